//! Power of two choices on calls in flight

use super::{
    Candidate, Pick, Policy,
    pair::{Odds, is_less_busy},
};

/// Of two endpoints drawn at random, the one with fewer calls in flight
///
/// Drawing two and taking the better one comes close to asking all of them, at constant cost and without the herding of
/// "always the least loaded" (Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", 2001). The two are
/// distinct, unlike gRFC A48's, so an endpoint that hangs is not picked against itself. Equal loads are split evenly.
///
/// Where weights differ, both are drawn in proportion to them, and calls in flight are compared per weight.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastRequest(());

impl LeastRequest {
    /// The policy; it has no settings
    pub fn new() -> Self {
        Self(())
    }
}

impl Policy for LeastRequest {
    type Plan = Odds;

    fn plan(&self, candidates: &[Candidate]) -> Odds {
        Odds::new(candidates)
    }

    fn pick(&self, odds: &Odds, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        // On a tie the first, itself drawn fairly, takes the call.
        odds.better_of_two(candidates, call, |second, first, _| is_less_busy(second, first))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::fixture::Fleet, *};

    #[test]
    fn equal_endpoints_get_equal_shares() {
        for count in 1..=5 {
            let shares = Fleet::new(count).shares(LeastRequest::new(), 60_000);
            let fair = 60_000 / count;
            assert!(shares.iter().all(|share| share.abs_diff(fair) < fair / 20), "{shares:?}");
        }
    }

    #[test]
    fn the_busiest_of_two_gets_nothing_and_of_three_loses_each_comparison() {
        let two = Fleet::new(2);
        two.start(1, 1);
        assert_eq!(two.shares(LeastRequest::new(), 100), [100, 0]);

        let three = Fleet::new(3);
        three.start(2, 1);
        assert_eq!(three.shares(LeastRequest::new(), 1000)[2], 0);
    }

    #[test]
    fn full_and_avoided_endpoints_are_passed_over_while_another_has_room() {
        let many = Fleet::new(50);
        (0..49).for_each(|index| many.fill(index));
        assert_eq!(many.shares(LeastRequest::new(), 1000)[49], 1000);
        let avoid = |number| move |call: &mut Pick<'_>| call.avoid = Some(number);
        assert_eq!(many.shares_with(LeastRequest::new(), 1000, avoid(49)), vec![0; 50]);
        assert_eq!(Fleet::new(2).shares_with(LeastRequest::new(), 1000, avoid(0)), [0, 1000]);
        assert_eq!(Fleet::new(1).shares_with(LeastRequest::new(), 10, avoid(0)), [0]);
    }

    #[test]
    fn calls_that_never_end_pile_up_in_proportion_to_the_weights() {
        let fleet = Fleet::weighted(&[1, 2, 7]);
        fleet.hold(LeastRequest::new(), 1000);
        let in_flight = fleet.in_flight();
        for (held, fair) in in_flight.iter().zip([100_u32, 200, 700]) {
            assert!(held.abs_diff(fair) <= fair / 20, "{in_flight:?}");
        }
    }
}
