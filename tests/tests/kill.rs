//! Servers that are killed, started again, told to stop and replaced, under load

#![cfg(unix)]

use std::time::{Duration, Instant};

use callsign::{EndpointState, Etcd, EtcdChannel, EtcdOptions};
use callsign_tests::{
    channel::UpdateLog,
    etcd::EtcdProcess,
    greeter,
    load::{Pace, greet},
    pb::greeter_client::GreeterClient,
    process::Process,
    registry,
    stall::on_a_steady_machine,
    wait,
};
use tokio::time::{sleep, sleep_until};

const SERVICE: &str = "hello.rpc";
const DEADLINE: Duration = Duration::from_millis(500);
const BOUND: Duration = Duration::from_secs(5);

async fn start(etcd: &EtcdProcess) -> Process {
    greeter!().register(SERVICE, &etcd.endpoint()).start().await
}

/// A channel that both servers are ready in, and its log
async fn connect(etcd: &EtcdProcess, servers: [&Process; 2]) -> (EtcdChannel, UpdateLog) {
    let since = Instant::now();
    let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.expect("etcd runs");
    let channel = EtcdChannel::builder(SERVICE).etcd(&session).connect().await.expect("servers run");
    let log = UpdateLog::new(channel.updates());
    for server in servers {
        log.until(&server.address(), EndpointState::Ready, since, BOUND).await;
    }
    (channel, log)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_server_costs_a_few_calls_in_flight_and_has_its_share_again_a_second_after_its_key() {
    on_a_steady_machine(killed_and_back).await;
}

async fn killed_and_back() {
    let etcd = registry::etcd().await;
    let (mut one, two) = (start(&etcd).await, start(&etcd).await);
    let address = one.address();
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 2).await;
    let (channel, log) = connect(&etcd, [&one, &two]).await;

    let client = GreeterClient::new(channel.clone());
    let began = tokio::time::Instant::now();
    let load = tokio::spawn(Pace::FULL.open_loop(move || greet(client.clone(), DEADLINE)));

    sleep_until(began + Duration::from_millis(2500)).await;
    let killed = Instant::now();
    one.kill9();
    let lost = log.until_lost(&address, killed, BOUND).await;

    sleep_until(began + Duration::from_millis(4500)).await;
    let _again = greeter!().listen(&address).register(SERVICE, &etcd.endpoint()).start().await;
    // The key of the killed one lapses with its lease; until then the address is there twice.
    let at = address.to_string();
    let appeared = async {
        registry::until_registered(&etcd, SERVICE, BOUND, |all| {
            all.iter().filter(|is| **is == at).count() == 2
        })
        .await;
        Instant::now()
    }
    .await;

    let load = load.await.expect("no call panics");
    assert_eq!(load.calls.len(), Pace::FULL.calls() as usize);
    let failed = load.failed();
    assert!(failed.len() <= 5, "{load}");
    for call in &failed {
        assert!(call.started <= lost, "picked {:?} after the loss was reported: {load}", call.started - lost);
        let status = call.result.as_ref().expect_err("it failed");
        assert!(status.message().contains(&at), "the message names the endpoint: {status:?}");
    }
    let [from, to] = [1, 4].map(|seconds| appeared + Duration::from_secs(seconds));
    let last = load.calls.last().expect("there were calls").started;
    assert!(last >= to, "the load ended too early to tell: {:?} after the key appeared", last - appeared);
    let share = load.share(&at, from, to);
    assert!(share >= 0.25, "share of the restarted server in seconds 1 to 4: {share}");
    let before = load.share(&at, load.calls[0].started, killed);
    assert!((0.25..0.75).contains(&before), "share before: {before}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_was_long_away_is_dialled_as_soon_as_it_has_registered_anew() {
    let etcd = registry::etcd().await;
    let first = greeter!().register(SERVICE, &etcd.endpoint()).ttl(Duration::from_secs(60));
    let (mut one, two) = (first.start().await, start(&etcd).await);
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 2).await;
    let (_channel, log) = connect(&etcd, [&one, &two]).await;

    let killed = Instant::now();
    one.kill9();
    // After waits of about 1, 1.6, 2.6 and 4.1 s begins one of 5.2 s at least.
    let fifth = wait::until("five attempts have failed", Duration::from_secs(30), || {
        let states = log.states(&one.address(), killed);
        states.iter().filter(|(_, state)| *state == EndpointState::Backoff).nth(4).map(|(at, _)| *at)
    })
    .await;
    let again = greeter!().listen(&one.address()).register(SERVICE, &etcd.endpoint()).start().await;
    let ready = log.until(&again.address(), EndpointState::Ready, fifth, 2 * BOUND).await;
    assert!(ready - fifth < Duration::from_secs(5), "not by its own clock: {:?}", ready - fifth);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_while_both_servers_are_replaced_one_after_the_other() {
    on_a_steady_machine(replaced).await;
}

async fn replaced() {
    let etcd = registry::etcd().await;
    let old = [start(&etcd).await, start(&etcd).await];
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 2).await;
    let (channel, log) = connect(&etcd, [&old[0], &old[1]]).await;

    let client = GreeterClient::new(channel.clone());
    let began = Instant::now();
    let load = tokio::spawn(Pace::FULL.open_loop(move || greet(client.clone(), DEADLINE)));
    let mut new = Vec::new();
    for mut server in old {
        sleep(Duration::from_secs(1)).await;
        server.sigterm();
        let status = server.exited(2 * BOUND).await;
        assert!(status.success(), "{status}");
        let successor = start(&etcd).await;
        log.until(&successor.address(), EndpointState::Ready, began, BOUND).await;
        new.push(successor);
    }
    let replaced = Instant::now();

    let load = load.await.expect("no call panics");
    load.assert_none_failed(Pace::FULL);
    let end = load.calls.last().expect("there were calls").started;
    assert!(end > replaced + Duration::from_secs(1), "the load ended too early to tell");
    for server in &new {
        let share = load.share(&server.address().to_string(), replaced, end);
        assert!(share > 0.25, "both successors work: {share}");
    }
}
