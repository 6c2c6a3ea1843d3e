//! A PING that somebody outside of the connection asks for

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use callsign_core::ejection::Probe;

/// What became of it, for both sides to see without a lock; idle connections and healthy ones never write it
#[derive(Debug, Default)]
pub(super) struct Wish(AtomicU8);

const ASKED: u8 = 1;
const SENT: u8 = 2;
const ANSWERED: u8 = 3;
const DENIED: u8 = 4;

impl Wish {
    pub(super) fn state(&self) -> Probe {
        match self.0.load(Relaxed) {
            ASKED => Probe::Asked,
            SENT => Probe::Sent,
            ANSWERED => Probe::Answered,
            DENIED => Probe::Denied,
            _ => Probe::Unasked,
        }
    }

    /// Asks for one, whatever became of the last
    pub(super) fn ask(&self) {
        self.0.store(ASKED, Relaxed);
    }

    /// Whether one was asked for, and nothing was done about it
    pub(super) fn is_asked(&self) -> bool {
        self.0.load(Relaxed) == ASKED
    }

    /// One is on its way, or cannot be sent
    pub(super) fn settle(&self, is_sent: bool) {
        self.0.store(if is_sent { SENT } else { DENIED }, Relaxed);
    }

    /// Something was read
    pub(super) fn on_read(&self) {
        if self.0.load(Relaxed) == SENT {
            // An error means that it was asked for again just now: that is another PING.
            let _ = self.0.compare_exchange(SENT, ANSWERED, Relaxed, Relaxed);
        }
    }
}
