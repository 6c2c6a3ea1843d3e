//! The future that moves a connection's bytes

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use callsign_core::keepalive::{Verdict, Watchdog};
use h2::{Ping, PingPong, client};
use tokio::{
    net::TcpStream,
    time::{Instant, Sleep},
};

use super::{
    Closed, Shared,
    tap::{News, Tap},
};

/// Reads, writes, pings and closes one connection; spawned by the connection's owner
///
/// Ends when the connection is closed, at the latest 1 s after it was drained and its last stream ended. Dropping it
/// closes the connection at once.
#[derive(Debug)]
#[must_use = "a connection does nothing unless its driver is spawned"]
pub(crate) struct Driver {
    h2: client::Connection<Tap<TcpStream>, Bytes>,
    news: Arc<News>,
    ping_pong: PingPong,
    shared: Arc<Shared>,
    watchdog: Watchdog,
    busy_since: Option<Instant>,
    /// For the watchdog and, once `closing`, for the end. Idle connections have none.
    timer: Option<Pin<Box<Sleep>>>,
    closing: bool,
}

/// Time for GOAWAY and FIN to leave; a frozen peer with full buffers never lets them.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

impl Driver {
    pub(super) fn new(
        h2: client::Connection<Tap<TcpStream>, Bytes>,
        news: Arc<News>,
        ping_pong: PingPong,
        shared: Arc<Shared>,
        watchdog: Watchdog,
    ) -> Self {
        Self { h2, news, ping_pong, shared, watchdog, busy_since: None, timer: None, closing: false }
    }

    fn on_news(&mut self) {
        let news = self.news.take();
        if news == 0 {
            return;
        }
        self.watchdog.on_read(Instant::now().into_std());
        if news & News::MESSAGE != 0 {
            self.watchdog.on_message();
        }
        if news & News::SETTINGS != 0 {
            self.shared.allow(self.h2.max_concurrent_send_streams());
        }
        if news & News::GO_AWAY != 0 {
            self.shared.on_go_away();
        }
    }

    /// Lets the watchdog speak when its time has come; true if the peer is dead
    fn poll_watchdog(&mut self, cx: &mut Context<'_>) -> bool {
        let busy = self.shared.streams.open() > 0;
        match (busy, self.busy_since) {
            (true, None) => self.busy_since = Some(Instant::now()),
            (false, Some(_)) => self.busy_since = None,
            _ => {}
        }
        // An armed timer is left to fire: setting it anew for each call would cost more than one idle wake-up.
        let due = match &mut self.timer {
            Some(timer) => timer.as_mut().poll(cx).is_ready(),
            None => busy,
        };
        if !due {
            return false;
        }
        loop {
            let busy_since = self.busy_since.map(Instant::into_std);
            match self.watchdog.verdict(Instant::now().into_std(), busy_since) {
                Verdict::Idle => {
                    self.timer = None;
                    return false;
                }
                Verdict::Wait(until) => {
                    if self.arm(until.into(), cx) {
                        return false;
                    }
                }
                Verdict::Ping => self.ping(cx),
                Verdict::Dead => return true,
            }
        }
    }

    /// Sets the timer; false if its time is already past
    fn arm(&mut self, until: Instant, cx: &mut Context<'_>) -> bool {
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        timer.as_mut().reset(until);
        timer.as_mut().poll(cx).is_pending()
    }

    fn ping(&mut self, cx: &mut Context<'_>) {
        // h2 has one slot for a ping; an answer that arrived occupies it until it is fetched.
        let _ = self.ping_pong.poll_pong(cx);
        // A slot still occupied means that a ping is on its way already: it will do.
        let _ = self.ping_pong.send_ping(Ping::opaque());
    }

    /// Ends the connection once it is retired and its last stream is closed; true when its time is over
    fn poll_close(&mut self, cx: &mut Context<'_>) -> bool {
        if self.closing {
            return self.timer.as_mut().is_some_and(|timer| timer.as_mut().poll(cx).is_ready());
        }
        if self.shared.is_retired() && self.shared.streams.open() == 0 {
            // Without the last handle h2 sends GOAWAY and closes by itself.
            self.shared.take_sender();
            self.closing = true;
            self.timer = None;
            return !self.arm(Instant::now() + CLOSE_TIMEOUT, cx);
        }
        false
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.shared.waker.register(cx.waker());
        loop {
            let ended = Pin::new(&mut this.h2).poll(cx);
            this.on_news();
            if let Poll::Ready(result) = ended {
                let cause =
                    result.err().map_or_else(|| "closed by the peer".into(), |error| error.to_string());
                this.shared.retire(Closed::Lost(cause.into()));
                return Poll::Ready(());
            }
            if !this.closing && this.poll_watchdog(cx) {
                this.shared.retire(Closed::Lost("a PING was not answered".into()));
                return Poll::Ready(());
            }
            let was_closing = this.closing;
            if this.poll_close(cx) {
                return Poll::Ready(());
            }
            if this.closing == was_closing {
                return Poll::Pending;
            }
            // The last handle is gone just now: h2 has to see it.
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Also when a runtime ends with the driver in it: nobody may wait for this connection any more.
        self.shared.retire(Closed::Lost("the driver was dropped".into()));
        self.shared.take_sender();
    }
}
