//! What is left when the last handle is dropped: nothing
//!
//! Tasks and descriptors are counted, so these tests run one at a time, each in a runtime of its own, in this binary.

// Descriptors are counted in /proc.
#![cfg(target_os = "linux")]

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use callsign::{Channel, Etcd, EtcdChannel, EtcdOptions, Registration, discover::EtcdDiscover};
use callsign_tests::{
    channel::over,
    echo::{Chunk, Wanted, echo_client::EchoClient},
    etcd::EtcdProcess,
    greeter,
    load::greet,
    pb::{HelloRequest, greeter_client::GreeterClient},
    peers::Peer,
    process::Process,
    registry, wait,
};
use tokio::runtime::{Builder, Handle};
use tokio_stream::StreamExt;

const BOUND: Duration = Duration::from_secs(5);

/// Runs a test alone in this process
fn alone(test: impl Future<Output = ()>) {
    static ALONE: Mutex<()> = Mutex::new(());
    // A test that failed leaves nothing behind that matters here.
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime").block_on(test);
}

#[derive(Debug, PartialEq)]
struct Left {
    tasks: usize,
    descriptors: usize,
}

fn left() -> Left {
    let descriptors = std::fs::read_dir("/proc/self/fd").expect("Linux").count();
    Left { tasks: Handle::current().metrics().num_alive_tasks(), descriptors }
}

/// Asserts that 5 s after `scenario` no more is there than before
async fn assert_leaves_nothing(scenario: impl Future<Output = ()>) {
    let before = left();
    scenario.await;
    let dropped = Instant::now();
    let mut now = left();
    let is_more = |now: &Left| now.tasks > before.tasks || now.descriptors > before.descriptors;
    while is_more(&now) && dropped.elapsed() < BOUND {
        tokio::time::sleep(Duration::from_millis(20)).await;
        now = left();
    }
    // What others have left until now may end meanwhile.
    assert!(
        !is_more(&now),
        "still there {BOUND:?} after the last handle was dropped: {now:?}, before: {before:?}"
    );
}

/// More than before, or the counting counts nothing
fn assert_more_than(before: &Left) {
    let now = left();
    assert!(now.tasks > before.tasks && now.descriptors > before.descriptors, "{now:?}, before: {before:?}");
}

#[test]
fn a_channel_leaves_nothing() {
    alone(async {
        let server = greeter!().start().await;
        // Their tasks and descriptors in this process end with the connections that the channel holds.
        let peers = [Peer::deaf(), Peer::mute().await, Peer::http1().await, Peer::slammer().await];
        let before = left();
        assert_leaves_nothing(async {
            let channel = over(peers.iter().map(Peer::address).chain([server.address()]));
            greet(GreeterClient::new(channel.clone()), BOUND).await.unwrap();
            let mut client = EchoClient::new(channel);
            let wanted = Wanted { chunks: 3, size: 1, rest_ms: 0 };
            let mut down = client.download(wanted).await.unwrap().into_inner();
            down.message().await.unwrap().unwrap();
            assert_more_than(&before);
        })
        .await;
    });
}

#[test]
fn a_response_stream_goes_on_after_the_last_channel_and_then_leaves_nothing() {
    alone(async {
        let server = greeter!().start().await;
        assert_leaves_nothing(async {
            let mut client = EchoClient::new(over([server.address()]));
            let wanted = Wanted { chunks: 20, size: 1, rest_ms: 100 };
            let mut down = client.download(wanted).await.unwrap().into_inner();
            drop(client);
            for _ in 0..20 {
                down.message().await.unwrap().unwrap();
            }
            assert_eq!(down.message().await.unwrap(), None);
        })
        .await;
    });
}

/// A server that stands still, with a unary call and a stream in flight, over a channel that is dropped
async fn freeze_with_calls_in_flight(server: &Process, channel: Channel) {
    let mut client = EchoClient::new(channel.clone());
    let body = tokio_stream::iter([Chunk::default()]).chain(tokio_stream::pending());
    let mut bidi = client.bidi(body).await.expect("the server is at work").into_inner();
    bidi.message().await.expect("the server is at work").expect("an echo");
    server.sigstop().await;
    let mut greeter = GreeterClient::new(channel);
    let mut call = Box::pin(greeter.say_hello(HelloRequest::default()));
    wait::assert_waits("a call to a stopped server", &mut call);
}

#[test]
fn a_channel_leaves_nothing_at_a_frozen_peer() {
    alone(async {
        let server = greeter!().start().await;
        assert_leaves_nothing(async {
            let channel = over([server.address()]);
            freeze_with_calls_in_flight(&server, channel).await;
        })
        .await;
        // Now the handshake is what hangs.
        assert_leaves_nothing(async {
            let channel = over([server.address()]);
            greet(GreeterClient::new(channel), Duration::from_millis(500)).await.unwrap_err();
        })
        .await;
    });
}

#[test]
fn a_channel_leaves_nothing_at_a_frozen_peer_that_takes_no_more_bytes() {
    alone(async {
        // Windows that never close: what stops the client is the socket.
        let server = greeter!().window(1 << 30).start().await;
        assert_leaves_nothing(async {
            let mut client = EchoClient::new(over([server.address()]));
            client.unary(Chunk::default()).await.unwrap();
            server.sigstop().await;
            let sent = Arc::new(AtomicU64::new(0));
            let count = sent.clone();
            let endless = tokio_stream::iter(std::iter::repeat_with(move || {
                count.fetch_add(1, Relaxed);
                Chunk { payload: vec![0; 64 * 1024].into(), rest_ms: 0 }
            }));
            let upload = tokio::spawn(async move { client.upload(endless).await.map(drop) });
            let sent = wait::settled("the socket is full", || sent.load(Relaxed)).await;
            assert!(sent > 16, "more than any window: {sent} chunks");
            upload.abort();
        })
        .await;
    });
}

#[test]
fn a_channel_leaves_nothing_where_nobody_listens() {
    alone(async {
        let peer = Peer::deaf();
        assert_leaves_nothing(async {
            let channel = over([peer.address()]);
            greet(GreeterClient::new(channel), BOUND).await.unwrap_err();
        })
        .await;
    });
}

/// A server that etcd knows
async fn registered(etcd: &EtcdProcess) -> Process {
    let server = greeter!().register("hello.rpc", &etcd.endpoint()).start().await;
    registry::until_registered(etcd, "hello.rpc", BOUND, |all| all.len() == 1).await;
    server
}

#[test]
fn a_session_and_what_was_built_from_it_leave_nothing() {
    alone(async {
        let etcd = registry::etcd().await;
        let _server = registered(&etcd).await;
        let before = left();
        assert_leaves_nothing(async {
            let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.unwrap();
            let channel = EtcdChannel::builder("hello.rpc").etcd(&session).connect().await.unwrap();
            let address = "127.0.0.1:1".parse().unwrap();
            let _registration =
                Registration::builder(&session, "other.rpc", address).register().await.unwrap();
            greet(GreeterClient::new(channel), BOUND).await.unwrap();
            assert_more_than(&before);
        })
        .await;
        assert!(
            registry::registered(&etcd, "other.rpc").await.is_empty(),
            "a dropped registration is taken back"
        );
    });
}

#[test]
fn tonics_own_balance_channel_leaves_nothing() {
    alone(async {
        let etcd = registry::etcd().await;
        let _server = registered(&etcd).await;
        assert_leaves_nothing(async {
            let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.unwrap();
            let channel = EtcdDiscover::new(&session, "hello.rpc").unwrap().into_tonic_channel();
            greet(GreeterClient::new(channel), BOUND).await.unwrap();
        })
        .await;
    });
}

#[test]
fn a_session_with_a_frozen_etcd_leaves_nothing() {
    alone(async {
        let etcd = registry::etcd().await;
        let _server = registered(&etcd).await;
        assert_leaves_nothing(async {
            let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.unwrap();
            let channel = EtcdChannel::builder("hello.rpc").etcd(&session).connect().await.unwrap();
            let address = "127.0.0.1:1".parse().unwrap();
            let _registration =
                Registration::builder(&session, "other.rpc", address).register().await.unwrap();
            greet(GreeterClient::new(channel), BOUND).await.unwrap();
            etcd.stop().await;
        })
        .await;
        etcd.cont();
    });
}
