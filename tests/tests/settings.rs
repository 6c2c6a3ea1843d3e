//! What a channel's settings make of its calls

use std::time::Duration;

use callsign::{
    Address, Channel, EndpointAddress,
    discover::{Fixed, fixed},
    policy::{Candidate, Pick, Policy},
};
use callsign_tests::{
    bare::Bare,
    channel::until_ready,
    echo::{Chunk, echo_client::EchoClient},
    pb::{HelloRequest, greeter_client::GreeterClient},
    peers::Peer,
    service::Local,
    wait,
};
use tonic::Code;

const BOUND: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(500);
/// Longer than any test
const FOR_EVER: u32 = 600_000;

fn builder(address: Address) -> callsign::channel::ChannelBuilder<Fixed> {
    Channel::builder(fixed([address]))
}

/// `user-agent` and `:authority` of one call
async fn head(server: &Bare, channel: Channel) -> [String; 2] {
    EchoClient::new(channel).unary(Chunk::default()).await.expect("the server answers");
    let [head] = &server.take_heads()[..] else { panic!("one call, one head") };
    let agent = head.headers["user-agent"].to_str().expect("printable");
    [agent, head.uri.authority().expect("every call has one").as_str()].map(ToOwned::to_owned)
}

#[tokio::test]
async fn user_agent_and_authority_are_as_set() {
    let server = Bare::well().await;
    let [agent, authority] = head(&server, builder(server.address()).build().unwrap()).await;
    assert!(agent.starts_with("callsign/"), "{agent}");
    assert_eq!(authority, server.address().to_string());

    let set = builder(server.address()).user_agent("mine/1.2").authority("hello.internal:80");
    let [own, authority] = head(&server, set.build().unwrap()).await;
    assert_eq!(own, format!("mine/1.2 {agent}"));
    assert_eq!(authority, "hello.internal:80");
}

#[tokio::test]
async fn a_methods_timeout_is_its_own() {
    let server = Local::start().await;
    let channel = builder(server.address()).timeout(BOUND / 2).method_timeout("/test.Echo/Unary", SHORT);
    let mut client = EchoClient::new(channel.build().unwrap());
    let call = client.unary(Chunk { rest_ms: FOR_EVER, ..Chunk::default() });
    let (outcome, took) = wait::timed(call).await;
    assert_eq!(outcome.unwrap_err().code(), Code::DeadlineExceeded);
    assert!((SHORT..BOUND / 2).contains(&took), "{took:?}");

    // Another method, which takes longer than that.
    let slow = tokio_stream::iter([Chunk { rest_ms: 700, ..Chunk::default() }]);
    client.upload(slow).await.unwrap();
}

#[tokio::test]
async fn a_pick_timeout_of_zero_waits_for_nobody() {
    let peer = Peer::deaf();
    let channel = builder(peer.address()).pick_timeout(Duration::ZERO).build().unwrap();
    let mut client = GreeterClient::new(channel);
    let (outcome, took) = wait::timed(client.say_hello(HelloRequest::default())).await;
    let status = outcome.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(took < Duration::from_secs(1), "the default: {took:?}");
}

/// The last one that is allowed
struct Last;

impl Policy for Last {
    type Plan = ();

    fn plan(&self, _: &[Candidate]) {}

    fn pick(&self, (): &(), candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        candidates.iter().rposition(|candidate| call.allows(candidate))
    }
}

#[tokio::test]
async fn a_policy_of_ones_own_picks() {
    let servers = [Local::start().await, Local::start().await, Local::start().await];
    let addresses = servers.each_ref().map(Local::address);
    let channel = Channel::builder(fixed(addresses.clone())).policy(Last).build().unwrap();
    until_ready(&channel, 3).await;
    let mut client = GreeterClient::new(channel);
    for _ in 0..20 {
        let reply = client.say_hello(HelloRequest::default()).await.unwrap();
        assert_eq!(reply.extensions().get(), Some(&EndpointAddress(addresses[2].clone())));
    }
}
