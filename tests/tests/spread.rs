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
    stall::on_a_steady_machine,
};

const DEADLINE: Duration = Duration::from_secs(2);

/// Calls two equal servers so many at a time
async fn two_equal_servers_share(at_a_time: u32) {
    let servers = [greeter!().start().await, greeter!().start().await];
    let channel = over(servers.each_ref().map(Process::address));
    until_ready(&channel, 2).await;
    let client = GreeterClient::new(channel);
    // Long enough that a server which a busy machine slows down for a second or two has its share all the same.
    let pace = Pace { rate: 200, lasting: Duration::from_secs(18) };
    let load = pace.at_a_time(at_a_time, || greet(client.clone(), DEADLINE)).await;
    load.assert_none_failed(pace);
    let share = load.share_of(&servers[0].address().to_string());
    assert!((0.4..=0.6).contains(&share), "one of the two has {share:.2} of the calls");
}

#[tokio::test]
async fn two_equal_servers_share_calls_that_come_one_after_the_other() {
    on_a_steady_machine(|| two_equal_servers_share(1)).await;
}

#[tokio::test]
async fn two_equal_servers_share_calls_that_come_sixteen_at_a_time() {
    on_a_steady_machine(|| two_equal_servers_share(16)).await;
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
