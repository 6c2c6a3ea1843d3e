//! How calls spread over servers: equal ones, a slow one, weighted ones

#![cfg(unix)]

use std::{collections::HashMap, time::Duration};

use callsign::{
    Channel, EndpointAddress, Instance, Metadata,
    policy::{P2cEwma, Policy},
};
use callsign_tests::{
    channel::{changing, over, until_ready},
    greeter,
    load::{Load, Pace, closed_loop, greet},
    pb::{HelloRequest, greeter_client::GreeterClient},
    process::Process,
    service::who,
};
use tonic::transport::Endpoint;

const DEADLINE: Duration = Duration::from_secs(2);

/// Calls two equal servers so many at a time
async fn two_equal_servers_share(at_a_time: u32) {
    let servers = [greeter!().start().await, greeter!().start().await];
    let channel = over(servers.each_ref().map(Process::address));
    until_ready(&channel, 2).await;
    let client = GreeterClient::new(channel);
    let pace = Pace { rate: 200, lasting: Duration::from_secs(6) };
    let load = pace.at_a_time(at_a_time, || greet(client.clone(), DEADLINE)).await;
    load.assert_none_failed(pace);
    for server in &servers {
        let share = load.share_of(&server.address().to_string());
        assert!((0.4..=0.6).contains(&share), "{}: {share}", server.address());
    }
}

#[tokio::test]
async fn two_equal_servers_share_calls_that_come_one_after_the_other() {
    two_equal_servers_share(1).await;
}

#[tokio::test]
async fn two_equal_servers_share_calls_that_come_sixteen_at_a_time() {
    two_equal_servers_share(16).await;
}

#[tokio::test]
async fn the_response_says_who_answered() {
    let servers = [greeter!().start().await, greeter!().start().await];
    let channel = over(servers.each_ref().map(Process::address));
    let mut client = GreeterClient::new(channel);
    for _ in 0..20 {
        let reply = client.say_hello(HelloRequest { name: "who".to_owned() }).await.unwrap();
        let EndpointAddress(address) = reply.extensions().get().expect("the channel adds it");
        assert_eq!(who(reply.get_ref()), address.to_string());
    }
}

/// Long enough that waiting decides, not the machine: some thousand calls a second at most
const FAST: Duration = Duration::from_millis(30);

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
    let theirs = GreeterClient::new(tonic::transport::Channel::balance_list(endpoints.into_iter()));
    // It connects as it is called.
    for _ in 0..20 {
        greet(theirs.clone(), DEADLINE).await.unwrap();
    }

    let lasting = Duration::from_secs(8);
    let ours = closed_loop(32, lasting, move || greet(ours.clone(), DEADLINE)).await;
    let theirs = closed_loop(32, lasting, move || greet(theirs.clone(), DEADLINE)).await;
    assert!(ours.failed().is_empty() && theirs.failed().is_empty(), "{ours}\n{theirs}");
    let share = ours.share_of(&servers[2].address().to_string());
    assert!(share <= 0.035, "the slow one's share: {share} of {}", ours.calls.len());
    let ratio = ours.calls.len() as f64 / theirs.calls.len() as f64;
    assert!(ratio >= 2.0, "{} calls beside tonic's {}", ours.calls.len(), theirs.calls.len());
}
