//! Endpoints that answer although discovery has lost them

#![cfg(unix)]

use std::{
    collections::HashMap,
    slice,
    time::{Duration, Instant},
};

use callsign::{Address, EndpointInfo, EndpointState, Etcd, EtcdChannel, EtcdOptions, Registration};
use callsign_tests::{
    channel::{UpdateLog, changing},
    etcd::EtcdProcess,
    greeter,
    load::{Load, Pace, greet},
    pb::greeter_client::GreeterClient,
    peers::Peer,
    process::Process,
    registry,
    service::Local,
    wait,
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::MissedTickBehavior,
};
use tonic::Code;

const SERVICE: &str = "hello.rpc";
const SECOND: Duration = Duration::from_secs(1);
const BOUND: Duration = Duration::from_secs(10);
const DEADLINE: Duration = Duration::from_secs(2);
/// As channels to etcd have it
const WINDOW: Duration = Duration::from_secs(15);

/// A server that knows how to end gracefully, and does not register as the service under test
async fn server(etcd: &EtcdProcess) -> Process {
    greeter!().register("other.rpc", &etcd.endpoint()).start().await
}

/// A server that registers, and registers again
async fn registered(etcd: &EtcdProcess) -> Process {
    greeter!().register(SERVICE, &etcd.endpoint()).start().await
}

fn key(address: &Address) -> String {
    format!("{SERVICE}/{}", address.port())
}

/// Puts keys that no registrar puts back
async fn put(etcd: &EtcdProcess, addresses: &[Address]) {
    for address in addresses {
        etcd.put(&key(address), address.to_string()).await;
    }
}

/// A channel whose endpoints are all ready
struct Client {
    channel: EtcdChannel,
    log: UpdateLog,
    began: Instant,
}

impl Client {
    async fn of(etcd: &EtcdProcess, addresses: &[Address], window: Duration) -> Self {
        let began = Instant::now();
        let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.expect("etcd runs");
        // A moment without an endpoint is to be noticed.
        let builder = EtcdChannel::builder(SERVICE).etcd(&session).pick_timeout(Duration::ZERO);
        let builder = builder.hold_window(window);
        let channel = builder.connect().await.expect("servers run");
        let log = UpdateLog::new(channel.updates());
        for address in addresses {
            log.until(address, EndpointState::Ready, began, BOUND).await;
        }
        Self { channel, log, began }
    }

    /// 100 calls a second
    fn load(&self, lasting: Duration) -> (Pace, JoinHandle<Load>) {
        let client = GreeterClient::new(self.channel.clone());
        let pace = Pace { rate: 100, lasting };
        (pace, tokio::spawn(pace.open_loop(move || greet(client.clone(), DEADLINE))))
    }

    fn held(&self) -> Vec<Address> {
        held(self.channel.endpoints())
    }

    async fn until_held(&self, addresses: &[Address]) {
        let what = format!("held are {addresses:?}");
        wait::until(&what, BOUND, || (self.held() == sorted(addresses)).then_some(())).await;
    }

    /// Waits until the channel has heard that discovery has lost it: it drains, is held, or is gone
    async fn until_missed(&self, address: &Address) {
        let misses = |info: &EndpointInfo| info.held || info.state == EndpointState::Draining;
        let missed = || {
            let endpoints = self.channel.endpoints();
            endpoints.iter().all(|info| info.address != *address || misses(info)).then_some(())
        };
        wait::until(&format!("{address} is missed"), BOUND, missed).await;
    }

    async fn until_nobody_is_left(&self) {
        let nobody = || self.channel.endpoints().is_empty().then_some(());
        wait::until("no endpoint is left", BOUND, nobody).await;
        let status =
            greet(GreeterClient::new(self.channel.clone()), DEADLINE).await.expect_err("nobody is left");
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains("no instances"), "{status:?}");
    }

    /// States of an endpoint since a time, without the times
    fn states(&self, address: &Address, since: Instant) -> Vec<EndpointState> {
        self.log.states(address, since).into_iter().map(|(_, state)| state).collect()
    }

    /// How many endpoints took calls at the same time, at least
    fn fewest_usable(&self, since: Instant) -> usize {
        let mut states = HashMap::new();
        let mut fewest = usize::MAX;
        let from = self.log.updates(since).len();
        let all = self.log.updates(self.began);
        for (number, update) in all.iter().enumerate() {
            states.insert(&update.address, update.state);
            if number >= all.len() - from {
                let usable = states.values().filter(|state| **state == EndpointState::Ready).count();
                fewest = fewest.min(usable);
            }
        }
        fewest
    }
}

fn held(endpoints: Vec<EndpointInfo>) -> Vec<Address> {
    let held = endpoints.into_iter().filter(|endpoint| endpoint.held).map(|endpoint| endpoint.address);
    sorted(&held.collect::<Vec<_>>())
}

fn sorted(addresses: &[Address]) -> Vec<Address> {
    let mut addresses = addresses.to_vec();
    addresses.sort();
    addresses
}

fn addresses(servers: &[Process]) -> Vec<Address> {
    servers.iter().map(Process::address).collect()
}

/// Three servers, known by keys of ours
async fn three(etcd: &EtcdProcess, window: Duration) -> (Vec<Process>, Client) {
    let servers = vec![server(etcd).await, server(etcd).await, server(etcd).await];
    put(etcd, &addresses(&servers)).await;
    let client = Client::of(etcd, &addresses(&servers), window).await;
    (servers, client)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_whose_keys_were_deleted_are_called_for_three_windows() {
    if !registry::has_etcdctl() {
        return;
    }
    let etcd = registry::etcd().await;
    let window = 2 * SECOND;
    let (servers, client) = three(&etcd, window).await;
    let (pace, load) = client.load(4 * SECOND);
    let deleted = Instant::now();
    etcd.etcdctl(["del", "--prefix", "hello.rpc/"]).await;
    client.until_held(&addresses(&servers)).await;
    let seen = Instant::now();
    load.await.unwrap().assert_none_failed(pace);
    assert_eq!(client.held().len(), 3, "no window has made a difference");

    for server in &servers {
        let drained = client.log.until(&server.address(), EndpointState::Draining, deleted, BOUND).await;
        assert!(drained - deleted >= 3 * window, "{:?}", drained - deleted);
        assert!(drained - seen < 3 * window + SECOND, "{:?}", drained - seen);
    }
    client.until_nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_whose_keys_return_keep_their_connections() {
    let etcd = registry::etcd().await;
    let (servers, client) = three(&etcd, SECOND).await;
    let all = addresses(&servers);
    // Longer than a hold.
    let (pace, load) = client.load(5 * SECOND);
    let deleted = Instant::now();
    etcd.delete_all("hello.rpc/").await;
    client.until_held(&all).await;
    put(&etcd, &all).await;
    client.until_held(&[]).await;

    let load = load.await.unwrap();
    load.assert_none_failed(pace);
    for address in &all {
        // Held, and held no longer.
        assert_eq!(client.states(address, deleted), [EndpointState::Ready, EndpointState::Ready]);
    }
    assert_eq!(client.held(), []);
    let started: u64 = client.channel.endpoints().iter().map(|endpoint| endpoint.started).sum();
    // Those from before and from within the hold count, too.
    assert!(started >= load.calls.len() as u64, "statistics are kept: {started} of {}", load.calls.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_server_that_is_killed_is_gone_at_once() {
    let etcd = registry::etcd().await;
    let (mut servers, client) = three(&etcd, WINDOW).await;
    etcd.delete_all("hello.rpc/").await;
    client.until_held(&addresses(&servers)).await;
    let (_, load) = client.load(3 * SECOND);

    let mut killed = servers.pop().expect("three");
    let at = Instant::now();
    killed.kill9();
    let lost = client.log.until_lost(&killed.address(), at, 2 * SECOND).await;
    client.log.until(&killed.address(), EndpointState::Gone, at, 2 * SECOND).await;
    assert_eq!(client.held(), sorted(&addresses(&servers)));
    let load = load.await.unwrap();
    for call in load.failed() {
        let status = call.result.as_ref().unwrap_err();
        assert!(call.started <= lost, "picked after the loss was reported: {status:?}");
        assert!(status.message().contains(&killed.address().to_string()), "{status:?}");
    }
    assert!(load.failed().len() <= 5, "{load}");
    assert_eq!(client.states(&killed.address(), at), [EndpointState::Draining, EndpointState::Gone]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_server_that_says_goaway_is_let_go_without_a_failed_call() {
    let etcd = registry::etcd().await;
    let (mut servers, client) = three(&etcd, WINDOW).await;
    etcd.delete_all("hello.rpc/").await;
    client.until_held(&addresses(&servers)).await;
    let (pace, load) = client.load(4 * SECOND);

    let mut stopped = servers.pop().expect("three");
    let at = Instant::now();
    stopped.sigterm();
    client.log.until(&stopped.address(), EndpointState::Gone, at, BOUND).await;
    assert_eq!(client.held(), sorted(&addresses(&servers)));
    assert!(stopped.exited(BOUND).await.success());
    load.await.unwrap().assert_none_failed(pace);
    assert_eq!(client.states(&stopped.address(), at), [EndpointState::Draining, EndpointState::Gone]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_server_is_held_until_it_says_goaway() {
    let etcd = registry::etcd().await;
    let mut last = registered(&etcd).await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 1).await;
    let client = Client::of(&etcd, &[last.address()], WINDOW).await;
    last.sigterm();
    client.until_held(&[last.address()]).await;
    greet(GreeterClient::new(client.channel.clone()), DEADLINE).await.expect("it still answers");
    assert!(last.exited(BOUND).await.success());
    client.until_nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_server_is_called_for_three_windows_after_its_registration_is_paused() {
    let etcd = registry::etcd().await;
    let server = Local::start().await;
    let address = server.address();
    let session = Etcd::connect_lazy(EtcdOptions::new([etcd.endpoint()])).expect("a valid host");
    let registration = Registration::builder(&session, SERVICE, address.clone()).register().await.unwrap();
    let client = Client::of(&etcd, slice::from_ref(&address), SECOND).await;
    let (pace, load) = client.load(2 * SECOND);
    let paused = Instant::now();
    registration.pause().await.unwrap();
    client.until_held(slice::from_ref(&address)).await;
    let seen = Instant::now();
    assert_eq!(etcd.pairs("hello.rpc/").await, []);
    load.await.unwrap().assert_none_failed(pace);

    let drained = client.log.until(&address, EndpointState::Draining, paused, BOUND).await;
    assert!(drained - paused >= 3 * SECOND, "{:?}", drained - paused);
    assert!(drained - seen < 4 * SECOND, "{:?}", drained - seen);
    client.until_nobody_is_left().await;
    // The connection has ended, the server has not.
    registration.resume().await.unwrap();
    client.log.until(&address, EndpointState::Ready, drained, BOUND).await;
    greet(GreeterClient::new(client.channel.clone()), DEADLINE).await.expect("it is back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_that_is_removed_gets_no_more_calls_and_loses_its_connection_after_a_window() {
    let etcd = registry::etcd().await;
    let window = 2 * SECOND;
    let (servers, client) = three(&etcd, window).await;
    let removed = servers[0].address();
    let deleted = Instant::now();
    etcd.delete(&key(&removed)).await;
    client.log.until(&removed, EndpointState::Draining, deleted, BOUND).await;
    for _ in 0..50 {
        let who = greet(GreeterClient::new(client.channel.clone()), DEADLINE).await.unwrap();
        assert_ne!(who, removed.to_string());
    }
    assert_eq!(client.held(), []);
    let gone = client.log.until(&removed, EndpointState::Gone, deleted, BOUND).await;
    assert!((window..2 * window).contains(&(gone - deleted)), "{:?}", gone - deleted);
    assert_eq!(client.states(&removed, deleted), [EndpointState::Draining, EndpointState::Gone]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_comes_back_empty_costs_no_call() {
    let mut etcd = registry::etcd().await;
    let servers = vec![registered(&etcd).await, registered(&etcd).await, registered(&etcd).await];
    let all = addresses(&servers);
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 3).await;
    let client = Client::of(&etcd, &all, WINDOW).await;
    let (pace, load) = client.load(12 * SECOND);
    let killed = Instant::now();
    etcd.kill9();
    etcd.wipe();
    etcd.restart().await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 3).await;
    client.until_held(&[]).await;
    load.await.unwrap().assert_none_failed(pace);
    for address in &all {
        // One or two of three may be missing for a moment, which alarms nobody.
        let kept = |state: &EndpointState| matches!(state, EndpointState::Ready | EndpointState::Draining);
        let states = client.states(address, killed);
        assert!(states.iter().all(kept), "{address} keeps its connection: {states:?}");
    }
    let endpoints = client.channel.endpoints();
    assert_eq!((endpoints.len(), held(endpoints)), (3, vec![]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_twenty_servers_that_vanish_one_by_one_fourteen_are_always_usable() {
    let etcd = registry::etcd().await;
    let mut servers = Vec::new();
    for _ in 0..20 {
        servers.push(Local::start().await);
    }
    let all: Vec<_> = servers.iter().map(Local::address).collect();
    put(&etcd, &all).await;
    let client = Client::of(&etcd, &all, WINDOW).await;
    let (pace, load) = client.load(4 * SECOND);
    let began = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for address in &all {
        tick.tick().await;
        etcd.delete(&key(address)).await;
        // Two deletes that are told at once would be one fault, and alarm with nobody gone.
        client.until_missed(address).await;
    }
    client.until_held(&all).await;
    load.await.unwrap().assert_none_failed(pace);
    // A third may go before anybody is alarmed.
    assert_eq!(client.fewest_usable(began), 14);
    for address in &all {
        let states = client.states(address, began);
        assert!(!states.contains(&EndpointState::Connecting), "{address}: {states:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_replacement_of_all_servers_holds_nobody() {
    let etcd = registry::etcd().await;
    let old = vec![registered(&etcd).await, registered(&etcd).await, registered(&etcd).await];
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 3).await;
    let client = Client::of(&etcd, &addresses(&old), WINDOW).await;
    let (pace, load) = client.load(8 * SECOND);
    let mut new = Vec::new();
    for mut server in old {
        let successor = registered(&etcd).await;
        client.log.until(&successor.address(), EndpointState::Ready, client.began, BOUND).await;
        new.push(successor);
        server.sigterm();
        assert!(server.exited(BOUND).await.success());
        client.log.until(&server.address(), EndpointState::Gone, client.began, BOUND).await;
    }
    load.await.unwrap().assert_none_failed(pace);
    let held: Vec<_> = client.log.updates(client.began).into_iter().filter(|update| update.held).collect();
    assert_eq!(held, []);
    let left: Vec<_> = client.channel.endpoints().into_iter().map(|endpoint| endpoint.address).collect();
    assert_eq!(sorted(&left), sorted(&addresses(&new)));
}

#[tokio::test]
async fn a_channel_over_any_discover_holds_nobody_unless_told_to() {
    let server = Local::start().await;
    let (channel, log, changes) = changing(|builder| builder);
    let began = Instant::now();
    changes.insert(server.address());
    channel.until_ready().await;
    changes.remove(&server.address());
    log.until(&server.address(), EndpointState::Gone, began, BOUND).await;
    assert!(log.updates(began).iter().all(|update| !update.held));
}

#[tokio::test]
async fn only_endpoints_that_answer_are_held() {
    let (server, peer) = (Local::start().await, Peer::deaf());
    let (channel, log, changes) = changing(|builder| builder.hold_window(WINDOW));
    let began = Instant::now();
    changes.insert(server.address());
    changes.insert(peer.address());
    channel.until_ready().await;
    log.until(&peer.address(), EndpointState::Backoff, began, BOUND).await;
    changes.remove(&peer.address());
    changes.remove(&server.address());
    log.until(&peer.address(), EndpointState::Gone, began, BOUND).await;
    let [endpoint] = &channel.endpoints()[..] else { panic!("one endpoint") };
    assert!(endpoint.held && endpoint.address == server.address(), "{endpoint:?}");
    greet(GreeterClient::new(channel), DEADLINE).await.unwrap();
}

#[tokio::test]
async fn a_held_endpoint_that_has_lost_its_connection_is_not_dialled_again() {
    let server = Local::start().await;
    // Who connects is seen.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::from(listener.local_addr().unwrap());
    let (channel, log, changes) = changing(|builder| builder.hold_window(WINDOW));
    let began = Instant::now();
    changes.insert(address.clone());
    let (mut client, _) = listener.accept().await.unwrap();
    let mut target = TcpStream::connect(server.address().to_string()).await.unwrap();
    let pipe = tokio::spawn(async move { copy_bidirectional(&mut client, &mut target).await });
    greet(GreeterClient::new(channel.clone()), DEADLINE).await.unwrap();
    changes.remove(&address);
    wait::until("it is held", BOUND, || (held(channel.endpoints()).len() == 1).then_some(())).await;

    // Attempts are 100 ms apart at least: from now on another would begin at once.
    tokio::time::sleep(Duration::from_millis(150)).await;
    pipe.abort();
    log.until(&address, EndpointState::Gone, began, BOUND).await;
    let probe = TcpStream::connect(address.to_string()).await.unwrap();
    let (_next, from) = listener.accept().await.unwrap();
    assert_eq!(from, probe.local_addr().unwrap(), "nobody has connected in between");
}

#[tokio::test]
async fn an_endpoint_that_comes_back_connects_again_when_its_connection_ends() {
    let mut server = greeter!().start().await;
    let address = server.address();
    let (channel, log, changes) = changing(|builder| builder.hold_window(WINDOW));
    let began = Instant::now();
    changes.insert(address.clone());
    channel.until_ready().await;
    changes.remove(&address);
    wait::until("it is held", BOUND, || (held(channel.endpoints()).len() == 1).then_some(())).await;
    changes.insert(address.clone());
    wait::until("it is not held", BOUND, || held(channel.endpoints()).is_empty().then_some(())).await;
    server.kill9();
    log.until(&address, EndpointState::Backoff, began, BOUND).await;
    let lost = Instant::now();
    let _server = greeter!().listen(&address).start().await;
    log.until(&address, EndpointState::Ready, lost, BOUND).await;
    assert_eq!(channel.endpoints().len(), 1);
}
