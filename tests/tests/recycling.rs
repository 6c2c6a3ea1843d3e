//! Servers that send their clients away every 200 ms

use std::time::{Duration, Instant};

use callsign::EndpointState;
use callsign_tests::{
    channel::{UpdateLog, over},
    greeter,
    load::{Pace, greet},
    pb::greeter_client::GreeterClient,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_while_the_servers_recycle_their_connections_every_200_ms() {
    let age = Duration::from_millis(200);
    let servers =
        [greeter!().max_connection_age(age).start().await, greeter!().max_connection_age(age).start().await];
    let began = Instant::now();
    let channel = over(servers.each_ref().map(|server| server.address()));
    let log = UpdateLog::new(channel.updates());
    let client = GreeterClient::new(channel);
    let load = Pace::FULL.open_loop(|| greet(client.clone(), Duration::from_secs(2))).await;

    load.assert_none_failed(Pace::FULL);
    for server in &servers {
        let states = log.states(&server.address(), began);
        let connected = states.iter().filter(|(_, state)| *state == EndpointState::Ready).count();
        // 60 at most; a server that is never left would make this test mean nothing.
        assert!(connected > 15, "{} was connected {connected} times", server.address());
    }
}
