//! How soon an endpoint that has just come gets its full share
//!
//! A server that has just started is slow: its caches are cold, its code is not compiled, its pools are empty. Slow start
//! lets its share of calls grow with time, as Envoy's does, around whatever policy picks.

use std::time::{Duration, Instant};

/// The share that an endpoint begins with: Envoy's `min_weight_percent`, 10 %.
const LEAST: f64 = 0.1;

/// How much of its share an endpoint takes, `age` after it came
///
/// Grows evenly to the whole within `window`, and is a tenth at least: Envoy's slow start with an aggression of 1.
pub fn share(age: Duration, window: Duration) -> f64 {
    if age >= window {
        return 1.0;
    }
    (age.as_secs_f64() / window.as_secs_f64()).max(LEAST)
}

/// Whether an endpoint that was picked makes way for `other`, each with its present [`share`]
///
/// `draw` is uniform between 0 and 1. Where the other has come as lately nobody makes way: among endpoints that are all new
/// the policy's choice stands, whatever it prefers.
pub fn makes_way(picked: f64, other: f64, draw: f64) -> bool {
    draw * other >= picked
}

/// Since when an endpoint's server is fresh
///
/// The clock begins with the first connection, and with the first one after the server has registered anew. A connection
/// that was lost and made again is no new server. Whether a server that was restarted first accepts connections or first
/// registers is its own affair: the order makes no difference.
#[derive(Clone, Copy, Debug, Default)]
pub struct Freshness {
    since: Option<Instant>,
    /// When the last connection was made.
    connected: Option<Instant>,
    /// The server has registered anew, and no connection was made since the clock last began.
    renewed: bool,
}

impl Freshness {
    /// The endpoint has a new connection
    pub fn on_connected(&mut self, now: Instant) {
        self.connected = Some(now);
        if self.renewed || self.since.is_none() {
            self.begin(now);
        }
    }

    /// The endpoint's server has registered anew
    pub fn on_renewed(&mut self) {
        // A connection made since the clock began may be to the server that registers only now. If it was a mere reconnect
        // long ago, the clock begins there and has run out already.
        match self.connected.filter(|connected| self.since.is_some_and(|since| *connected > since)) {
            Some(connected) => self.begin(connected),
            None => self.renewed = true,
        }
    }

    /// When the clock last began; `None` before the first connection
    pub fn since(&self) -> Option<Instant> {
        self.since
    }

    fn begin(&mut self, connected: Instant) {
        self.since = Some(connected);
        self.renewed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[allow(clippy::disallowed_methods, reason = "any instant will do as the zero of a test")]
    fn zero() -> Instant {
        Instant::now()
    }

    #[test]
    fn the_share_grows_evenly_from_a_tenth_to_the_whole() {
        let window = secs(100);
        for (age, expected) in
            [(0, 0.1), (5, 0.1), (10, 0.1), (25, 0.25), (99, 0.99), (100, 1.0), (1000, 1.0)]
        {
            assert!((share(secs(age), window) - expected).abs() < 1e-9, "after {age} s");
        }
        assert!((share(Duration::ZERO, Duration::ZERO) - 1.0).abs() < 1e-9, "a window of zero is off");
        assert!((share(secs(1), Duration::MAX) - LEAST).abs() < 1e-9);
    }

    /// Where all were new, whoever the policy preferred made way for the others: a slow endpoint got nine calls of ten
    #[test]
    fn who_has_come_makes_way_for_who_is_older_in_proportion_and_for_nobody_else() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut kept =
            |picked, other| (0..10_000).filter(|_| !makes_way(picked, other, random.f64())).count();
        assert!((800..1200).contains(&kept(0.1, 1.0)), "a tenth of what the policy gives it");
        assert!((4800..5200).contains(&kept(0.25, 0.5)), "half as much as the other");
        assert_eq!(kept(0.1, 0.1), 10_000);
        assert_eq!(kept(0.5, 0.1), 10_000);
        assert_eq!(kept(1.0, 1.0), 10_000);
    }

    #[test]
    fn the_clock_begins_with_the_first_connection_and_not_with_the_next() {
        let (mut fresh, t0) = (Freshness::default(), zero());
        assert_eq!(fresh.since(), None);
        fresh.on_connected(t0);
        fresh.on_connected(t0 + secs(60));
        assert_eq!(fresh.since(), Some(t0));
    }

    #[test]
    fn a_server_that_registers_anew_is_fresh_from_its_next_connection_on() {
        let (mut fresh, t0) = (Freshness::default(), zero());
        fresh.on_connected(t0);
        fresh.on_renewed();
        assert_eq!(
            fresh.since(),
            Some(t0),
            "the old connection is to the old server, or nothing was restarted"
        );
        fresh.on_connected(t0 + secs(60));
        fresh.on_connected(t0 + secs(90));
        assert_eq!(fresh.since(), Some(t0 + secs(60)));
    }

    #[test]
    fn a_restarted_server_that_accepts_connections_before_it_registers_is_fresh_too() {
        let (mut fresh, t0) = (Freshness::default(), zero());
        fresh.on_connected(t0);
        fresh.on_connected(t0 + secs(60));
        fresh.on_renewed();
        assert_eq!(fresh.since(), Some(t0 + secs(60)));
        fresh.on_connected(t0 + secs(90));
        assert_eq!(fresh.since(), Some(t0 + secs(60)), "that was a mere reconnect");
    }

    #[test]
    fn news_before_the_first_connection_is_no_second_start() {
        let (mut fresh, t0) = (Freshness::default(), zero());
        fresh.on_renewed();
        fresh.on_connected(t0);
        fresh.on_connected(t0 + secs(60));
        assert_eq!(fresh.since(), Some(t0));
    }
}
