//! One row of the table: a cluster, a fleet under load, and the checks that all rows share

use std::{
    env,
    io::{self, Write as _},
    time::{Duration, Instant},
};

use callsign::{Registration, RegistrationState};
use callsign_tests::{
    certificates::Certificates,
    checker::{
        self, CONVERGED, SETTLED, Violation, changed, failed_calls, left_behind, listed,
        removed_while_living, until_none,
    },
    cluster::{Cluster, Traces},
    fleet::{Fleet, Plan},
    greeter,
    lines::Lines,
    load::Tally,
    proxy::Proxy,
    registry, wait,
};
use tokio::{runtime::Handle, sync::watch, time::sleep};
use tonic::Status;
use tracing::Level;

pub(crate) const SECOND: Duration = Duration::from_secs(1);

/// Of all registrations
pub(crate) const TTL: Duration = Duration::from_secs(5);

/// What a busy machine may add to any time of the table
pub(crate) const MORE: Duration = Duration::from_secs(2);

/// An outage as long as the short form has
pub(crate) const OUTAGE: Duration = Duration::from_secs(20);

/// Whether the long forms are asked for
pub(crate) fn is_long() -> bool {
    env::var_os("CALLSIGN_FAULTS").is_some_and(|form| form == "all")
}

/// Which member all sessions are connected to when the fault comes
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Connected {
    Anywhere,
    ToLeader,
    ToFollower,
}

/// How a row begins
pub(crate) struct Setup {
    connected: Connected,
    options: Vec<String>,
    certificates: Option<Certificates>,
    login: bool,
    apart: bool,
    ttl: Duration,
}

/// Who the sessions log in as, where they have to
pub(crate) const USER: &str = "app";
pub(crate) const PASSWORD: &str = "s3cret";

impl Setup {
    pub(crate) fn new() -> Self {
        Self {
            connected: Connected::Anywhere,
            options: Vec::new(),
            certificates: None,
            login: false,
            apart: false,
            ttl: TTL,
        }
    }

    /// All sessions begin at this member
    pub(crate) fn connected(mut self, connected: Connected) -> Self {
        self.connected = connected;
        self
    }

    /// Options of etcd
    pub(crate) fn etcd<S: ToString>(mut self, options: &[S]) -> Self {
        self.options.extend(options.iter().map(S::to_string));
        self
    }

    /// Another TTL than [`TTL`], of servers and registration
    pub(crate) fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// The servers have ways to etcd of their own: [`Row::server_ways`]
    pub(crate) fn apart(mut self) -> Self {
        self.apart = true;
        self
    }

    /// Everybody logs in
    pub(crate) fn login(mut self) -> Self {
        self.login = true;
        self
    }

    /// Everybody speaks TLS, with certificates in files
    pub(crate) fn tls(mut self) -> Self {
        let certificates = Certificates::new();
        self.options.extend(certificates.etcd_mtls_options());
        self.certificates = Some(certificates);
        self
    }

    async fn cluster(&self) -> Cluster {
        let options: Vec<_> = self.options.iter().map(String::as_str).collect();
        let cluster = match self.certificates {
            Some(_) => Cluster::start_tls(&options).await,
            None => Cluster::start_with(&options).await,
        };
        if self.login {
            cluster.enable_auth(USER, PASSWORD, &["hello.rpc/", "probe.rpc/"]).await;
        }
        cluster
    }

    async fn server_ways(&self, cluster: &Cluster) -> Vec<Proxy> {
        let mut ways = Vec::new();
        for member in (0..cluster.len()).filter(|_| self.apart) {
            ways.push(Proxy::to(cluster.etcd(member).secure_endpoint()).await);
        }
        ways
    }

    fn plan(&self, server_ways: &[Proxy]) -> Plan {
        let mut plan = Plan { ttl: self.ttl, ..Plan::new(greeter!()) };
        if self.apart {
            plan.server_hosts = Some(server_ways.iter().map(Proxy::endpoint).collect());
        }
        if self.login {
            plan.login = format!("{USER}:{PASSWORD}@");
        }
        if let Some(certificates) = &self.certificates {
            let ([certificate, key], ca) = (certificates.client(), certificates.ca());
            let [ca, certificate, key] = [ca, certificate, key].map(|path| path.display().to_string());
            plan.options = format!("?tls_ca={ca}&tls_cert={certificate}&tls_key={key}");
        }
        plan
    }

    /// Starts cluster, fleet and a registration in this process; `None` where there is no real etcd, which is said
    pub(crate) async fn start(self, name: &'static str) -> Option<Row> {
        registry::needs_real("the fault table needs three real members")?;
        let cluster = self.cluster().await;
        let lines = Lines::record();
        let tasks = tasks();
        let member = match self.connected {
            Connected::Anywhere => None,
            Connected::ToLeader => Some(cluster.leader().await),
            Connected::ToFollower => Some(cluster.follower().await),
        };
        if let Some(member) = member {
            cluster.only(member).await;
        }
        let server_ways = self.server_ways(&cluster).await;
        let fleet = Fleet::start(cluster.hosts(), self.plan(&server_ways)).await;
        let address = "127.0.0.1:9".parse().expect("an address");
        let probe = Registration::builder(&fleet.plan().session(&cluster.hosts()), "probe.rpc", address);
        let probe = probe.ttl(self.ttl).register().await.expect("etcd is there");
        cluster.proxies().for_each(Proxy::heal);
        let before = settled(&cluster).await;
        Some(Row {
            name,
            state: probe.state(),
            cluster,
            fleet,
            probe,
            member: member.unwrap_or_default(),
            lines,
            tasks,
            certificates: self.certificates,
            server_ways,
            before,
            excused: Vec::new(),
            notes: Vec::new(),
        })
    }
}

/// A row under way
pub(crate) struct Row {
    name: &'static str,
    pub(crate) cluster: Cluster,
    pub(crate) fleet: Fleet,
    /// A registration of this process under another name: its state can be seen
    probe: Registration,
    state: watch::Receiver<RegistrationState>,
    /// The member that all are connected to, if that was asked for
    pub(crate) member: usize,
    pub(crate) lines: Lines,
    /// What TLS is spoken with, if it is
    pub(crate) certificates: Option<Certificates>,
    /// The servers' own ways to etcd, if they were asked for
    pub(crate) server_ways: Vec<Proxy>,
    tasks: usize,
    pub(crate) before: Traces,
    excused: Vec<(Instant, Option<Instant>)>,
    notes: Vec<String>,
}

impl Row {
    /// With nothing special
    pub(crate) async fn start(name: &'static str) -> Option<Self> {
        Setup::new().start(name).await
    }

    /// From now on the fault itself takes living instances out of etcd
    pub(crate) fn excuse(&mut self) {
        self.excused.push((Instant::now(), None));
    }

    /// Tells something on the row's line
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// One server less is to be there in the end: its lease, the watch of its key, its two connections
    pub(crate) fn one_less(&mut self) {
        self.before.leases.pop_last();
        self.before.watchers -= 1;
        self.before.connections -= 2;
    }

    /// What is there now is what is to be there in the end
    pub(crate) async fn rebase(&mut self) {
        self.before = settled(&self.cluster).await;
    }

    /// How often discoveries have listed so far, first lists included
    pub(crate) fn lists(&self) -> usize {
        self.lines.beginning("listed")
    }

    /// Waits until the registration of this process meets `condition`
    pub(crate) async fn until_state(
        &mut self,
        what: &str,
        bound: Duration,
        condition: impl Fn(&RegistrationState) -> bool,
    ) {
        let state = self.state.wait_for(condition);
        drop(wait::within(what, bound, state).await.expect("its task lives"));
    }

    /// Waits until all is well, which has to be soon: call it at once when etcd has healed
    pub(crate) async fn healed(&mut self) {
        let since = Instant::now();
        self.until_well(CONVERGED).await;
        self.note(format!("well after {:.1} s", since.elapsed().as_secs_f64()));
    }

    /// Waits until every view shows what etcd says, which is one key for each that lives
    pub(crate) async fn until_well(&self, bound: Duration) {
        let since = Instant::now();
        loop {
            let wrong = self.fleet.evidence(&self.cluster).await.violations();
            if wrong.is_empty() {
                return;
            }
            assert!(since.elapsed() < bound, "not well within {bound:?}:{}\n{}", listed(&wrong), self.log());
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// The row's end when the servers lived all the time: no call has failed
    pub(crate) async fn end(self) {
        self.end_with(|_, _| false).await;
    }

    /// The row's end: what shall hold in every row; calls that failed must be `expected`, by start and status
    pub(crate) async fn end_with(mut self, expected: impl Fn(Instant, &Status) -> bool) {
        let mut wrong = self.removals();
        wrong.extend(self.until_as_before().await);
        let log = self.log();
        let removed = self.fleet.views().map(|view| view.removals().len()).sum::<usize>();
        self.note(format!("{removed} removals"));
        let Self { name, cluster, fleet, probe, lines, tasks: before, notes, .. } = self;
        drop(probe);
        let (mut tally, servers) = fleet.end_clients().await;
        let all = tally.failed.len();
        tally.failed.retain(|(at, _, status)| !expected(*at, status));
        wrong.extend(failed_calls(&tally));
        servers.terminate().await;
        wrong.extend(until_nothing_left(&cluster, before).await);
        assert!(wrong.is_empty(), "{name}:{}\n{log}", listed(&wrong));
        say(&told(name, &tally, all, &lines, &notes));
        if env::var_os("CALLSIGN_FAULTS_LOG").is_some() {
            say(&log);
        }
    }

    /// Living instances that left a view
    fn removals(&self) -> Vec<Violation> {
        let lives = self.fleet.lives();
        let of = |view: &checker::Observed| {
            removed_while_living(view.name(), &view.removals(), &lives, &self.excused)
        };
        self.fleet.views().flat_map(of).collect()
    }

    /// Waits until leases, watchers and connections are as many as before; what is not
    async fn until_as_before(&self) -> Vec<Violation> {
        until_none(async || left_behind(&self.before, &self.cluster.traces().await)).await
    }

    /// What was logged last, for those who look for the reason of a failure
    pub(crate) fn log(&self) -> String {
        let lines = self.lines.at(Level::DEBUG);
        let last = &lines[lines.len().saturating_sub(25)..];
        let texts = last.iter().map(|line| format!("  {} {}\n", line.level, line.text));
        format!("{}\nthe last lines:\n{}", self.fleet.tally(), texts.collect::<String>())
    }
}

fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

/// The traces once they have stood still for a second
async fn settled(cluster: &Cluster) -> Traces {
    let (mut last, mut since) = (cluster.traces().await, Instant::now());
    wait::within("leases, watchers and connections stand still", SETTLED, async {
        while since.elapsed() < SECOND {
            sleep(SECOND / 5).await;
            let now = cluster.traces().await;
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
    })
    .await;
    last
}

/// After clients and servers have ended
async fn until_nothing_left(cluster: &Cluster, tasks_before: usize) -> Vec<Violation> {
    until_none(async || {
        let Traces { leases, watchers, connections } = cluster.traces().await;
        // Leases that the row itself has made are its own affair.
        let nothing = Traces { leases: leases.clone(), watchers: 0, connections: 0 };
        let mut left = left_behind(&nothing, &Traces { leases, watchers, connections });
        left.extend(changed("tasks", tasks_before, tasks()));
        left
    })
    .await
}

fn told(name: &str, tally: &Tally, failed: usize, lines: &Lines, notes: &[String]) -> String {
    let slowest = tally.slowest.as_millis();
    let (calls, lists, logged) = (tally.calls, lines.beginning("listed"), lines.at(Level::INFO).len());
    let notes = notes.iter().map(|note| format!(", {note}")).collect::<String>();
    format!(
        "{name}: {calls} calls, {failed} failed, slowest {slowest} ms, {lists} lists, {logged} log lines{notes}"
    )
}

/// On a line of its own, also when the test passes
pub(crate) fn say(line: &str) {
    // A stdout that is gone is no failure.
    let _ = writeln!(io::stdout(), "{line}");
}
