//! The future that moves a connection's bytes

use std::{
    future::Future,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use callsign_core::keepalive::{Activity, Asked, KeepAlive, Verdict, Watchdog};
use h2::{Ping, PingPong, client};
use tokio::time::{Instant, Sleep};

use super::{
    Closed, Shared,
    company::Company,
    io::Io,
    tap::{News, Tap},
};

/// Reads, writes, pings and closes one connection; spawned by the connection's owner
///
/// Ends when the connection is closed, at the latest 1 s after it was drained and its last stream ended. Dropping it
/// closes the connection at once.
#[derive(Debug)]
#[must_use = "a connection does nothing unless its driver is spawned"]
pub(crate) struct Driver {
    h2: client::Connection<Tap<Io>, Bytes>,
    news: Arc<News>,
    ping_pong: PingPong,
    shared: Arc<Shared>,
    watchdog: Watchdog,
    /// The peer's stream limit as last seen.
    limit: usize,
    /// For the watchdog and, once `closing`, for the end. Idle connections have none.
    timer: Option<Pin<Box<Sleep>>>,
    closing: bool,
    company: Company,
}

/// Time for GOAWAY and FIN to leave, or for what a peer sent before it hung up to come in.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

impl Driver {
    pub(super) fn new(
        h2: client::Connection<Tap<Io>, Bytes>,
        news: Arc<News>,
        ping_pong: PingPong,
        shared: Arc<Shared>,
        keep_alive: KeepAlive,
    ) -> Self {
        let (watchdog, company) = (Watchdog::new(keep_alive), Company::default());
        let limit = h2.max_concurrent_send_streams();
        shared.allow(limit);
        Self { h2, news, ping_pong, shared, watchdog, limit, timer: None, closing: false, company }
    }

    fn on_news(&mut self, cx: &mut Context<'_>) {
        let news = self.news.take();
        if news & News::READ != 0 {
            self.watchdog.on_read();
            self.shared.wish.on_read();
        }
        if news & News::MESSAGE != 0 {
            self.watchdog.on_message();
            self.shared.answered.store(true, Ordering::Relaxed);
        }
        if news & News::GO_AWAY != 0 {
            self.shared.on_go_away();
        }
        if news & News::MUTE != 0 && !self.closing {
            self.shared.retire(Closed::Lost(self.news.mute().unwrap_or("cannot write").into()));
            self.close(cx);
        }
        // When h2 applies a SETTINGS frame is its own affair; a look at the result is cheap.
        let limit = self.h2.max_concurrent_send_streams();
        if limit != self.limit {
            self.limit = limit;
            self.shared.allow(limit);
        }
    }

    /// Lets the watchdog speak when its time has come; true if the peer is dead
    fn poll_watchdog(&mut self, cx: &mut Context<'_>) -> bool {
        let busy = self.shared.streams.open() > 0;
        if busy {
            self.watchdog.on_busy(|| Instant::now().into_std());
        }
        let asked = self.shared.wish.is_asked() && self.grant_wish(cx);
        // An armed timer is left to fire: setting it anew for each call would cost more than one idle wake-up.
        let due = asked
            || match &mut self.timer {
                Some(timer) => timer.as_mut().poll(cx).is_ready(),
                None => busy,
            };
        if !due {
            return false;
        }
        let activity = Activity { busy, calls: self.shared.outbox().calls };
        loop {
            match self.watchdog.verdict(Instant::now().into_std(), activity) {
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

    /// Sends the PING that was asked for, if the peer does not mind; true if one is on its way
    fn grant_wish(&mut self, cx: &mut Context<'_>) -> bool {
        let calls = self.shared.outbox().calls;
        let asked = self.watchdog.suspect(Instant::now().into_std(), calls);
        if asked == Asked::Ping {
            self.ping(cx);
        }
        let is_sent = asked != Asked::Denied;
        self.shared.wish.settle(is_sent);
        is_sent
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

    /// Begins to close once the connection is retired and its last stream has ended; true when the time for it is over
    fn poll_close(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.closing && self.shared.is_retired() && self.shared.streams.open() == 0 {
            self.close(cx);
        }
        self.closing && self.timer.as_mut().is_none_or(|timer| timer.as_mut().poll(cx).is_ready())
    }

    fn close(&mut self, cx: &mut Context<'_>) {
        self.closing = true;
        self.shared.shut();
        self.arm(Instant::now() + CLOSE_TIMEOUT, cx);
        // h2 has to see that its last handle is gone.
        cx.waker().wake_by_ref();
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        this.shared.waker.register(cx.waker());
        let unsent = this.shared.unsent.load(Ordering::Relaxed) > 0;
        if unsent && this.shared.streams.open() > 1 && this.company.is_awaited() {
            // Behind all that is ready: the task is woken while it runs.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let ended = Pin::new(&mut this.h2).poll(cx);
        if unsent {
            // After the poll: a request that comes meanwhile goes sooner, and not later, than it might.
            this.company.left(this.shared.unsent.swap(0, Ordering::Relaxed));
        }
        this.on_news(cx);
        if let Poll::Ready(result) = ended {
            let cause = result.err().map_or_else(|| "closed by the peer".into(), |error| error.to_string());
            this.shared.retire(Closed::Lost(cause.into()));
            return Poll::Ready(());
        }
        if !this.closing && this.poll_watchdog(cx) {
            this.shared.retire(Closed::Lost("a PING was not answered".into()));
            return Poll::Ready(());
        }
        if this.poll_close(cx) { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Also when a runtime ends with the driver in it: nobody may wait for this connection any more.
        self.shared.retire(Closed::Lost("the driver was dropped".into()));
        self.shared.shut();
    }
}
