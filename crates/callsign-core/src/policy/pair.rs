//! The power of two choices: draw two, take the better one

use super::{Candidate, Pick};

/// How the two are drawn from a set of candidates: each in proportion to its weight
#[derive(Clone, Debug)]
pub struct Odds {
    /// `None` if all weigh the same.
    aliases: Option<Box<[Alias]>>,
    /// One, divided by the mean of the weights.
    per_mean_weight: f32,
}

impl Odds {
    pub(super) fn new(candidates: &[Candidate]) -> Self {
        let equal = candidates.windows(2).all(|pair| pair[0].weight() == pair[1].weight());
        let weights = || candidates.iter().map(Candidate::weight);
        let total: u64 = weights().map(u64::from).sum();
        let per_mean_weight = candidates.len() as f32 / total.max(1) as f32;
        Self { aliases: (!equal).then(|| aliases(weights(), total)), per_mean_weight }
    }

    /// A candidate's weight, where the mean of all is 1
    pub(super) fn relative_weight(&self, candidate: &Candidate) -> f32 {
        candidate.weight() as f32 * self.per_mean_weight
    }

    /// Draws two distinct candidates, and takes the first unless the second `is_better`
    ///
    /// If only one of them is allowed, it is that one; if neither, which is rare, any that is: better than to wait.
    pub(super) fn better_of_two(
        &self,
        candidates: &[Candidate],
        call: &mut Pick<'_>,
        is_better: impl FnOnce(&Candidate, &Candidate, &Pick<'_>) -> bool,
    ) -> Option<usize> {
        let count = candidates.len();
        if count < 2 {
            return (count == 1 && call.allows(&candidates[0])).then_some(0);
        }
        let (first, second) = self.two(count, call.random);
        let (one, other) = (&candidates[first], &candidates[second]);
        match (call.allows(one), call.allows(other)) {
            (true, true) => Some(if is_better(other, one, call) { second } else { first }),
            (true, false) => Some(first),
            (false, true) => Some(second),
            (false, false) => super::next_allowed(second + 1, candidates, call),
        }
    }

    /// Two distinct indices; `count` is at least 2
    fn two(&self, count: usize, random: &mut fastrand::Rng) -> (usize, usize) {
        let Some(aliases) = &self.aliases else {
            let first = random.usize(..count);
            return (first, another(first, count, random));
        };
        let first = draw(aliases, random);
        for _ in 0..REDRAWS {
            let second = draw(aliases, random);
            if second != first {
                return (first, second);
            }
        }
        (first, another(first, count, random))
    }
}

/// How often the second is drawn by weight before it is any other one: where one weighs more than all others together, it
/// would be drawn against itself for long.
const REDRAWS: usize = 4;

/// Any but this one
fn another(first: usize, count: usize, random: &mut fastrand::Rng) -> usize {
    let second = first + 1 + random.usize(..count - 1);
    if second < count { second } else { second - count }
}

/// Whether a call more would leave `one` with no more calls per weight than `other` has now
///
/// With equal weights that is "fewer in flight". While little is in flight it is false either way, and shares follow the
/// weights that the two were drawn by; when queues build up, they do.
pub(super) fn is_less_busy(one: &Candidate, other: &Candidate) -> bool {
    (u64::from(one.in_flight()) + 1) * u64::from(other.weight())
        <= u64::from(other.in_flight()) * u64::from(one.weight())
}

/// A column of an alias table: whom it means below the threshold is itself, above it another one
///
/// A. J. Walker, "An Efficient Method for Generating Discrete Random Variables with General Distributions", 1977; built as
/// in M. D. Vose, "A Linear Algorithm for Generating Random Numbers with a Given Distribution", 1991, on integers.
#[derive(Clone, Copy, Debug)]
struct Alias {
    /// In parts of 2^32.
    below: u32,
    other: u32,
}

fn draw(aliases: &[Alias], random: &mut fastrand::Rng) -> usize {
    let bits = random.u64(..);
    // The upper half chooses the column: a multiplication maps it to the range, with a bias below 2^-18 for 10 000.
    let column = (((bits >> 32) * aliases.len() as u64) >> 32) as usize;
    let Alias { below, other } = aliases[column];
    if (bits as u32) < below { column } else { other as usize }
}

fn aliases(weights: impl Iterator<Item = u32>, total: u64) -> Box<[Alias]> {
    let mut shares: Vec<u64> = weights.map(u64::from).collect();
    let count = shares.len() as u64;
    // A column is `total` high; together they hold each weight `count` times.
    shares.iter_mut().for_each(|share| *share *= count);
    let mut aliases: Vec<_> = (0..count as u32).map(|other| Alias { below: u32::MAX, other }).collect();
    let (mut small, mut large): (Vec<_>, Vec<_>) =
        (0..shares.len()).partition(|&index| shares[index] < total);
    while let (Some(poor), Some(&rich)) = (small.pop(), large.last()) {
        let below = (u128::from(shares[poor]) << 32) / u128::from(total);
        // Less than 2^32 since the share is less than the total; and nobody who has a weight is without a chance.
        aliases[poor] = Alias { below: (below as u32).max(1), other: rich as u32 };
        shares[rich] -= total - shares[poor];
        if shares[rich] < total {
            large.pop();
            small.push(rich);
        }
    }
    aliases.into()
}

#[cfg(test)]
mod tests {
    use super::{super::fixture::Fleet, *};

    #[test]
    fn what_is_drawn_first_follows_the_weights() {
        for weights in [&[1, 2, 7][..], &[5, 1, 1, 1, 1, 1], &[1000, 1], &[3, 3, 3, 4]] {
            let odds = Odds::new(Fleet::weighted(weights).candidates());
            let mut random = fastrand::Rng::with_seed(3);
            let mut firsts = vec![0; weights.len()];
            for _ in 0..200_000 {
                firsts[odds.two(weights.len(), &mut random).0] += 1;
            }
            let total: u32 = weights.iter().sum();
            for (&weight, &drawn) in weights.iter().zip(&firsts) {
                let expected = f64::from(weight) / f64::from(total) * 200_000.0;
                // Five standard deviations of a count.
                assert!(
                    (f64::from(drawn) - expected).abs() < 5.0 * expected.sqrt(),
                    "{weights:?}: {firsts:?}"
                );
            }
        }
    }

    #[test]
    fn the_two_are_distinct_and_in_bounds_whatever_the_weights() {
        for weights in
            [&[1, 1][..], &[1, 2], &[u32::MAX, 1], &[u32::MAX, u32::MAX, 1], &[1, 2, 3, 4, 5, 6, 7]]
        {
            let odds = Odds::new(Fleet::weighted(weights).candidates());
            let mut random = fastrand::Rng::with_seed(5);
            for _ in 0..10_000 {
                let (first, second) = odds.two(weights.len(), &mut random);
                assert!(first != second && first < weights.len() && second < weights.len());
            }
        }
    }

    #[test]
    fn the_second_is_drawn_by_weight_too() {
        let odds = Odds::new(Fleet::weighted(&[1, 1, 10, 10]).candidates());
        let mut random = fastrand::Rng::with_seed(5);
        let mut seconds = [0; 4];
        for _ in 0..10_000 {
            seconds[odds.two(4, &mut random).1] += 1;
        }
        assert!(seconds[2] > 4 * seconds[0] && seconds[3] > 4 * seconds[1], "{seconds:?}");
    }

    #[test]
    fn busy_is_what_a_call_more_would_make_it_per_weight() {
        let fleet = Fleet::weighted(&[1, 7]);
        let [light, heavy] = fleet.candidates() else { unreachable!() };
        assert!(!is_less_busy(light, heavy) && !is_less_busy(heavy, light), "idle");
        fleet.start(1, 6);
        assert!(!is_less_busy(light, heavy), "6 of 7 are less than 1 of 1");
        fleet.start(1, 1);
        assert!(is_less_busy(light, heavy));
        fleet.start(0, 1);
        assert!(!is_less_busy(heavy, light), "8 of 7 would be more than 1 of 1");
    }
}
