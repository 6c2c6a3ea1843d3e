//! Peers that are no gRPC server at all

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering::Relaxed},
};

use callsign::instance::Address;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::{JoinHandle, JoinSet},
};

/// A peer at an address; gone when dropped
#[derive(Debug)]
pub struct Peer {
    address: Address,
    accepted: Arc<AtomicU32>,
    _kept: Kept,
}

#[derive(Debug)]
enum Kept {
    /// Bound and never listening: the port stays ours, a connect is refused.
    Bound {
        _socket: TcpSocket,
    },
    Listening(JoinHandle<()>),
}

impl Peer {
    /// An address at which nobody listens
    pub fn deaf() -> Self {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(([127, 0, 0, 1], 0).into()).expect("a port is free");
        let address = Address::from(socket.local_addr().expect("the socket is bound"));
        Self { address, accepted: Arc::default(), _kept: Kept::Bound { _socket: socket } }
    }

    /// One that accepts and never speaks
    pub async fn mute() -> Self {
        Self::listening(|mut stream| async move {
            // What is read is of no interest; the end is.
            let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
        })
        .await
    }

    /// One that speaks HTTP/1
    pub async fn http1() -> Self {
        Self::listening(|mut stream| async move {
            let mut request = [0; 1024];
            if stream.read(&mut request).await.is_ok() {
                // A client that is already gone needs no answer.
                let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").await;
            }
        })
        .await
    }

    /// One that closes what it accepts
    pub async fn slammer() -> Self {
        Self::listening(|stream| async move { drop(stream) }).await
    }

    /// Where it is
    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// How many connections it has accepted
    pub fn accepted(&self) -> u32 {
        self.accepted.load(Relaxed)
    }

    async fn listening<F>(mut on_stream: impl FnMut(TcpStream) -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = Address::from(listener.local_addr().expect("the listener is bound"));
        let accepted = Arc::<AtomicU32>::default();
        let count = accepted.clone();
        let task = tokio::spawn(async move {
            // Owns the streams: they end with the listener.
            let mut streams = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Relaxed);
                streams.spawn(on_stream(stream));
            }
        });
        Self { address, accepted, _kept: Kept::Listening(task) }
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Self::Listening(task) = self {
            task.abort();
        }
    }
}
