//! A caller's panic is the caller's: nothing hangs, nothing stays taken

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::Duration,
};

use callsign::{
    Channel, EndpointState,
    discover::fixed,
    policy::{Candidate, LeastRequest, Pick, Policy},
};
use callsign_tests::{
    channel::over,
    echo::{Chunk, echo_client::EchoClient},
    scripted::{Scripted, code},
    service::Local,
    wait,
};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};

const BOUND: Duration = Duration::from_secs(10);
const PANIC: &str = "a panic on purpose";

fn chunk(payload: &'static str) -> Chunk {
    Chunk { payload: payload.into(), rest_ms: 0 }
}

/// Passes chunks on, and panics at one that says so
fn panicking(chunk: Chunk) -> Chunk {
    assert_ne!(chunk.payload, PANIC);
    chunk
}

/// The server has let go, the channel counts nothing, and the next call works
async fn assert_as_if_nothing_had_been(server: &Local, channel: &Channel) {
    wait::until("the server lets go", BOUND, || (server.calls().open() == 0).then_some(())).await;
    wait::until("nothing is in flight", BOUND, || (channel.endpoints()[0].in_flight == 0).then_some(()))
        .await;
    let mut client = EchoClient::new(channel.clone());
    wait::within("the next call", BOUND, client.unary(Chunk::default())).await.expect("it works");
}

#[tokio::test]
async fn a_panic_of_a_body_before_the_response_reaches_the_caller() {
    let server = Local::start().await;
    let channel = over([server.address()]);
    let mut client = EchoClient::new(channel.clone());
    let body = tokio_stream::iter([chunk("good"), chunk(PANIC)]).map(panicking);
    let call = tokio::spawn(async move { client.upload(body).await.map(drop) });
    let ended = wait::within("the call", BOUND, call).await;
    assert!(ended.unwrap_err().is_panic());
    assert_as_if_nothing_had_been(&server, &channel).await;
}

#[tokio::test]
async fn a_panic_of_a_body_that_waits_reaches_the_caller() {
    let server = Local::start().await;
    let channel = over([server.address()]);
    let mut client = EchoClient::new(channel.clone());
    let (sender, receiver) = mpsc::unbounded_channel();
    let body = UnboundedReceiverStream::new(receiver).map(panicking);
    sender.send(chunk("good")).unwrap();
    let call = tokio::spawn(async move { client.upload(body).await.map(drop) });
    wait::until("the server has begun", BOUND, || (server.calls().open() == 1).then_some(())).await;
    sender.send(chunk(PANIC)).unwrap();
    let ended = wait::within("the call", BOUND, call).await;
    assert!(ended.unwrap_err().is_panic());
    assert_as_if_nothing_had_been(&server, &channel).await;
}

#[tokio::test]
async fn a_panic_of_a_body_after_the_response_has_begun_ends_the_response() {
    let server = Local::start().await;
    let channel = over([server.address()]);
    let mut client = EchoClient::new(channel.clone());
    let (sender, receiver) = mpsc::unbounded_channel();
    let body = UnboundedReceiverStream::new(receiver).map(panicking);
    sender.send(chunk("good")).unwrap();
    let mut echoes = client.bidi(body).await.unwrap().into_inner();
    assert_eq!(echoes.message().await.unwrap(), Some(chunk("good")));

    sender.send(chunk(PANIC)).unwrap();
    let reading = tokio::spawn(async move { echoes.message().await });
    // By the panic itself, or by a status if the reader learns of the reset first.
    match wait::within("the response", BOUND, reading).await {
        Err(ended) => assert!(ended.is_panic()),
        Ok(message) => drop(message.unwrap_err()),
    }
    assert_as_if_nothing_had_been(&server, &channel).await;
}

/// Panics at its first pick
struct Faulty(AtomicBool);

impl Policy for Faulty {
    type Plan = <LeastRequest as Policy>::Plan;

    fn plan(&self, candidates: &[Candidate]) -> Self::Plan {
        LeastRequest::new().plan(candidates)
    }

    fn pick(&self, plan: &Self::Plan, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        assert!(self.0.swap(true, Relaxed) || candidates.is_empty(), "{PANIC}");
        LeastRequest::new().pick(plan, candidates, call)
    }
}

#[tokio::test]
async fn a_panic_of_a_policy_is_one_calls_only() {
    let server = Local::start().await;
    let channel =
        Channel::builder(fixed([server.address()])).policy(Faulty(AtomicBool::new(false))).build().unwrap();
    channel.until_ready().await;
    let mut client = EchoClient::new(channel.clone());
    let call = tokio::spawn(async move { client.unary(Chunk::default()).await.map(drop) });
    assert!(wait::within("the call", BOUND, call).await.unwrap_err().is_panic());
    assert_as_if_nothing_had_been(&server, &channel).await;
}

/// Cannot make a plan for two
struct Overwhelmed;

impl Policy for Overwhelmed {
    type Plan = ();

    fn plan(&self, candidates: &[Candidate]) {
        assert!(candidates.len() < 2, "{PANIC}");
    }

    fn pick(&self, (): &(), candidates: &[Candidate], _: &mut Pick<'_>) -> Option<usize> {
        (!candidates.is_empty()).then_some(0)
    }
}

#[tokio::test]
async fn a_policy_that_panics_over_a_set_is_replaced_for_that_set_alone() {
    let servers = [Local::start().await, Local::start().await];
    let addresses = servers.each_ref().map(Local::address);
    let channel = Channel::builder(fixed(addresses)).policy(Overwhelmed).build().unwrap();
    let ready = |many| {
        let channel = &channel;
        wait::until("as many are ready", BOUND, move || {
            let infos = channel.endpoints();
            let ready = infos.iter().filter(|info| info.state == EndpointState::Ready).count();
            (ready == many).then_some(())
        })
    };
    ready(2).await;
    let mut client = EchoClient::new(channel.clone());
    for _ in 0..20 {
        wait::within("a call", BOUND, client.unary(Chunk::default())).await.expect("it works");
    }
    assert!(channel.endpoints().iter().all(|info| info.started > 0), "{:?}", channel.endpoints());

    let [gone, _left] = servers;
    drop(gone);
    ready(1).await;
    wait::within("a call", BOUND, client.unary(Chunk::default())).await.expect("its own rule works again");
}

#[tokio::test]
async fn a_caller_that_panics_gives_its_stream_back() {
    let server = Scripted::start(|_, peer| async move {
        peer.settings(Some(1)).await;
        peer.headers(0).await;
        let second = peer.headers(1).await;
        peer.end(second).await;
        peer.respond(second).await;
        peer.closed().await;
    })
    .await;
    let channel = over([server.address()]);
    let mut client = EchoClient::new(channel.clone());
    let record = server.record().clone();
    let caller = tokio::spawn(async move {
        tokio::select! {
            _ = client.unary(chunk("first")) => {}
            () = record.until(|calls| (calls.len() == 1).then_some(())) => panic!("{PANIC}"),
        }
    });
    assert!(wait::within("the caller", BOUND, caller).await.unwrap_err().is_panic());
    let mut client = EchoClient::new(channel.clone());
    wait::within("the next call", BOUND, client.unary(chunk("second"))).await.unwrap();
    assert_eq!(server.record().calls()[0].reset, Some(code::CANCEL), "the server knows");
    assert_eq!(channel.endpoints()[0].in_flight, 0);
}
