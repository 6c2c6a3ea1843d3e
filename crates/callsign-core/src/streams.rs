//! Whether a connection has room for one more stream

use crate::sync::{AtomicU32, Ordering};

/// The streams of one HTTP/2 connection: how many are open, how many the peer allows
///
/// A connection never gets more streams than its peer allows: a call that waits for a stream inside the HTTP/2
/// implementation cannot be taken back and sent elsewhere. A closed connection is one that allows none.
#[derive(Debug, Default)]
pub struct Streams {
    open: AtomicU32,
    limit: AtomicU32,
}

impl Streams {
    /// Takes a stream if the peer allows one more, and says how many were open before; [`close`](Self::close) gives it back
    #[must_use]
    pub fn try_open(&self) -> Option<u32> {
        // A count that overshoots for a moment would let a driver believe that a stream is open; hence no fetch_add.
        // Sequentially consistent: a driver that sets the limit to zero and then reads `open` either sees this stream, or
        // this caller comes too late and is refused by the connection itself.
        let room = |open| (open < self.limit.load(Ordering::SeqCst)).then_some(open + 1);
        self.open.fetch_update(Ordering::SeqCst, Ordering::SeqCst, room).ok()
    }

    /// Gives a stream back; true if it was the last one open
    pub fn close(&self) -> bool {
        self.open.fetch_sub(1, Ordering::SeqCst) == 1
    }

    /// Whether [`try_open`](Self::try_open) would succeed now
    pub fn has_room(&self) -> bool {
        self.open.load(Ordering::SeqCst) < self.limit.load(Ordering::SeqCst)
    }

    /// Streams open now
    pub fn open(&self) -> u32 {
        self.open.load(Ordering::SeqCst)
    }

    /// The peer's limit, as last set
    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::SeqCst)
    }

    /// Sets the peer's limit; zero closes the connection to new streams
    pub fn set_limit(&self, limit: u32) {
        self.limit.store(limit, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_streams_than_the_limit() {
        let streams = Streams::default();
        assert_eq!(streams.try_open(), None, "a connection without SETTINGS has no room");
        streams.set_limit(2);
        assert_eq!((streams.try_open(), streams.try_open()), (Some(0), Some(1)));
        assert!(!streams.has_room() && streams.try_open().is_none());
        assert_eq!(streams.open(), 2);
        assert!(!streams.close());
        assert_eq!(streams.try_open(), Some(1));
    }

    #[test]
    fn a_lowered_limit_leaves_open_streams_alone() {
        let streams = Streams::default();
        streams.set_limit(3);
        assert_eq!((streams.try_open(), streams.try_open()), (Some(0), Some(1)));
        streams.set_limit(0);
        assert_eq!(streams.try_open(), None);
        assert_eq!(streams.open(), 2);
        assert!(!streams.close());
        assert!(streams.close(), "the last one says so");
    }

    #[test]
    fn threads_that_race_never_exceed_the_limit() {
        let streams = Streams::default();
        streams.set_limit(7);
        let most = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut held = 0;
                    for turn in 0..20_000 {
                        if turn % 3 != 2 && streams.try_open().is_some() {
                            held += 1;
                            most.fetch_add(1, Ordering::SeqCst);
                            assert!(most.load(Ordering::SeqCst) <= 7);
                        } else if held > 0 {
                            held -= 1;
                            most.fetch_sub(1, Ordering::SeqCst);
                            streams.close();
                        }
                    }
                    for _ in 0..held {
                        most.fetch_sub(1, Ordering::SeqCst);
                        streams.close();
                    }
                });
            }
        });
        assert_eq!(streams.open(), 0);
    }
}
