//! One endpoint of three is no server at all, and no call notices

#![cfg(unix)]

use std::time::{Duration, Instant};

use callsign::{EndpointInfo, EndpointState};
use callsign_tests::{
    channel::{UpdateLog, over},
    greeter,
    load::{Pace, greet},
    pb::greeter_client::GreeterClient,
    peers::Peer,
};

const PACE: Pace = Pace { rate: 200, lasting: Duration::from_secs(6) };

/// Calls for 6 s over two servers and `peer`; afterwards, what the channel says about the peer
async fn none_fails_beside(peer: &Peer, deadline: Duration) -> EndpointInfo {
    let servers = [greeter!().start().await, greeter!().start().await];
    let addresses = [servers[0].address(), peer.address(), servers[1].address()];
    let began = Instant::now();
    let channel = over(addresses);
    let log = UpdateLog::new(channel.updates());
    let client = GreeterClient::new(channel.clone());
    let load = PACE.open_loop(|| greet(client.clone(), deadline)).await;

    load.assert_none_failed(PACE);
    let states = log.states(&peer.address(), began);
    assert!(states.iter().all(|(_, state)| *state != EndpointState::Ready), "{states:?}");
    let endpoints = channel.endpoints();
    let endpoint = endpoints.iter().find(|endpoint| endpoint.address == peer.address());
    let endpoint = endpoint.expect("the endpoint is known").clone();
    assert_eq!((endpoint.started, endpoint.in_flight), (0, 0), "no call went there");
    endpoint
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_beside_an_address_where_nobody_listens() {
    let endpoint = none_fails_beside(&Peer::deaf(), Duration::from_secs(2)).await;
    let cause = endpoint.last_error.expect("attempts have failed by now");
    assert!(cause.contains("refused"), "{cause}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_beside_a_peer_that_accepts_and_never_speaks() {
    let endpoint = none_fails_beside(&Peer::mute().await, Duration::from_secs(2)).await;
    // One attempt may take 20 s: it has not failed yet.
    assert_eq!(endpoint.state, EndpointState::Connecting);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_beside_a_peer_that_speaks_http_1() {
    let endpoint = none_fails_beside(&Peer::http1().await, Duration::from_secs(2)).await;
    let cause = endpoint.last_error.expect("attempts have failed by now");
    assert!(cause.contains("HTTP/2"), "{cause}");
    assert_eq!(endpoint.state, EndpointState::Backoff);
}
