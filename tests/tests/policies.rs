//! What policies do with weights and keys, over real connections

#![cfg(unix)]

use std::{collections::BTreeMap, time::Duration};

use callsign::{
    Address, Channel, EndpointAddress, HashKey, Instance, Metadata,
    policy::{P2cEwma, Policy, RingHash, WeightedRoundRobin},
};
use callsign_tests::{
    channel::{Changes, changing, until_ready},
    greeter,
    load::{Pace, greet},
    pb::{HelloRequest, greeter_client::GreeterClient},
    service::Local,
    wait,
};
use tonic::Request;

const BOUND: Duration = Duration::from_secs(10);

/// In this order
const WEIGHTS: [u32; 3] = [1, 2, 7];

/// The part of 10 000 calls that each of three servers with these weights gets
async fn shares(policy: impl Policy) -> [f64; 3] {
    let start = || greeter!().delay(Duration::ZERO).start();
    let servers = [start().await, start().await, start().await];
    let (channel, _log, changes) = changing(|builder| builder.policy(policy));
    for (server, weight) in servers.iter().zip(WEIGHTS) {
        let mut instance = Instance::new(server.address());
        instance.metadata = Metadata::new().with_weight(weight);
        changes.insert(instance);
    }
    until_ready(&channel, 3).await;
    // Faster than anybody answers: as fast as it goes.
    let pace = Pace { rate: 10_000, lasting: Duration::from_secs(1) };
    let client = GreeterClient::new(channel);
    let load = pace.at_a_time(16, || greet(client.clone(), BOUND)).await;
    load.assert_none_failed(pace);
    servers.each_ref().map(|server| load.share_of(&server.address().to_string()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn weighted_round_robin_shares_calls_by_weight() {
    let shares = shares(WeightedRoundRobin::new()).await;
    for (share, weight) in shares.iter().zip(WEIGHTS) {
        let fair = f64::from(weight) / 10.0;
        assert!((share - fair).abs() <= 0.01, "weight {weight}: {shares:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p2c_ewma_follows_the_order_of_weights() {
    let shares = shares(P2cEwma::new()).await;
    assert!(shares.is_sorted() && shares[0] < shares[1] && shares[1] < shares[2], "{shares:?}");
}

/// Who answers for each of many keys
async fn placed(channel: &Channel) -> BTreeMap<u32, Address> {
    let mut client = GreeterClient::new(channel.clone());
    let mut placed = BTreeMap::new();
    for key in 0..500_u32 {
        let mut request = Request::new(HelloRequest::default());
        request.extensions_mut().insert(HashKey::new(key.to_be_bytes()));
        let reply = client.say_hello(request).await.expect("all servers answer");
        let EndpointAddress(address) = reply.extensions().get().expect("the channel adds it");
        placed.insert(key, address.clone());
    }
    placed
}

async fn until_gone(channel: &Channel, changes: &Changes, address: &Address) {
    changes.remove(address);
    let gone = || channel.endpoints().iter().all(|endpoint| endpoint.address != *address);
    wait::until("it is gone", BOUND, || gone().then_some(())).await;
}

#[tokio::test]
async fn ring_hash_keeps_each_key_where_it_is_and_moves_only_those_of_who_leaves() {
    let (channel, _log, changes) = changing(|builder| builder.policy(RingHash::new()));
    let mut servers = Vec::new();
    for _ in 0..10 {
        let server = Local::start().await;
        changes.insert(server.address());
        servers.push(server);
    }
    until_ready(&channel, 10).await;
    let before = placed(&channel).await;
    assert_eq!(placed(&channel).await, before, "the same key, the same endpoint");

    let leaver = servers[3].address();
    assert!(before.values().any(|address| *address == leaver), "it had keys");
    until_gone(&channel, &changes, &leaver).await;
    let without = placed(&channel).await;
    for (key, address) in &before {
        assert_eq!(without[key] != *address, *address == leaver, "key {key}");
    }

    changes.insert(leaver);
    until_ready(&channel, 10).await;
    assert_eq!(placed(&channel).await, before, "they return with it");
}
