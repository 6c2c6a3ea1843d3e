//! The bytes between socket and h2, watched as they pass

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What came in since the driver last looked
///
/// Written by the [`Tap`] inside h2 and read by the driver around it, both on the driver's task.
#[derive(Debug, Default)]
pub(super) struct News {
    flags: AtomicU8,
    not_http2: OnceLock<String>,
    unreadable: OnceLock<io::Error>,
    mute: OnceLock<String>,
}

impl News {
    /// Something was read.
    pub(super) const READ: u8 = 1;
    /// HEADERS or DATA began.
    pub(super) const MESSAGE: u8 = 2;
    /// A GOAWAY frame began.
    pub(super) const GO_AWAY: u8 = 4;
    /// Writing failed: nothing leaves any more, but what the peer had sent can still be read.
    pub(super) const MUTE: u8 = 8;

    /// The flags since the last call
    pub(super) fn take(&self) -> u8 {
        // One task writes and reads; the load spares the exchange when there is nothing.
        match self.flags.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.flags.swap(0, Ordering::Relaxed),
        }
    }

    /// Why writing failed
    pub(super) fn mute(&self) -> Option<&str> {
        self.mute.get().map(String::as_str)
    }

    /// Whether anything was read since the flags were last taken
    pub(super) fn has_read(&self) -> bool {
        self.flags.load(Ordering::Relaxed) & Self::READ != 0
    }

    /// Why reading failed, if it was not the socket but what is between it and us
    pub(super) fn unreadable(&self) -> Option<&io::Error> {
        self.unreadable.get()
    }

    /// The beginning of what the peer sent, escaped, if it was no SETTINGS frame
    pub(super) fn not_http2(&self) -> Option<&str> {
        self.not_http2.get().map(String::as_str)
    }
}

/// A transport that tells what kinds of frame come in
///
/// It looks at the nine bytes of each frame header and at nothing else. h2 offers no such hook, and without one the
/// driver would have to take h2's lock after every read to find out whether the limit changed or a GOAWAY came.
#[derive(Debug)]
pub(super) struct Tap<T> {
    io: T,
    scanner: Scanner,
    news: Arc<News>,
}

impl<T> Tap<T> {
    pub(super) fn new(io: T, news: Arc<News>) -> Self {
        Self { io, scanner: Scanner::default(), news }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Tap<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf)).map_err(|error| self.unreadable(error))?;
        let bytes = &buf.filled()[before..];
        if bytes.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let Some(flags) = self.scanner.scan(bytes) else {
            let start = &bytes[..bytes.len().min(40)];
            let _ = self.news.not_http2.set(start.escape_ascii().to_string());
            return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
        };
        self.news.flags.fetch_or(flags, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl<T> Tap<T> {
    /// Keeps an error of TLS, of which h2 would leave no more than the words
    fn unreadable(&self, error: io::Error) -> io::Error {
        if error.get_ref().is_none() {
            return error;
        }
        let words = io::Error::new(error.kind(), error.to_string());
        // The first failure is the cause.
        let _ = self.news.unreadable.set(error);
        words
    }

    /// Hides a failure to write from h2, which would end the connection and with it what is still to be read
    ///
    /// A server that says GOAWAY and closes may have us find out by a write: the GOAWAY, and perhaps answers, are there to
    /// be read all the same.
    fn written(&self, result: io::Result<usize>, all: usize) -> io::Result<usize> {
        result.or_else(|error| {
            self.fail(&error);
            Ok(all)
        })
    }

    fn fail(&self, error: &io::Error) {
        // The first failure is the cause.
        let _ = self.news.mute.set(error.to_string());
        self.news.flags.fetch_or(News::MUTE, Ordering::Relaxed);
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Tap<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write(cx, buf));
        Poll::Ready(self.written(result, buf.len()))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, bufs));
        Poll::Ready(self.written(result, bufs.iter().map(|buf| buf.len()).sum()))
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = ready!(Pin::new(&mut self.io).poll_flush(cx));
        Poll::Ready(self.written(result.map(|()| 0), 0).map(drop))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Finds the frame headers in a stream of bytes that is cut anywhere
#[derive(Debug, Default)]
struct Scanner {
    header: [u8; HEADER],
    /// Bytes of `header` that are there.
    filled: usize,
    /// Bytes of payload still to come before the next header.
    payload: usize,
    /// Whether the first frame was seen, and was SETTINGS.
    begun: bool,
}

/// Length of a frame header, and the frame types of interest (RFC 9113, sections 4.1 and 6).
const HEADER: usize = 9;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GO_AWAY: u8 = 7;

impl Scanner {
    /// The news in `bytes`, or `None` if the peer does not begin as an HTTP/2 server must
    fn scan(&mut self, mut bytes: &[u8]) -> Option<u8> {
        let mut flags = News::READ;
        loop {
            let skipped = self.payload.min(bytes.len());
            self.payload -= skipped;
            bytes = &bytes[skipped..];
            if bytes.is_empty() {
                return Some(flags);
            }
            let taken = (HEADER - self.filled).min(bytes.len());
            self.header[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
            self.filled += taken;
            bytes = &bytes[taken..];
            if self.filled > 3 && !self.begun && self.header[3] != SETTINGS {
                return None;
            }
            if self.filled < HEADER {
                return Some(flags);
            }
            self.begun = true;
            self.filled = 0;
            self.payload = usize::from(self.header[0]) << 16
                | usize::from(self.header[1]) << 8
                | usize::from(self.header[2]);
            flags |= match self.header[3] {
                DATA | HEADERS => News::MESSAGE,
                GO_AWAY => News::GO_AWAY,
                _ => 0,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, length: usize) -> Vec<u8> {
        let [_, a, b, c] = u32::try_from(length).unwrap().to_be_bytes();
        let mut frame = vec![a, b, c, kind, 0, 0, 0, 0, 1];
        frame.resize(HEADER + length, GO_AWAY);
        frame
    }

    #[test]
    fn frames_are_found_wherever_the_bytes_are_cut() {
        let stream =
            [frame(SETTINGS, 6), frame(8, 4), frame(HEADERS, 300), frame(DATA, 0), frame(6, 8)].concat();
        for size in 1..stream.len() {
            let mut scanner = Scanner::default();
            let flags = stream.chunks(size).fold(0, |all, chunk| all | scanner.scan(chunk).unwrap());
            assert_eq!(flags, News::READ | News::MESSAGE, "cut every {size} bytes");
        }
    }

    #[test]
    fn go_away_is_news_and_its_payload_is_not() {
        let mut scanner = Scanner::default();
        assert_eq!(scanner.scan(&frame(SETTINGS, 0)), Some(News::READ));
        assert_eq!(scanner.scan(&frame(DATA, 5)), Some(News::READ | News::MESSAGE));
        assert_eq!(scanner.scan(&frame(GO_AWAY, 8)), Some(News::READ | News::GO_AWAY));
    }

    #[tokio::test]
    async fn what_the_peer_sent_is_read_even_when_writing_fails() {
        let news = Arc::new(News::default());
        let (peer, ours) = tokio::io::duplex(1024);
        let mut tap = Tap::new(ours, Arc::clone(&news));
        let mut peer = peer;
        tokio::io::AsyncWriteExt::write_all(&mut peer, &frame(SETTINGS, 0)).await.unwrap();
        drop(peer);
        tokio::io::AsyncWriteExt::write_all(&mut tap, b"lost").await.unwrap();
        assert_eq!(news.take(), News::MUTE);
        assert!(news.mute().is_some());
        let mut read = Vec::new();
        tokio::io::AsyncReadExt::read_to_end(&mut tap, &mut read).await.unwrap();
        assert_eq!(read, frame(SETTINGS, 0));
    }

    #[tokio::test]
    async fn a_peer_that_does_not_begin_with_settings_is_quoted() {
        let news = Arc::new(News::default());
        let mut tap = Tap::new(&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], Arc::clone(&news));
        let error = tokio::io::AsyncReadExt::read(&mut tap, &mut [0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        assert_eq!(news.not_http2(), Some("HTTP/1.1 400 Bad Request\\r\\n\\r\\n"));
    }
}
