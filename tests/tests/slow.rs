//! A server that is slower than the others, for callers that wait for their answers
//!
//! By itself, because it keeps the machine busy.

#![cfg(unix)]

use std::time::Duration;

use callsign_tests::{
    channel::{over, until_ready},
    greeter,
    load::{closed_loop, greet},
    pb::greeter_client::GreeterClient,
    process::Process,
};
use tonic::transport::{Channel, Endpoint};

const DEADLINE: Duration = Duration::from_secs(2);

/// Long enough that what a machine costs without optimization does not double it; with `--release` 2 ms will do
const FAST: Duration = Duration::from_millis(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_ten_times_slower_gets_few_calls_and_costs_no_throughput() {
    let servers = [
        greeter!().delay(FAST).start().await,
        greeter!().delay(FAST).start().await,
        greeter!().delay(10 * FAST).start().await,
    ];
    let channel = over(servers.each_ref().map(Process::address));
    until_ready(&channel, 3).await;
    let ours = GreeterClient::new(channel);
    let endpoints = servers.each_ref().map(|server| {
        Endpoint::from_shared(format!("http://{}", server.address())).expect("an address makes a URL")
    });
    let theirs = GreeterClient::new(Channel::balance_list(endpoints.into_iter()));
    // It connects as it is called.
    for _ in 0..20 {
        greet(theirs.clone(), DEADLINE).await.unwrap();
    }

    let lasting = Duration::from_secs(8);
    let ours = closed_loop(32, lasting, move || greet(ours.clone(), DEADLINE)).await;
    let theirs = closed_loop(32, lasting, move || greet(theirs.clone(), DEADLINE)).await;
    assert!(ours.failed().is_empty() && theirs.failed().is_empty(), "{ours}\n{theirs}");
    let share = ours.share_of(&servers[2].address().to_string());
    let fast = servers[..2].iter().map(|server| ours.median_latency(&server.address().to_string()));
    let fast = fast.collect::<Vec<_>>();
    let ratio = ours.calls.len() as f64 / theirs.calls.len() as f64;
    println!(
        "share of the slow one: {share:.4}, latency of the fast ones: {fast:?}, throughput over tonic's: {ratio:.2}"
    );
    assert!(share <= 0.035, "the slow one's share: {share} of {}, fast ones: {fast:?}", ours.calls.len());
    assert!(ratio >= 2.0, "{} calls beside tonic's {}", ours.calls.len(), theirs.calls.len());
}
