//! Connections that come in, and the switch that cuts them

use std::{
    collections::HashMap,
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use atomic_waker::AtomicWaker;
use futures_core::Stream;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    time::{Sleep, sleep},
};
use tonic::transport::server::{Connected, TcpConnectInfo};

/// A client that vanished without a word is noticed after about a minute and a half, as with Go's defaults doubled.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));

/// When the process is out of descriptors, accepting again at once would only burn a core.
const PAUSE: Duration = Duration::from_millis(100);

/// Binds `host:port` and tells what was bound; port 0 lets the system pick
///
/// # Errors
///
/// [`ListenError`], before any network call if `address` is not `host:port`.
pub async fn listen(address: &str) -> Result<(TcpListener, SocketAddr), ListenError> {
    let shown = || address.escape_debug().to_string();
    let (host, port) = address.rsplit_once(':').unwrap_or_default();
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = port.parse::<u16>().ok().filter(|_| !host.is_empty());
    let port = port.ok_or_else(|| ListenError::Address { address: shown() })?;
    let failed = |source| ListenError::Bind { address: shown(), source };
    let listener = TcpListener::bind((host, port)).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Why a server does not listen
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// The address is not `host:port`: write it so, as in `127.0.0.1:9090`
    #[error("bad listen address \"{address}\": it should be host:port")]
    Address {
        /// The address given
        address: String,
    },
    /// The address cannot be bound: it is in use, or not one of this machine
    #[error("cannot listen on {address}")]
    Bind {
        /// The address given
        address: String,
        /// What the system says
        source: io::Error,
    },
}

/// The connections of a listener, for tonic's `serve_with_incoming`
///
/// tonic ignores its own TCP options there, so this sets `TCP_NODELAY` and keepalive. The stream never ends, and no failure
/// to accept stops it. Dropping it closes the listener and no connection: that is what the [`Switch`] is for.
pub struct Incoming {
    listener: TcpListener,
    open: Arc<Open>,
    pause: Option<Pin<Box<Sleep>>>,
    failing: bool,
}

impl Incoming {
    /// Takes `listener` over; the switch cuts the connections that come from it
    pub fn new(listener: TcpListener) -> (Self, Switch) {
        let open = Arc::new(Open::default());
        let switch = Switch { open: Arc::clone(&open) };
        (Self { listener, open, pause: None, failing: false }, switch)
    }

    /// One that failed is the connection's affair; without descriptors or memory it is ours
    fn on_error(&mut self, error: &io::Error) {
        use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
        if matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
            return;
        }
        if !std::mem::replace(&mut self.failing, true) {
            tracing::warn!(%error, "cannot accept connections; trying on");
        }
        self.pause = Some(Box::pin(sleep(PAUSE)));
    }
}

impl Stream for Incoming {
    type Item = io::Result<Io>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            match ready!(self.listener.poll_accept(cx)) {
                Ok((tcp, _)) => {
                    self.failing = false;
                    return Poll::Ready(Some(Ok(Io::new(tcp, &self.open))));
                }
                Err(error) => self.on_error(&error),
            }
        }
    }
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").field("listener", &self.listener).finish_non_exhaustive()
    }
}

/// Cuts all connections of an [`Incoming`], those that are open and those to come
///
/// Cheap to clone. Dropping it does nothing.
#[derive(Clone, Debug)]
pub struct Switch {
    open: Arc<Open>,
}

impl Switch {
    /// From now on every read and every write fails
    pub fn throw(&self) {
        self.open.thrown.store(true, Ordering::SeqCst);
        let sockets = std::mem::take(&mut *self.open.sockets());
        for wakers in sockets.into_values() {
            wakers.read.wake();
            wakers.write.wake();
        }
    }
}

#[derive(Debug, Default)]
struct Open {
    thrown: AtomicBool,
    sockets: Mutex<HashMap<usize, Arc<Wakers>>>,
}

impl Open {
    fn sockets(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Arc<Wakers>>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who waits for a socket
#[derive(Debug, Default)]
struct Wakers {
    read: AtomicWaker,
    write: AtomicWaker,
}

/// A TCP connection that a [`Switch`] can cut
#[derive(Debug)]
pub struct Io {
    tcp: TcpStream,
    wakers: Arc<Wakers>,
    open: Arc<Open>,
}

impl Io {
    fn new(tcp: TcpStream, open: &Arc<Open>) -> Self {
        // A connection without its options still serves.
        let _ = tcp.set_nodelay(true);
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE.0).with_interval(KEEPALIVE.1);
        let _ = SockRef::from(&tcp).set_tcp_keepalive(&keepalive);
        let io = Self { tcp, wakers: Arc::default(), open: Arc::clone(open) };
        open.sockets().insert(io.key(), Arc::clone(&io.wakers));
        io
    }

    /// Its wakers' address is its own as long as it lives
    fn key(&self) -> usize {
        Arc::as_ptr(&self.wakers).addr()
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        waker: fn(&Wakers) -> &AtomicWaker,
        operation: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if self.is_cut() {
            return Poll::Ready(Err(cut()));
        }
        let polled = operation(Pin::new(&mut self.tcp), cx);
        if polled.is_pending() {
            waker(&self.wakers).register(cx.waker());
            // The switch may have been thrown before the waker was there to be woken.
            if self.is_cut() {
                return Poll::Ready(Err(cut()));
            }
        }
        polled
    }

    fn is_cut(&self) -> bool {
        self.open.thrown.load(Ordering::SeqCst)
    }
}

fn cut() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "cut at the end of the drain")
}

impl Drop for Io {
    fn drop(&mut self) {
        self.open.sockets().remove(&self.key());
    }
}

impl AsyncRead for Io {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = |tcp: Pin<&mut TcpStream>, cx: &mut Context<'_>| tcp.poll_read(cx, buf).map_ok(|()| 0);
        self.poll(cx, |wakers| &wakers.read, read).map_ok(drop)
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll(cx, |wakers| &wakers.write, |tcp, cx| tcp.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll(cx, |wakers| &wakers.write, |tcp, cx| tcp.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

impl Connected for Io {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.tcp.connect_info()
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn a_listen_address_is_host_and_port() {
        for bad in ["", "9090", "127.0.0.1", ":9090", "127.0.0.1:http", "127.0.0.1:99999"] {
            assert!(matches!(listen(bad).await, Err(ListenError::Address { .. })), "{bad}");
        }
        let (_listener, bound) = listen("127.0.0.1:0").await.unwrap();
        assert_ne!(bound.port(), 0);
        assert!(matches!(listen(&bound.to_string()).await, Err(ListenError::Bind { .. })));
        assert!(listen("[::1]:0").await.unwrap().1.is_ipv6());
    }

    async fn connected() -> (TcpStream, Io, Switch) {
        let (listener, bound) = listen("127.0.0.1:0").await.unwrap();
        let (mut incoming, switch) = Incoming::new(listener);
        let client = TcpStream::connect(bound).await.unwrap();
        let io = poll_fn(|cx| Pin::new(&mut incoming).poll_next(cx)).await.unwrap().unwrap();
        (client, io, switch)
    }

    #[tokio::test]
    async fn a_thrown_switch_wakes_a_waiting_read_and_fails_what_follows() {
        let (_client, mut io, switch) = connected().await;
        let reading = tokio::spawn(async move {
            let first = io.read(&mut [0; 1]).await;
            (first, io.write(b"x").await)
        });
        // The read waits before the switch is thrown: the runtime has one thread.
        tokio::task::yield_now().await;
        switch.throw();
        let (read, written) = reading.await.unwrap();
        assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }

    #[tokio::test]
    async fn a_connection_carries_bytes_and_leaves_nothing_behind() {
        let (mut client, mut io, switch) = connected().await;
        client.write_all(b"ping").await.unwrap();
        let mut read = [0; 4];
        io.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"ping");
        assert!(io.tcp.nodelay().unwrap());
        assert_eq!(switch.open.sockets().len(), 1);
        drop(io);
        assert_eq!(switch.open.sockets().len(), 0);
    }
}
