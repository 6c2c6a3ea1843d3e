//! go-zero and callsign in one fleet, and a stream from a default grpc-go server that is quiet for a minute

#![cfg(unix)]

use std::time::{Duration, Instant};

use callsign::{
    Address, Channel, Etcd, EtcdChannel, EtcdOptions, Registration,
    etcd::registration::{LossCause, RegistrationState},
};
use callsign_tests::{
    channel::{UpdateLog, over},
    echo::{Chunk, Wanted, echo_client::EchoClient},
    etcd::EtcdProcess,
    go, greeter,
    load::{Load, Pace, greet},
    pb::greeter_client::GreeterClient,
    process::Process,
    registry,
    stall::on_a_steady_machine,
    wait,
};

const SERVICE: &str = "hello.rpc";
const BOUND: Duration = Duration::from_secs(20);
const GAP: Duration = Duration::from_millis(10);
/// More calls than any test waits for; a client ends with its test
const ENDLESS: u32 = 1_000_000;
/// go-zero's lease; no file of its sets another
const GO_ZERO_TTL: Duration = Duration::from_secs(10);

async fn ours(etcd: &EtcdProcess) -> Process {
    let registered = registry::registered(etcd, SERVICE).await.len();
    // Long enough that one is always in flight.
    let greeter = greeter!().register(SERVICE, &etcd.endpoint()).delay(2 * GAP);
    let server = greeter.start().await;
    registry::until_registered(etcd, SERVICE, BOUND, |all| all.len() == registered + 1).await;
    server
}

async fn session(etcd: &EtcdProcess) -> Etcd {
    Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.expect("etcd runs")
}

/// A channel in which as many endpoints are ready
async fn channel(etcd: &EtcdProcess, endpoints: usize) -> EtcdChannel {
    let builder = EtcdChannel::builder(SERVICE).etcd(&session(etcd).await);
    let channel = builder.connect().await.expect("servers are registered");
    let ready = |channel: &EtcdChannel| {
        channel.endpoints().iter().filter(|endpoint| endpoint.state == callsign::EndpointState::Ready).count()
    };
    wait::until("all are ready", BOUND, || (ready(&channel) == endpoints).then_some(())).await;
    channel
}

/// 100 calls a second
async fn load(channel: EtcdChannel, lasting: Duration) -> Load {
    let client = GreeterClient::new(channel);
    Pace { rate: 100, lasting }.open_loop(move || greet(client.clone(), Duration::from_secs(2))).await
}

/// Registers `address` from this process under an id of its own choice
async fn register(etcd: &EtcdProcess, address: Address, id: i64) -> Registration {
    let builder = Registration::builder(&session(etcd).await, SERVICE, address).id(id);
    builder.register().await.expect("etcd runs")
}

/// The one key of the service and its value, once that is so
async fn only_pair(etcd: &EtcdProcess) -> (String, String) {
    let mut pairs = etcd.pairs("hello.rpc/").await;
    assert_eq!(pairs.len(), 1, "{pairs:?}");
    pairs.remove(0)
}

#[tokio::test]
async fn a_go_zero_client_calls_our_server() {
    let Some(go) = go!() else { return };
    let etcd = registry::etcd().await;
    let server = ours(&etcd).await;
    let mut client = go.client(SERVICE, &etcd.endpoint()).calls(100, GAP).start();
    client.done(BOUND).await;
    assert_eq!(client.errors(), [] as [&str; 0]);
    assert_eq!(client.answers(), vec![server.address().to_string(); 100]);
}

#[tokio::test]
async fn a_go_zero_client_sees_our_servers_leave_and_come_without_a_failed_call() {
    let Some(go) = go!() else { return };
    let etcd = registry::etcd().await;
    let (mut leaving, staying) = (ours(&etcd).await, ours(&etcd).await);
    let client = go.client(SERVICE, &etcd.endpoint()).calls(ENDLESS, GAP).start();
    client.until_answered_by(&leaving.address(), BOUND).await;
    client.until_answered_by(&staying.address(), BOUND).await;

    leaving.sigterm();
    let status = leaving.exited(BOUND).await;
    assert!(status.success(), "{status}");
    let left = client.answers().len();
    client.until_answered_by(&staying.address(), BOUND).await;

    let coming = ours(&etcd).await;
    client.until_answered_by(&coming.address(), BOUND).await;
    client.until_answered_by(&staying.address(), BOUND).await;
    let answers = client.answers();
    let late = answers[left..].iter().filter(|who| **who == leaving.address().to_string());
    assert_eq!(late.count(), 0, "it had ended");
    assert_eq!(client.errors(), [] as [&str; 0], "of {} calls", answers.len());
}

#[tokio::test]
async fn our_channel_calls_a_go_zero_server_and_sees_it_leave_without_a_failed_call() {
    let Some(go) = go!() else { return };
    let etcd = registry::etcd().await;
    let mut leaving = go.server(SERVICE, &etcd.endpoint()).listening().await;
    let staying = go.server(SERVICE, &etcd.endpoint()).listening().await;
    let channel = channel(&etcd, 2).await;
    let loading = tokio::spawn(load(channel, Duration::from_secs(8)));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let told = Instant::now();
    leaving.sigterm();
    leaving.exited(BOUND).await;
    let load = loading.await.unwrap();
    let first = load.calls[0].started;
    assert!(load.failed().is_empty(), "{load}");
    assert!(load.share(&leaving.address().to_string(), first, told) > 0.0, "it served before: {load}");
    assert!(load.share(&staying.address().to_string(), first, told) > 0.0, "both served: {load}");
    assert_eq!(registry::registered(&etcd, SERVICE).await, [staying.address().to_string()]);
}

#[tokio::test]
async fn in_a_mixed_fleet_both_kinds_of_client_are_served_by_both_kinds_of_server() {
    let Some(go) = go!() else { return };
    let etcd = registry::etcd().await;
    let theirs = go.server(SERVICE, &etcd.endpoint()).listening().await;
    let ours = ours(&etcd).await;
    let client = go.client(SERVICE, &etcd.endpoint()).calls(ENDLESS, GAP).start();
    let load = load(channel(&etcd, 2).await, Duration::from_secs(2)).await;
    assert!(load.failed().is_empty(), "{load}");
    for server in [theirs.address(), ours.address()] {
        client.until_answered_by(&server, BOUND).await;
        assert!(load.share_of(&server.to_string()) > 0.1, "{server} served our client");
    }
    assert_eq!(client.errors(), [] as [&str; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_go_zero_server_costs_our_channel_at_most_the_calls_in_flight_and_its_key_expires() {
    if go!().is_some() {
        on_a_steady_machine(killed).await;
    }
}

async fn killed() {
    let go = go!().expect("it was there");
    let etcd = registry::etcd().await;
    let mut killed = go.server(SERVICE, &etcd.endpoint()).listening().await;
    let living = go.server(SERVICE, &etcd.endpoint()).listening().await;
    let channel = channel(&etcd, 2).await;
    let log = UpdateLog::new(channel.updates());
    let loading = tokio::spawn(load(channel, Duration::from_secs(4)));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = Instant::now();
    killed.kill9();
    let expired = Instant::now() + GO_ZERO_TTL + Duration::from_secs(2);
    let address = killed.address();
    let lost = log.until_lost(&address, before, BOUND).await;
    let load = loading.await.expect("no call panics");
    let at = address.to_string();
    assert!(load.share(&at, load.calls[0].started, before) > 0.0, "it served before");
    for call in load.failed() {
        let names_it = call.result.as_ref().is_err_and(|status| status.message().contains(&at));
        assert!(names_it && call.started <= lost, "{load}");
    }
    assert!(load.failed().len() <= 5, "{load}");
    let left = expired.saturating_duration_since(Instant::now());
    let shown = registry::until_registered(&etcd, SERVICE, left, |all| all.len() == 1).await;
    assert_eq!(shown, [living.address().to_string()]);
}

#[tokio::test]
async fn what_go_zero_writes_is_what_we_write() {
    let Some(go) = go!() else { return };
    let etcd = registry::etcd().await;
    let mut theirs = go.server(SERVICE, &etcd.endpoint()).id(7).listening().await;
    let address = theirs.address();
    let written = only_pair(&etcd).await;
    assert_eq!(written, ("hello.rpc/7".to_owned(), address.to_string()));
    theirs.kill9();
    // Or what is compared below would be go-zero's still.
    etcd.delete("hello.rpc/7").await;
    let registration = register(&etcd, address, 7).await;
    assert_eq!(only_pair(&etcd).await, written);
    assert_eq!(registration.key(), written.0);
}

#[tokio::test]
async fn ids_that_nobody_chose_are_positive_decimal_numbers_in_both() {
    let Some(go) = go!() else { return };
    let etcd = registry::etcd().await;
    let theirs = go.server(SERVICE, &etcd.endpoint()).listening().await;
    let lease = etcd.leases().await[0];
    assert_eq!(only_pair(&etcd).await, (format!("hello.rpc/{lease}"), theirs.address().to_string()));
    let ours = ours(&etcd).await;
    let pairs = etcd.pairs("hello.rpc/").await;
    let (key, _) = pairs.iter().find(|(_, value)| *value == ours.address().to_string()).unwrap();
    let id: i64 = key.strip_prefix("hello.rpc/").unwrap().parse().unwrap();
    assert!(id > 0, "{key}");
    assert_eq!(*key, format!("hello.rpc/{id}"), "written as go-zero writes it");
}

#[tokio::test]
async fn a_server_of_ours_with_an_id_is_called_by_a_go_zero_client_that_names_one() {
    let Some(go) = go!() else { return };
    let etcd = registry::etcd().await;
    let server = greeter!().start().await;
    let registration = register(&etcd, server.address(), 7).await;
    assert_eq!(registration.key(), "hello.rpc/7");
    // The same file may serve a program that is server and client.
    let mut client = go.client(SERVICE, &etcd.endpoint()).id(8).calls(100, GAP).start();
    client.done(BOUND).await;
    assert_eq!(client.errors(), [] as [&str; 0]);
    assert_eq!(client.answers(), vec![server.address().to_string(); 100]);
}

#[tokio::test]
async fn of_two_with_one_id_our_later_one_wins_and_go_zero_takes_over_when_it_leaves() {
    let Some(go) = go!() else { return };
    let etcd = registry::etcd().await;
    let theirs = go.server(SERVICE, &etcd.endpoint()).id(7).listening().await;
    let server = greeter!().start().await;
    let registration = register(&etcd, server.address(), 7).await;
    assert_eq!(only_pair(&etcd).await.1, server.address().to_string());
    let client = go.client(SERVICE, &etcd.endpoint()).calls(ENDLESS, GAP).start();
    client.until_answered_by(&server.address(), BOUND).await;
    registration.deregister().await.unwrap();
    // go-zero puts its key again when that is deleted, whoever's it was.
    client.until_answered_by(&theirs.address(), BOUND).await;
    assert_eq!(only_pair(&etcd).await, ("hello.rpc/7".to_owned(), theirs.address().to_string()));
}

#[tokio::test]
async fn of_two_with_one_id_go_zeros_later_one_wins_and_ours_says_so_and_leaves_its_key_alone() {
    let Some(go) = go!() else { return };
    let etcd = registry::etcd().await;
    let server = greeter!().start().await;
    let registration = register(&etcd, server.address(), 7).await;
    let theirs = go.server(SERVICE, &etcd.endpoint()).id(7).listening().await;
    let lost = RegistrationState::Lost { cause: LossCause::Overwritten };
    let mut state = registration.state();
    wait::within("it is overwritten", BOUND, state.wait_for(|state| *state == lost)).await.unwrap();
    let written = ("hello.rpc/7".to_owned(), theirs.address().to_string());
    assert_eq!(only_pair(&etcd).await, written);
    registration.deregister().await.unwrap();
    assert_eq!(only_pair(&etcd).await, written);
}

/// What a call that takes a minute comes to, over a connection of its own
async fn quiet<T>(address: &Address, call: impl AsyncFnOnce(EchoClient<Channel>) -> T) -> T {
    call(EchoClient::new(over([address.clone()]))).await
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn calls_that_a_default_grpc_go_server_leaves_quiet_for_a_minute_live() {
    let Some(go) = go!() else { return };
    let server = go.grpc_server().await;
    let address = server.address();
    let rest_ms = 60_000;
    let unary = quiet(&address, async |mut client| {
        client.unary(Chunk { rest_ms, ..Chunk::default() }).await.map(drop)
    });
    let download = quiet(&address, async |mut client| {
        let mut chunks = client.download(Wanted { chunks: 2, rest_ms, size: 1 }).await?.into_inner();
        let mut got = Vec::new();
        while let Some(chunk) = chunks.message().await? {
            got.push((chunk.payload.len(), Instant::now()));
        }
        Ok::<_, tonic::Status>(got)
    });
    let bidi = quiet(&address, async |mut client| {
        let sent = [0, rest_ms].map(|rest_ms| Chunk { rest_ms, ..Chunk::default() });
        // The caller's half stays open: it may have more to say.
        let sent = tokio_stream::StreamExt::chain(tokio_stream::iter(sent), tokio_stream::pending());
        let mut chunks = client.bidi(sent).await?.into_inner();
        for _ in 0..2 {
            chunks.message().await?.expect("an answer each");
        }
        Ok::<_, tonic::Status>(())
    });
    let began = Instant::now();
    let calls = async { tokio::join!(unary, download, bidi) };
    let (unary, download, bidi) = wait::within("a minute", Duration::from_secs(90), calls).await;
    assert!(began.elapsed() >= Duration::from_secs(60), "{:?}", began.elapsed());
    unary.expect("a handler may take a minute");
    bidi.expect("both halves may be quiet");
    let chunks = download.expect("a stream may be quiet");
    assert_eq!(chunks.len(), 2);
    assert!(chunks[1].1 - chunks[0].1 >= Duration::from_secs(59), "it was quiet in between");
}
