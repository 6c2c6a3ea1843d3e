//! Rows 19, 21, 23 and 26: what the clients themselves do, or their network

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use callsign::{
    EtcdChannel, Registration,
    discover::{DiscoveryState, EtcdDiscover},
};
use callsign_tests::{
    checker::{CONVERGED, Observed},
    fleet::{Client, Plan, session},
    greeter,
    proxy::Proxy,
    wait,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::sleep,
};

use crate::row::{MORE, OUTAGE, Row, SECOND, TTL, is_long, say};

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_19_who_does_not_read_holds_nobody_up_and_finds_the_latest() {
    const CHANGES: usize = 3_000;
    let Some(mut row) = Row::start("row 19, slow subscriber").await else { return };
    let busy = session(&row.cluster.hosts());
    let follow = || EtcdDiscover::new(&busy, "busy.rpc").expect("a valid name");
    let (slow, reader) = (follow(), Observed::of("reader", follow()));
    let address = |number: usize| format!("10.0.{}.{}:80", number / 250, number % 250);
    for number in 0..CHANGES {
        row.cluster.running().put(&format!("busy.rpc/{}", number % 10), address(number)).await;
    }
    let latest: std::collections::BTreeSet<_> = (CHANGES - 10..CHANGES).map(address).collect();
    let there = |view: &Observed| (view.addresses() == latest).then_some(());
    wait::until("who reads is up to date", SECOND + MORE, || there(&reader)).await;
    let late = Observed::of("late", slow);
    wait::until("who did not read is, too", SECOND, || there(&late)).await;
    assert_eq!(late.changes(), 10, "the latest, and nothing of what was before");
    drop((late, reader, busy));
    row.cluster.running().delete_all("busy.rpc/").await;
    row.healed().await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_21_the_pings_of_quiet_sessions_are_not_too_many_for_etcd() {
    let Some(mut row) = Row::start("row 21, pings").await else { return };
    let made = |row: &Row| row.cluster.proxies().map(Proxy::made).collect::<Vec<_>>();
    let before = made(&row);
    // etcd closes what pings more often than every 5 s, at the third ping; ours come every 10 s.
    sleep(if is_long() { 120 * SECOND } else { 32 * SECOND }).await;
    assert_eq!(made(&row), before, "nobody had to connect again");
    row.healed().await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_26_the_drop_of_the_last_handle_leaves_nothing_behind() {
    let Some(mut row) = Row::start("row 26, drop of the last handle").await else { return };
    for _ in 0..3 {
        let session = session(&row.cluster.hosts());
        let address = "127.0.0.1:9".parse().expect("an address");
        let registration = Registration::builder(&session, "short.rpc", address).register().await;
        let view = Observed::of("short", EtcdDiscover::new(&session, "hello.rpc").expect("a valid name"));
        let channel =
            EtcdChannel::builder("hello.rpc").etcd(&session).connect().await.expect("there are servers");
        wait::until("the view is full", SECOND + MORE, || {
            (view.addresses() == row.fleet.living()).then_some(())
        })
        .await;
        let during = row.cluster.traces().await;
        assert_eq!(during.leases.len(), row.before.leases.len() + 1);
        assert_eq!(during.watchers, row.before.watchers + 2, "of its own key, and of the service");
        drop((registration, view, channel, session));
        let dropped = Instant::now();
        while row.cluster.traces().await != row.before {
            assert!(dropped.elapsed() < SECOND + MORE, "{:?}, {:?}", row.cluster.traces().await, row.before);
        }
    }
    row.healed().await;
    row.end().await;
}

const NAME: &str = "etcd.callsign.test";
/// Tells the child which hosts it is to use, by name
const HOSTS: &str = "CALLSIGN_FAULTS_HOSTS";

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_23_a_name_that_no_longer_resolves_costs_nothing_while_the_connection_lives() {
    if let Ok(hosts) = env::var(HOSTS) {
        return Inner::start(&hosts).await.serve().await;
    }
    let Some(unshare) = unshare().await else {
        return say("row 23, name resolution: skipped, no mount namespace can be made here");
    };
    let Some(mut row) = Row::start("row 23, name resolution").await else { return };
    let names = Names::new(row.cluster.etcd(0).dir());
    let hosts = row.cluster.hosts().join(",").replace("127.0.0.1", NAME);
    let mut child = NamedChild::start(unshare, &names, &hosts).await;
    let living = row.fleet.living().into_iter().collect::<Vec<_>>().join(",");
    child.until(CONVERGED, |status| status.view == living && status.is_watching).await;

    names.forget();
    let made = |row: &Row| row.cluster.proxies().map(Proxy::made).sum::<usize>();
    let before = made(&row);
    sleep(if is_long() { 30 * SECOND } else { OUTAGE / 2 }).await;
    assert_eq!(made(&row), before, "live connections go on");
    assert!(child.status().await.is_watching);

    // Nor does it matter while they are gone: the last view is served.
    for proxy in row.cluster.proxies() {
        proxy.cut().await;
        proxy.heal();
    }
    child.until(CONVERGED, |status| !status.is_watching).await;
    sleep(TTL).await;
    assert_eq!(child.status().await.view, living, "the last view is served");
    names.remember();
    child.until(CONVERGED, |status| status.view == living && status.is_watching).await;
    let status = child.status().await;
    assert!(status.calls > 1000 && status.failed == 0, "{status:?}");
    row.note(format!("{} calls of the client that uses names, 0 failed", status.calls));
    drop(child);
    row.healed().await;
    row.end().await;
}

/// A private `/etc/hosts`
struct Names(PathBuf);

impl Names {
    fn new(dir: &Path) -> Self {
        let names = Self(dir.join("hosts"));
        names.remember();
        names
    }

    fn remember(&self) {
        self.write(&format!("127.0.0.1 localhost\n127.0.0.1 {NAME}\n"));
    }

    fn forget(&self) {
        self.write("127.0.0.1 localhost\n");
    }

    /// In place: what is mounted is this file, not its name
    fn write(&self, text: &str) {
        fs::write(&self.0, text).expect("the temp dir is writable");
    }
}

/// How a mount namespace of one's own is made here, if it can be
async fn unshare() -> Option<&'static [&'static str]> {
    for arguments in [&["-m"][..], &["-r", "-m"][..]] {
        let mut command = Command::new("unshare");
        command.args(arguments).args(["mount", "--bind", "/etc/hosts", "/etc/hosts"]);
        let tried = command.stdout(Stdio::null()).stderr(Stdio::null()).status().await;
        if tried.is_ok_and(|status| status.success()) {
            return Some(arguments);
        }
    }
    None
}

/// This test program again, where the name is only known through a file of the test
struct NamedChild {
    requests: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

#[derive(Debug)]
struct Status {
    calls: u64,
    failed: u64,
    is_watching: bool,
    view: String,
}

impl NamedChild {
    async fn start(unshare: &[&str], names: &Names, hosts: &str) -> Self {
        let script = r#"mount --bind "$1" /etc/hosts && exec "$2" --exact --ignored --nocapture "$3""#;
        let test = "views::row_23_a_name_that_no_longer_resolves_costs_nothing_while_the_connection_lives";
        let program = env::current_exe().expect("the system knows what runs");
        let mut command = Command::new("unshare");
        command.args(unshare).args(["sh", "-c", script, "sh"]).arg(&names.0).arg(program).arg(test);
        command.env(HOSTS, hosts).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("it could be run before");
        let requests = child.stdin.take().expect("it is piped");
        let answers = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        Self { requests, answers, _child: child }
    }

    async fn status(&mut self) -> Status {
        self.requests.write_all(b"?\n").await.expect("the child runs");
        wait::within("the child answers", 20 * SECOND, async {
            while let Some(line) = self.answers.next_line().await.expect("it writes text") {
                if let Some(status) = line.strip_prefix("status ") {
                    return parsed(status).unwrap_or_else(|| panic!("not a status: {line}"));
                }
            }
            panic!("the child has ended");
        })
        .await
    }

    async fn until(&mut self, bound: Duration, condition: impl Fn(&Status) -> bool) {
        let since = Instant::now();
        loop {
            let status = self.status().await;
            if condition(&status) {
                return;
            }
            assert!(since.elapsed() < bound, "not within {bound:?}: {status:?}");
            sleep(SECOND / 20).await;
        }
    }
}

fn parsed(status: &str) -> Option<Status> {
    let mut words = status.split(' ');
    let (calls, failed) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some(Status { calls, failed, is_watching: words.next()? == "watching", view: words.next()?.to_owned() })
}

/// What runs in the child
struct Inner {
    client: Client,
    state: tokio::sync::watch::Receiver<DiscoveryState>,
}

impl Inner {
    async fn start(hosts: &str) -> Self {
        let hosts: Vec<_> = hosts.split(',').map(str::to_owned).collect();
        let client = Client::start("by name", &hosts, &Plan::new(greeter!())).await;
        let state = EtcdDiscover::new(&client.session, "hello.rpc").expect("a valid name").state();
        Self { client, state }
    }

    /// Answers each line with the status, until there are no more
    async fn serve(self) {
        let mut requests = BufReader::new(tokio::io::stdin()).lines();
        while let Ok(Some(_)) = requests.next_line().await {
            let tally = self.client.load.tally();
            let watching = matches!(*self.state.borrow(), DiscoveryState::Watching { .. });
            let watching = if watching { "watching" } else { "resuming" };
            let view = self.client.view.addresses().into_iter().collect::<Vec<_>>().join(",");
            say(&format!("status {} {} {watching} {view}", tally.calls, tally.failed.len()));
        }
    }
}
