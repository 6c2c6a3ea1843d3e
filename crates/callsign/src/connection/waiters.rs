//! Calls that wait for a stream or for an endpoint

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Notify, futures::Notified};

/// Where calls wait until there may be room for them
///
/// A waiter takes a [`Place`], asks for [`notified`](Place::notified), looks for room once more, and only then waits: what
/// happens in between wakes it.
#[derive(Debug, Default)]
pub(crate) struct Waiters {
    notify: Notify,
    news: Notify,
    waiting: AtomicUsize,
    /// Of these, who may find no use for a stream that another could use.
    choosy: AtomicUsize,
}

impl Waiters {
    /// A place to wait in, unless `most` wait already
    pub(crate) fn enter(&self, most: usize) -> Option<Place<'_>> {
        let place = Place { waiters: self, is_choosy: false };
        let before = self.waiting.fetch_add(1, Ordering::SeqCst);
        (before < most).then_some(place)
    }

    /// One stream was given back
    pub(crate) fn wake_one(&self) {
        // The giver has given back before, the waiter looks for room after it has counted itself; all of it sequentially
        // consistent (also in `Streams`), so at least one of them sees the other. Without waiters this costs a load.
        if self.waiting.load(Ordering::SeqCst) == 0 {
            return;
        }
        // Who is choosy counts itself before it can be notified. If it does so after this, whoever comes to stand behind it
        // looks for room later still, and finds this stream.
        if self.choosy.load(Ordering::SeqCst) == 0 {
            self.notify.notify_one();
        } else {
            // One alone might be the wrong one.
            self.notify.notify_waiters();
        }
    }

    /// Completes at the next [`wake_all`](Self::wake_all), for those who wait for news and not for room
    pub(crate) fn news(&self) -> Notified<'_> {
        self.news.notified()
    }

    /// There may be room for many, or news for all
    pub(crate) fn wake_all(&self) {
        self.notify.notify_waiters();
        self.news.notify_waiters();
    }
}

/// One who waits for room; dropping it leaves
#[derive(Debug)]
pub(crate) struct Place<'a> {
    waiters: &'a Waiters,
    is_choosy: bool,
}

impl<'a> Place<'a> {
    /// From here on it may find no use for a stream that another could use
    pub(crate) fn choose(&mut self) {
        if !std::mem::replace(&mut self.is_choosy, true) {
            self.waiters.choosy.fetch_add(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn is_choosy(&self) -> bool {
        self.is_choosy
    }

    /// Completes at the next news from now on, or the next stream given back to one of those who wait
    ///
    /// To be enabled before looking for room.
    pub(crate) fn notified(&self) -> Notified<'a> {
        self.waiters.notify.notified()
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.is_choosy {
            self.waiters.choosy.fetch_sub(1, Ordering::SeqCst);
        }
        self.waiters.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}
