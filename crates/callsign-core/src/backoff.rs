//! When to try again

use std::time::Duration;

/// How the waits between attempts grow
///
/// The n-th wait is `initial * multiplier^(n-1)`, at most `max`, and then varied by `jitter`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    /// The first wait
    pub initial: Duration,
    /// Growth from one wait to the next, at least 1
    pub multiplier: f64,
    /// The longest wait, before jitter
    pub max: Duration,
    /// How the wait is varied
    pub jitter: Jitter,
}

/// How a wait is varied, so that many clients do not come back in step
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Jitter {
    /// Uniform between nothing and the whole wait
    Full,
    /// Uniform within this fraction around the wait: 0.2 gives 80 to 120 %
    Fraction(f64),
    /// Not varied, for tests
    None,
}

impl Backoff {
    /// gRPC's connection backoff: 1 s, times 1.6, at most 120 s, jitter 0.2
    ///
    /// Source: gRPC's `doc/connection-backoff.md`.
    pub const CONNECTION: Self = Self {
        initial: Duration::from_secs(1),
        multiplier: 1.6,
        max: Duration::from_secs(120),
        jitter: Jitter::Fraction(0.2),
    };

    /// The wait after `failures` failures in a row; none after zero
    pub fn wait(&self, failures: u32, random: &mut fastrand::Rng) -> Duration {
        let Some(exponent) = failures.checked_sub(1) else { return Duration::ZERO };
        // 64 doublings of a nanosecond are past any sensible `max`; the cap keeps `powi` finite.
        let exponent = i32::try_from(exponent.min(1024)).expect("capped at 1024");
        let grown = self.initial.as_secs_f64() * self.multiplier.max(1.0).powi(exponent);
        let wait = grown.min(self.max.as_secs_f64());
        let varied = match self.jitter {
            Jitter::Full => wait * random.f64(),
            Jitter::Fraction(fraction) => wait * (1.0 + fraction * (2.0 * random.f64() - 1.0)),
            Jitter::None => wait,
        };
        Duration::try_from_secs_f64(varied).unwrap_or(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random() -> fastrand::Rng {
        fastrand::Rng::with_seed(1)
    }

    #[test]
    fn waits_grow_to_the_maximum_and_stay_there() {
        let backoff = Backoff { jitter: Jitter::None, ..Backoff::CONNECTION };
        let waits: Vec<f64> = (0..4).map(|n| backoff.wait(n, &mut random()).as_secs_f64()).collect();
        assert_eq!(waits, [0.0, 1.0, 1.6, 2.56]);
        assert_eq!(backoff.wait(50, &mut random()), Duration::from_secs(120));
        assert_eq!(backoff.wait(u32::MAX, &mut random()), Duration::from_secs(120));
    }

    #[test]
    fn jitter_stays_within_its_bounds_and_uses_them() {
        let mut random = random();
        let mut spread = |jitter| {
            let backoff = Backoff { jitter, ..Backoff::CONNECTION };
            let waits = (0..1000).map(|_| backoff.wait(1, &mut random).as_secs_f64());
            waits.fold((f64::MAX, 0.0_f64), |(low, high), wait| (low.min(wait), high.max(wait)))
        };
        let (low, high) = spread(Jitter::Fraction(0.2));
        assert!((0.8..0.82).contains(&low) && (1.18..=1.2).contains(&high), "{low} {high}");
        let (low, high) = spread(Jitter::Full);
        assert!((0.0..0.02).contains(&low) && (0.98..=1.0).contains(&high), "{low} {high}");
    }
}
