//! Servers that fail without anyone noticing: frozen, behind a black hole, answering UNAVAILABLE

#![cfg(unix)]

use std::time::{Duration, Instant};

use callsign::{
    Address, Channel, EndpointState, Etcd, EtcdChannel, EtcdOptions, discover,
    policy::{P2cEwma, Policy, RoundRobin},
};
use callsign_tests::{
    channel::{UpdateLog, over, until_ready},
    etcd::EtcdProcess,
    greeter,
    load::{Load, Pace, greet},
    pb::greeter_client::GreeterClient,
    process::Process,
    proxy::Proxy,
    registry,
    service::Manner,
    stall::on_a_steady_machine,
    wait,
};
use tokio::{task::JoinHandle, time::sleep_until};
use tonic::Status;

const SERVICE: &str = "hello.rpc";
const DEADLINE: Duration = Duration::from_millis(500);
const SECOND: Duration = Duration::from_secs(1);
const BOUND: Duration = Duration::from_secs(10);

/// Calls that may fail when an endpoint falls silent
const LOST: usize = 3;

/// Into a load, when it runs steadily
const AT: Duration = Duration::from_millis(2500);

/// 2 400 calls
fn full_load(channel: Channel) -> JoinHandle<Load> {
    let client = GreeterClient::new(channel);
    tokio::spawn(Pace::FULL.open_loop(move || greet(client.clone(), DEADLINE)))
}

fn assert_at_most(failed: usize, load: &Load) {
    assert_eq!(load.calls.len(), Pace::FULL.calls() as usize);
    assert!(load.failed().len() <= failed, "{load}");
}

async fn start(count: usize) -> Vec<Process> {
    let mut servers = Vec::new();
    for _ in 0..count {
        servers.push(greeter!().start().await);
    }
    servers
}

/// Calls, of which none fails, until all of these servers are called; from then on they have their full share
async fn until_shared<F>(mut call: impl FnMut() -> F, servers: &[Address], bound: Duration)
where
    F: Future<Output = Result<String, Status>> + Send + 'static,
{
    let began = Instant::now();
    let mut shares = async |lasting| {
        let pace = Pace { rate: 200, lasting };
        let load = pace.open_loop(&mut call).await;
        load.assert_none_failed(pace);
        servers.iter().map(|server| load.share_of(&server.to_string())).collect::<Vec<_>>()
    };
    while shares(SECOND).await.contains(&0.0) {
        assert!(began.elapsed() < bound, "not within {bound:?}: {servers:?} are all called");
    }
    let shares = shares(5 * SECOND).await;
    let full = 0.6 / servers.len() as f64;
    assert!(shares.iter().all(|share| *share >= full), "{servers:?} share the calls: {shares:.2?}");
}

/// One of so many servers vanishes behind a proxy that swallows everything, established connections included
async fn black_hole(count: usize) {
    let servers = start(count).await;
    let proxy = Proxy::to(servers[0].address().to_string()).await;
    let behind: Address = proxy.endpoint().parse().expect("an address");
    let channel = over([behind].into_iter().chain(servers[1..].iter().map(Process::address)));
    until_ready(&channel, count).await;

    let began = tokio::time::Instant::now();
    let log = UpdateLog::new(channel.updates());
    let load = full_load(channel);
    sleep_until(began + AT).await;
    proxy.hold();
    let load = load.await.expect("no call panics");
    let share = load.share(&servers[0].address().to_string(), load.calls[0].started, (began + AT).into());
    assert!(share > 0.0, "calls went there before");
    assert!(load.failed().len() <= LOST, "{load}\n{:?}", log.updates(began.into()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_most_three_calls_fail_when_one_of_three_servers_is_in_a_black_hole() {
    on_a_steady_machine(|| black_hole(3)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_most_three_calls_fail_when_one_of_two_servers_is_in_a_black_hole() {
    on_a_steady_machine(|| black_hole(2)).await;
}

async fn register(etcd: &EtcdProcess) -> Process {
    greeter!().register(SERVICE, &etcd.endpoint()).start().await
}

/// One of so many servers found through etcd is stopped for good; 3 s later another one may come
async fn stopped(count: usize, another_comes: bool) {
    let etcd = registry::etcd().await;
    let mut servers = Vec::new();
    for _ in 0..count {
        servers.push(register(&etcd).await);
    }
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == count).await;
    let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.expect("etcd runs");
    let channel = EtcdChannel::builder(SERVICE).etcd(&session).connect().await.expect("servers run");
    let ready =
        || channel.endpoints().iter().filter(|endpoint| endpoint.state == EndpointState::Ready).count();
    wait::until("all are ready", BOUND, || (ready() == count).then_some(())).await;

    let began = tokio::time::Instant::now();
    let client = GreeterClient::new(channel.clone());
    let load = tokio::spawn(Pace::FULL.open_loop(move || greet(client.clone(), DEADLINE)));
    sleep_until(began + AT).await;
    servers[0].sigstop().await;
    if another_comes {
        sleep_until(began + AT + 3 * SECOND).await;
        servers.push(register(&etcd).await);
    }
    assert_at_most(LOST, &load.await.expect("no call panics"));
    let others = servers[1..].iter().map(Process::address).collect::<Vec<_>>();
    let client = GreeterClient::new(channel);
    until_shared(|| greet(client.clone(), DEADLINE), &others, BOUND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_most_three_calls_fail_when_one_of_three_registered_servers_is_stopped_for_good() {
    on_a_steady_machine(|| stopped(3, false)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn at_most_three_calls_fail_when_one_of_two_registered_servers_is_stopped_for_good() {
    on_a_steady_machine(|| stopped(2, false)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_server_stays_out_and_a_fourth_one_that_registers_has_its_share() {
    on_a_steady_machine(|| stopped(3, true)).await;
}

/// One of so many servers answers UNAVAILABLE at once, and recovers; so many calls in a hundred may go there
async fn unavailable(count: usize, policy: impl Policy, percent: usize) {
    let mut servers = start(count).await;
    let fixed = discover::fixed(servers.iter().map(Process::address));
    let channel = Channel::builder(fixed).policy(policy).build().expect("valid settings");
    until_ready(&channel, count).await;

    servers[0].turn(Manner::Unavailable).await;
    let load = full_load(channel.clone()).await.expect("no call panics");
    let most = load.calls.len() * percent / 100;
    assert_at_most(most, &load);
    let calls = servers[0].calls().await;
    assert!(calls as usize <= most, "{calls} of {} calls went there", load.calls.len());
    assert!(calls > 0, "it was tried");

    servers[0].turn(Manner::After(Duration::from_millis(2))).await;
    let all = servers.iter().map(Process::address).collect::<Vec<_>>();
    let client = GreeterClient::new(channel);
    until_shared(|| greet(client.clone(), DEADLINE), &all, 10 * SECOND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_that_answers_unavailable_costs_one_call_in_a_hundred_and_has_its_share_once_recovered()
{
    on_a_steady_machine(|| unavailable(3, P2cEwma::new(), 1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_that_answers_unavailable_costs_one_call_in_a_hundred_and_has_its_share_once_recovered() {
    on_a_steady_machine(|| unavailable(2, P2cEwma::new(), 1)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_answers_unavailable_is_left_out_whatever_the_policy() {
    // It does not go by failures: between two looks, 100 ms apart, its turns come as ever. Five of them to be ejected, and one
    // in each trial, with a few more before it is noticed.
    on_a_steady_machine(|| unavailable(3, RoundRobin::new(), 2)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_all_fail_calls_still_go_to_all_and_succeed_as_soon_as_they_have_recovered() {
    on_a_steady_machine(all_fail_and_recover).await;
}

async fn all_fail_and_recover() {
    let mut servers = start(3).await;
    let channel = over(servers.iter().map(Process::address));
    until_ready(&channel, 3).await;
    let client = GreeterClient::new(channel);
    let pace = Pace { rate: 200, lasting: 3 * SECOND };
    let call = || greet(client.clone(), DEADLINE);

    for server in &mut servers {
        server.turn(Manner::Unavailable).await;
    }
    // The first of the two is long enough to be judged by.
    let mut before = 0;
    for _ in 0..2 {
        let load = pace.open_loop(call).await;
        assert_eq!(load.failed().len(), pace.calls() as usize);
        let calls = [servers[0].calls().await, servers[1].calls().await, servers[2].calls().await];
        let total = calls.iter().sum::<u64>();
        assert_eq!(total - before, u64::from(pace.calls()), "every call went out");
        before = total;
        assert!(calls.iter().all(|calls| *calls >= total / 5), "all are tried alike: {calls:?}");
    }
    for server in &mut servers {
        server.turn(Manner::After(Duration::from_millis(2))).await;
    }
    pace.open_loop(call).await.assert_none_failed(pace);
}
