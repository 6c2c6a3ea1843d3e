//! One HTTP/2 connection to one peer, on the `h2` crate
//!
//! [`connect`] gives three things: the [`Connection`], whose drop drains; the [`Sender`] in it, which calls clone; and
//! the [`Driver`], which the owner spawns. Ready means that the peer's SETTINGS frame was read and applied: a server that
//! is paused accepts connections and preface alike, so nothing less proves that somebody is there.

mod body;
mod company;
mod dial;
mod driver;
mod io;
mod tap;
mod waiters;
mod wish;

use std::{
    future::{Future as _, poll_fn},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use atomic_waker::AtomicWaker;
use bytes::Bytes;
use callsign_core::{ejection::Probe, keepalive::KeepAlive, streams::Streams};
use h2::{Reason, client};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tonic::Status;

pub(crate) use self::{
    body::Incoming,
    driver::Driver,
    io::Transport,
    waiters::{Place, Waiters},
};
use self::{
    io::Io,
    tap::{News, Tap},
    wish::Wish,
};
use crate::{error, instance::Address, replay::Outgoing};

/// How a connection is made and watched
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Time for dialling, TLS, the preface and the peer's SETTINGS together.
    pub(crate) connect_timeout: Duration,
    /// What the peer is spoken to over.
    pub(crate) transport: Transport,
    /// When the peer is asked whether it lives.
    pub(crate) keep_alive: KeepAlive,
    /// Who is told when a stream is given back.
    pub(crate) waiters: Arc<Waiters>,
}

/// Connects to `address`; the caller spawns the driver
pub(crate) async fn connect(
    address: &Address,
    config: &Config,
) -> Result<(Connection, Driver), ConnectError> {
    let deadline = Instant::now() + config.connect_timeout;
    let tcp = timeout_at(deadline, dial::dial(address)).await.map_err(|_| ConnectError::DialTimeout)??;
    let secured = timeout_at(deadline, config.transport.carry(address, tcp)).await;
    let io = secured.map_err(|_| ConnectError::TlsTimeout)??;
    timeout_at(deadline, handshake(address, config, io)).await.map_err(|_| ConnectError::Silent)?
}

/// Why there is no connection
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("cannot connect: {0}")]
    Dial(#[from] std::io::Error),
    #[error("cannot connect: timed out")]
    DialTimeout,
    #[error("connected, but the TLS handshake did not end in time: the peer may not speak TLS")]
    TlsTimeout,
    #[cfg(feature = "tls")]
    #[error(transparent)]
    Tls(#[from] crate::tls::HandshakeError),
    #[error("the peer speaks TLS: it answered plain HTTP/2 with a TLS alert")]
    PeerSpeaksTls,
    /// What a Go server does on a port for TLS.
    #[error("the peer closed the connection without a word: it may speak TLS, or be about to end")]
    ClosedUnread,
    #[error("connected, but the peer sent no HTTP/2 SETTINGS in time")]
    Silent,
    #[error("the peer closed the connection before its HTTP/2 SETTINGS came")]
    Closed,
    #[error("the peer does not speak HTTP/2: it sent \"{0}\"")]
    NotHttp2(String),
    #[error("HTTP/2 handshake failed: {0}")]
    Handshake(h2::Error),
}

/// Receive windows, as in hyper's client: large enough for a fast network, small enough to bound a slow reader.
const STREAM_WINDOW: u32 = 2 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 5 * 1024 * 1024;
/// A stream limit that no SETTINGS frame can set: it has 32 bits, and none at all is h2's `usize::MAX`.
const NO_SETTINGS: usize = usize::MAX - 1;
/// Streams that were cancelled here and may still be answered: remembered, so that a late answer is no protocol error.
const CANCELLED_STREAMS: usize = 1024;

async fn handshake(address: &Address, config: &Config, io: Io) -> Result<(Connection, Driver), ConnectError> {
    let news = Arc::new(News::default());
    let failed = |error| not_ready(error, &news, &config.transport);
    let (send, mut h2) = client::Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_reset_streams(CANCELLED_STREAMS)
        // Answers to calls that were cancelled and forgotten are no attack of the server's.
        .max_local_error_reset_streams(None)
        // Unread messages, however small, are bounded by the window alone: the smallest gRPC message has 5 bytes, and h2
        // charges 256 less its length for a small frame. The default kills a connection with 11 000 unread small ones.
        .data_frame_budget(CONNECTION_WINDOW as usize / 5 * 251)
        // No stream is sent before SETTINGS were applied; this limit tells when, for a peer can set any other.
        .initial_max_send_streams(NO_SETTINGS)
        .handshake(Tap::new(io, Arc::clone(&news)))
        .await
        .map_err(|error| failed(Some(error)))?;
    poll_fn(|cx| match Pin::new(&mut h2).poll(cx) {
        Poll::Ready(ended) => Poll::Ready(Err(failed(ended.err()))),
        Poll::Pending => match h2.max_concurrent_send_streams() {
            NO_SETTINGS => Poll::Pending,
            _ => Poll::Ready(Ok(())),
        },
    })
    .await?;

    let ping_pong = h2.ping_pong().expect("nobody took it before");
    let shared = Arc::new(Shared {
        address: address.clone(),
        streams: Arc::default(),
        outbox: Mutex::new(Outbox { send: Some(send), calls: 0 }),
        closed: watch::Sender::new(None),
        answered: AtomicBool::new(false),
        unsent: AtomicU32::new(0),
        wish: Wish::default(),
        waiters: Arc::clone(&config.waiters),
        waker: AtomicWaker::new(),
    });
    let driver = Driver::new(h2, news, ping_pong, Arc::clone(&shared), config.keep_alive);
    Ok((Connection { sender: Sender { shared } }, driver))
}

/// Why h2 has ended before it was ready; without an error the peer has closed
fn not_ready(error: Option<h2::Error>, news: &News, transport: &Transport) -> ConnectError {
    if let Some(start) = news.not_http2() {
        return match start.starts_with(TLS_ALERT) && transport.is_plain() {
            true => ConnectError::PeerSpeaksTls,
            false => ConnectError::NotHttp2(start.into()),
        };
    }
    let refused = transport.explain(news.unreadable());
    refused.unwrap_or_else(|| match error {
        // A reset also comes of what the peer left unread.
        _ if transport.is_plain() && !news.has_read() && error.as_ref().is_none_or(h2::Error::is_io) => {
            ConnectError::ClosedUnread
        }
        Some(error) => ConnectError::Handshake(error),
        None => ConnectError::Closed,
    })
}

/// The beginning of an alert record (RFC 8446, section 5.1), escaped: its type, and the version's major number.
const TLS_ALERT: &str = "\\x15\\x03";

/// The owner of a connection
///
/// Dropping it drains: no new streams, and the connection closes when the open ones have ended.
#[derive(Debug)]
pub(crate) struct Connection {
    sender: Sender,
}

impl Connection {
    /// What calls are sent with
    pub(crate) fn sender(&self) -> &Sender {
        &self.sender
    }

    /// Whether a response has ever begun on it
    pub(crate) fn has_answered(&self) -> bool {
        self.sender.shared.answered.load(Ordering::Relaxed)
    }

    /// Waits until the connection takes no new streams, and says why
    pub(crate) async fn closed(&self) -> Closed {
        let mut closed = self.sender.shared.closed.subscribe();
        let reason = closed.wait_for(Option::is_some).await.map(|reason| reason.clone());
        reason.ok().flatten().expect("waited for a reason, and `shared` keeps the sender alive")
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.sender.shared.retire(Closed::Drained);
    }
}

/// Why a connection takes no new streams
#[derive(Clone, Debug)]
pub(crate) enum Closed {
    /// The peer asked to go elsewhere; streams that it accepted go on
    GoAway {
        cause: Arc<str>,
        /// It wants to be asked less often (gRFC A8).
        calm: bool,
    },
    /// The owner let it go
    Drained,
    /// The connection is broken
    Lost(Arc<str>),
}

impl Closed {
    fn go_away(error: &h2::Error) -> Self {
        let calm = error.is_remote() && error.reason() == Some(Reason::ENHANCE_YOUR_CALM);
        Self::GoAway { cause: error.to_string().into(), calm }
    }
}

/// A handle to send calls with; cheap to clone, keeps no connection open
#[derive(Clone, Debug)]
pub(crate) struct Sender {
    shared: Arc<Shared>,
}

impl Sender {
    /// Whether new streams are taken
    #[cfg(feature = "etcd")]
    pub(crate) fn is_open(&self) -> bool {
        !self.shared.is_retired()
    }

    /// Sends `call` once; scheme and authority are the caller's
    #[cfg(feature = "etcd")]
    pub(crate) async fn call(
        &self,
        call: &mut Outgoing,
    ) -> Result<http::Response<tonic::body::Body>, Status> {
        let not_sent = || error::connection_lost(&self.shared.address, "no stream to be had");
        let stream = self.try_open().ok_or_else(not_sent)?;
        match stream.send(call).await {
            Ok(response) => Ok(response.map(tonic::body::Body::new)),
            Err(SendError::Refused(status) | SendError::Failed(status)) => Err(status),
            Err(SendError::NotSent) => Err(not_sent()),
        }
    }

    /// The count of streams, for those who pick
    pub(crate) fn streams(&self) -> &Arc<Streams> {
        &self.shared.streams
    }

    /// Asks for a PING now, if the peer does not mind; unanswered, it ends the connection
    pub(crate) fn probe(&self) {
        self.shared.wish.ask();
        self.shared.waker.wake();
    }

    /// What became of the last [`probe`](Self::probe)
    pub(crate) fn probed(&self) -> Probe {
        self.shared.wish.state()
    }

    /// Takes a stream, if the peer allows one more
    pub(crate) fn try_open(&self) -> Option<OpenStream> {
        let before = self.shared.streams.try_open()?;
        if before == 0 {
            // h2 wakes nobody while its output is blocked, but the driver must begin to watch the peer.
            self.shared.waker.wake();
        }
        Some(OpenStream { shared: Arc::clone(&self.shared) })
    }
}

/// A stream that the peer's limit allows, to be used or given back by dropping it
#[derive(Debug)]
pub(crate) struct OpenStream {
    shared: Arc<Shared>,
}

impl OpenStream {
    /// Sends `call` and waits for the response headers
    ///
    /// The body is sent from the caller's own polls. Only what is left of it when the response begins gets a task.
    pub(crate) async fn send(self, call: &mut Outgoing) -> Result<http::Response<Incoming>, SendError> {
        let (mut response, stream) = self.shared.start(call)?;
        let mut attempt = call.transmit(stream);
        let answer = poll_fn(|cx| {
            if let Some(sending) = &mut attempt
                && call.poll_send(sending, cx).is_ready()
            {
                attempt = None;
            }
            Pin::new(&mut response).poll(cx)
        });
        match answer.await {
            Ok(response) => {
                let pump = attempt.map(|attempt| call.pump(attempt));
                Ok(response.map(|body| Incoming::new(self, body, pump)))
            }
            Err(error) => Err(self.classify(&error, call)),
        }
    }

    fn classify(&self, error: &h2::Error, call: &mut Outgoing) -> SendError {
        if let Some(status) = call.body_error() {
            return SendError::Failed(status);
        }
        // Only the peer's own word makes a call unprocessed: an I/O error says nothing about what it had read.
        let above_last_id = error.is_go_away() && error.is_remote();
        let refused = error.is_reset() && error.is_remote() && error.reason() == Some(Reason::REFUSED_STREAM);
        let status = self.shared.failed(error);
        if above_last_id || refused { SendError::Refused(status) } else { SendError::Failed(status) }
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        if self.shared.streams.close() && self.shared.is_retired() {
            self.shared.waker.wake();
        }
        self.shared.waiters.wake_one();
    }
}

/// Why a call got no response headers
#[derive(Debug)]
pub(crate) enum SendError {
    /// The connection took no stream: nothing was sent
    NotSent,
    /// The peer says that it has not processed the call
    Refused(Status),
    /// Anything else: the peer may have processed the call
    Failed(Status),
}

/// What owner, senders, streams and driver share
#[derive(Debug)]
struct Shared {
    address: Address,
    streams: Arc<Streams>,
    outbox: Mutex<Outbox>,
    /// Set when no new streams are taken any more.
    closed: watch::Sender<Option<Closed>>,
    /// Whether a response has ever begun.
    answered: AtomicBool,
    /// Requests that were handed to h2 since the driver last polled it.
    unsent: AtomicU32,
    wish: Wish,
    /// Calls that wait for a stream, on this connection or another of their channel.
    waiters: Arc<Waiters>,
    /// The driver's.
    waker: AtomicWaker,
}

/// Where calls get their handle to h2 from
#[derive(Debug)]
struct Outbox {
    /// `None` once the connection may close.
    send: Option<client::SendRequest<Bytes>>,
    /// Handles given out.
    calls: u64,
}

impl Outbox {
    fn open(&mut self) -> Option<client::SendRequest<Bytes>> {
        self.calls += 1;
        self.send.clone()
    }
}

impl Shared {
    fn outbox(&self) -> MutexGuard<'_, Outbox> {
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets go of h2, which then says GOAWAY and closes
    fn shut(&self) {
        // Dropped outside of our lock: h2 takes its own.
        let send = self.outbox().send.take();
        drop(send);
    }

    /// Opens a stream in h2: from here on the call counts as sent
    fn start(&self, call: &Outgoing) -> Result<(client::ResponseFuture, h2::SendStream<Bytes>), SendError> {
        // A clone for each call: near the limit h2 makes a handle wait for its last stream. We count streams ourselves,
        // and a new handle knows of no stream to wait for.
        let mut send = self.outbox().open().ok_or(SendError::NotSent)?;
        self.unsent.fetch_add(1, Ordering::Relaxed);
        let opened = send.send_request(call.head(), call.is_empty());
        // Connection or request: only a connection that is finished says so again.
        opened.map_err(|error| match poll_now(&mut send) {
            Poll::Ready(Err(closed)) => {
                // The driver says the same in a moment; this is the first to see it.
                let lost = || Closed::Lost(closed.to_string().into());
                self.retire(if closed.is_io() { lost() } else { Closed::go_away(&closed) });
                SendError::NotSent
            }
            _ => SendError::Failed(error::bad_request(&error)),
        })
    }

    /// Takes no new streams from here on, because the peer said so
    fn on_go_away(&self) {
        // The frame may have only begun to come in; then h2 does not know of it yet, and has no reason to give.
        let handle = self.outbox().send.clone();
        self.retire(match handle.map(|mut handle| poll_now(&mut handle)) {
            Some(Poll::Ready(Err(error))) => Closed::go_away(&error),
            _ => Closed::GoAway { cause: "the peer sent GOAWAY".into(), calm: false },
        });
    }

    fn is_retired(&self) -> bool {
        self.closed.borrow().is_some()
    }

    /// Sets the peer's stream limit, unless the connection takes none any more
    fn allow(&self, limit: usize) {
        self.streams.set_limit(u32::try_from(limit).unwrap_or(u32::MAX));
        if self.is_retired() {
            self.streams.set_limit(0);
        }
        self.waiters.wake_all();
    }

    /// What a stream's error means for its call, with the connection's own end as the cause where it is one
    fn failed(&self, error: &h2::Error) -> Status {
        match &*self.closed.borrow() {
            Some(Closed::Lost(cause)) if !error.is_reset() => error::connection_lost(&self.address, cause),
            _ => error::stream_failed(&self.address, error),
        }
    }

    /// Takes no new streams from here on; the first reason stays: a loss after GOAWAY is no failure
    fn retire(&self, reason: Closed) {
        self.closed.send_if_modified(|closed| {
            let first = closed.is_none();
            closed.get_or_insert(reason);
            first
        });
        self.streams.set_limit(0);
        self.waker.wake();
    }
}

/// Whether h2 opens streams: an error if it never will again
fn poll_now(send: &mut client::SendRequest<Bytes>) -> Poll<Result<(), h2::Error>> {
    send.poll_ready(&mut Context::from_waker(Waker::noop()))
}
