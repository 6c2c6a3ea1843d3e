//! Power of two choices on calls in flight

use super::{Candidate, Pick, Policy};

/// Of two endpoints drawn at random, the one with fewer calls in flight
///
/// Drawing two and taking the better one comes close to asking all of them, at constant cost and without the herding of
/// "always the least loaded" (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001). The two are
/// distinct, unlike gRFC A48's, so an endpoint that hangs is not picked against itself. Equal loads are split evenly.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastRequest(());

impl LeastRequest {
    /// The policy; it has no settings
    pub fn new() -> Self {
        Self(())
    }
}

impl Policy for LeastRequest {
    type Plan = ();

    fn plan(&self, _: &[Candidate]) {}

    fn pick(&self, (): &(), candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        let count = candidates.len();
        if count < 2 {
            return (count == 1 && call.allows(&candidates[0])).then_some(0);
        }
        let first = call.random.usize(..count);
        // The second is drawn from the others. On a tie the first, itself uniform, takes the call.
        let second = (first + 1 + call.random.usize(..count - 1)) % count;
        match (call.allows(&candidates[first]), call.allows(&candidates[second])) {
            (true, true) => {
                let fewer = candidates[second].in_flight() < candidates[first].in_flight();
                Some(if fewer { second } else { first })
            }
            (true, false) => Some(first),
            (false, true) => Some(second),
            // Both are full: rare, and then any endpoint with room beats waiting.
            (false, false) => {
                (1..count).map(|step| (second + step) % count).find(|&index| call.allows(&candidates[index]))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Instant};

    use super::*;
    use crate::{load::Load, streams::Streams};

    fn zero() -> Instant {
        #[allow(clippy::disallowed_methods, reason = "any instant will do as the zero of a test")]
        Instant::now()
    }

    fn candidates(count: u64) -> Vec<Candidate> {
        let ready = |endpoint| {
            let streams = Arc::new(Streams::default());
            streams.set_limit(100);
            Candidate::new(endpoint, Arc::new(Load::new(zero())), streams)
        };
        (0..count).map(ready).collect()
    }

    fn shares(candidates: &[Candidate], avoid: Option<u64>, picks: usize) -> Vec<usize> {
        let mut random = fastrand::Rng::with_seed(7);
        let mut shares = vec![0; candidates.len()];
        for _ in 0..picks {
            let mut call = Pick { avoid, ..Pick::new(&mut random, zero()) };
            if let Some(index) = LeastRequest::new().pick(&(), candidates, &mut call) {
                shares[index] += 1;
            }
        }
        shares
    }

    #[test]
    fn nothing_to_pick_from_picks_nothing() {
        assert_eq!(shares(&candidates(0), None, 10), [0usize; 0]);
    }

    #[test]
    fn equal_endpoints_get_equal_shares() {
        for count in 1..=5 {
            let shares = shares(&candidates(count), None, 60_000);
            let fair = 60_000 / count as usize;
            assert!(shares.iter().all(|share| share.abs_diff(fair) < fair / 20), "{shares:?}");
        }
    }

    #[test]
    fn the_busiest_of_two_gets_nothing_and_of_three_loses_each_comparison() {
        let two = candidates(2);
        two[1].load.start(zero());
        assert_eq!(shares(&two, None, 100), [100, 0]);

        let three = candidates(3);
        three[2].load.start(zero());
        assert_eq!(shares(&three, None, 1000)[2], 0);
    }

    #[test]
    fn full_and_avoided_endpoints_are_passed_over_while_another_has_room() {
        let many = candidates(50);
        for candidate in &many[..49] {
            candidate.streams.set_limit(0);
        }
        assert_eq!(shares(&many, None, 1000)[49], 1000);
        assert_eq!(shares(&many, Some(49), 1000), vec![0; 50]);
        assert_eq!(shares(&candidates(2), Some(0), 1000), [0, 1000]);
        assert_eq!(shares(&candidates(1), Some(0), 10), [0]);
    }
}
