//! One connection: limits of streams that change, attempts that are kept apart, requests that leave together, and no task for a
//! unary call

use std::{
    io::{self, Read as _},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use callsign::{Channel, EndpointState};
use callsign_tests::{
    channel::{UpdateLog, over, until_ready},
    echo::{Chunk, echo_client::EchoClient},
    matrix::{Gate, MATRIX},
    peers,
    scripted::{Peer, Scripted, code},
    wait,
};
use tokio::{
    io::AsyncWriteExt as _,
    net::TcpListener,
    runtime::Handle,
    task::{JoinHandle, spawn_blocking},
};

const BOUND: Duration = Duration::from_secs(10);

fn marked(marker: &'static str) -> Chunk {
    Chunk { payload: marker.into(), rest_ms: 0 }
}

#[tokio::test]
async fn a_unary_call_of_a_megabyte_has_no_task_of_its_own() {
    let server = Scripted::start(|_, peer| async move {
        peer.settings(None).await;
        let first = peer.headers(0).await;
        peer.end(first).await;
        peer.respond(first).await;
        peer.closed().await;
    })
    .await;
    let mut client = EchoClient::new(over([server.address()]));
    // With it the connection's own tasks are there.
    client.unary(Chunk::default()).await.unwrap();

    let tasks = || Handle::current().metrics().num_alive_tasks();
    let before = tasks();
    let mut most = before;
    let mut call = Box::pin(client.unary(Chunk { payload: vec![1; 1_000_000].into(), rest_ms: 0 }));
    let sent = server.record().until(|calls| {
        most = most.max(tasks());
        calls.get(1).filter(|call| call.ended).map(|call| call.body.len())
    });
    let sent = tokio::select! {
        outcome = &mut call => panic!("nobody answers: {outcome:?}"),
        sent = wait::within("the body is sent", BOUND, sent) => sent,
    };
    assert!(sent > 1_000_000, "{sent}");
    assert_eq!(most, before, "tasks while the call is in flight");
}

/// Reads what a client says, and answers no call
struct Reader {
    /// Read by a thread, also while the runtime is busy.
    peer: std::net::TcpStream,
    received: Vec<u8>,
}

impl Reader {
    async fn accept(listener: TcpListener) -> io::Result<Self> {
        const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let (mut peer, _) = listener.accept().await?;
        peer.write_all(&SETTINGS).await?;
        let peer = peer.into_std()?;
        peer.set_nonblocking(false)?;
        Ok(Self { peer, received: Vec::new() })
    }

    /// In how many pieces more requests come in, until there are so many of them
    fn pieces_until(mut self, requests: usize) -> io::Result<(Self, usize)> {
        let (mut chunk, mut pieces) = (vec![0; 1 << 20], 0);
        loop {
            let before = ended(&self.received);
            if before == requests {
                return Ok((self, pieces));
            }
            match self.peer.read(&mut chunk)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => self.received.extend_from_slice(&chunk[..read]),
            }
            pieces += usize::from(ended(&self.received) > before);
        }
    }
}

/// How many streams a client that said this has ended
fn ended(bytes: &[u8]) -> usize {
    const PREFACE: usize = 24;
    let (mut ended, mut bytes) = (0, bytes.get(PREFACE..).unwrap_or_default());
    while let Some((head, rest)) = bytes.split_at_checked(9) {
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let Some(rest) = rest.get(length..) else { break };
        // DATA with END_STREAM.
        ended += usize::from(head[3] == 0 && head[4] & 1 != 0);
        bytes = rest;
    }
    ended
}

// One worker: the callers are ready at the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn calls_that_are_made_at_the_same_time_leave_together() {
    const CALLS: usize = 40;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let channel = over([listener.local_addr().unwrap().into()]);
    let (reader, ()) = tokio::join!(Reader::accept(listener), until_ready(&channel, 1));
    let reader = reader.unwrap();
    let call = move |_| {
        let mut client = EchoClient::new(channel.clone());
        tokio::spawn(async move { client.unary(Chunk::default()).await })
    };
    // The first call of all wakes the pool, too; and from here on no call is alone on the connection.
    let first = call(0);
    let reader = spawn_blocking(|| reader.pieces_until(1));
    let (reader, _) = wait::within("the first request", BOUND, reader).await.unwrap().unwrap();
    let reader = spawn_blocking(|| reader.pieces_until(1 + CALLS));
    let calls = tokio::spawn(async move { (0..CALLS).map(call).collect::<Vec<_>>() });
    let (_, pieces) = wait::within("all requests", BOUND, reader).await.unwrap().unwrap();
    calls.await.unwrap().iter().chain([&first]).for_each(JoinHandle::abort);
    assert!(pieces <= 2, "{CALLS} requests came in {pieces} pieces");
}

#[tokio::test]
async fn a_limit_of_streams_that_is_raised_lets_the_next_call_go() {
    let raise = Gate::default();
    let raised = raise.clone();
    let server = Scripted::start(move |_, peer| {
        let raised = raised.clone();
        async move {
            peer.settings(Some(1)).await;
            let held = peer.headers(0).await;
            raised.opened().await;
            peer.limit(2).await;
            let second = peer.headers(1).await;
            peer.end(second).await;
            peer.respond(second).await;
            peer.respond(held).await;
            peer.closed().await;
        }
    })
    .await;
    let (client, gate) = (EchoClient::new(over([server.address()])), Gate::default());
    let held = MATRIX[0].spawn(&client, "held", &gate);
    server.record().until(|calls| (calls.len() == 1).then_some(())).await;
    let mut second = Box::pin(MATRIX[0].call(client, "second", gate));
    wait::assert_waits("a call without a stream", &mut second);

    raise.open();
    wait::within("the second call", BOUND, second).await.unwrap();
    wait::within("the first call", BOUND, held).await.unwrap().unwrap();
    assert_eq!(server.record().calls().iter().map(|call| call.open).collect::<Vec<_>>(), [1, 2]);
}

/// A channel over both, once both are ready
async fn channel_over(servers: [&Scripted; 2]) -> Channel {
    let began = Instant::now();
    let channel = over(servers.map(Scripted::address));
    let log = UpdateLog::new(channel.updates());
    for server in servers {
        log.until(&server.address(), EndpointState::Ready, began, BOUND).await;
    }
    channel
}

/// Makes 20 calls, all of which `other` answers
async fn assert_all_go_to(client: &mut EchoClient<Channel>, other: &Scripted) {
    let before = other.record().calls().len();
    for _ in 0..20 {
        wait::within("a call", BOUND, client.unary(marked("elsewhere"))).await.expect("a call");
    }
    assert_eq!(other.record().calls().len(), before + 20);
}

#[tokio::test]
async fn a_server_that_allows_no_streams_gets_calls_only_once_it_allows_some() {
    let raise = Gate::default();
    let raised = raise.clone();
    let shy = Scripted::start(move |_, peer| {
        let raised = raised.clone();
        async move {
            peer.settings(Some(0)).await;
            raised.opened().await;
            peer.limit(10).await;
            peer.serve().await;
        }
    })
    .await;
    let other = Scripted::serving().await;
    let mut client = EchoClient::new(channel_over([&shy, &other]).await);
    assert_all_go_to(&mut client, &other).await;
    assert_eq!(shy.record().calls().len(), 0);

    raise.open();
    let called = async {
        while shy.record().calls().is_empty() {
            client.unary(marked("anywhere")).await.unwrap();
        }
    };
    wait::within("it gets a call", BOUND, called).await;
}

#[tokio::test]
async fn a_limit_of_streams_that_is_lowered_counts_what_is_open() {
    let lowered = Gate::default();
    let told = lowered.clone();
    let full = Scripted::start(move |_, peer| {
        let told = told.clone();
        async move {
            peer.settings(None).await;
            peer.headers(0).await;
            peer.limit(1).await;
            told.open();
            peer.closed().await;
        }
    })
    .await;
    let other = Scripted::serving().await;
    let channel = channel_over([&full, &other]).await;
    // One call after the other, until one is held.
    let mut client = EchoClient::new(channel.clone());
    let mut one = client.clone();
    let holding = tokio::spawn(async move { while one.unary(marked("held")).await.is_ok() {} });
    wait::within("the limit is lowered", BOUND, lowered.opened()).await;
    assert_all_go_to(&mut client, &other).await;
    assert_eq!(full.record().calls().len(), 1);
    holding.abort();
}

/// A server that does `then` with each connection, and the count of those
async fn unhelpful<F>(then: impl Fn(Peer) -> F + Clone + Send + Sync + 'static) -> (Scripted, Arc<AtomicU32>)
where
    F: Future<Output = ()> + Send + 'static,
{
    let connections = Arc::new(AtomicU32::new(0));
    let count = connections.clone();
    let server = Scripted::start(move |_, peer| {
        count.fetch_add(1, Relaxed);
        let then = then.clone();
        async move {
            peer.settings(None).await;
            then(peer).await;
        }
    })
    .await;
    (server, connections)
}

/// How long it takes until a channel has connected so many times
async fn time_to(address: callsign::Address, connections: u32, count: impl Fn() -> u32) -> Duration {
    let began = Instant::now();
    let _channel = over([address]);
    wait::until("it is dialled again", 2 * BOUND, || (count() >= connections).then_some(())).await;
    began.elapsed()
}

/// gRPC's first two waits at their shortest, 0.8 and 1.28 s
const TWO_WAITS: Duration = Duration::from_millis(2080);

#[tokio::test]
async fn a_peer_that_closes_what_it_accepts_is_dialled_with_backoff() {
    let peer = peers::Peer::slammer().await;
    let took = time_to(peer.address(), 3, || peer.accepted()).await;
    assert!(took >= TWO_WAITS, "{took:?}");
}

#[tokio::test]
async fn a_server_that_closes_after_its_settings_is_dialled_with_backoff() {
    let (server, connections) = unhelpful(|peer| async move { peer.close() }).await;
    let took = time_to(server.address(), 3, || connections.load(Relaxed)).await;
    assert!(took >= TWO_WAITS, "{took:?}");
}

#[tokio::test]
async fn a_server_that_says_goaway_as_soon_as_it_is_ready_is_dialled_ten_times_a_second_at_most() {
    let goaway = |peer: Peer| async move {
        // The client has seen that it is ready: a GOAWAY any earlier fails the attempt.
        peer.limit(1).await;
        peer.goaway(0, code::NO_ERROR).await;
        peer.closed().await;
    };
    let (server, connections) = unhelpful(goaway).await;
    let took = time_to(server.address(), 6, || connections.load(Relaxed)).await;
    assert!(took >= Duration::from_millis(500), "{took:?}");
    assert!(took < BOUND, "and it is no failure: {took:?}");
}
