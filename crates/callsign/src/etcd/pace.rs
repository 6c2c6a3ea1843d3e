//! How often etcd is asked again

use std::time::Duration;

use callsign_core::backoff::{Backoff, Jitter};
use tokio::time::{Instant, sleep};

use super::request::RequestError;

/// Full jitter, because every client of a cluster loses it at the same moment.
const RETRY: Backoff = Backoff {
    initial: Duration::from_millis(100),
    multiplier: 2.0,
    max: Duration::from_secs(3),
    jitter: Jitter::Full,
};

/// What a person has to change (a permission, a password) is asked for slowly.
pub(super) const REFUSED: Duration = Duration::from_secs(30);

/// An attempt that took this long, whether it succeeded or not, was pause enough: the next failure is the first one again.
const LIVED: Duration = RETRY.max;

/// Counts failures in a row and waits accordingly
#[derive(Debug)]
pub(crate) struct Pace {
    failures: u32,
    started: Instant,
    random: fastrand::Rng,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Self { failures: 0, started: Instant::now(), random: fastrand::Rng::new() }
    }

    /// An attempt starts now
    pub(crate) fn on_attempt(&mut self) {
        self.started = Instant::now();
    }

    /// Waits until the next attempt is due
    pub(crate) async fn after(&mut self, error: &RequestError) {
        let wait = self.wait();
        sleep(match error.due() {
            // A login that someone else was refused is tried again when that one is, by all at once.
            Some(due) => due.saturating_duration_since(Instant::now()),
            None if error.is_refusal() => REFUSED,
            None => wait,
        })
        .await;
    }

    /// Waits before what was lost is taken back: not the first time, then so that repeated losses make no busy loop
    pub(crate) async fn after_loss(&mut self) {
        let wait = self.wait();
        if self.failures > 1 {
            sleep(wait).await;
        }
    }

    fn wait(&mut self) -> Duration {
        if self.started.elapsed() >= LIVED {
            self.failures = 0;
        }
        self.failures = self.failures.saturating_add(1);
        RETRY.wait(self.failures, &mut self.random)
    }

    /// `time`, varied by a tenth, so that what started together does not stay together
    pub(crate) fn vary(&mut self, time: Duration) -> Duration {
        time.mul_f64(0.9 + 0.2 * self.random.f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_grow_to_three_seconds_and_start_anew_after_what_lived() {
        let mut pace = Pace::new();
        assert!(pace.wait() <= RETRY.initial);
        let long = (0..200).map(|_| pace.wait()).max().unwrap();
        assert!((Duration::from_secs(2)..=Duration::from_secs(3)).contains(&long), "{long:?}");
        pace.on_attempt();
        tokio::time::advance(LIVED).await;
        assert!(pace.wait() <= RETRY.initial);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_lost_is_taken_back_at_once_and_only_at_once_once() {
        let (mut pace, start) = (Pace::new(), Instant::now());
        pace.after_loss().await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        for _ in 0..20 {
            pace.on_attempt();
            pace.after_loss().await;
        }
        assert!(start.elapsed() > Duration::from_secs(5), "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_is_repeated_every_half_minute() {
        let start = Instant::now();
        Pace::new().after(&RequestError::refused()).await;
        assert!((REFUSED..REFUSED + Duration::from_secs(1)).contains(&start.elapsed()));
    }
}
