//! Sessions with an etcd: who logs in, what becomes of tokens, and what is shown of it all

#![cfg(unix)]

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use callsign::{
    Etcd, EtcdChannel, EtcdError, EtcdOptions, Registration, RegistrationState, SessionState,
    discover::{DiscoveryState, EtcdDiscover},
};
use callsign_tests::{
    etcd::EtcdProcess,
    lines::{Line, Lines, ask_always},
    pb::{HelloRequest, greeter_client::GreeterClient},
    proxy::Proxy,
    registry,
    service::Local,
    view::View,
    wait,
};
use etcd_client::{GetOptions, Permission, PermissionType};
use etcd_embedded::EmbeddedEtcd;
use tokio::{process::Command, sync::watch, time::sleep};
use tracing::Level;
use tracing_subscriber::{fmt::MakeWriter, util::SubscriberInitExt as _};

const SERVICE: &str = "hello.rpc";
const ADDRESS: &str = "127.0.0.1:9090";
/// How soon a change is seen
const SEEN: Duration = Duration::from_secs(3);
/// For what waits for a ping, a backoff or an election
const BOUND: Duration = Duration::from_secs(20);
/// What was refused is asked for again every half minute
const SLOW: Duration = Duration::from_secs(35);

fn options(etcd: &EtcdProcess) -> EtcdOptions {
    EtcdOptions::new([etcd.endpoint()])
}

fn root(etcd: &EtcdProcess) -> Etcd {
    Etcd::connect_lazy(options(etcd).user("root", "root")).expect("valid options")
}

async fn registered(session: &Etcd, id: i64) -> Registration {
    let builder = Registration::builder(session, SERVICE, ADDRESS.parse().expect("an address"));
    builder.id(id).register().await.expect("etcd lets it")
}

fn follow(session: &Etcd, service: &str) -> (View, watch::Receiver<DiscoveryState>) {
    let discover = EtcdDiscover::new(session, service).expect("a valid name");
    let state = discover.state();
    (View::of(discover), state)
}

/// Lists and watches a service that nobody has followed before
async fn follow_anew(session: &Etcd, service: &str) {
    let (_view, state) = follow(session, service);
    until(state, "watching", |state| matches!(state, DiscoveryState::Watching { .. })).await;
}

async fn until<T: Clone>(mut state: watch::Receiver<T>, what: &str, condition: impl Fn(&T) -> bool) -> T {
    wait::within(what, SLOW, state.wait_for(condition)).await.expect("the session lives").clone()
}

fn is_registered(state: &RegistrationState) -> bool {
    matches!(state, RegistrationState::Registered { .. })
}

/// How many logins were asked for ever
async fn logins(etcd: &EtcdProcess) -> u64 {
    let counted = etcd.metric("grpc_server_started_total", "grpc_method=\"Authenticate\"").await;
    counted.expect("a real etcd counts")
}

/// How many tokens were refused ever
async fn refused(etcd: &EtcdProcess) -> u64 {
    let counted = etcd.metric("grpc_server_handled_total", "grpc_code=\"Unauthenticated\"").await;
    counted.expect("a real etcd counts")
}

/// A user `app` who may do everything under `hello.rpc/` by the role `app`
async fn add_app(etcd: &EtcdProcess, password: &'static str) {
    etcd.as_root(async move |mut client| {
        client.role_add("app").await?;
        let all = Permission::new(PermissionType::Readwrite, "hello.rpc/").with_prefix();
        client.role_grant_permission("app", all).await?;
        client.user_add("app", password, None).await?;
        client.user_grant_role("app", "app").await.map(drop)
    })
    .await;
}

async fn enable_auth(etcd: &EmbeddedEtcd) -> Result<(), etcd_client::Error> {
    let mut admin = etcd_client::Client::connect([etcd.endpoint()], None).await?;
    admin.user_add("root", "root", None).await?;
    admin.role_add("root").await?;
    admin.user_grant_role("root", "root").await?;
    admin.auth_enable().await.map(drop)
}

fn app(etcd: &EtcdProcess) -> Etcd {
    Etcd::connect_lazy(options(etcd).user("app", "one")).expect("valid options")
}

/// Keys and values under `prefix`, once authentication is enabled
async fn pairs_as_root(etcd: &EtcdProcess, prefix: &'static str) -> Vec<(String, String)> {
    etcd.as_root(async move |mut client| {
        let got = client.get(prefix, Some(GetOptions::new().with_prefix())).await?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(got.kvs().iter().map(|pair| (text(pair.key()), text(pair.value()))).collect())
    })
    .await
}

#[tokio::test]
async fn who_logs_in_registers_and_finds() {
    let etcd = registry::etcd().await;
    etcd.enable_auth().await;
    let session = Etcd::connect(options(&etcd).user("root", "root")).await.unwrap();
    let host = etcd.endpoint().parse().unwrap();
    assert_eq!(*session.state().borrow(), SessionState::Connected { host });
    let registration = registered(&session, 7).await;
    let (view, _) = follow(&session, SERVICE);
    view.until(&[ADDRESS], SEEN).await;
    registration.deregister().await.unwrap();
    view.until(&[], SEEN).await;
}

#[tokio::test]
async fn a_wrong_password_is_named_at_once_and_not_tried_in_a_flood() {
    let Some(etcd) = registry::real(registry::METRICS).await else { return };
    etcd.enable_auth().await;
    let wrong = || options(&etcd).user("root", "s3cret");
    let before = logins(&etcd).await;
    let (error, took) = wait::timed(Etcd::connect(wrong())).await;
    let error = error.unwrap_err();
    assert!(
        matches!(&error, EtcdError::Refused { host, .. } if host.to_string() == etcd.endpoint()),
        "{error:?}"
    );
    assert!(
        error.to_string().contains("authentication failed") && took < Duration::from_secs(2),
        "{error}, {took:?}"
    );
    assert_eq!(logins(&etcd).await, before + 1);

    let session = Etcd::connect_lazy(wrong()).unwrap();
    let builder = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap());
    let registrations = [(); 5].map(|()| builder.clone().start().unwrap());
    let follows = ["a", "b", "c", "d", "e"].map(|service| follow(&session, service));
    let refused = |state: &SessionState| matches!(state, SessionState::Refused { .. });
    until(session.state(), "the login is refused", refused).await;
    for registration in &registrations {
        let named = |state: &RegistrationState| matches!(state, RegistrationState::Granting { cause: Some(cause) } if cause.contains("login was refused"));
        until(registration.state(), "the cause is told", named).await;
    }
    sleep(Duration::from_secs(3)).await;
    assert_eq!(logins(&etcd).await, before + 2, "ten that ask cost one login");
    drop(follows);
}

#[tokio::test]
async fn expired_tokens_are_replaced_unseen() {
    let Some(etcd) = registry::real_with(&["--auth-token-ttl", "5"]).await else { return };
    etcd.enable_auth().await;
    let before = logins(&etcd).await;
    let session = root(&etcd);
    let registration = registered(&session, 7).await;
    let (view, discovery) = follow(&session, SERVICE);
    view.until(&[ADDRESS], SEEN).await;
    until(discovery.clone(), "watching", |state| matches!(state, DiscoveryState::Watching { .. })).await;
    let (mut states, mut discovery) = (registration.state(), discovery);
    states.borrow_and_update();
    discovery.borrow_and_update();
    let started = logins(&etcd).await - before;
    assert!(started <= 2, "{started} logins for two connections");

    sleep(Duration::from_secs(8)).await;
    assert!(!states.has_changed().unwrap() && !discovery.has_changed().unwrap());
    // Reads and a new watch over one connection, a lease and its key over both.
    follow_anew(&session, "other").await;
    let second = registered(&session, 8).await;
    assert!(
        !discovery.has_changed().unwrap() || matches!(*discovery.borrow(), DiscoveryState::Watching { .. })
    );
    let again = logins(&etcd).await - before - started;
    assert!((1..=2).contains(&again), "{again} logins for two expired tokens");
    assert_eq!(view.removed(), 0);
    second.deregister().await.unwrap();
    registration.deregister().await.unwrap();
    view.until(&[], SEEN).await;
}

#[tokio::test]
async fn who_leaves_after_its_token_has_expired_leaves_nothing() {
    let Some(etcd) = registry::real_with(&["--auth-token-ttl", "5"]).await else { return };
    etcd.enable_auth().await;
    let registration = registered(&root(&etcd), 7).await;
    sleep(Duration::from_secs(8)).await;
    registration.deregister().await.unwrap();
    assert_eq!(pairs_as_root(&etcd, "hello.rpc/").await, []);
    assert!(etcd.leases_as_root().await.is_empty());
}

#[tokio::test]
async fn the_next_host_gets_a_token_of_its_own_before_it_can_refuse_the_old_one() {
    let Some(mut members) = registry::three_members_with(&["--auth-token-ttl", "5"]).await else { return };
    members[0].enable_auth().await;
    let session =
        Etcd::connect(EtcdOptions::new(members.each_ref().map(EtcdProcess::endpoint)).user("root", "root"));
    let session = session.await.unwrap();
    // Warm where it is used, and cold on the others.
    for number in 0..8 {
        follow_anew(&session, &format!("service{number}")).await;
        sleep(Duration::from_secs(1)).await;
    }
    let SessionState::Connected { host } = session.state().borrow().clone() else { panic!() };
    let used = members.iter().position(|member| member.endpoint() == host.to_string()).unwrap();
    let others = members.iter().enumerate().filter(|(number, _)| *number != used);
    let others: Vec<_> = others.map(|(number, _)| number).collect();
    let count = async |count: AsyncCount, members: &[EtcdProcess; 3]| {
        let mut sum = 0;
        for &number in &others {
            sum += count(&members[number]).await;
        }
        sum
    };
    let (logins_before, refused_before) =
        (count(counted_logins, &members).await, count(counted_refused, &members).await);
    members[used].kill9();
    // A list comes first, whose refusal would be counted; a watch's is in band.
    follow_anew(&session, "other").await;
    let moved = |state: &SessionState| matches!(state, SessionState::Connected { host: now } if *now != host);
    assert!(moved(&session.state().borrow()));
    assert_eq!(count(counted_refused, &members).await, refused_before, "no token was refused");
    // Leases go over another connection, which may lead to the third member.
    let registration = registered(&session, 8).await;
    let logins = count(counted_logins, &members).await - logins_before;
    assert!((1..=3).contains(&logins), "{logins} logins");
    assert!(is_registered(&registration.state().borrow()));
    registration.deregister().await.unwrap();
}

type AsyncCount = fn(&EtcdProcess) -> Pin<Box<dyn Future<Output = u64> + '_>>;

fn counted_logins(etcd: &EtcdProcess) -> Pin<Box<dyn Future<Output = u64> + '_>> {
    Box::pin(logins(etcd))
}

fn counted_refused(etcd: &EtcdProcess) -> Pin<Box<dyn Future<Output = u64> + '_>> {
    Box::pin(refused(etcd))
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn a_changed_password_is_told_tried_slowly_and_forgiven() {
    let Some(etcd) = registry::real(registry::METRICS).await else { return };
    etcd.enable_auth().await;
    add_app(&etcd, "one").await;
    let session = app(&etcd);
    let registration = registered(&session, 7).await;
    let (view, _) = follow(&session, SERVICE);
    view.until(&[ADDRESS], SEEN).await;
    etcd.as_root(async |mut client| client.user_change_password("app", "two").await.map(drop)).await;
    let RegistrationState::Registered { lease, .. } = *registration.state().borrow() else { panic!() };
    etcd.as_root(async move |mut client| client.lease_revoke(lease).await.map(drop)).await;
    let before = logins(&etcd).await;
    let named = |state: &SessionState| matches!(state, SessionState::Refused { cause } if cause.contains("authentication failed"));
    until(session.state(), "the login is refused", named).await;
    let named = |state: &RegistrationState| matches!(state, RegistrationState::Granting { cause: Some(cause) } if cause.contains("authentication failed"));
    until(registration.state(), "the cause is told", named).await;
    sleep(Duration::from_secs(5)).await;
    assert_eq!(logins(&etcd).await, before + 1, "in its first seconds");
    etcd.as_root(async |mut client| client.user_change_password("app", "one").await.map(drop)).await;
    until(registration.state(), "registered again", is_registered).await;
    until(session.state(), "connected again", |state| matches!(state, SessionState::Connected { .. })).await;
    view.until(&[ADDRESS], SEEN).await;
    // One login was root's, to change the password back.
    let slow = logins(&etcd).await - before;
    assert!(slow <= 4, "{slow} logins in half a minute");
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn a_permission_that_was_revoked_is_told_asked_for_slowly_and_used_when_it_is_back() {
    let Some(etcd) = registry::real(registry::METRICS).await else { return };
    etcd.enable_auth().await;
    add_app(&etcd, "one").await;
    let session = app(&etcd);
    let registration = registered(&session, 7).await;
    etcd.as_root(async |mut client| {
        client.user_revoke_role("app", "app").await?;
        client.delete("hello.rpc/7", None).await.map(drop)
    })
    .await;
    let named = |state: &RegistrationState| matches!(state, RegistrationState::Granting { cause: Some(cause) } if cause.contains("permission denied"));
    until(registration.state(), "the permission is missed", named).await;
    let asked = async || etcd.metric("grpc_server_started_total", "grpc_method=\"Txn\"").await.unwrap();
    let before = asked().await;
    sleep(Duration::from_secs(5)).await;
    assert!(asked().await - before <= 1, "{} attempts in 5 s", asked().await - before);
    etcd.as_root(async |mut client| client.user_grant_role("app", "app").await.map(drop)).await;
    until(registration.state(), "registered again", is_registered).await;
    assert_eq!(pairs_as_root(&etcd, "hello.rpc/").await, [("hello.rpc/7".to_owned(), ADDRESS.to_owned())]);
}

#[tokio::test]
async fn an_etcd_without_authentication_is_used_without_a_login_until_it_asks_for_one() {
    let etcd = registry::etcd().await;
    let session = Etcd::connect(options(&etcd).user("root", "root")).await.unwrap();
    let registration = registered(&session, 7).await;
    etcd.enable_auth().await;
    follow_anew(&session, SERVICE).await;
    let second = registered(&session, 8).await;
    second.deregister().await.unwrap();
    registration.deregister().await.unwrap();
    assert_eq!(pairs_as_root(&etcd, "hello.rpc/").await, []);
}

/// Its timer belonged to the runtime that had ended, and whoever polled it from another panicked, for ever
#[test]
fn a_login_that_waits_goes_on_when_the_runtime_that_it_began_in_has_ended() {
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (first, second) = (runtime(), runtime());
    let etcd = second.block_on(EmbeddedEtcd::start("127.0.0.1:0")).unwrap();
    second.block_on(enable_auth(&etcd)).unwrap();
    let session = Etcd::connect_lazy(EtcdOptions::new([etcd.endpoint()]).user("root", "root")).unwrap();
    first.block_on(session.put_value("k", &1)).unwrap();
    etcd.expire_tokens();
    // Refused; the next login is due a second after the last one.
    let waiting = first.block_on(async {
        tokio::time::timeout(Duration::from_millis(200), session.put_value("k", &2)).await
    });
    assert!(waiting.is_err(), "it waits");
    drop(first);
    second.block_on(session.put_value("k", &3)).unwrap();
}

#[tokio::test]
async fn a_watch_that_is_refused_in_band_is_opened_again_with_a_new_token() {
    let etcd = EmbeddedEtcd::start("127.0.0.1:0").await.unwrap();
    enable_auth(&etcd).await.unwrap();
    let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()]).user("root", "root")).await.unwrap();
    follow_anew(&session, SERVICE).await;
    // Each answer takes its time: first the list's, then the watch's, and meanwhile the token expires.
    etcd.delay(Duration::from_millis(400));
    let (_view, mut state) = follow(&session, "other");
    let mut told = Vec::new();
    let expire = async {
        sleep(Duration::from_millis(600)).await;
        etcd.expire_tokens();
        sleep(Duration::from_millis(300)).await;
        etcd.delay(Duration::ZERO);
        std::future::pending::<()>().await;
    };
    let watching = async {
        while !matches!(told.last(), Some(DiscoveryState::Watching { .. })) {
            state.changed().await.unwrap();
            told.push(state.borrow_and_update().clone());
        }
    };
    let watching = async {
        tokio::select! {
            () = watching => {}
            () = expire => {}
        }
    };
    let ((), took) = wait::timed(wait::within("watching", SEEN, watching)).await;
    assert!(took > Duration::from_millis(900), "the watch was refused first: {took:?}");
    assert_eq!(told.len(), 1, "nobody heard of it: {told:?}");
}

#[tokio::test]
async fn two_namespaces_do_not_see_each_other() {
    let etcd = registry::etcd().await;
    let server = Local::start().await;
    let session = |namespace: &str| Etcd::connect_lazy(options(&etcd).namespace(namespace)).unwrap();
    let (a, b, none) = (session("/a"), session("b/c"), session(""));
    let views = [&a, &b, &none].map(|session| follow(session, SERVICE).0);
    let in_a = Registration::builder(&a, SERVICE, server.address()).id(7).register().await.unwrap();
    let in_b = registered(&b, 8).await;
    let address = server.address().to_string();
    views[0].until(&[&address], SEEN).await;
    views[1].until(&[ADDRESS], SEEN).await;
    assert_eq!(views[2].addresses(), [""; 0]);
    let pair = |key: &str, address: &str| (key.to_owned(), address.to_owned());
    assert_eq!(etcd.pairs("").await, [pair("/a/hello.rpc/7", &address), pair("b/c/hello.rpc/8", ADDRESS)]);
    assert_eq!((in_a.key(), in_b.key()), ("/a/hello.rpc/7", "b/c/hello.rpc/8"));

    let target = format!("etcd:///{}?namespace=%2Fa&key=hello.rpc", etcd.endpoint());
    let channel = EtcdChannel::connect(target).await.unwrap();
    let greeted = GreeterClient::new(channel).say_hello(HelloRequest { name: "you".into() }).await;
    greeted.unwrap();
    in_b.deregister().await.unwrap();
    assert_eq!(etcd.pairs("").await.len(), 1);
}

/// Set where the environment is the test's own: another one may name an etcd that is not for tests
const CHILD: &str = "CALLSIGN_TEST_CHILD";

/// Run by the test below, in a process whose environment names the etcd
#[tokio::test]
#[ignore = "needs the environment that another test gives it"]
async fn in_the_environment() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let session = Etcd::connect(EtcdOptions::from_env()).await.unwrap();
    registered(&session, 7).await.deregister().await.unwrap();
    let registration = registered(&session, 8).await;
    assert_eq!(registration.key(), "/service/hello.rpc/8");
    println!("registered as {}", registration.key());
}

#[tokio::test]
async fn a_url_and_the_environment_name_cluster_user_and_namespace() {
    let etcd = registry::etcd().await;
    etcd.enable_auth().await;
    etcd.as_root(async |mut client| {
        client.user_add("us@r", "p:/?w%", None).await?;
        client.user_grant_role("us@r", "root").await.map(drop)
    })
    .await;
    let url = format!("etcd:///us%40r:p:%2f%3Fw%25@{}?namespace=/service", etcd.endpoint());
    let session = Etcd::connect(url.parse().unwrap()).await.unwrap();
    assert_eq!(registered(&session, 7).await.key(), "/service/hello.rpc/7");
    let mut child = Command::new(std::env::current_exe().unwrap());
    child
        .args(["--exact", "in_the_environment", "--ignored", "--nocapture"])
        .env("CALLSIGN_ETCD", url)
        .env(CHILD, "1");
    let output = wait::within("the child ends", BOUND, child.kill_on_drop(true).output()).await.unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && printed.contains("registered as /service/hello.rpc/8"), "{printed}");
}

#[tokio::test]
async fn a_host_without_an_address_is_left_for_the_next() {
    let etcd = registry::etcd().await;
    let port = etcd.endpoint().rsplit_once(':').unwrap().1.to_owned();
    // The first host is a random one, so both orders come up.
    for _ in 0..4 {
        let hosts = ["no-such-host.invalid:2379".to_owned(), format!("localhost:{port}")];
        let session = Etcd::connect(EtcdOptions::new(hosts)).await.unwrap();
        let SessionState::Connected { host } = session.state().borrow().clone() else { panic!() };
        assert_eq!(host.host(), "localhost");
    }
    let options = EtcdOptions::new(["no-such-host.invalid:2379"]).connect_timeout(Duration::from_secs(3));
    let error = Etcd::connect(options).await.unwrap_err().to_string();
    assert!(error.contains("no-such-host.invalid:2379"), "{error}");
}

/// What was logged while it lived, by this thread
#[derive(Clone, Default)]
struct Logged(Arc<Mutex<Vec<u8>>>);

impl Logged {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("nobody panics while writing")).into_owned()
    }
}

impl io::Write for Logged {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panics while writing").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Logged {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// Writes down all that this thread logs, which in these tests runs all tasks
fn listen() -> (Logged, impl Sized) {
    ask_always();
    let logged = Logged::default();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(logged.clone());
    (logged, subscriber.with_max_level(tracing_subscriber::filter::LevelFilter::TRACE).finish().set_default())
}

#[tokio::test]
async fn no_log_and_no_error_shows_a_secret() {
    let etcd = registry::etcd().await;
    etcd.enable_auth().await;
    etcd.as_root(async |mut client| {
        client.user_add("n4me", "s3cret", None).await?;
        client.user_grant_role("n4me", "root").await.map(drop)
    })
    .await;
    let (logged, guard) = listen();
    let right = options(&etcd).user("n4me", "s3cret");
    let session = Etcd::connect(right.clone()).await.unwrap();
    let registration = registered(&session, 7).await;
    follow_anew(&session, SERVICE).await;
    let target = format!("etcd:///n4me:s3cret@{}?key=nobody.rpc", etcd.endpoint());
    let builder = EtcdChannel::builder(&target).connect_timeout(Duration::from_millis(300));
    let mut shown = format!("{right:?}{session:?}{registration:?}{builder:?}");
    let channel = builder.connect().await.unwrap_err();
    let refused = Etcd::connect(options(&etcd).user("n4me", "s3cretwrong")).await.unwrap_err();
    shown += &format!("{channel:?}{channel}{refused:?}{refused}");
    registration.deregister().await.unwrap();
    drop(guard);
    let logged = logged.text();
    assert!(logged.contains("logged in to etcd") && logged.contains("refuses the login"), "{logged}");
    assert!(logged.contains("in plaintext"), "{logged}");
    for secret in ["s3cret", "n4me"] {
        assert!(
            !logged.contains(secret),
            "{secret} in {:?}",
            logged.lines().find(|line| line.contains(secret))
        );
        assert!(!shown.contains(secret), "{secret} in {shown}");
    }
    assert_eq!(logged.lines().find(|line| has_token(line)), None);
}

/// Whether there is a simple token in the text: 16 letters, a dot and digits
fn has_token(text: &str) -> bool {
    let letter = |byte: &u8| byte.is_ascii_alphabetic();
    text.as_bytes()
        .windows(18)
        .any(|part| part[..16].iter().all(letter) && part[16] == b'.' && part[17].is_ascii_digit())
}

/// Asserts that since the last time nothing but this was told, at info and above, whoever of callsign told it
fn assert_told<const N: usize>(lines: &Lines, seen: &mut usize, expected: [(Level, &str); N]) {
    let told: Vec<_> = lines.at(Level::INFO).split_off(*seen);
    *seen += told.len();
    let is = |line: &Line, (level, text): (Level, &str)| line.level == level && line.text.starts_with(text);
    let each = expected.iter().all(|&expected| told.iter().filter(|line| is(line, expected)).count() == 1);
    assert!(each && told.len() == N, "{told:#?}, not {expected:?}");
}

#[tokio::test]
async fn each_change_is_one_line_of_each_who_is_concerned() {
    const CONNECTED: (Level, &str) = (Level::INFO, "connected to etcd");
    const WATCHING: (Level, &str) = (Level::INFO, "watching");
    const INTERRUPTED: (Level, &str) = (Level::WARN, "discovery is interrupted");
    let mut etcd = registry::etcd().await;
    let proxies = [Proxy::to(etcd.endpoint()).await, Proxy::to(etcd.endpoint()).await];
    let (lines, mut seen) = (Lines::record(), 0);
    let session = Etcd::connect(EtcdOptions::new(proxies.each_ref().map(Proxy::endpoint))).await.unwrap();
    let (_view, discovery) = follow(&session, SERVICE);
    let watching = |state: &DiscoveryState| matches!(state, DiscoveryState::Watching { .. });
    until(discovery.clone(), "watching", watching).await;
    assert_told(&lines, &mut seen, [CONNECTED, WATCHING]);
    let SessionState::Connected { host } = session.state().borrow().clone() else { panic!() };
    let used = proxies.iter().find(|proxy| proxy.endpoint() == host.to_string()).unwrap();
    used.cut().await;
    let moved = |state: &SessionState| matches!(state, SessionState::Connected { host: now } if *now != host);
    until(session.state(), "it has moved", moved).await;
    until(discovery.clone(), "watching", watching).await;
    assert_told(&lines, &mut seen, [INTERRUPTED, (Level::INFO, "moved to another etcd host"), WATCHING]);
    used.heal();

    etcd.kill9();
    until(session.state(), "it has gone", |state| matches!(state, SessionState::Disconnected { .. })).await;
    sleep(Duration::from_secs(5)).await;
    // However often that is found.
    assert_told(&lines, &mut seen, [INTERRUPTED, (Level::WARN, "no etcd host answers")]);
    etcd.restart().await;
    until(session.state(), "it is back", |state| matches!(state, SessionState::Connected { .. })).await;
    until(discovery, "watching", watching).await;
    assert_told(&lines, &mut seen, [CONNECTED, WATCHING]);
}
