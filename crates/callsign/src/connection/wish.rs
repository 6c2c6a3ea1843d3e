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

    /// Something was read, which is as good as an answer
    ///
    /// Also to a PING that was not sent: else only the next message would tell that the peer lives, and the calls that bring
    /// one go elsewhere.
    pub(super) fn on_read(&self) {
        let state = self.0.load(Relaxed);
        if state == SENT || state == DENIED {
            // An error means that it was asked for again just now: that is another PING.
            let _ = self.0.compare_exchange(state, ANSWERED, Relaxed, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_answers_a_ping_that_was_sent_or_denied_and_none_that_was_not_come_to() {
        let wish = Wish::default();
        wish.on_read();
        assert_eq!(wish.state(), Probe::Unasked);
        for is_sent in [true, false] {
            wish.ask();
            wish.on_read();
            assert_eq!(wish.state(), Probe::Asked);
            wish.settle(is_sent);
            assert_eq!(wish.state(), if is_sent { Probe::Sent } else { Probe::Denied });
            wish.on_read();
            assert_eq!(wish.state(), Probe::Answered);
        }
    }
}
