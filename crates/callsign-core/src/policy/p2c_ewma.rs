//! Power of two choices on latency and calls in flight

use super::{
    Candidate, Pick, Policy,
    pair::{Odds, is_less_busy},
};

/// Of two endpoints drawn at random, the one that promises the faster answer
///
/// What an endpoint promises is `latency * (calls in flight + 1)`, as in Finagle's `P2CPeakEwma`. The latency is that of the last
/// seconds, times a penalty for failures in a row that fades within seconds; or what calls have waited there already without an
/// answer to any, if that is more (all of it in [`load`](crate::load)). Latencies of the last seconds count as equal if the larger
/// one is less than twice the smaller one and 3 ms more, so that equal endpoints get equal shares: then fewer calls in flight win,
/// and on a tie the one drawn first. An answer that is overdue counts from the moment that it is: it speaks for itself, and is
/// forgotten when it comes.
///
/// Where weights differ, both are drawn in proportion to them, and calls in flight are compared per weight: at low load shares follow
/// the weights, at high load queues do.
#[derive(Clone, Copy, Debug, Default)]
pub struct P2cEwma(());

impl P2cEwma {
    /// The policy; it has no settings
    pub fn new() -> Self {
        Self(())
    }
}

/// Latencies within this factor of each other, and [`SLACK`], are noise.
const ALIKE: f32 = 2.0;
/// In nanoseconds: 3 ms. Of our own, measured by the simulation in `noise.rs`: where calls take 2 ms one late wake-up of a thread
/// is several times that. The price is that of 1 ms and 4 ms the faster one is preferred only by calls in flight.
const SLACK: f32 = 3e6;

impl Policy for P2cEwma {
    type Plan = Odds;

    fn plan(&self, candidates: &[Candidate]) -> Odds {
        Odds::new(candidates)
    }

    fn pick(&self, odds: &Odds, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        odds.better_of_two(candidates, call, |second, first, call| is_better(odds, second, first, call))
    }
}

fn is_better(odds: &Odds, one: &Candidate, other: &Candidate, call: &Pick<'_>) -> bool {
    let ((usual, waited), (others, others_waited)) =
        (one.load().expected(call.now), other.load().expected(call.now));
    let (weight, others_weight) = (odds.relative_weight(one), odds.relative_weight(other));
    let are_alike = (usual < ALIKE * others + SLACK) & (others < ALIKE * usual + SLACK);
    let same = if are_alike { usual.max(others) } else { 0.0 };
    let (usual, others) = (usual.max(same), others.max(same));
    let is_overdue = (waited > usual) | (others_waited > others);
    let (expected, others) = (usual.max(waited), others.max(others_waited));
    // `expected * (in_flight / weight + 1)` on either side, without the divisions.
    let cost = expected * (one.in_flight() as f32 + weight) * others_weight;
    let others_cost = others * (other.in_flight() as f32 + others_weight) * weight;
    // Without a branch: nobody can predict it, and to guess wrong costs more than all of this.
    let is_alike = are_alike & !is_overdue;
    (is_alike & is_less_busy(one, other)) | (!is_alike & (cost < others_cost))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{
        super::fixture::{
            Answer::{After, Fails, Never},
            Fleet,
        },
        *,
    };

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn equal_endpoints_get_equal_shares_however_much_their_latencies_vary() {
        for count in [2, 3, 10] {
            let fleet = Fleet::new(count);
            let shares =
                fleet.serve(P2cEwma::new(), 20_000, MS, |_, random| After(MS.mul_f32(2.0 + random.f32())));
            let fair = 20_000 / count;
            assert!(shares.iter().all(|share| share.abs_diff(fair) < fair / 10), "{shares:?}");
        }
    }

    #[test]
    fn one_that_is_ten_times_slower_gets_little_but_is_tried_again() {
        let slow = |index, _: &mut fastrand::Rng| After(if index == 2 { 50 * MS } else { 5 * MS });
        let shares = Fleet::new(3).serve(P2cEwma::new(), 20_000, MS, slow);
        // Its fair share is 6667; a third of all pairs are the two others.
        assert!((5..1000).contains(&shares[2]), "{shares:?}");
        let low = Fleet::new(3).serve(P2cEwma::new(), 20_000, 20 * MS, slow);
        assert!((20..2000).contains(&low[2]), "{low:?}");
    }

    #[test]
    fn one_that_fails_at_once_does_not_look_fast() {
        let failing = |index, _: &mut fastrand::Rng| if index == 1 { Fails(MS / 10) } else { After(10 * MS) };
        // Where calls queue up it is a matter for ejection.
        let shares = Fleet::new(3).serve(P2cEwma::new(), 20_000, 5 * MS, failing);
        assert!(shares[1] < 1000, "{shares:?}");
    }

    #[test]
    fn a_black_hole_is_known_by_the_age_of_what_waits_there() {
        let hole = |index, _: &mut fastrand::Rng| if index == 0 { Never } else { After(5 * MS) };
        for count in [2, 3, 10] {
            let shares = Fleet::new(count).serve(P2cEwma::new(), 10_000, MS, hole);
            assert!(shares[0] < 8, "{shares:?}");
        }
    }

    #[test]
    fn at_low_load_shares_follow_the_weights() {
        let shares = Fleet::weighted(&[1, 2, 7]).serve(P2cEwma::new(), 20_000, 20 * MS, |_, _| After(5 * MS));
        for (share, fair) in shares.iter().zip([2000_usize, 4000, 14_000]) {
            assert!(share.abs_diff(fair) < fair / 10, "{shares:?}");
        }
    }

    #[test]
    fn at_high_load_queues_follow_the_weights() {
        let fleet = Fleet::weighted(&[1, 2, 7]);
        fleet.hold(P2cEwma::new(), 1000);
        let in_flight = fleet.in_flight();
        for (held, fair) in in_flight.iter().zip([100_u32, 200, 700]) {
            assert!(held.abs_diff(fair) <= fair / 20, "{in_flight:?}");
        }
    }

    #[test]
    fn in_between_shares_follow_the_weights_roughly() {
        for every in [1, 2, 4] {
            let shares = Fleet::weighted(&[1, 2, 7]).serve(P2cEwma::new(), 20_000, MS, |_, random| {
                After(MS.mul_f32(20.0 / every as f32 * (0.5 + random.f32())))
            });
            for (share, fair) in shares.iter().zip([2000_usize, 4000, 14_000]) {
                assert!(share.abs_diff(fair) < fair / 3, "{shares:?}");
            }
        }
    }

    #[test]
    fn a_heavy_weight_does_not_make_a_slow_endpoint_fast() {
        let slow = |index, _: &mut fastrand::Rng| After(if index == 0 { 100 * MS } else { 5 * MS });
        let shares = Fleet::weighted(&[100, 1, 1]).serve(P2cEwma::new(), 5_000, 20 * MS, slow);
        assert!(shares[0] < 1000, "{shares:?}");
    }

    #[test]
    fn who_is_full_or_not_wanted_is_passed_over_while_another_has_room() {
        let many = Fleet::new(50);
        (0..49).for_each(|index| many.fill(index));
        assert_eq!(many.shares(P2cEwma::new(), 1000)[49], 1000);
        assert_eq!(many.shares_with(P2cEwma::new(), 100, |call| call.excluded = Some(49)), [0; 50]);
        assert_eq!(Fleet::new(2).shares_with(P2cEwma::new(), 100, |call| call.avoid = Some(0)), [0, 100]);
    }
}
