//! An estimate of how long answers take

use std::{
    f64::consts::{LN_2, SQRT_2},
    time::Duration,
};

use crate::sync::{AtomicU64, Ordering::Relaxed};

/// An estimate of the usual latency: an EWMA over time
///
/// `estimate * w + sample * (1 - w)` with `w = e^(-elapsed / tau)`, where `elapsed` is the time since the last sample, and by
/// `w` alone while there are none. So it is the mean of the last seconds, however many calls there are; of samples within the
/// same millisecond only the first counts. No sample more than doubles an estimate that is fresh: where calls are rare each weighs
/// much, and one slow answer is chance.
///
/// Finagle's and linkerd's peak EWMA jumps up to each slower sample, and so follows the slowest of a hundred. Measured by the
/// simulation in `policy/noise.rs`, with jumps of a doubling at most: on a busy machine one of two equal endpoints got 15 % of
/// the calls for six seconds, and of three one that was ten times slower got 6 %; as it is here, 45 % and 1 %. The price: an
/// endpoint that becomes slow is known for it only after some tenths of a second, in which the calls in flight and the age of
/// those that wait speak against it.
#[derive(Debug, Default)]
pub(super) struct Latency {
    /// See [`pack`].
    estimate: AtomicU64,
}

/// Finagle and linkerd2-proxy use 10 s, kratos 0.6 s. Two seconds remember an endpoint that is called once a second, and try
/// one that was ten times slower than the others again after three.
const TAU: f64 = 2000.0;
/// See [`Latency`].
const MOST_RISE: f32 = 2.0;

impl Latency {
    pub(super) fn observe(&self, sample: Duration, now: u32) {
        let sample = sample.as_nanos() as f32;
        self.update(now, |known, kept| match known {
            None => sample,
            // What is old is believed less.
            Some(known) => {
                let most = known * MOST_RISE / kept.max(f32::MIN_POSITIVE);
                (known * kept + sample * (1.0 - kept)).min(most)
            }
        });
    }

    /// A lower bound cannot let the estimate fall
    pub(super) fn at_least(&self, bound: Duration, now: u32) {
        let faded = self.read(now).unwrap_or(0.0);
        if bound.as_nanos() as f32 > faded {
            self.observe(bound, now);
        }
    }

    pub(super) fn seed(&self, latency: Duration, now: u32) {
        let seed = pack(latency.as_nanos() as f32, now);
        // Only what is unknown: an error is a sample that came first.
        let _ = self.estimate.compare_exchange(0, seed, Relaxed, Relaxed);
    }

    pub(super) fn forget(&self) {
        self.estimate.store(0, Relaxed);
    }

    pub(super) fn last(&self) -> Option<f32> {
        unpack(self.estimate.load(Relaxed)).map(|(known, _)| known)
    }

    pub(super) fn read(&self, now: u32) -> Option<f32> {
        let (known, at) = unpack(self.estimate.load(Relaxed))?;
        Some(known * kept(now.wrapping_sub(at)))
    }

    fn update(&self, now: u32, next: impl Fn(Option<f32>, f32) -> f32) {
        // An error cannot be: the closure always has a value.
        let _ = self.estimate.fetch_update(Relaxed, Relaxed, |packed| {
            let Some((known, at)) = unpack(packed) else { return Some(pack(next(None, 1.0), now)) };
            Some(pack(next(Some(known), kept(now.wrapping_sub(at))), now))
        });
    }
}

/// Part of an estimate that is left after that many milliseconds: `e^(-elapsed / tau)`
fn kept(elapsed: u32) -> f32 {
    /// Halvings in a millisecond, in parts of 2^40.
    const HALVINGS: u64 = ((1_u64 << 40) as f64 / (TAU * LN_2)) as u64;
    // Threads that race see each other's future: the last minute before the clock wraps counts as that.
    if elapsed > u32::MAX - 60_000 { 1.0 } else { half_to_the((u64::from(elapsed) * HALVINGS) >> (40 - 23)) }
}

/// `2^-halvings`, in parts of 2^23, within 0.4 %; every pick needs it twice, so it has to be fast
///
/// Subtracted from a float's bits they divide it by powers of two, and in between on a straight line, which the parabola
/// through 2^0, 2^0.5 and 2^1 bends into shape.
pub(super) fn half_to_the(halvings: u64) -> f32 {
    const ONE: u64 = 1 << 23;
    /// In parts of 2^16.
    const BEND: u64 = ((6.0 - 4.0 * SQRT_2) * 65_536.0) as u64;
    // Beyond it is nothing, as it were.
    let line = 127 * ONE - halvings.min(126 * ONE);
    let rest = line % ONE;
    let bend = (((rest * (ONE - rest)) >> 23) * BEND) >> 16;
    f32::from_bits((line - bend) as u32)
}

/// Nanoseconds and the time of the last update in milliseconds; zero is "unknown", so no estimate is zero
fn pack(estimate: f32, at: u32) -> u64 {
    u64::from(estimate.clamp(1.0, 1e18).to_bits()) << 32 | u64::from(at)
}

fn unpack(packed: u64) -> Option<(f32, u32)> {
    let estimate = f32::from_bits((packed >> 32) as u32);
    (packed >> 32 != 0).then_some((estimate, packed as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_falls_as_the_exponential_function_does() {
        for elapsed in (0..20_000).step_by(7) {
            let exact = (-f64::from(elapsed) / TAU).exp();
            let off = f64::from(kept(elapsed)) / exact - 1.0;
            assert!(off.abs() < 0.004, "{off} after {elapsed} ms");
        }
        assert_eq!((kept(0), kept(u32::MAX)), (1.0, 1.0));
        assert!(kept(u32::MAX - 60_000) > 0.0);
    }
}
