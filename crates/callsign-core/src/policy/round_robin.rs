//! One after the other

use super::{Candidate, Pick, Policy, turns::Turns};

/// Each endpoint in its turn, whatever it weighs and however busy it is
///
/// An endpoint that does not allow the call loses its turn, and the next one takes the call and the turn: so its
/// neighbour is not called twice. Each client begins with another endpoint. gRPC's `round_robin`.
#[derive(Debug, Default)]
pub struct RoundRobin(Turns);

impl RoundRobin {
    /// The policy; it has no settings
    pub fn new() -> Self {
        Self::default()
    }
}

impl Policy for RoundRobin {
    type Plan = ();

    fn plan(&self, _: &[Candidate]) {}

    fn pick(&self, (): &(), candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        let count = candidates.len();
        self.0.pick(count, candidates, call, |turn| Some((turn % count as u64) as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::fixture::Fleet, *};

    #[test]
    fn each_has_its_turn_whatever_it_weighs() {
        let fleet = Fleet::weighted(&[1, 100, 1]);
        let policy = RoundRobin::new();
        let order = fleet.picks(&policy, 7);
        assert_eq!(order, (0..7).map(|turn| Some((order[0].unwrap() + turn) % 3)).collect::<Vec<_>>());
    }

    #[test]
    fn who_is_full_is_passed_over_and_the_others_share_evenly() {
        let fleet = Fleet::new(5);
        fleet.fill(1);
        fleet.fill(2);
        assert_eq!(fleet.shares(RoundRobin::new(), 3000), [1000, 0, 0, 1000, 1000]);
    }

    #[test]
    fn clients_begin_with_different_endpoints() {
        let fleet = Fleet::new(50);
        let first = |seed| fleet.picks_seeded(&RoundRobin::new(), 1, seed)[0].unwrap();
        assert!((1..5).any(|seed| first(seed) != first(0)));
    }

    #[test]
    fn callers_on_several_threads_share_the_turns() {
        let fleet = Fleet::new(4);
        let policy = RoundRobin::new();
        let mut shares = [0; 4];
        std::thread::scope(|scope| {
            let callers: Vec<_> = (0..4).map(|_| scope.spawn(|| fleet.picks(&policy, 1000))).collect();
            for caller in callers {
                caller.join().unwrap().into_iter().for_each(|index| shares[index.unwrap()] += 1);
            }
        });
        assert_eq!(shares, [1000; 4]);
    }
}
