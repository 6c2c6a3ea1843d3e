//! Streams of all shapes: they count until they end, are cancelled when dropped, and honour flow control

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use callsign::Channel;
use callsign_tests::{
    channel::over,
    echo::{Chunk, Wanted, echo_client::EchoClient},
    service::Local,
    wait,
};
use tokio::sync::mpsc;
use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};

const BOUND: Duration = Duration::from_secs(2);
/// Longer than any test
const FOR_EVER: u32 = 600_000;

fn channel(server: &Local) -> Channel {
    over([server.address()])
}

fn chunk(payload: impl Into<Bytes>) -> Chunk {
    Chunk { payload: payload.into(), rest_ms: 0 }
}

fn in_flight(channel: &Channel) -> u32 {
    channel.endpoints().iter().map(|endpoint| endpoint.in_flight).sum()
}

async fn until_in_flight(channel: &Channel, calls: u32) {
    wait::until(&format!("{calls} calls in flight"), BOUND, || (in_flight(channel) == calls).then_some(()))
        .await;
}

#[tokio::test]
async fn calls_of_all_shapes_work() {
    let server = Local::start().await;
    let mut client = EchoClient::new(channel(&server));

    let echo = client.unary(chunk("one")).await.unwrap();
    assert_eq!(echo.get_ref().payload, "one");

    let mut down =
        client.download(Wanted { chunks: 100, size: 1000, rest_ms: 0 }).await.unwrap().into_inner();
    let mut bytes = 0;
    while let Some(chunk) = down.message().await.unwrap() {
        bytes += chunk.payload.len();
    }
    assert_eq!(bytes, 100_000);

    let up = tokio_stream::iter((0..100).map(|_| chunk(vec![1; 1000])));
    let total = client.upload(up).await.unwrap().into_inner();
    assert_eq!((total.chunks, total.bytes), (100, 100_000));

    let (sender, receiver) = mpsc::unbounded_channel();
    let mut echoes = client.bidi(UnboundedReceiverStream::new(receiver)).await.unwrap().into_inner();
    for nth in 0..100 {
        sender.send(chunk(nth.to_string())).unwrap();
        assert_eq!(echoes.message().await.unwrap().unwrap().payload, nth.to_string());
    }
    drop(sender);
    assert_eq!(echoes.message().await.unwrap(), None);
}

#[tokio::test]
async fn a_stream_counts_as_in_flight_until_it_ends_or_is_dropped() {
    let server = Local::start().await;
    let channel = channel(&server);
    let mut client = EchoClient::new(channel.clone());
    let wanted = Wanted { chunks: 2, size: 1, rest_ms: 0 };

    let mut read = client.download(wanted).await.unwrap().into_inner();
    assert_eq!(in_flight(&channel), 1, "after the headers");
    let mut dropped = client.download(wanted).await.unwrap().into_inner();
    assert_eq!(in_flight(&channel), 2);
    let (sender, receiver) = mpsc::unbounded_channel();
    let mut bidi = client.bidi(UnboundedReceiverStream::new(receiver)).await.unwrap().into_inner();
    assert_eq!(in_flight(&channel), 3);

    dropped.message().await.unwrap().unwrap();
    drop(dropped);
    until_in_flight(&channel, 2).await;
    while read.message().await.unwrap().is_some() {}
    until_in_flight(&channel, 1).await;
    drop(sender);
    assert_eq!(bidi.message().await.unwrap(), None);
    until_in_flight(&channel, 0).await;

    let (sender, receiver) = mpsc::unbounded_channel::<Chunk>();
    let upload = tokio::spawn(async move { client.upload(UnboundedReceiverStream::new(receiver)).await });
    until_in_flight(&channel, 1).await;
    drop(sender);
    upload.await.unwrap().unwrap();
    until_in_flight(&channel, 0).await;
    let [endpoint] = &channel.endpoints()[..] else { panic!("one endpoint") };
    assert_eq!(endpoint.started, 4);
}

/// A call that the server would never end is gone there once `call` is dropped
async fn assert_cancelled<F: Future<Output = ()>>(call: impl FnOnce(EchoClient<Channel>) -> F) {
    let server = Local::start().await;
    let channel = channel(&server);
    let mut call = Box::pin(call(EchoClient::new(channel.clone())));
    let at_work = wait::until("the server is at work", BOUND, || (server.calls().open() == 1).then_some(()));
    tokio::select! {
        () = &mut call => panic!("the call ended by itself"),
        () = at_work => {}
    }
    assert_eq!(in_flight(&channel), 1);
    drop(call);
    wait::until("the call is cancelled on the server", BOUND, || (server.calls().open() == 0).then_some(()))
        .await;
    until_in_flight(&channel, 0).await;
}

#[tokio::test]
async fn a_dropped_unary_call_is_cancelled_on_the_server() {
    assert_cancelled(async |mut client: EchoClient<Channel>| {
        client.unary(Chunk { payload: Bytes::new(), rest_ms: FOR_EVER }).await.map(drop).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_dropped_server_stream_is_cancelled_on_the_server() {
    assert_cancelled(async |mut client: EchoClient<Channel>| {
        let wanted = Wanted { chunks: 2, size: 1, rest_ms: FOR_EVER };
        client.download(wanted).await.unwrap().into_inner().message().await.map(drop).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_dropped_client_stream_is_cancelled_on_the_server() {
    assert_cancelled(async |mut client: EchoClient<Channel>| {
        let body = tokio_stream::iter([chunk("one")]).chain(tokio_stream::pending());
        client.upload(body).await.map(drop).unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_dropped_bidirectional_stream_is_cancelled_on_the_server() {
    assert_cancelled(async |mut client: EchoClient<Channel>| {
        let body = tokio_stream::iter([chunk("one")]).chain(tokio_stream::pending());
        let mut echoes = client.bidi(body).await.unwrap().into_inner();
        while echoes.message().await.unwrap().is_some() {}
    })
    .await;
}

const CHUNK: usize = 64 * 1024;
const CHUNKS: usize = 1600;
/// 100 MiB
const LARGE: u64 = (CHUNK * CHUNKS) as u64;
/// What may lie between writer and reader: windows of 2 MiB, and the buffers of the socket and of the two ends
const BETWEEN: u64 = 8 << 20;
/// What this process may occupy with two such bodies on their way, both ends of them
const MEMORY: u64 = 80 << 20;

/// The most memory that this process has occupied so far; elsewhere than on Linux nobody says
#[cfg(not(target_os = "linux"))]
fn peak_memory() -> u64 {
    0
}

#[cfg(target_os = "linux")]
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("Linux says the peak");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("in KiB") * 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_holds_back_a_server_that_sends_100_mib() {
    let server = Local::start().await;
    let mut client = EchoClient::new(channel(&server));
    let wanted = Wanted { chunks: CHUNKS as u32, size: CHUNK as u32, rest_ms: 0 };
    let mut down = client.download(wanted).await.unwrap().into_inner();
    let written = wait::settled("the writer is held back", || server.calls().written()).await;
    assert!((1..BETWEEN).contains(&written), "nothing was read and {written} bytes were written");

    let mut read = 0;
    while let Some(chunk) = down.message().await.unwrap() {
        read += chunk.payload.len() as u64;
        if read.is_multiple_of(1 << 20) {
            let between = server.calls().written() - read;
            assert!(between < BETWEEN, "{between} bytes between writer and reader");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    assert_eq!(read, LARGE);
    assert!(peak_memory() < MEMORY, "{} bytes", peak_memory());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_reads_slowly_holds_back_a_client_that_sends_100_mib() {
    let server = Local::start().await;
    let mut client = EchoClient::new(channel(&server));
    // The server rests after the first chunk, then a little after each mebibyte.
    let payload = Bytes::from(vec![1; CHUNK]);
    let rest_ms = |nth: usize| {
        if nth == 0 {
            3000
        } else if nth.is_multiple_of(16) {
            5
        } else {
            0
        }
    };
    let sent = Arc::new(AtomicU64::new(0));
    let count = sent.clone();
    let body = tokio_stream::iter((0..CHUNKS).map(move |nth| {
        count.fetch_add(CHUNK as u64, Relaxed);
        Chunk { payload: payload.clone(), rest_ms: rest_ms(nth) }
    }));
    let upload = tokio::spawn(async move { client.upload(body).await });

    let before = wait::settled("the writer is held back", || sent.load(Relaxed)).await;
    assert!((1..BETWEEN).contains(&before), "one chunk was read and {before} bytes were sent");
    while !upload.is_finished() {
        let between = sent.load(Relaxed).saturating_sub(server.calls().read());
        assert!(between < BETWEEN, "{between} bytes between writer and reader");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let total = upload.await.unwrap().unwrap().into_inner();
    assert_eq!((total.chunks, total.bytes), (CHUNKS as u64, LARGE));
    assert!(peak_memory() < MEMORY, "{} bytes", peak_memory());
}
