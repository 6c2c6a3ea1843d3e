//! How calls spread over equal servers

#![cfg(unix)]

use std::time::Duration;

use callsign::EndpointAddress;
use callsign_tests::{
    channel::over,
    greeter,
    load::{Pace, greet},
    pb::{HelloRequest, greeter_client::GreeterClient},
    service::who,
};

#[tokio::test]
async fn two_equal_servers_share_calls_that_come_one_after_the_other() {
    let servers = [greeter!().start().await, greeter!().start().await];
    let channel = over(servers.each_ref().map(|server| server.address()));
    let client = GreeterClient::new(channel);
    let pace = Pace { rate: 200, lasting: Duration::from_secs(5) };
    let load = pace.one_after_the_other(|| greet(client.clone(), Duration::from_secs(2))).await;
    load.assert_none_failed(pace);
    for server in &servers {
        let share = load.share_of(&server.address().to_string());
        assert!((0.4..=0.6).contains(&share), "{}: {share}", server.address());
    }
}

#[tokio::test]
async fn the_response_says_who_answered() {
    let servers = [greeter!().start().await, greeter!().start().await];
    let channel = over(servers.each_ref().map(|server| server.address()));
    let mut client = GreeterClient::new(channel);
    for _ in 0..20 {
        let reply = client.say_hello(HelloRequest { name: "who".to_owned() }).await.unwrap();
        let EndpointAddress(address) = reply.extensions().get().expect("the channel adds it");
        assert_eq!(who(reply.get_ref()), address.to_string());
    }
}
