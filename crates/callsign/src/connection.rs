//! One HTTP/2 connection to one peer, on the `h2` crate
//!
//! [`connect`] gives three things: the [`Connection`], whose drop drains; the [`Sender`] in it, which calls clone; and
//! the [`Driver`], which the owner spawns. Ready means that the peer's SETTINGS frame was read and applied: a server that
//! is paused accepts connections and preface alike, so nothing less proves that somebody is there.

mod body;
mod driver;
mod tap;
mod waiters;

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use atomic_waker::AtomicWaker;
use bytes::Bytes;
use callsign_core::{
    keepalive::{KeepAlive, Watchdog},
    streams::Streams,
};
use h2::{Reason, client};
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{Instant, timeout_at},
};
use tonic::Status;

use self::tap::{News, Tap};
pub(crate) use self::{body::Incoming, driver::Driver, waiters::Waiters};
use crate::{error, instance::Address, replay::Outgoing};

/// How a connection is made and watched
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Time for dialling, the preface and the peer's SETTINGS together.
    pub(crate) connect_timeout: Duration,
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
    let tcp = timeout_at(deadline, dial(address)).await.map_err(|_| ConnectError::DialTimeout)??;
    timeout_at(deadline, handshake(address, config, tcp)).await.map_err(|_| ConnectError::Silent)?
}

/// Why there is no connection
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("cannot connect: {0}")]
    Dial(#[from] io::Error),
    #[error("cannot connect: timed out")]
    DialTimeout,
    #[error("connected, but the peer sent no HTTP/2 SETTINGS in time")]
    Silent,
    #[error("the peer closed the connection before its HTTP/2 SETTINGS came")]
    Closed,
    #[error("the peer does not speak HTTP/2: it sent \"{0}\"")]
    NotHttp2(String),
    #[error("HTTP/2 handshake failed: {0}")]
    Handshake(h2::Error),
}

async fn dial(address: &Address) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect((address.host(), address.port())).await?;
    tcp.set_nodelay(true)?;
    #[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
    socket2::SockRef::from(&tcp).set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    Ok(tcp)
}

/// Data that stays unacknowledged for this long ends the connection: gRFC A18 ties it to the keepalive timeout, 20 s.
#[cfg(any(target_os = "android", target_os = "fuchsia", target_os = "linux"))]
const USER_TIMEOUT: Duration = Duration::from_secs(20);
/// Receive windows, as in hyper's client: large enough for a fast network, small enough to bound a slow reader.
const STREAM_WINDOW: u32 = 2 * 1024 * 1024;
const CONNECTION_WINDOW: u32 = 5 * 1024 * 1024;
/// Streams that were cancelled here and may still be answered: remembered, so that a late answer is no protocol error.
const CANCELLED_STREAMS: usize = 1024;

async fn handshake(
    address: &Address,
    config: &Config,
    tcp: TcpStream,
) -> Result<(Connection, Driver), ConnectError> {
    let news = Arc::new(News::default());
    let failed = |error: h2::Error| match news.not_http2() {
        Some(start) => ConnectError::NotHttp2(start.into()),
        None => ConnectError::Handshake(error),
    };
    let (send, mut h2) = client::Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_reset_streams(CANCELLED_STREAMS)
        // Answers to calls that were cancelled and forgotten are no attack of the server's.
        .max_local_error_reset_streams(None)
        // No stream before SETTINGS; from then on the limit that h2 reports is the peer's.
        .initial_max_send_streams(0)
        .handshake(Tap::new(tcp, Arc::clone(&news)))
        .await
        .map_err(failed)?;
    let limit = poll_fn(|cx| match Pin::new(&mut h2).poll(cx) {
        Poll::Ready(Ok(())) => Poll::Ready(Err(ConnectError::Closed)),
        Poll::Ready(Err(error)) => Poll::Ready(Err(failed(error))),
        // A peer that allows no streams at all is as good as silent.
        Poll::Pending => match h2.max_concurrent_send_streams() {
            0 => Poll::Pending,
            limit => Poll::Ready(Ok(limit)),
        },
    })
    .await?;

    let ping_pong = h2.ping_pong().expect("nobody took it before");
    let watchdog = Watchdog::new(config.keep_alive, Instant::now().into_std());
    let shared = Arc::new(Shared {
        address: address.clone(),
        streams: Arc::default(),
        send: Mutex::new(Some(send)),
        closed: watch::Sender::new(None),
        waiters: Arc::clone(&config.waiters),
        waker: AtomicWaker::new(),
    });
    shared.allow(limit);
    let driver = Driver::new(h2, news, ping_pong, Arc::clone(&shared), watchdog);
    Ok((Connection { sender: Sender { shared } }, driver))
}

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

    /// Waits until the connection takes no new streams, and says why
    pub(crate) async fn closed(&self) -> Closed {
        let mut closed = self.sender.shared.closed.subscribe();
        let reason = closed.wait_for(Option::is_some).await.map(|reason| reason.clone());
        reason.ok().flatten().expect("waited for a reason, and `shared` keeps the sender alive")
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.sender.shared.retire(Closed::Lost("drained".into()));
    }
}

/// Why a connection takes no new streams
#[derive(Clone, Debug)]
pub(crate) enum Closed {
    /// The peer asked to go elsewhere; streams that it accepted go on
    GoAway(Arc<str>),
    /// The connection is broken, or its owner let it go
    Lost(Arc<str>),
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

    /// Sends one request that is never replayed; scheme and authority are the caller's
    #[cfg(feature = "etcd")]
    pub(crate) async fn call(
        &self,
        request: http::Request<tonic::body::Body>,
    ) -> Result<http::Response<tonic::body::Body>, Status> {
        let not_sent = || error::connection_lost(&self.shared.address, "no stream to be had");
        let stream = self.try_open().ok_or_else(not_sent)?;
        match stream.send(&mut Outgoing::new(request)).await {
            Ok(response) => Ok(response.map(tonic::body::Body::new)),
            Err(SendError::Refused(status) | SendError::Failed(status)) => Err(status),
            Err(SendError::NotSent) => Err(not_sent()),
        }
    }

    /// The count of streams, for those who pick
    pub(crate) fn streams(&self) -> &Arc<Streams> {
        &self.shared.streams
    }

    /// Takes a stream, if the peer allows one more
    pub(crate) fn try_open(&self) -> Option<OpenStream> {
        self.shared.streams.try_open().then(|| OpenStream { shared: Arc::clone(&self.shared) })
    }
}

/// A stream that the peer's limit allows, to be used or given back by dropping it
#[derive(Debug)]
pub(crate) struct OpenStream {
    shared: Arc<Shared>,
}

impl OpenStream {
    /// Sends `call` and waits for the response headers
    pub(crate) async fn send(self, call: &mut Outgoing) -> Result<http::Response<Incoming>, SendError> {
        let (response, stream) = self.shared.start(call)?;
        let pump = call.transmit(stream).await;
        match response.await {
            Ok(response) => {
                call.commit();
                Ok(response.map(|body| Incoming::new(self, body, pump)))
            }
            Err(error) => {
                if let Some(pump) = pump {
                    pump.propagate_panic().await;
                }
                Err(self.classify(&error, call))
            }
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
    /// `None` once the connection may close.
    send: Mutex<Option<client::SendRequest<Bytes>>>,
    /// Set once, when no new streams are taken any more.
    closed: watch::Sender<Option<Closed>>,
    /// Calls that wait for a stream, on this connection or another of their channel.
    waiters: Arc<Waiters>,
    /// The driver's.
    waker: AtomicWaker,
}

impl Shared {
    fn sender(&self) -> MutexGuard<'_, Option<client::SendRequest<Bytes>>> {
        self.send.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_sender(&self) {
        // Dropped outside of our lock: h2 takes its own.
        let sender = self.sender().take();
        drop(sender);
    }

    /// Opens a stream in h2: from here on the call counts as sent
    fn start(&self, call: &Outgoing) -> Result<(client::ResponseFuture, h2::SendStream<Bytes>), SendError> {
        let request = call.head();
        let mut guard = self.sender();
        let send = guard.as_mut().ok_or(SendError::NotSent)?;
        match send.send_request(request, call.is_empty()) {
            Ok(opened) => {
                // Near the limit h2 makes this handle wait for its last stream; we count streams ourselves, and a clone
                // knows of no stream to wait for.
                if !self.streams.has_room() {
                    *send = send.clone();
                }
                Ok(opened)
            }
            // Connection or request: only a connection that is finished says so again.
            Err(error) => match refusal(send) {
                Some(refusal) => {
                    drop(guard);
                    self.retire(Closed::GoAway(refusal));
                    Err(SendError::NotSent)
                }
                None => Err(SendError::Failed(error::bad_request(&error))),
            },
        }
    }

    /// Takes no new streams from here on, because the peer said so
    fn on_go_away(&self) {
        // The frame may have only begun to come in; then h2 does not know of it yet, and has no reason to give.
        let refusal = self.sender().as_mut().and_then(refusal);
        self.retire(Closed::GoAway(refusal.unwrap_or_else(|| "the peer sent GOAWAY".into())));
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

    /// Takes no new streams from here on; the first reason stays
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

/// Why h2 opens no streams on this connection: lost, told to go away, or out of stream ids
fn refusal(send: &mut client::SendRequest<Bytes>) -> Option<Arc<str>> {
    match send.poll_ready(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Err(error)) => Some(error.to_string().into()),
        _ => None,
    }
}
