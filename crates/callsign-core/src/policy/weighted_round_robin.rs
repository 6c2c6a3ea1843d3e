//! One after the other, the heavier ones more often

use super::{Candidate, Pick, Policy, turns::Turns};

/// Each endpoint in its turn, as often as its weight says, however busy it is
///
/// The static stride scheduler of gRFC A58 with grpc-go's constants, and discovery's weights: the turns of a heavy endpoint
/// lie apart, so nobody is called in bursts. Weights are rounded to 1/65 535 of the heaviest, and no endpoint to zero. An
/// endpoint that does not allow the call loses its turn, and the next one takes both.
///
/// A pick tries as many turns as the heaviest endpoint outweighs the mean, on average: with weights like 1:2:7 two, with
/// one endpoint that weighs more than a thousand others together a thousand.
#[derive(Debug, Default)]
pub struct WeightedRoundRobin(Turns);

impl WeightedRoundRobin {
    /// The policy; it has no settings
    pub fn new() -> Self {
        Self::default()
    }
}

/// What the heaviest weighs after scaling: grpc-go's `maxWeight`.
const SCALE: u64 = u16::MAX as u64;
/// How far endpoints of equal weight are out of step with their neighbours, as in grpc-go: half a stride.
const OFFSET: u64 = SCALE / 2;

/// The weights of a set, scaled
#[derive(Debug)]
pub struct Strides(Box<[u16]>);

impl Strides {
    fn new(candidates: &[Candidate]) -> Self {
        let weights = || candidates.iter().map(|candidate| u64::from(candidate.weight()));
        let most = weights().max().unwrap_or(1);
        Self(weights().map(|weight| ((weight * SCALE + most / 2) / most).max(1) as u16).collect())
    }

    /// Whose turn it is, if anybody's: of `SCALE` rounds an endpoint sits out as many as it weighs less
    fn whose(&self, turn: u64) -> Option<usize> {
        let count = self.0.len() as u64;
        let (round, index) = (turn / count, turn % count);
        let weight = u64::from(self.0[index as usize]);
        let phase = weight.wrapping_mul(round).wrapping_add(index * OFFSET) % SCALE;
        (phase >= SCALE - weight).then_some(index as usize)
    }
}

impl Policy for WeightedRoundRobin {
    type Plan = Strides;

    fn plan(&self, candidates: &[Candidate]) -> Strides {
        Strides::new(candidates)
    }

    fn pick(&self, strides: &Strides, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        self.0.pick(candidates.len(), candidates, call, |turn| strides.whose(turn))
    }
}

#[cfg(test)]
mod tests {
    use super::{super::fixture::Fleet, *};

    #[test]
    fn shares_follow_the_weights_within_a_hundredth() {
        let shares = Fleet::weighted(&[1, 2, 7]).shares(WeightedRoundRobin::new(), 10_000);
        for (share, fair) in shares.iter().zip([1000_usize, 2000, 7000]) {
            assert!(share.abs_diff(fair) <= fair / 100, "{shares:?}");
        }
    }

    #[test]
    fn equal_weights_are_round_robin() {
        assert_eq!(Fleet::weighted(&[9; 4]).shares(WeightedRoundRobin::new(), 4000), [1000; 4]);
    }

    #[test]
    fn a_heavy_endpoint_is_not_called_in_bursts() {
        let picks = Fleet::weighted(&[1, 1, 2]).picks(&WeightedRoundRobin::new(), 4000);
        let longest = picks.chunk_by(|one, next| one == next).map(<[_]>::len).max();
        assert!(longest <= Some(2), "{longest:?}");
    }

    #[test]
    fn who_is_full_is_passed_over_and_the_others_keep_their_proportion() {
        let fleet = Fleet::weighted(&[1, 5, 2, 1]);
        fleet.fill(1);
        let shares = fleet.shares(WeightedRoundRobin::new(), 4000);
        assert!(
            shares[1] == 0 && shares[0].abs_diff(1000) < 50 && shares[2].abs_diff(2000) < 50,
            "{shares:?}"
        );
    }

    #[test]
    fn the_lightest_is_called_however_heavy_the_others_are() {
        let fleet = Fleet::weighted(&[u32::MAX, 1]);
        let shares = fleet.shares(WeightedRoundRobin::new(), 140_000);
        assert!((1..=3).contains(&shares[1]), "{shares:?}");
        fleet.fill(0);
        assert_eq!(fleet.shares(WeightedRoundRobin::new(), 10), [0, 10]);
    }
}
