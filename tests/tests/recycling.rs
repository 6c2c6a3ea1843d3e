//! Servers that send their clients away every 200 ms

#![cfg(unix)]

use std::time::{Duration, Instant};

use bytes::Bytes;
use callsign::{Channel, EndpointState};
use callsign_tests::{
    channel::{UpdateLog, over},
    echo::{Chunk, echo_client::EchoClient},
    greeter,
    load::{Pace, greet},
    pb::greeter_client::GreeterClient,
    service::Local,
};
use tonic::transport::Server;

const PACE: Pace = Pace { rate: 200, lasting: Duration::from_secs(6) };

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_while_the_servers_recycle_their_connections_every_200_ms() {
    let age = Duration::from_millis(200);
    let servers =
        [greeter!().max_connection_age(age).start().await, greeter!().max_connection_age(age).start().await];
    let began = Instant::now();
    let channel = over(servers.each_ref().map(|server| server.address()));
    let log = UpdateLog::new(channel.updates());
    let client = GreeterClient::new(channel);
    let load = PACE.open_loop(|| greet(client.clone(), Duration::from_secs(2))).await;

    load.assert_none_failed(PACE);
    for server in &servers {
        let states = log.states(&server.address(), began);
        let connected = states.iter().filter(|(_, state)| *state == EndpointState::Ready).count();
        // 30 at most; a server that is never left would make this test mean nothing.
        assert!(connected > 7, "{} was connected {connected} times", server.address());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_is_processed_twice_while_the_servers_recycle_their_connections() {
    let server = || Local::start_with(Server::builder().max_connection_age(Duration::from_millis(200)));
    let servers = [server().await, server().await];
    let client = EchoClient::new(over(servers.each_ref().map(Local::address)));
    // Long enough that several are in flight whenever a server says GOAWAY.
    let call = |mut client: EchoClient<Channel>| async move {
        client.unary(Chunk { payload: Bytes::new(), rest_ms: 30 }).await.map(|_| String::new())
    };
    let load = PACE.open_loop(move || call(client.clone())).await;

    load.assert_none_failed(PACE);
    let processed: u64 = servers.iter().map(|server| server.calls().started()).sum();
    assert_eq!(processed, u64::from(PACE.calls()));
}
