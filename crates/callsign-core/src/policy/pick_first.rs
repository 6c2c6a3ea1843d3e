//! One endpoint for everything

use super::{Candidate, Pick, Policy, next_allowed};
use crate::sync::{AtomicU64, AtomicUsize, Ordering::Relaxed};

/// The same endpoint for all calls, until it is lost
///
/// It is the one that has been known longest among those that are ready, or a random one if [shuffled](Self::shuffled). An
/// endpoint that comes back does not take over again. A call that cannot go there, because its connection is full or its
/// caller excludes the endpoint, goes to the next one alone. As gRPC's `pick_first` (gRFC A62), but that the others are
/// connected: to change costs no connecting.
#[derive(Debug, Default)]
pub struct PickFirst {
    shuffled: bool,
    /// The number of the chosen endpoint and one more; zero if none was chosen.
    chosen: AtomicU64,
}

impl PickFirst {
    /// The policy, choosing the first in order
    pub fn new() -> Self {
        Self::default()
    }

    /// Chooses at random, so that many clients do not choose the same: gRPC's `shuffleAddressList`
    ///
    /// Default: in order.
    #[must_use]
    pub fn shuffled(self) -> Self {
        Self { shuffled: true, ..self }
    }
}

/// Where the chosen endpoint stands in a set, or [`NONE`](Self::NONE)
#[derive(Debug)]
pub struct Place(AtomicUsize);

impl Place {
    const NONE: usize = usize::MAX;
}

impl Policy for PickFirst {
    type Plan = Place;

    fn plan(&self, candidates: &[Candidate]) -> Place {
        let chosen = self.chosen.load(Relaxed).checked_sub(1);
        let place = candidates.iter().position(|candidate| Some(candidate.endpoint()) == chosen);
        Place(AtomicUsize::new(place.unwrap_or(Place::NONE)))
    }

    fn pick(&self, place: &Place, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        let chosen = place.0.load(Relaxed);
        if chosen != Place::NONE {
            return next_allowed(chosen, candidates, call);
        }
        let start =
            if self.shuffled && candidates.len() > 1 { call.random.usize(..candidates.len()) } else { 0 };
        let index = next_allowed(start, candidates, call)?;
        match place.0.compare_exchange(Place::NONE, index, Relaxed, Relaxed) {
            Ok(_) => {
                self.chosen.store(candidates[index].endpoint().wrapping_add(1), Relaxed);
                Some(index)
            }
            // Another caller was first.
            Err(chosen) => next_allowed(chosen, candidates, call),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::fixture::Fleet, *};

    #[test]
    fn the_first_takes_all_calls() {
        assert_eq!(Fleet::new(3).shares(PickFirst::new(), 100), [100, 0, 0]);
    }

    #[test]
    fn the_chosen_one_stays_when_the_set_changes_and_another_follows_when_it_is_lost() {
        let policy = PickFirst::new();
        let mut fleet = Fleet::new(3);
        fleet.remove(0);
        assert_eq!(fleet.picks(&policy, 1), [Some(0)]);
        assert_eq!(Fleet::new(3).picks(&policy, 1), [Some(1)], "the first comes back, the second stays");
        fleet.remove(0);
        assert_eq!(fleet.picks(&policy, 1), [Some(0)], "the third is the only one");
        assert_eq!(Fleet::new(3).picks(&policy, 2), [Some(2); 2]);
    }

    #[test]
    fn a_call_that_cannot_go_there_goes_elsewhere_alone() {
        let policy = PickFirst::new();
        let fleet = Fleet::new(2);
        assert_eq!(fleet.picks(&policy, 1), [Some(0)]);
        fleet.fill(0);
        assert_eq!(fleet.picks(&policy, 1), [Some(1)]);
        fleet.empty(0);
        assert_eq!(fleet.picks(&policy, 1), [Some(0)]);
    }

    #[test]
    fn shuffled_clients_choose_differently_and_each_stays_with_its_own() {
        let fleet = Fleet::new(4);
        let mut choices = [0; 4];
        for seed in 0..400 {
            let picks = fleet.picks_seeded(&PickFirst::new().shuffled(), 10, seed);
            assert!(picks.iter().all(|&index| index == picks[0]));
            choices[picks[0].unwrap()] += 1;
        }
        assert!(choices.iter().all(|chosen| (60..140).contains(chosen)), "{choices:?}");
    }
}
