//! The server a user holds: start, stop, faults

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::{
    io::DuplexStream,
    net::{TcpListener, ToSocketAddrs},
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};
use tonic::transport::{Channel, Endpoint, Server};

use crate::{
    net::{Incoming, Line},
    proto::etcdserverpb::CompactionRequest,
    service::{NameUnimplemented, Service, Shared},
    store::Limits,
};

/// An etcd that runs in this process
///
/// It stands for one member of a cluster of one, with everything in memory. Dropping it closes its port and cuts its
/// connections; [`shutdown`](Self::shutdown) also waits until they are gone. Handles from [`channel`](Self::channel) do
/// not keep it alive.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let etcd = etcd_embedded::EmbeddedEtcd::start("127.0.0.1:0").await?;
/// let mut client = etcd_client::Client::connect([etcd.endpoint()], None).await?;
/// client.put("hello", "world", None).await?;
/// assert_eq!(client.get("hello", None).await?.kvs()[0].value(), b"world");
/// etcd.shutdown().await;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct EmbeddedEtcd {
    shared: Arc<Shared>,
    endpoint: String,
    pipes: mpsc::UnboundedSender<DuplexStream>,
    /// Its end cuts every connection.
    line: watch::Sender<Line>,
    stop: Option<oneshot::Sender<()>>,
    server: JoinHandle<()>,
    expiry: JoinHandle<()>,
}

/// Why a server did not start
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The address cannot be listened on: another process has it, or it is not this machine's.
    #[error("cannot listen")]
    Listen(#[from] io::Error),
}

/// How a server is bounded; made by [`EmbeddedEtcd::builder`]
#[derive(Clone, Debug)]
pub struct Builder {
    limits: Limits,
}

/// 64 MiB hold some 200 000 small writes; a test that needs more says so.
const HISTORY: usize = 64 << 20;

/// etcd's default for `--auth-token-ttl`.
const TOKEN_TTL: Duration = Duration::from_secs(300);

/// Bytes in flight per direction of a pipe; HTTP/2's own windows are about that.
const PIPE: usize = 64 << 10;

impl Builder {
    /// How much history is kept, in bytes (64 MiB); above it the older half is compacted
    ///
    /// Keys are never dropped, only what they were before. A watch that is further behind is told that its revision was
    /// compacted.
    #[must_use]
    pub fn history(mut self, bytes: usize) -> Self {
        self.limits.history = bytes;
        self
    }

    /// How long a token lives after its last use (300 s, as etcd's)
    #[must_use]
    pub fn token_ttl(mut self, ttl: Duration) -> Self {
        self.limits.token_ttl = ttl;
        self
    }

    /// Listens on the address and serves; port 0 is one from the OS
    ///
    /// # Errors
    ///
    /// When the address cannot be listened on.
    pub async fn start(self, addr: impl ToSocketAddrs) -> Result<EmbeddedEtcd, StartError> {
        let listener = TcpListener::bind(addr).await?;
        let addr = listener.local_addr()?;
        Ok(self.spawn(Some((listener, addr))))
    }

    /// Serves [`channel`](EmbeddedEtcd::channel) and [`dial`](EmbeddedEtcd::dial) only, without any socket
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn in_memory(self) -> EmbeddedEtcd {
        self.spawn(None)
    }

    fn spawn(self, bound: Option<(TcpListener, SocketAddr)>) -> EmbeddedEtcd {
        let (listener, addr) = bound.unzip();
        let endpoint = addr.map_or_else(|| "in-memory".to_owned(), |addr| addr.to_string());
        let shared = Arc::new(Shared::new(self.limits, format!("http://{endpoint}")));
        let (line, line_state) = watch::channel(Line::default());
        let (pipes, dialled) = mpsc::unbounded_channel();
        let (stop, stopped) = oneshot::channel::<()>();
        let incoming = Incoming::new(listener, dialled, line_state);
        let server = Server::builder()
            // As Go's: every watch and every keepalive is a stream.
            .max_concurrent_streams(u32::MAX)
            .layer(NameUnimplemented)
            .add_routes(Service(shared.clone()).routes())
            .serve_with_incoming_shutdown(incoming, async {
                // Its sender never sends; that it goes is the signal.
                let _ = stopped.await;
            });
        let server = tokio::spawn(async {
            // It fails only if the incoming stream does, which ends with the server.
            let _ = server.await;
        });
        let expiry = tokio::spawn(shared.clone().expire_leases());
        EmbeddedEtcd { shared, endpoint, pipes, line, stop: Some(stop), server, expiry }
    }
}

impl EmbeddedEtcd {
    /// Listens on the address and serves; port 0 is one from the OS
    ///
    /// # Errors
    ///
    /// When the address cannot be listened on.
    pub async fn start(addr: impl ToSocketAddrs) -> Result<Self, StartError> {
        Self::builder().start(addr).await
    }

    /// Serves without any socket, so that tests can pause tokio's clock
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread", start_paused = true)]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use etcd_client::{Channel, Client, PutOptions};
    ///
    /// let etcd = etcd_embedded::EmbeddedEtcd::in_memory();
    /// let mut client = Client::from_channel(Channel::Tonic(etcd.channel()), None).await?;
    /// let lease = client.lease_grant(3600, None).await?.id();
    /// client.put("hello", "world", Some(PutOptions::new().with_lease(lease))).await?;
    /// tokio::time::sleep(std::time::Duration::from_secs(3600)).await; // in no time
    /// assert!(client.get("hello", None).await?.kvs().is_empty());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Panics
    ///
    /// Outside of a tokio runtime.
    pub fn in_memory() -> Self {
        Self::builder().in_memory()
    }

    /// A server with other bounds than the usual ones
    pub fn builder() -> Builder {
        Builder { limits: Limits { history: HISTORY, token_ttl: TOKEN_TTL } }
    }

    /// Where it listens, `127.0.0.1:2379`; of one without a socket, a name that leads nowhere
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A channel to it through memory, for `etcd_client::Client::from_channel` or any generated client
    ///
    /// It connects when it is first used, and again after a cut.
    pub fn channel(&self) -> Channel {
        let pipes = self.pipes.clone();
        let connect = tower::service_fn(move |_| {
            let pipe = dial(&pipes);
            async { pipe.map(TokioIo::new) }
        });
        Endpoint::from_static("http://in-memory").connect_with_connector_lazy(connect)
    }

    /// One end of a new connection through memory, for clients that bring their own HTTP/2
    ///
    /// # Errors
    ///
    /// When the server's task is gone, with its runtime.
    pub fn dial(&self) -> io::Result<DuplexStream> {
        dial(&self.pipes)
    }

    /// Stops: no more connections, none left, the port free
    pub async fn shutdown(mut self) {
        self.line.send_modify(|line| line.closed = true);
        self.stop = None;
        // An error would be its panic, and what it served is gone either way.
        let _ = (&mut self.server).await;
    }

    /// Freezes the server: connections are accepted, nothing is read or answered
    ///
    /// As a stopped process would; but its clock goes on, so leases end meanwhile.
    pub fn pause(&self) {
        self.line.send_modify(|line| line.paused = true);
    }

    /// Ends a [`pause`](Self::pause)
    pub fn resume(&self) {
        self.line.send_modify(|line| line.paused = false);
    }

    /// Cuts every connection, as a reset does
    pub fn drop_connections(&self) {
        self.cut();
    }

    /// Compacts all history; returns the revision up to which
    pub fn compact_now(&self) -> i64 {
        self.shared.with(|store, _| {
            let revision = store.revision();
            // Refused only if nothing was written since the last compaction: then it is done already.
            let _ = store.compact(&CompactionRequest { revision, physical: true });
            revision
        })
    }

    /// Ends a lease now, as if its time were over; false if there is none of that id
    pub fn expire_lease(&self, id: i64) -> bool {
        self.shared.with(|store, _| store.revoke(id).is_ok())
    }

    /// Makes every token invalid, as time and a member change do
    pub fn expire_tokens(&self) {
        self.shared.with(|store, _| store.auth.expire_tokens());
    }

    /// Loses all data, as a wiped data directory does: the same cluster and member, revision 1, no connections
    pub fn forget_everything(&self) {
        // First, so that no stream is told of the new store.
        self.cut();
        self.shared.forget_everything();
    }

    /// Makes every answer that much later, those on open streams too; zero ends it
    pub fn delay(&self, delay: Duration) {
        self.shared.faults.set_delay(delay);
    }

    /// Tells every open watch its last events again, and of the deletion of a key that never was
    ///
    /// A watch on a single key is only told its last events.
    pub fn resend_events(&self) {
        self.shared.faults.add_resend();
        self.shared.tell_watches();
    }

    /// Lets a word of progress overtake the events it speaks of, once on every open stream, before the next events
    ///
    /// etcd before 3.4.25 and 3.5.8 does that when it is asked for progress.
    pub fn progress_ahead(&self) {
        self.shared.faults.add_ahead();
    }

    fn cut(&self) {
        self.line.send_modify(|line| line.cuts += 1);
    }
}

impl Drop for EmbeddedEtcd {
    fn drop(&mut self) {
        // The connections' tasks end because the line does.
        self.server.abort();
        self.expiry.abort();
    }
}

fn dial(pipes: &mpsc::UnboundedSender<DuplexStream>) -> io::Result<DuplexStream> {
    let (client, server) = tokio::io::duplex(PIPE);
    pipes.send(server).map_err(|_| io::Error::from(io::ErrorKind::ConnectionRefused))?;
    Ok(client)
}
