//! Deadlines, waiting for a server, and endpoints that come and go

use std::time::Duration;

use bytes::Bytes;
use callsign::{Address, Channel, EndpointAddress, EndpointState, WaitForReady, discover};
use callsign_tests::{
    bare::Bare,
    channel::{changing, over},
    echo::{Chunk, Wanted, echo_client::EchoClient},
    lines::Lines,
    load::greet,
    pb::{HelloRequest, greeter_client::GreeterClient},
    peers::Peer,
    service::Local,
    wait,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request, body::Body};
use tower::Service as _;
use tracing::Level;

/// For what should take no time
const BOUND: Duration = Duration::from_secs(10);
const SHORT: Duration = Duration::from_millis(500);
/// Longer than any test
const FOR_EVER: u32 = 600_000;

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
    assert!((SHORT..BOUND).contains(&took), "{took:?}");
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
    assert!((SHORT..BOUND).contains(&took), "the channel's own timeout covers a unary call: {took:?}");
}

#[tokio::test]
async fn waiting_for_an_endpoint_takes_the_pick_timeout_or_all_of_the_deadline() {
    let peer = Peer::deaf();
    // Longer than the default, so that it cannot be taken for that.
    let picking = 3 * SHORT;
    let channel =
        Channel::builder(discover::fixed([peer.address()])).pick_timeout(picking).name("hello.rpc").build();
    let mut client = GreeterClient::new(channel.unwrap());
    let (status, took) = wait::timed(client.say_hello(HelloRequest::default())).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!((picking..BOUND).contains(&took), "{took:?}");
    assert!(status.message().contains("hello.rpc"), "{status:?}");

    let mut request = Request::new(HelloRequest::default());
    request.extensions_mut().insert(WaitForReady);
    request.set_timeout(2 * picking);
    let (status, took) = wait::timed(client.say_hello(request)).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert!((2 * picking..BOUND).contains(&took), "{took:?}");
}

/// Its stream was cancelled by what would have sent the body
#[tokio::test]
async fn a_request_without_a_body_is_sent_and_answered() {
    let server = Bare::well().await;
    let request = http::Request::post("/test.Echo/Unary").body(Body::empty()).unwrap();
    let response = wait::within("the answer", BOUND, over([server.address()]).call(request)).await.unwrap();
    assert_eq!(response.extensions().get(), Some(&EndpointAddress(server.address())));
}

#[tokio::test]
async fn a_server_is_told_what_is_left_of_the_callers_deadline() {
    let server = Bare::well().await;
    let (channel, _log, changes) = changing(|builder| builder);
    let mut client = EchoClient::new(channel);
    let told = |server: &Bare| {
        let [head] = &server.take_heads()[..] else { panic!("one call, one head") };
        head.headers["grpc-timeout"].to_str().unwrap().to_owned()
    };
    let request = || {
        let mut request = Request::new(Chunk::default());
        request.set_timeout(2 * BOUND);
        request.extensions_mut().insert(WaitForReady);
        request
    };
    let mut call = Box::pin(client.unary(request()));
    wait::assert_waits("a call to nobody", &mut call);
    tokio::time::sleep(SHORT).await;
    changes.insert(server.address());
    call.await.unwrap();
    let waited = told(&server);
    // Twenty seconds are written in microseconds, as are nineteen.
    let micros: u64 = waited.strip_suffix('u').unwrap().parse().unwrap();
    assert!(Duration::from_micros(micros) <= 2 * BOUND - SHORT, "{waited}");
    assert!(Duration::from_micros(micros) > BOUND, "{waited}");

    client.unary(request()).await.unwrap();
    assert_eq!(told(&server), "20000000u", "a call that did not wait has all of it");
}

#[tokio::test]
async fn an_endpoint_that_is_named_again_keeps_its_connection() {
    let began = std::time::Instant::now();
    let server = Local::start().await;
    let (channel, log, changes) = changing(|builder| builder);
    changes.insert(server.address());
    log.until(&server.address(), EndpointState::Ready, began, BOUND).await;
    let named_again = std::time::Instant::now();
    changes.insert(server.address());
    // What is named after it is seen after it.
    let other = Local::start().await;
    changes.insert(other.address());
    log.until(&other.address(), EndpointState::Ready, began, BOUND).await;
    assert_eq!(log.states(&server.address(), named_again), []);
    assert_eq!(channel.endpoints().len(), 2);
}

#[tokio::test]
async fn a_removed_endpoint_gets_no_new_calls_and_ends_with_its_last_stream() {
    let began = std::time::Instant::now();
    let [removed, kept] = [Local::start().await, Local::start().await];
    let (channel, log, changes) = changing(|builder| builder);
    changes.insert(removed.address());
    let mut client = EchoClient::new(channel.clone());
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut echoes = client.bidi(UnboundedReceiverStream::new(receiver)).await.unwrap().into_inner();

    changes.insert(kept.address());
    log.until(&kept.address(), EndpointState::Ready, began, BOUND).await;
    changes.remove(&removed.address());
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
async fn an_instance_that_cannot_be_used_any_more_takes_its_endpoint_with_it() {
    let began = std::time::Instant::now();
    let server = Local::start().await;
    let (channel, log, changes) = changing(|builder| builder);
    changes.insert(server.address());
    log.until(&server.address(), EndpointState::Ready, began, BOUND).await;
    // The same key, but calls would now have to be encrypted.
    let encrypted: Address = format!("https://{}", server.address()).parse().unwrap();
    changes.insert_as(&server.address(), encrypted);
    log.until(&server.address(), EndpointState::Gone, began, BOUND).await;
    assert_eq!(channel.endpoints(), []);
}

#[tokio::test]
async fn an_instance_that_cannot_be_used_is_said_once_until_it_is_gone() {
    let lines = Lines::record();
    let (_channel, log, changes) = changing(|builder| builder);
    let key: Address = "127.0.0.1:1".parse().unwrap();
    let encrypted: Address = "https://127.0.0.1:1".parse().unwrap();
    for (round, times) in [(1, 3), (2, 1)] {
        for _ in 0..times {
            changes.insert_as(&key, encrypted.clone());
        }
        // What comes later is seen later.
        let began = std::time::Instant::now();
        let server = Local::start().await;
        changes.insert(server.address());
        log.until(&server.address(), EndpointState::Ready, began, BOUND).await;
        assert_eq!(lines.beginning("instance skipped"), round, "{:?}", lines.at(Level::WARN));
        changes.remove(&key);
    }
}

#[tokio::test]
async fn a_discovery_that_ends_leaves_the_set_as_it_was() {
    let began = std::time::Instant::now();
    let server = Local::start().await;
    let (channel, log, changes) = changing(|builder| builder);
    changes.insert(server.address());
    log.until(&server.address(), EndpointState::Ready, began, BOUND).await;
    drop(changes);
    for _ in 0..20 {
        greet(GreeterClient::new(channel.clone()), BOUND).await.unwrap();
    }
    assert_eq!(channel.endpoints().len(), 1);
}
