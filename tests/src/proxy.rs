//! A TCP proxy whose connections can be held, delayed, cut, reset and refused

use std::{net::SocketAddr, sync::Arc, thread, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    runtime::Builder,
    sync::watch,
    task::JoinSet,
    time::sleep,
};

use crate::wait;

/// Passes bytes to one target, or to nobody; ends with its drop
///
/// It runs in a thread and a runtime of its own: no task of a test's runtime is the proxy's, and a busy test delays no
/// byte.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    way: watch::Sender<Way>,
    admitted: watch::Sender<usize>,
    seen: watch::Receiver<Seen>,
    /// Keeps the port ours while nobody listens on it
    _reserved: TcpSocket,
}

/// What becomes of connections and bytes
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Open,
    Delayed(Duration),
    Held,
    Cut,
    Reset,
    Refused,
}

impl Way {
    fn ends_connections(self) -> bool {
        matches!(self, Self::Cut | Self::Reset | Self::Refused)
    }
}

/// What the proxy's thread tells
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    listening: bool,
    /// Connections that were ever made
    made: usize,
    /// Connections that are there now
    open: usize,
}

/// What a change of mind needs on a busy machine
const SOON: Duration = Duration::from_secs(10);

impl Proxy {
    /// A proxy to `target` on a port of its own
    pub async fn to(target: String) -> Self {
        let reserved = socket(([127, 0, 0, 1], 0).into());
        let address = reserved.local_addr().expect("the socket is bound");
        let (way, ways) = watch::channel(Way::Open);
        let (admitted, limit) = watch::channel(usize::MAX);
        let (tell, seen) = watch::channel(Seen::default());
        thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be built");
            runtime.block_on(serve(Served { address, target, limit, tell: Arc::new(tell) }, ways));
        });
        let proxy = Self { address, way, admitted, seen, _reserved: reserved };
        proxy.until("the proxy listens", |seen| seen.listening).await;
        proxy
    }

    /// Passes on the first `connections` that were ever made and keeps those that come later on hold
    pub fn admit(&self, connections: usize) {
        self.admitted.send_replace(connections);
    }

    /// `127.0.0.1:port`
    pub fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// Connections that are open now
    pub fn open(&self) -> usize {
        self.seen.borrow().open
    }

    /// Connections that were ever made
    pub fn made(&self) -> usize {
        self.seen.borrow().made
    }

    /// Waits until as many connections were ever made
    pub async fn until_made(&self, connections: usize) {
        self.until("the proxy is connected to", |seen| seen.made >= connections).await;
    }

    /// Closes all connections, and new ones at once; returns when they are closed
    pub async fn cut(&self) {
        self.way.send_replace(Way::Cut);
        self.until("the proxy has cut all connections", |seen| seen.open == 0).await;
    }

    /// The same by RST instead of FIN, as a host does that has forgotten its connections
    pub async fn reset(&self) {
        self.way.send_replace(Way::Reset);
        self.until("the proxy has reset all connections", |seen| seen.open == 0).await;
    }

    /// Resets all connections and refuses new ones, as a host does on which nobody listens
    pub async fn refuse(&self) {
        self.way.send_replace(Way::Refused);
        let refused = |seen: &Seen| seen.open == 0 && !seen.listening;
        self.until("the proxy has closed its port", refused).await;
    }

    /// Keeps all connections open and passes nothing on, like a host that is frozen or a network that is a black hole
    ///
    /// What is sent meanwhile arrives after [`heal`](Self::heal), as what TCP repeats would.
    pub fn hold(&self) {
        self.way.send_replace(Way::Held);
    }

    /// Passes everything on this much later, in both directions
    pub fn delay(&self, delay: Duration) {
        self.way.send_replace(Way::Delayed(delay));
    }

    /// Lets connections and what was held through again
    pub fn heal(&self) {
        self.way.send_replace(Way::Open);
    }

    async fn until(&self, what: &str, condition: impl Fn(&Seen) -> bool) {
        let mut seen = self.seen.clone();
        wait::within(what, SOON, seen.wait_for(condition)).await.expect("the proxy's thread runs");
    }
}

/// Bound for good, whether it listens or not
fn socket(address: SocketAddr) -> TcpSocket {
    let socket = TcpSocket::new_v4().expect("descriptors are left");
    // So that one that listens can be bound beside one that keeps the port. By SO_REUSEADDR whoever sets it, as servers do,
    // could bind the port and listen while we refuse; by SO_REUSEPORT alone nobody but us.
    #[cfg(unix)]
    socket.set_reuseport(true).expect("a new socket takes options");
    #[cfg(not(unix))]
    socket.set_reuseaddr(true).expect("a new socket takes options");
    socket.bind(address).expect("the port is free, or ours");
    socket
}

struct Served {
    address: SocketAddr,
    target: String,
    limit: watch::Receiver<usize>,
    tell: Arc<watch::Sender<Seen>>,
}

/// Until the proxy is dropped; its connections end with this future
async fn serve(served: Served, mut ways: watch::Receiver<Way>) {
    let mut connections = JoinSet::new();
    let mut listener = None;
    loop {
        if *ways.borrow_and_update() == Way::Refused {
            listener = None;
        } else if listener.is_none() {
            listener = Some(socket(served.address).listen(1024).expect("the port is ours"));
        }
        served.tell.send_modify(|seen| seen.listening = listener.is_some());
        tokio::select! {
            changed = ways.changed() => if changed.is_err() { return },
            client = accept(listener.as_ref()) => {
                let Some(client) = client else { continue };
                let number = served.tell.borrow().made;
                let counted = Counted::new(&served.tell);
                // Who is not admitted finds the way held, and closed with all others.
                let admitted = number < *served.limit.borrow();
                connections.spawn(pass(client, admitted, served.target.clone(), ways.clone(), counted));
            }
            _ = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

async fn accept(listener: Option<&TcpListener>) -> Option<TcpStream> {
    match listener {
        // A client that is gone before it was accepted is none.
        Some(listener) => listener.accept().await.ok().map(|(client, _)| client),
        None => std::future::pending().await,
    }
}

/// An open connection
struct Counted(Arc<watch::Sender<Seen>>);

impl Counted {
    fn new(tell: &Arc<watch::Sender<Seen>>) -> Self {
        tell.send_modify(|seen| {
            seen.made += 1;
            seen.open += 1;
        });
        Self(Arc::clone(tell))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|seen| seen.open -= 1);
    }
}

async fn pass(
    mut client: TcpStream,
    admitted: bool,
    target: String,
    mut ways: watch::Receiver<Way>,
    counted: Counted,
) {
    let mut server = None;
    if !ways.borrow().ends_connections() {
        server = TcpStream::connect(target).await.ok();
    }
    if let Some(server) = &mut server {
        for socket in [&client, server] {
            // It adds no wait of its own; a socket that is gone already needs no option.
            let _ = socket.set_nodelay(true);
        }
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        let up = pump(from_client, to_server, admitted, ways.clone());
        let down = pump(from_server, to_client, admitted, ways.clone());
        tokio::select! {
            _ = async { tokio::join!(up, down) } => {}
            _ = ways.wait_for(|way| way.ends_connections()) => {}
        }
    }
    if matches!(*ways.borrow(), Way::Reset | Way::Refused) {
        for socket in [Some(&client), server.as_ref()].into_iter().flatten() {
            // One that is closed already needs no reset.
            let _ = socket.set_zero_linger();
        }
    }
    drop((client, server));
    drop(counted);
}

/// One direction, to its end; an error is an end, which the other side hears of when bytes would reach it
async fn pump(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    admitted: bool,
    mut ways: watch::Receiver<Way>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let read = from.read(&mut buffer).await.unwrap_or(0);
        let open = ways.wait_for(|way| admitted && matches!(way, Way::Open | Way::Delayed(_)));
        let Ok(way) = open.await.map(|way| *way) else { return };
        if let Way::Delayed(delay) = way {
            sleep(delay).await;
        }
        let written = if read == 0 { to.shutdown().await } else { to.write_all(&buffer[..read]).await };
        if read == 0 || written.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{io::ErrorKind, time::Instant};

    use tokio::{io::AsyncReadExt, time::timeout};

    use super::*;

    /// One that says back what it hears, behind a proxy, and a connection to it
    async fn echo() -> (Proxy, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Proxy::to(listener.local_addr().unwrap().to_string()).await;
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        let stream = TcpStream::connect(proxy.endpoint()).await.unwrap();
        (proxy, stream)
    }

    async fn says_back(stream: &mut TcpStream) -> std::io::Result<()> {
        stream.write_all(b"word").await?;
        stream.read_exact(&mut [0; 4]).await.map(drop)
    }

    #[tokio::test]
    async fn what_is_held_arrives_after_healing_and_what_is_delayed_arrives_late() {
        let (proxy, mut stream) = echo().await;
        says_back(&mut stream).await.unwrap();
        proxy.hold();
        timeout(Duration::from_millis(200), says_back(&mut stream)).await.unwrap_err();
        proxy.heal();
        stream.read_exact(&mut [0; 4]).await.unwrap();
        proxy.delay(Duration::from_millis(100));
        let start = Instant::now();
        says_back(&mut stream).await.unwrap();
        assert!(start.elapsed() >= Duration::from_millis(200), "there and back");
        assert_eq!((proxy.made(), proxy.open()), (1, 1));
    }

    #[tokio::test]
    async fn a_closed_connection_is_no_longer_counted() {
        let (proxy, stream) = echo().await;
        proxy.until_made(1).await;
        drop(stream);
        wait::until("it is gone", SOON, || (proxy.open() == 0).then_some(())).await;
    }

    #[tokio::test]
    async fn cut_ends_in_order_reset_does_not_and_refuse_lets_nobody_in_until_healed() {
        let (proxy, mut stream) = echo().await;
        says_back(&mut stream).await.unwrap();
        proxy.cut().await;
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        proxy.heal();
        let mut stream = TcpStream::connect(proxy.endpoint()).await.unwrap();
        says_back(&mut stream).await.unwrap();
        proxy.reset().await;
        assert_eq!(stream.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        proxy.refuse().await;
        let refused = TcpStream::connect(proxy.endpoint()).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        // It did once, and the connection above was made.
        TcpListener::bind(proxy.endpoint()).await.expect_err("nobody else listens there meanwhile");
        proxy.heal();
        proxy.until("it listens again", |seen| seen.listening).await;
        says_back(&mut TcpStream::connect(proxy.endpoint()).await.unwrap()).await.unwrap();
    }
}
