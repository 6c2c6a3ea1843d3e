//! Connections that can be frozen and cut, and where they come from

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf},
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::WatchStream;
use tonic::transport::server::Connected;

/// The state of all connections of a server
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Line {
    /// Nothing is read or written.
    pub(crate) paused: bool,
    /// Connections of an earlier cut are gone.
    pub(crate) cuts: u64,
    /// Every connection is gone, those that still come in too.
    pub(crate) closed: bool,
}

/// New connections, over TCP and over pipes
#[derive(Debug)]
pub(crate) struct Incoming {
    listener: Option<TcpListener>,
    pipes: mpsc::UnboundedReceiver<DuplexStream>,
    line: watch::Receiver<Line>,
}

impl Incoming {
    pub(crate) fn new(
        listener: Option<TcpListener>,
        pipes: mpsc::UnboundedReceiver<DuplexStream>,
        line: watch::Receiver<Line>,
    ) -> Self {
        Self { listener, pipes, line }
    }

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Box<dyn Transport>>> {
        if let Poll::Ready(Some(pipe)) = self.pipes.poll_recv(cx) {
            return Poll::Ready(Ok(Box::new(pipe)));
        }
        let Some(listener) = &self.listener else { return Poll::Pending };
        let (socket, _) = ready!(listener.poll_accept(cx))?;
        socket.set_nodelay(true)?;
        Poll::Ready(Ok(Box::new(socket)))
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let transport = ready!(self.poll_accept(cx));
        Poll::Ready(Some(transport.map(|transport| Connection::new(transport, self.line.clone()))))
    }
}

/// A byte stream of either kind
trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// One connection under the server's [`Line`]
pub(crate) struct Connection {
    transport: Box<dyn Transport>,
    line: Line,
    /// The cuts that were before its time.
    born: u64,
    /// None once the server is gone.
    changes: Option<WatchStream<Line>>,
}

impl Connection {
    fn new(transport: Box<dyn Transport>, line: watch::Receiver<Line>) -> Self {
        let now = *line.borrow();
        Self { transport, line: now, born: now.cuts, changes: Some(WatchStream::new(line)) }
    }

    /// Ready while bytes may pass; hyper polls both directions from one task, which this wakes
    fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(changes) = &mut self.changes {
            match Pin::new(changes).poll_next(cx) {
                Poll::Ready(Some(line)) => self.line = line,
                Poll::Ready(None) => self.changes = None,
                Poll::Pending => break,
            }
        }
        if self.changes.is_none() || self.line.closed || self.line.cuts != self.born {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if self.line.paused { Poll::Pending } else { Poll::Ready(Ok(())) }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_open(cx))?;
        Pin::new(&mut self.transport).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_open(cx))?;
        Pin::new(&mut self.transport).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_open(cx))?;
        Pin::new(&mut self.transport).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.transport.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_open(cx))?;
        Pin::new(&mut self.transport).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_open(cx))?;
        Pin::new(&mut self.transport).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}
