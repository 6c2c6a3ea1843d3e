//! What is sent again, and what never
//!
//! Each test runs its script with a unary and with a client-streaming call, each with a body below and above the 64 KiB
//! that a channel keeps. The scripted server says of every stream whether it may have processed it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use callsign::{Channel, WaitForReady};
use callsign_tests::{
    channel::over,
    echo::{Chunk, echo_client::EchoClient},
    scripted::{Peer, Scripted, code},
    wait,
};
use prost::Message;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};
use tokio_stream::StreamExt;
use tonic::{Code, Request, Status};

const BOUND: Duration = Duration::from_secs(10);
const CHUNK: usize = 8 * 1024;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Shape {
    Unary,
    /// Sends its size, waits for the test's gate, then sends one more chunk.
    ClientStreaming,
}

/// One cell of the matrix
#[derive(Clone, Copy, Debug)]
struct Case {
    shape: Shape,
    size: usize,
    /// Waits for an endpoint to be ready, so that a call which is sent again comes through whatever it takes.
    patient: bool,
}

const MATRIX: [Case; 4] = [
    Case { shape: Shape::Unary, size: 3 * CHUNK, patient: false },
    Case { shape: Shape::Unary, size: 25 * CHUNK, patient: false },
    Case { shape: Shape::ClientStreaming, size: 3 * CHUNK, patient: false },
    Case { shape: Shape::ClientStreaming, size: 25 * CHUNK, patient: false },
];

impl Case {
    fn patient(self) -> Self {
        Self { patient: true, ..self }
    }

    fn is_kept(self) -> bool {
        self.size < 64 * 1024
    }

    /// What is sent before the gate opens; it begins with the marker
    fn chunks(self, marker: &str) -> Vec<Chunk> {
        let size = if self.shape == Shape::Unary { self.size } else { CHUNK };
        let mut chunks = vec![chunk(vec![b'x'; size]); self.size / size];
        let mut first = chunks[0].payload.to_vec();
        first[..marker.len()].copy_from_slice(marker.as_bytes());
        chunks[0] = chunk(first);
        chunks
    }

    /// What is sent after the gate has opened
    fn last(self) -> Option<Chunk> {
        (self.shape == Shape::ClientStreaming).then(|| chunk(b"last".as_slice()))
    }

    /// Bytes on the wire before the gate opens
    fn sent_at_first(self) -> usize {
        self.chunks("").iter().map(|chunk| wire(chunk).len()).sum()
    }

    /// The whole body on the wire
    fn body(self, marker: &str) -> Vec<u8> {
        self.chunks(marker).iter().chain(&self.last()).flat_map(wire).collect()
    }

    fn request<T>(self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        // Longer than any test, so that a call that hangs is told from one that waits.
        request.set_timeout(2 * BOUND);
        if self.patient {
            request.extensions_mut().insert(WaitForReady);
        }
        request
    }

    /// The call
    async fn call(
        self,
        mut client: EchoClient<Channel>,
        marker: &'static str,
        gate: Gate,
    ) -> Result<(), Status> {
        let chunks = self.chunks(marker);
        match self.shape {
            Shape::Unary => client.unary(self.request(chunks[0].clone())).await.map(drop),
            Shape::ClientStreaming => {
                let chunks = chunks.into_iter().map(|chunk| (false, chunk));
                let chunks = chunks.chain(self.last().map(|chunk| (true, chunk)));
                let body = tokio_stream::iter(chunks.collect::<Vec<_>>()).then(move |(gated, chunk)| {
                    let gate = gate.clone();
                    async move {
                        if gated {
                            gate.opened().await;
                        }
                        chunk
                    }
                });
                client.upload(self.request(body)).await.map(drop)
            }
        }
    }

    fn spawn(
        self,
        client: &EchoClient<Channel>,
        marker: &'static str,
        gate: &Gate,
    ) -> JoinHandle<Result<(), Status>> {
        tokio::spawn(self.call(client.clone(), marker, gate.clone()))
    }
}

fn chunk(payload: impl Into<Bytes>) -> Chunk {
    Chunk { payload: payload.into(), rest_ms: 0 }
}

/// A message as gRPC frames it
fn wire(chunk: &Chunk) -> Vec<u8> {
    let message = chunk.encode_to_vec();
    let length = u32::try_from(message.len()).expect("a short message");
    [&[0], &length.to_be_bytes()[..], &message].concat()
}

/// Closed at first; clones share it
#[derive(Clone)]
struct Gate(Arc<watch::Sender<bool>>);

impl Gate {
    fn new() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }

    fn open(&self) {
        self.0.send_replace(true);
    }

    async fn opened(&self) {
        self.0.subscribe().wait_for(|open| *open).await.expect("the gate holds the sender");
    }
}

fn client(server: &Scripted) -> EchoClient<Channel> {
    EchoClient::new(over([server.address()]))
}

/// Runs a test for each cell of the matrix, which it names when it fails
async fn for_each_case<F: Future<Output = ()> + Send + 'static>(test: impl Fn(Case) -> F) {
    for case in MATRIX {
        // A task of its own, so that a panic can be told with the case.
        let outcome = wait::within(&format!("{case:?}"), 2 * BOUND, tokio::spawn(test(case))).await;
        assert!(outcome.is_ok(), "{case:?} failed, see above");
    }
}

fn assert_unavailable(outcome: Result<(), Status>) {
    let status = outcome.expect_err("the call is lost");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
}

/// The call was taken once in all, complete, and sent `times`
fn assert_taken_once(server: &Scripted, case: Case, marker: &str, times: usize) {
    let record = server.record();
    assert_eq!((record.times_sent(marker), record.times_processed(marker)), (times, 1), "{marker}");
    let calls = record.calls();
    let taken = calls.iter().find(|call| call.is_call(marker) && call.is_processed()).expect("it was taken");
    assert!(taken.body == case.body(marker), "the body is whole: {} bytes", taken.body.len());
}

/// A first connection with room for one stream: answers a call, holds the next, then runs `then`; all others serve
///
/// The answered call makes it a connection that has worked: the loss of one that never did is followed by a backoff.
async fn with_room_for_one<F>(
    case: Case,
    go: Arc<Notify>,
    then: impl Fn(u32, Peer) -> F + Clone + Send + Sync + 'static,
) -> Scripted
where
    F: Future<Output = ()> + Send + 'static,
{
    Scripted::start(move |connection, peer| {
        let (go, then) = (go.clone(), then.clone());
        async move {
            if connection > 0 {
                peer.settings(None).await;
                return peer.serve().await;
            }
            peer.settings(Some(1)).await;
            let answered = peer.headers(0).await;
            peer.end(answered).await;
            peer.respond(answered).await;
            let stream = peer.headers(1).await;
            peer.body(stream, case.sent_at_first()).await;
            go.notified().await;
            then(stream, peer).await;
        }
    })
    .await
}

#[tokio::test]
async fn a_call_that_waits_for_a_stream_goes_elsewhere_when_the_connection_closes() {
    for_each_case(|case| async move {
        let go = Arc::new(Notify::new());
        let server = with_room_for_one(case, go.clone(), |_, peer| async move { peer.close() }).await;
        let (client, gate) = (client(&server), Gate::new());
        MATRIX[0].call(client.clone(), "answered", gate.clone()).await.unwrap();
        let first = case.spawn(&client, "first", &gate);
        server.record().until(|calls| (calls.len() == 2).then_some(())).await;
        let mut second = Box::pin(case.call(client, "second", gate.clone()));
        wait::assert_waits("a call without a stream", &mut second);

        let second = tokio::spawn(second);
        go.notify_one();
        assert_unavailable(first.await.unwrap());
        gate.open();
        second.await.unwrap().unwrap();
        assert_eq!((server.record().times_sent("first"), server.record().times_processed("first")), (1, 1));
        assert_taken_once(&server, case, "second", 1);
    })
    .await;
}

#[tokio::test]
async fn a_call_that_waits_for_a_stream_goes_elsewhere_after_goaway_and_the_first_ends_where_it_is() {
    for_each_case(|case| async move {
        let go = Arc::new(Notify::new());
        let server = with_room_for_one(case, go.clone(), |stream, peer| async move {
            peer.goaway(stream, code::NO_ERROR).await;
            peer.serve().await;
        })
        .await;
        let (client, gate) = (client(&server), Gate::new());
        MATRIX[0].call(client.clone(), "answered", gate.clone()).await.unwrap();
        let first = case.spawn(&client, "first", &gate);
        server.record().until(|calls| (calls.len() == 2).then_some(())).await;
        let mut second = Box::pin(case.call(client, "second", gate.clone()));
        wait::assert_waits("a call without a stream", &mut second);

        let second = tokio::spawn(second);
        go.notify_one();
        gate.open();
        first.await.unwrap().unwrap();
        second.await.unwrap().unwrap();
        assert_taken_once(&server, case, "first", 1);
        assert_taken_once(&server, case, "second", 1);
        let calls = server.record().calls();
        assert!(calls.iter().all(|call| call.connection == usize::from(call.is_call("second"))), "{calls:?}");
    })
    .await;
}

#[tokio::test]
async fn calls_beyond_the_limit_of_streams_wait_for_their_turn() {
    let server = Scripted::start(|_, peer| async move {
        peer.settings(Some(1)).await;
        peer.serve().await;
    })
    .await;
    let (client, gate) = (client(&server), Gate::new());
    gate.open();
    let calls: Vec<_> = (0..100).map(|nth| MATRIX[nth % 4].spawn(&client, "one of many", &gate)).collect();
    for call in calls {
        wait::within("one of many", BOUND, call).await.unwrap().unwrap();
    }
    let calls = server.record().calls();
    assert_eq!((calls.len(), calls.iter().map(|call| call.open).max()), (100, Some(1)));
}

/// Makes a call, opens its gate once it is sent again, and returns what became of it
async fn sent_again(server: &Scripted, case: Case) -> Result<(), Status> {
    let gate = Gate::new();
    let mut call = case.patient().spawn(&client(server), "refused", &gate);
    let again = server.record().until(|calls| (calls.len() > 1).then_some(()));
    tokio::select! {
        outcome = &mut call => return outcome.expect("the call does not panic"),
        () = again => {}
    }
    gate.open();
    call.await.expect("the call does not panic")
}

#[tokio::test]
async fn a_refused_call_is_sent_again_if_its_body_is_still_kept() {
    for_each_case(|case| async move {
        let server = Scripted::start(move |_, peer| async move {
            peer.settings(None).await;
            let stream = peer.headers(0).await;
            peer.body(stream, case.sent_at_first()).await;
            peer.refuse(stream).await;
            peer.serve().await;
        })
        .await;
        let outcome = sent_again(&server, case).await;
        if case.is_kept() {
            outcome.unwrap();
            assert_taken_once(&server, case, "refused", 2);
        } else {
            assert_unavailable(outcome);
            assert_eq!(server.record().times_sent("refused"), 1);
        }
    })
    .await;
}

#[tokio::test]
async fn a_refused_call_is_sent_again_only_once() {
    for_each_case(|case| async move {
        let server = Scripted::start(move |_, peer| async move {
            peer.settings(None).await;
            for nth in 0.. {
                let stream = peer.headers(nth).await;
                peer.body(stream, case.sent_at_first()).await;
                peer.refuse(stream).await;
            }
        })
        .await;
        assert_unavailable(sent_again(&server, case).await);
        assert_eq!(server.record().times_sent("refused"), if case.is_kept() { 2 } else { 1 });
    })
    .await;
}

#[tokio::test]
async fn a_large_call_of_which_little_was_sent_is_sent_again() {
    for_each_case(|case| async move {
        let window = 2 * CHUNK;
        let server = Scripted::start(move |connection, peer| async move {
            if connection > 0 {
                peer.settings(None).await;
                return peer.serve().await;
            }
            peer.settings_with_window(None, window as u32).await;
            let stream = peer.headers(0).await;
            peer.body(stream, window).await;
            // Everything above stream 0: this connection has processed nothing.
            peer.goaway(0, code::NO_ERROR).await;
            peer.closed().await;
        })
        .await;
        sent_again(&server, case).await.unwrap();
        assert_taken_once(&server, case, "refused", 2);
    })
    .await;
}

#[tokio::test]
async fn a_call_above_goaways_id_is_sent_again_if_its_body_is_still_kept_and_the_one_below_ends() {
    for_each_case(|case| async move {
        let server = Scripted::start(move |connection, peer| async move {
            peer.settings(None).await;
            if connection > 0 {
                return peer.serve().await;
            }
            let (below, above) = (peer.headers(0).await, peer.headers(1).await);
            peer.body(below, case.sent_at_first()).await;
            peer.body(above, case.sent_at_first()).await;
            peer.goaway(below, code::NO_ERROR).await;
            peer.serve().await;
        })
        .await;
        let (client, gate) = (client(&server), Gate::new());
        let below = case.spawn(&client, "below", &gate);
        server.record().until(|calls| (calls.len() == 1).then_some(())).await;
        let mut above = case.patient().spawn(&client, "above", &gate);
        let again = server.record().until(|calls| (calls.len() > 2).then_some(()));
        let outcome = tokio::select! {
            outcome = &mut above => outcome.unwrap(),
            () = again => {
                gate.open();
                above.await.unwrap()
            }
        };
        gate.open();
        below.await.unwrap().unwrap();
        assert_taken_once(&server, case, "below", 1);
        if case.is_kept() {
            outcome.unwrap();
            assert_taken_once(&server, case, "above", 2);
        } else {
            assert_unavailable(outcome);
            assert_eq!(
                (server.record().times_sent("above"), server.record().times_processed("above")),
                (1, 0)
            );
        }
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_ends_with_goaway_is_replaced_at_once() {
    for_each_case(|case| async move {
        let server = Scripted::start(move |connection, peer| async move {
            peer.settings(None).await;
            if connection > 0 {
                return peer.serve().await;
            }
            // The client's first call finds nobody at home: a server that is told to stop as it starts.
            let stream = peer.headers(0).await;
            peer.body(stream, 1).await;
            peer.goaway(0, code::NO_ERROR).await;
            peer.closed().await;
        })
        .await;
        let gate = Gate::new();
        gate.open();
        let small = Case { size: CHUNK, ..case };
        let (outcome, took) = wait::timed(small.call(client(&server), "goaway", gate)).await;
        outcome.unwrap();
        assert!(took < Duration::from_millis(600), "a backoff is for what failed: {took:?}");
    })
    .await;
}

#[tokio::test]
async fn a_call_that_may_have_been_processed_is_never_sent_again() {
    for_each_case(|case| async move {
        let server = Scripted::start(move |connection, peer| async move {
            peer.settings(None).await;
            if connection > 0 {
                return peer.serve().await;
            }
            let stream = peer.headers(0).await;
            peer.body(stream, case.sent_at_first()).await;
            peer.close();
        })
        .await;
        assert_unavailable(sent_again(&server, case).await);
        assert_eq!(
            (server.record().times_sent("refused"), server.record().times_processed("refused")),
            (1, 1)
        );
    })
    .await;
}

#[tokio::test]
async fn a_call_that_goaway_leaves_to_the_server_is_not_sent_again_when_the_connection_is_lost_after_all() {
    for_each_case(|case| async move {
        let server = Scripted::start(move |connection, peer| async move {
            peer.settings(None).await;
            if connection > 0 {
                return peer.serve().await;
            }
            let stream = peer.headers(0).await;
            peer.body(stream, case.sent_at_first()).await;
            peer.goaway(stream, code::NO_ERROR).await;
            peer.close();
        })
        .await;
        assert_unavailable(sent_again(&server, case).await);
        assert_eq!(
            (server.record().times_sent("refused"), server.record().times_processed("refused")),
            (1, 1)
        );
    })
    .await;
}

#[tokio::test]
async fn a_call_that_got_response_headers_is_never_sent_again() {
    for_each_case(|case| async move {
        let server = Scripted::start(move |connection, peer| async move {
            peer.settings(None).await;
            if connection > 0 {
                return peer.serve().await;
            }
            let stream = peer.headers(0).await;
            peer.body(stream, case.sent_at_first()).await;
            peer.respond_headers(stream).await;
            peer.refuse(stream).await;
            peer.closed().await;
        })
        .await;
        sent_again(&server, case).await.unwrap_err();
        assert_eq!(server.record().times_sent("refused"), 1);
    })
    .await;
}

#[tokio::test]
async fn a_connection_gets_no_call_before_its_settings() {
    let server = Scripted::start(|_, peer| peer.closed()).await;
    let gate = Gate::new();
    assert_unavailable(MATRIX[0].call(client(&server), "early", gate).await);
    assert_eq!(server.record().calls().len(), 0);
}
