//! An HTTP/2 server whose frames are written by hand
//!
//! Each connection runs a script: an `async fn` over a [`Peer`], which sends single frames and waits for what the client
//! sends. What came in is in the [`Record`]: every stream, its body, and what the server said about it. So a test can
//! bring about what a real server does once in a million calls, and count how often a call was processed.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use callsign::instance::Address;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::Mutex,
    task::{JoinHandle, JoinSet},
};

use self::frame::{ACK, DATA, END_STREAM, Frame, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS};
pub use self::record::{Fate, Record, Taken};
use crate::wait;

mod frame;
mod record;

/// Receive window of a stream and, at first, of a connection: bodies of these scripts never wait for more
pub const WINDOW: u32 = 1 << 20;
/// Receive window of a connection before anyone says otherwise (RFC 9113, section 6.9.2)
const FIRST_WINDOW: u32 = 65_535;
/// The longest wait of a script for the client
const PATIENCE: Duration = Duration::from_secs(10);

/// Error codes of HTTP/2 (RFC 9113, section 7)
pub mod code {
    /// A graceful shutdown
    pub const NO_ERROR: u32 = 0x0;
    /// The peer broke the protocol
    pub const PROTOCOL_ERROR: u32 = 0x1;
    /// Something went wrong
    pub const INTERNAL_ERROR: u32 = 0x2;
    /// The stream was not processed
    pub const REFUSED_STREAM: u32 = 0x7;
    /// The stream is not needed any more
    pub const CANCEL: u32 = 0x8;
    /// The peer asks for too much
    pub const ENHANCE_YOUR_CALM: u32 = 0xb;
    /// The transport is not safe enough
    pub const INADEQUATE_SECURITY: u32 = 0xc;
}

/// The server; dropped, it and its connections are gone
#[derive(Debug)]
pub struct Scripted {
    address: Address,
    record: Record,
    task: JoinHandle<()>,
}

impl Scripted {
    /// Listens, and runs `script` with the number of each connection, from 0, and its peer
    pub async fn start<F>(script: impl Fn(usize, Peer) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = Address::from(listener.local_addr().expect("the listener is bound"));
        let record = Record::default();
        let shared = record.clone();
        let task = tokio::spawn(async move {
            // Owns the scripts: they end with the listener.
            let mut scripts = JoinSet::new();
            for connection in 0.. {
                let Ok((stream, _)) = listener.accept().await else { return };
                scripts.spawn(script(connection, Peer::new(connection, stream, shared.clone())));
            }
        });
        Self { address, record, task }
    }

    /// Answers every call
    pub async fn serving() -> Self {
        Self::start(|_, peer| async move {
            peer.settings(None).await;
            peer.serve().await;
        })
        .await
    }

    /// Refuses the first call of each connection, unseen by its application, and answers all others
    pub async fn refusing() -> Self {
        Self::start(|_, peer| async move {
            peer.settings(None).await;
            let stream = peer.headers(0).await;
            peer.end(stream).await;
            peer.refuse(stream).await;
            peer.serve().await;
        })
        .await
    }

    /// Where it listens
    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// What came in
    pub fn record(&self) -> &Record {
        &self.record
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A script's end of one connection; dropped, the connection is closed
///
/// In the background it answers PING and SETTINGS, gives the connection's window back, and keeps the record. It sends
/// no SETTINGS by itself: until the script does, the client must not take the connection for ready.
#[derive(Debug)]
pub struct Peer {
    connection: usize,
    record: Record,
    writer: Writer,
    reader: JoinHandle<()>,
    /// SETTINGS frames sent.
    settings: AtomicUsize,
}

type Writer = Arc<Mutex<OwnedWriteHalf>>;

impl Peer {
    fn new(connection: usize, stream: TcpStream, record: Record) -> Self {
        // A frame that waits for the next one would make the order in time a matter of luck.
        stream.set_nodelay(true).expect("an accepted stream takes options");
        let (reader, writer) = stream.into_split();
        let writer = Arc::new(Mutex::new(writer));
        let reader = tokio::spawn(read(connection, reader, writer.clone(), record.clone()));
        Self { connection, record, writer, reader, settings: AtomicUsize::new(0) }
    }

    /// SETTINGS with a limit of streams, and windows of [`WINDOW`]
    pub async fn settings(&self, streams: Option<u32>) {
        self.settings_with_window(streams, WINDOW).await;
    }

    /// SETTINGS with a limit of streams and a receive window of each stream, which is never given back
    pub async fn settings_with_window(&self, streams: Option<u32>, window: u32) {
        self.settings.fetch_add(1, Relaxed);
        self.send(&[Frame::settings(streams, window), Frame::window_update(0, WINDOW - FIRST_WINDOW)]).await;
    }

    /// SETTINGS with another limit of streams; returns when the client has applied it
    pub async fn limit(&self, streams: u32) {
        let sent = 1 + self.settings.fetch_add(1, Relaxed);
        self.send(&[Frame::settings(Some(streams), WINDOW)]).await;
        let applied = self.record.until_applied(self.connection, sent);
        wait::within("the client applies SETTINGS", PATIENCE, applied).await;
    }

    /// Waits for the HEADERS of this connection's `nth` stream, from 0; its id
    pub async fn headers(&self, nth: usize) -> u32 {
        let streams = |calls: &[Taken]| {
            calls.iter().filter(|call| call.connection == self.connection).nth(nth).map(|call| call.stream)
        };
        wait::within("the client opens a stream", PATIENCE, self.record.until(streams)).await
    }

    /// Waits until `bytes` of the body of `stream` came in
    pub async fn body(&self, stream: u32, bytes: usize) {
        self.until(stream, "the client sends the body", |call| call.body.len() >= bytes).await;
    }

    /// Waits until the client has ended `stream`
    pub async fn end(&self, stream: u32) {
        self.until(stream, "the client ends the stream", |call| call.ended).await;
    }

    /// Waits for the `nth` PING of this connection, from 0
    pub async fn pinged(&self, nth: usize) {
        let pinged = self.record.until_pinged(self.connection, nth + 1);
        wait::within("the client sends a PING", 2 * PATIENCE, pinged).await;
    }

    async fn until(&self, stream: u32, what: &str, condition: impl Fn(&Taken) -> bool) {
        let met = |calls: &[Taken]| {
            let call = calls.iter().find(|call| call.is(self.connection, stream));
            call.is_some_and(&condition).then_some(())
        };
        wait::within(what, PATIENCE, self.record.until(met)).await;
    }

    /// GOAWAY: streams above `last` were not processed
    pub async fn goaway(&self, last: u32, code: u32) {
        self.record.on_goaway(self.connection, last);
        self.send(&[Frame::goaway(last, code)]).await;
    }

    /// RST_STREAM(REFUSED_STREAM): the stream was not processed
    pub async fn refuse(&self, stream: u32) {
        self.record.on_answer(self.connection, stream, Fate::Refused);
        self.send(&[Frame::rst_stream(stream, code::REFUSED_STREAM)]).await;
    }

    /// RST_STREAM with any other code: the stream was processed, as far as anyone knows
    pub async fn reset(&self, stream: u32, code: u32) {
        self.record.on_answer(self.connection, stream, Fate::Answered);
        self.send(&[Frame::rst_stream(stream, code)]).await;
    }

    /// Headers, one empty message, trailers with `grpc-status: 0`
    pub async fn respond(&self, stream: u32) {
        self.record.on_answer(self.connection, stream, Fate::Answered);
        let response =
            [Frame::response_headers(stream), Frame::empty_message(stream), Frame::trailers(stream)];
        self.send(&response).await;
    }

    /// The headers of a response, and nothing more
    pub async fn respond_headers(&self, stream: u32) {
        self.send(&[Frame::response_headers(stream)]).await;
    }

    /// The headers of a response, one empty message, and nothing more
    pub async fn respond_message(&self, stream: u32) {
        self.send(&[Frame::response_headers(stream), Frame::empty_message(stream)]).await;
    }

    /// Answers every stream that the client ends, until the connection is closed
    pub async fn serve(mut self) {
        loop {
            let connection = self.connection;
            let record = self.record.clone();
            let ended = record.until(move |calls| {
                let mut calls = calls.iter().filter(|call| call.connection == connection);
                calls.find(|call| call.ended && call.fate == Fate::Open).map(|call| call.stream)
            });
            tokio::select! {
                stream = ended => self.respond(stream).await,
                _ = &mut self.reader => return,
            }
        }
    }

    /// Waits until the client has closed the connection
    pub async fn closed(mut self) {
        // The reader ends by itself; a panic in it was printed by then.
        let _ = (&mut self.reader).await;
    }

    /// Closes the connection
    pub fn close(self) {}

    async fn send(&self, frames: &[Frame]) {
        send(&self.writer, frames).await;
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Writes frames in one piece
async fn send(writer: &Writer, frames: &[Frame]) {
    let bytes: Vec<u8> = frames.iter().flat_map(Frame::bytes).collect();
    // The client may be gone: then the record says what came in before.
    let _ = writer.lock().await.write_all(&bytes).await;
}

/// Reads a connection to its end
async fn read(connection: usize, mut from: OwnedReadHalf, writer: Writer, record: Record) {
    let mut preface = [0; PREFACE.len()];
    if from.read_exact(&mut preface).await.is_err() {
        return;
    }
    assert_eq!(preface, PREFACE, "the client speaks HTTP/2 with prior knowledge");
    while let Some(frame) = Frame::read(&mut from).await {
        match frame.kind {
            SETTINGS if frame.is(ACK) => record.on_applied(connection),
            SETTINGS | PING if frame.flags == 0 => {
                if frame.kind == PING {
                    record.on_ping(connection);
                }
                send(&writer, &[frame.ack()]).await;
            }
            HEADERS => record.on_headers(connection, frame.stream, frame.is(END_STREAM)),
            DATA => {
                record.on_data(connection, frame.stream, frame.data(), frame.is(END_STREAM));
                if let Some(bytes) = u32::try_from(frame.payload.len()).ok().filter(|bytes| *bytes > 0) {
                    send(&writer, &[Frame::window_update(0, bytes)]).await;
                }
            }
            RST_STREAM => record.on_reset(connection, frame.stream, frame.code()),
            // A request has one HEADERS frame: CONTINUATION, PUSH_PROMISE and the rest say nothing about it.
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tonic::{Code, Status, transport::Endpoint};

    use super::*;
    use crate::echo::{Chunk, echo_client::EchoClient};

    type Client = EchoClient<tonic::transport::Channel>;

    fn client(server: &Scripted) -> Client {
        let endpoint = Endpoint::from_shared(format!("http://{}", server.address())).unwrap();
        EchoClient::new(endpoint.connect_lazy())
    }

    fn unary(client: &Client, payload: impl Into<Bytes>) -> JoinHandle<Result<(), Status>> {
        let mut client = client.clone();
        let chunk = Chunk { payload: payload.into(), rest_ms: 0 };
        tokio::spawn(async move { client.unary(chunk).await.map(drop) })
    }

    #[tokio::test]
    async fn an_answered_call_is_recorded_with_its_body() {
        let server = Scripted::serving().await;
        let client = client(&server);
        let large = [b"large".as_slice(), &[b'x'; 500_000]].concat();
        for payload in [Bytes::from_static(b"small"), large.into()] {
            unary(&client, payload).await.unwrap().unwrap();
        }
        let calls = server.record().calls();
        assert_eq!(
            calls.iter().map(|call| call.body.len()).collect::<Vec<_>>(),
            [5 + 2 + 5, 5 + 4 + 500_005]
        );
        assert!(calls.iter().all(|call| call.ended && call.fate == Fate::Answered && call.open == 1));
        assert_eq!((server.record().times_sent("small"), server.record().times_processed("large")), (1, 1));
    }

    #[tokio::test]
    async fn a_refused_call_was_sent_and_not_processed() {
        let server = Scripted::refusing().await;
        unary(&client(&server), "first").await.unwrap().unwrap_err();
        assert_eq!((server.record().times_sent("first"), server.record().times_processed("first")), (1, 0));
    }

    #[tokio::test]
    async fn goaway_excludes_the_streams_above_its_id() {
        let server = Scripted::start(|connection, peer| async move {
            peer.settings(None).await;
            if connection > 0 {
                return peer.serve().await;
            }
            let (first, second) = (peer.headers(0).await, peer.headers(1).await);
            peer.end(first).await;
            peer.end(second).await;
            peer.goaway(first, code::NO_ERROR).await;
            peer.respond(first).await;
            peer.closed().await;
        })
        .await;
        let client = client(&server);
        let first = unary(&client, "first");
        server.record().until(|calls| (calls.len() == 1).then_some(())).await;
        let second = unary(&client, "second");
        first.await.unwrap().unwrap();
        // hyper takes a stream that GOAWAY excluded for failed, or sends it again: either way it was not processed here.
        let _ = second.await.unwrap();
        let excluded = &server.record().calls()[1];
        assert_eq!((excluded.fate, excluded.is_processed()), (Fate::Excluded, false));
    }

    #[tokio::test]
    async fn a_limit_of_one_stream_is_seen_to_be_kept() {
        let server = Scripted::start(|_, peer| async move {
            peer.settings(Some(1)).await;
            peer.serve().await;
        })
        .await;
        let client = client(&server);
        unary(&client, "the client has read SETTINGS").await.unwrap().unwrap();
        let calls: Vec<_> = (0..20).map(|nth| unary(&client, nth.to_string())).collect();
        for call in calls {
            call.await.unwrap().unwrap();
        }
        assert!(server.record().calls().iter().all(|call| call.open == 1));
    }

    #[tokio::test]
    async fn a_closed_connection_fails_what_was_open() {
        let server = Scripted::start(|_, peer| async move {
            peer.settings(None).await;
            peer.headers(0).await;
            peer.close();
        })
        .await;
        let status = unary(&client(&server), "lost").await.unwrap().unwrap_err();
        assert_ne!(status.code(), Code::Ok);
        assert_eq!(server.record().calls()[0].fate, Fate::Open, "nobody knows");
    }
}
