//! What is sent again, and what never
//!
//! Each test runs its script with a unary and with a client-streaming call, each with a body below and above the 64 KiB
//! that a channel keeps. The scripted server says of every stream whether it may have processed it.

use std::{sync::Arc, time::Duration};

use callsign::Channel;
use callsign_tests::{
    channel::over,
    echo::echo_client::EchoClient,
    matrix::{CHUNK, Case, Gate, MATRIX},
    scripted::{Peer, Scripted, code},
    wait,
};
use tokio::sync::Notify;
use tonic::{Code, Status};

const BOUND: Duration = Duration::from_secs(10);

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
        let (client, gate) = (client(&server), Gate::default());
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
        let (client, gate) = (client(&server), Gate::default());
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
    let (client, gate) = (client(&server), Gate::default());
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
    let gate = Gate::default();
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
        let (client, gate) = (client(&server), Gate::default());
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
        let gate = Gate::default();
        gate.open();
        let small = Case { size: CHUNK, ..case };
        let (outcome, took) = wait::timed(small.call(client(&server), "goaway", gate)).await;
        outcome.unwrap();
        // The shortest backoff is 800 ms.
        assert!(took < Duration::from_millis(780), "a backoff is for what failed: {took:?}");
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
    let gate = Gate::default();
    assert_unavailable(MATRIX[0].call(client(&server), "early", gate).await);
    assert_eq!(server.record().calls().len(), 0);
}
