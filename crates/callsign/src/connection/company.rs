//! Whether requests are made at the same time, and should share a write

/// Whether it pays to let other callers go first
///
/// tokio's workers run the task that was woken last first, so that a driver would write each small request by itself. If it
/// goes behind the tasks that are ready, the requests of those come along. Where none do, it stops doing so: to go
/// behind others wakes an idle worker, for nothing.
#[derive(Debug, Default)]
pub(super) struct Company {
    /// Whether the requests at hand have waited for others.
    has_waited: bool,
    /// Waits in a row that were for nothing; from [`PATIENCE`] on, single requests since then, too.
    vain: u32,
}

/// Waits for nothing before there are no more of them.
const PATIENCE: u32 = 8;
/// Single requests before it is tried again.
const PAUSE: u32 = 64;

impl Company {
    /// Whether the requests at hand are to wait for others, which they do once at most
    pub(super) fn is_awaited(&mut self) -> bool {
        let is_awaited = !self.has_waited && self.vain < PATIENCE;
        self.has_waited |= is_awaited;
        is_awaited
    }

    /// So many requests have left together
    pub(super) fn left(&mut self, requests: u32) {
        let has_waited = std::mem::take(&mut self.has_waited);
        if requests > 1 {
            self.vain = 0;
        } else if has_waited || self.vain >= PATIENCE {
            self.vain += 1;
        }
        if self.vain == PATIENCE + PAUSE {
            self.vain = PATIENCE - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether they waited, in so many turns in which so many requests leave together
    fn waits(company: &mut Company, turns: u32, requests: u32) -> u32 {
        let turn = |_: &u32| {
            let has_waited = company.is_awaited();
            assert!(!has_waited || !company.is_awaited(), "once at most");
            company.left(requests);
            has_waited
        };
        (0..turns).filter(turn).count() as u32
    }

    #[test]
    fn requests_wait_while_others_come_along_now_and_then() {
        let mut company = Company::default();
        for _ in 0..10 {
            assert_eq!(waits(&mut company, PATIENCE - 1, 1), PATIENCE - 1);
            assert_eq!(waits(&mut company, 1, 2), 1);
        }
    }

    #[test]
    fn who_is_always_alone_waits_no_more_but_tries_it_again() {
        let mut company = Company::default();
        assert_eq!(waits(&mut company, 1000, 1), PATIENCE + (1000 - PATIENCE) / (PAUSE + 1));
        assert!(!company.is_awaited());
        company.left(2);
        assert!(company.is_awaited(), "others came along by themselves");
    }

    #[test]
    fn those_for_whom_there_was_nothing_to_wait_for_say_nothing() {
        let mut company = Company::default();
        (0..1000).for_each(|_| company.left(1));
        assert!(company.is_awaited());
    }
}
