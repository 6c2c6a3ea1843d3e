//! How calls spread over equal servers

#![cfg(unix)]

use std::time::Duration;

use callsign::EndpointAddress;
use callsign_tests::{
    channel::{over, until_ready},
    greeter,
    load::{Pace, greet},
    pb::{HelloRequest, greeter_client::GreeterClient},
    process::Process,
    service::who,
};

const DEADLINE: Duration = Duration::from_secs(2);

/// Calls two equal servers so many at a time
///
/// On a busy machine one of two servers may be slower for seconds, and then has less: of three rounds one is to be fair.
async fn two_equal_servers_share(at_a_time: u32) {
    let servers = [greeter!().start().await, greeter!().start().await];
    let channel = over(servers.each_ref().map(Process::address));
    until_ready(&channel, 2).await;
    let client = GreeterClient::new(channel);
    let pace = Pace { rate: 200, lasting: Duration::from_secs(6) };
    let one = servers[0].address().to_string();
    let mut shares = Vec::new();
    for _ in 0..3 {
        let load = pace.at_a_time(at_a_time, || greet(client.clone(), DEADLINE)).await;
        load.assert_none_failed(pace);
        shares.push(load.share_of(&one));
        if (0.4..=0.6).contains(&load.share_of(&one)) {
            return;
        }
    }
    panic!("shares of one of the two: {shares:.2?}");
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
