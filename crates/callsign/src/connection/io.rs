//! What carries HTTP/2: TCP, or TLS over it

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use super::ConnectError;
use crate::instance::Address;

/// How bytes are to travel
#[derive(Clone, Debug, Default)]
pub(crate) enum Transport {
    #[default]
    Plain,
    #[cfg(feature = "tls")]
    Tls(std::sync::Arc<crate::tls::Connector>),
}

impl Transport {
    /// What a request's `:scheme` is
    pub(crate) fn scheme(&self) -> http::uri::Scheme {
        match self {
            Self::Plain => http::uri::Scheme::HTTP,
            #[cfg(feature = "tls")]
            Self::Tls(_) => http::uri::Scheme::HTTPS,
        }
    }

    /// Takes a socket that was connected to `address`
    #[cfg_attr(not(feature = "tls"), allow(unused_variables, reason = "TLS verifies the name in it"))]
    pub(super) async fn carry(&self, address: &Address, tcp: TcpStream) -> Result<Io, ConnectError> {
        match self {
            Self::Plain => Ok(Io::Plain(tcp)),
            #[cfg(feature = "tls")]
            Self::Tls(connector) => Ok(Io::Tls(Box::new(connector.connect(address, tcp).await?))),
        }
    }

    /// What it means that reading failed in this way, if it did, before the peer was ready
    #[cfg_attr(not(feature = "tls"), allow(unused_variables, reason = "only TLS has errors of its own"))]
    pub(super) fn explain(&self, error: Option<&io::Error>) -> Option<ConnectError> {
        match self {
            Self::Plain => None,
            #[cfg(feature = "tls")]
            Self::Tls(connector) => {
                let has_identity = connector.has_identity();
                crate::tls::HandshakeError::after_handshake(error?, has_identity).map(Into::into)
            }
        }
    }

    /// Whether who is on the way can read along
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self, Self::Plain)
    }
}

/// A socket, perhaps with TLS over it
#[derive(Debug)]
pub(super) enum Io {
    Plain(TcpStream),
    /// Boxed for its size: most connections are plain, and pay for nothing.
    #[cfg(feature = "tls")]
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

macro_rules! delegate {
    ($io:expr, $stream:ident => $call:expr) => {
        match $io.get_mut() {
            Io::Plain($stream) => $call,
            #[cfg(feature = "tls")]
            Io::Tls($stream) => $call,
        }
    };
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => match Pin::new(tls).poll_read(cx, buf) {
                // A peer that ends without saying so to TLS, as one that was killed. Frames and streams tell by themselves
                // whether they are whole, so this is the end of a connection like any other.
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    Poll::Ready(Ok(()))
                }
                read => read,
            },
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        delegate!(self, io => Pin::new(io).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, io => Pin::new(io).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(tcp) => tcp.is_write_vectored(),
            #[cfg(feature = "tls")]
            Self::Tls(tls) => tls.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, io => Pin::new(io).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, io => Pin::new(io).poll_shutdown(cx))
    }
}

#[cfg(test)]
#[cfg(feature = "tls")]
mod tests {
    use std::{sync::Arc, task::Waker, time::Duration};

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        time::timeout,
    };
    use tokio_rustls::{TlsAcceptor, server};

    use super::{
        super::tap::{News, Tap},
        *,
    };
    use crate::tls::{Connector, Tls};

    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];

    /// Both ends of a TLS connection, ours as connections use it
    async fn pair() -> (server::TlsStream<TcpStream>, Tap<Io>, Arc<News>) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let tls = Tls::new().ca_pem(made.cert.pem()).server_name("localhost");
        let key = made.signing_key.serialize_der().try_into().unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let transport = Transport::Tls(Connector::new(&tls).unwrap());
        assert!(!transport.is_plain());
        assert_eq!(transport.scheme(), http::uri::Scheme::HTTPS);
        let (peer, ours) = tokio::join!(
            async { acceptor.accept(listener.accept().await.unwrap().0).await.unwrap() },
            async {
                let tcp = TcpStream::connect(address).await.unwrap();
                transport.carry(&address.into(), tcp).await.unwrap()
            }
        );
        let news = Arc::new(News::default());
        (peer, Tap::new(ours, Arc::clone(&news)), news)
    }

    async fn read_all(tap: &mut Tap<Io>) -> Vec<u8> {
        let mut read = Vec::new();
        tap.read_to_end(&mut read).await.unwrap();
        read
    }

    #[tokio::test]
    async fn a_peer_that_says_goodbye_is_read_to_its_end_even_when_writing_fails() {
        let (mut peer, mut tap, news) = pair().await;
        peer.write_all(&SETTINGS).await.unwrap();
        // Says close_notify and closes; what we send from now on is answered with a reset.
        peer.shutdown().await.unwrap();
        drop(peer);
        while news.mute().is_none() {
            tap.write_all(&[0; 1 << 16]).await.unwrap();
            tap.flush().await.unwrap();
        }
        assert_eq!(read_all(&mut tap).await, SETTINGS);
    }

    #[tokio::test]
    async fn a_peer_that_is_gone_without_a_word_to_tls_ends_a_connection_as_over_tcp() {
        let (mut peer, mut tap, _) = pair().await;
        peer.write_all(&SETTINGS).await.unwrap();
        // As the kernel does for a process that was killed.
        peer.get_mut().0.shutdown().await.unwrap();
        assert_eq!(read_all(&mut tap).await, SETTINGS);
    }

    #[tokio::test]
    async fn a_flush_sends_what_tls_has_kept_back() {
        let (mut peer, mut tap, _) = pair().await;
        // Nobody reads: the socket fills up, then the buffer of TLS.
        let (mut written, mut cx) = (0, Context::from_waker(Waker::noop()));
        while let Poll::Ready(taken) = Pin::new(&mut tap).poll_write(&mut cx, &[7; 1 << 14]) {
            written += taken.unwrap();
        }
        let mut read = vec![0; written];
        let flushed = async { tokio::join!(tap.flush(), peer.read_exact(&mut read)) };
        let (flushed, arrived) =
            timeout(Duration::from_secs(10), flushed).await.expect("nothing is kept back");
        assert_eq!((flushed.unwrap(), arrived.unwrap()), ((), written));
    }
}
