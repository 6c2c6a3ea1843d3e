//! Deadlines, waiting for a server, and endpoints that come and go

use std::{convert::Infallible, time::Duration};

use bytes::Bytes;
use callsign::{Address, Channel, EndpointAddress, EndpointState, Instance, WaitForReady, discover};
use callsign_tests::{
    channel::{UpdateLog, over},
    echo::{Chunk, Wanted, echo_client::EchoClient},
    load::greet,
    pb::{HelloRequest, greeter_client::GreeterClient},
    peers::Peer,
    service::Local,
    wait,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request};
use tower::discover::Change;

const BOUND: Duration = Duration::from_secs(2);
const SHORT: Duration = Duration::from_millis(500);
/// Longer than any test
const FOR_EVER: u32 = 600_000;

fn around_short(took: Duration) -> bool {
    (SHORT..3 * SHORT).contains(&took)
}

fn resting() -> Chunk {
    Chunk { payload: Bytes::new(), rest_ms: FOR_EVER }
}

#[tokio::test]
async fn a_callers_deadline_ends_a_call_that_names_its_endpoint() {
    let server = Local::start().await;
    let mut request = Request::new(resting());
    request.set_timeout(SHORT);
    let mut client = EchoClient::new(over([server.address()]));
    let (status, took) = wait::timed(client.unary(request)).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!(around_short(took), "{took:?}");
    assert!(status.message().contains(&server.address().to_string()), "{status:?}");
    wait::until("the server lets go", BOUND, || (server.calls().open() == 0).then_some(())).await;
}

#[tokio::test]
async fn a_callers_deadline_covers_the_body_and_the_channels_own_does_not() {
    let server = Local::start().await;
    let channel = Channel::builder(discover::fixed([server.address()])).timeout(SHORT).build().unwrap();
    let mut client = EchoClient::new(channel);
    let wanted = Wanted { chunks: 5, size: 1, rest_ms: 250 };

    let mut down = client.download(wanted).await.unwrap().into_inner();
    for _ in 0..5 {
        down.message().await.unwrap().unwrap();
    }
    assert_eq!(down.message().await.unwrap(), None);

    let mut request = Request::new(wanted);
    request.set_timeout(SHORT);
    let mut down = client.download(request).await.unwrap().into_inner();
    let status = loop {
        match down.message().await {
            Ok(chunk) => assert!(chunk.is_some(), "the stream was cut"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");

    let (status, took) = wait::timed(client.unary(resting())).await;
    assert_eq!(status.unwrap_err().code(), Code::DeadlineExceeded);
    assert!(around_short(took), "the channel's own timeout covers a unary call: {took:?}");
}

#[tokio::test]
async fn waiting_for_an_endpoint_takes_the_pick_timeout_or_all_of_the_deadline() {
    let peer = Peer::deaf();
    let channel =
        Channel::builder(discover::fixed([peer.address()])).pick_timeout(SHORT).name("hello.rpc").build();
    let mut client = GreeterClient::new(channel.unwrap());
    let (status, took) = wait::timed(client.say_hello(HelloRequest::default())).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(around_short(took) && status.message().contains("hello.rpc"), "{took:?}: {status:?}");

    let mut request = Request::new(HelloRequest::default());
    request.extensions_mut().insert(WaitForReady);
    request.set_timeout(3 * SHORT);
    let (status, took) = wait::timed(client.say_hello(request)).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!((3 * SHORT..5 * SHORT).contains(&took), "{took:?}");
}

/// What a test tells a channel about its endpoints
type Changes = mpsc::UnboundedSender<Result<Change<Address, Instance>, Infallible>>;

fn changing() -> (Channel, UpdateLog, Changes) {
    let (changes, discover) = mpsc::unbounded_channel();
    let channel =
        Channel::builder(UnboundedReceiverStream::new(discover)).build().expect("the defaults are valid");
    let log = UpdateLog::new(channel.updates());
    (channel, log, changes)
}

fn insert(server: &Local) -> Result<Change<Address, Instance>, Infallible> {
    Ok(Change::Insert(server.address(), server.address().into()))
}

#[tokio::test]
async fn a_removed_endpoint_gets_no_new_calls_and_ends_with_its_last_stream() {
    let began = std::time::Instant::now();
    let [removed, kept] = [Local::start().await, Local::start().await];
    let (channel, log, changes) = changing();
    changes.send(insert(&removed)).unwrap();
    let mut client = EchoClient::new(channel.clone());
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut echoes = client.bidi(UnboundedReceiverStream::new(receiver)).await.unwrap().into_inner();

    changes.send(insert(&kept)).unwrap();
    log.until(&kept.address(), EndpointState::Ready, began, BOUND).await;
    changes.send(Ok(Change::Remove(removed.address()))).unwrap();
    log.until(&removed.address(), EndpointState::Draining, began, BOUND).await;

    for _ in 0..50 {
        let reply = client.unary(Chunk::default()).await.unwrap();
        assert_eq!(reply.extensions().get(), Some(&EndpointAddress(kept.address())));
        sender.send(Chunk { payload: "still here".into(), rest_ms: 0 }).unwrap();
        assert_eq!(echoes.message().await.unwrap().unwrap().payload, "still here");
    }
    let states = log.states(&removed.address(), began);
    assert!(states.iter().all(|(_, state)| *state != EndpointState::Gone), "{states:?}");

    drop(sender);
    assert_eq!(echoes.message().await.unwrap(), None);
    drop(echoes);
    log.until(&removed.address(), EndpointState::Gone, began, BOUND).await;
    assert_eq!(
        channel.endpoints().iter().map(|endpoint| &endpoint.address).collect::<Vec<_>>(),
        [&kept.address()]
    );
}

#[tokio::test]
async fn a_discovery_that_ends_leaves_the_set_as_it_was() {
    let server = Local::start().await;
    let (channel, log, changes) = changing();
    changes.send(insert(&server)).unwrap();
    log.until(&server.address(), EndpointState::Ready, std::time::Instant::now() - BOUND, BOUND).await;
    drop(changes);
    for _ in 0..20 {
        greet(GreeterClient::new(channel.clone()), BOUND).await.unwrap();
    }
    assert_eq!(channel.endpoints().len(), 1);
}
