//! Which instances of many a client connects to
//!
//! Where many clients meet many servers, each client connecting to each server costs more than it brings. A client keeps
//! to a subset, another one than its neighbours', so that all servers have about as many clients: rendezvous hashing as in
//! gRFC A68. A change of one instance moves one of a client's connections at most, and needs no word between clients.

use std::{collections::BTreeSet, num::NonZeroUsize};

use twox_hash::XxHash64;

/// The instances of least rank, as many as were asked for
///
/// The rank of an instance is the XXH64 of its address with a seed, which each client draws for itself. The choice
/// depends on the set of instances alone: neither on their order nor on what was before. A change costs the logarithm of
/// their number.
#[derive(Clone, Debug)]
pub struct Subset {
    size: NonZeroUsize,
    seed: u64,
    chosen: BTreeSet<Rank>,
    /// Each of them ranks behind all that are chosen.
    spare: BTreeSet<Rank>,
}

/// The number makes it certain where two instances have one address.
type Rank = (u64, u64);

/// What a change of the set has moved, beside the instance that came or went itself
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Is chosen from now on
    pub joined: Option<u64>,
    /// Is not chosen any more
    pub left: Option<u64>,
}

impl Subset {
    /// A subset of `size` instances; clients with the same `seed` choose the same
    pub fn new(size: NonZeroUsize, seed: u64) -> Self {
        Self { size, seed, chosen: BTreeSet::new(), spare: BTreeSet::new() }
    }

    /// An instance has come; its number is the caller's, and tells it from all others
    pub fn insert(&mut self, instance: u64, address: &str) -> Moved {
        self.chosen.insert(self.rank(instance, address));
        if self.chosen.len() <= self.size.get() {
            return Moved::default();
        }
        let left = self.chosen.pop_last();
        self.spare.extend(left);
        Moved { joined: None, left: left.map(number).filter(|left| *left != instance) }
    }

    /// An instance has gone
    pub fn remove(&mut self, instance: u64, address: &str) -> Moved {
        let rank = self.rank(instance, address);
        if !self.chosen.remove(&rank) {
            self.spare.remove(&rank);
            return Moved::default();
        }
        let joined = self.spare.pop_first();
        self.chosen.extend(joined);
        Moved { joined: joined.map(number), left: None }
    }

    /// Whether an instance is chosen
    pub fn contains(&self, instance: u64, address: &str) -> bool {
        self.chosen.contains(&self.rank(instance, address))
    }

    fn rank(&self, instance: u64, address: &str) -> Rank {
        (XxHash64::oneshot(self.seed, address.as_bytes()), instance)
    }
}

fn number((_, instance): Rank) -> u64 {
    instance
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};

    use super::*;

    fn subset(size: usize, seed: u64) -> Subset {
        Subset::new(NonZeroUsize::new(size).unwrap(), seed)
    }

    fn address(instance: u64) -> String {
        format!("10.0.{}.{}:8080", instance / 256, instance % 256)
    }

    fn chosen(subset: &Subset, instances: impl IntoIterator<Item = u64>) -> BTreeSet<u64> {
        instances.into_iter().filter(|one| subset.contains(*one, &address(*one))).collect()
    }

    fn filled(size: usize, seed: u64, instances: impl IntoIterator<Item = u64>) -> Subset {
        let mut subset = subset(size, seed);
        for instance in instances {
            subset.insert(instance, &address(instance));
        }
        subset
    }

    /// The definition: sort all by rank, take the first
    fn sorted(size: usize, seed: u64, instances: &BTreeSet<u64>) -> BTreeSet<u64> {
        let rank = |one: &u64| (XxHash64::oneshot(seed, address(*one).as_bytes()), *one);
        let mut ranked: Vec<_> = instances.iter().copied().collect();
        ranked.sort_by_key(rank);
        ranked.into_iter().take(size).collect()
    }

    #[test]
    fn fewer_than_asked_for_are_all_chosen() {
        let all = filled(5, 1, 0..5);
        assert_eq!(chosen(&all, 0..5), (0..5).collect());
        assert_eq!(chosen(&filled(5, 1, []), 0..5), BTreeSet::new());
    }

    #[test]
    fn over_any_history_a_change_moves_one_at_most_and_the_choice_is_as_if_sorted_anew() {
        let mut random = fastrand::Rng::with_seed(7);
        for (size, seed) in [(1, 1), (2, 2), (32, 3), (64, 4)] {
            let (mut subset, mut present, mut was) = (subset(size, seed), BTreeSet::new(), BTreeSet::new());
            for _ in 0..2000 {
                let one = random.u64(0..100);
                let (moved, came) = if present.remove(&one) {
                    (subset.remove(one, &address(one)), false)
                } else {
                    present.insert(one);
                    (subset.insert(one, &address(one)), true)
                };
                let now = chosen(&subset, 0..100);
                assert_eq!(now, sorted(size, seed, &present));
                let joined: Vec<_> = now.difference(&was).copied().filter(|other| *other != one).collect();
                let left: Vec<_> = was.difference(&now).copied().filter(|other| *other != one).collect();
                assert_eq!(moved.joined, joined.first().copied());
                assert_eq!(moved.left, left.first().copied());
                assert!(joined.len() + left.len() <= 1, "{joined:?} {left:?}");
                assert!(if came { joined.is_empty() } else { left.is_empty() });
                was = now;
            }
        }
    }

    #[test]
    fn the_order_of_instances_makes_no_difference() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut instances: Vec<_> = (0..100).collect();
        let expected = chosen(&filled(32, 9, instances.clone()), 0..100);
        for _ in 0..20 {
            random.shuffle(&mut instances);
            assert_eq!(chosen(&filled(32, 9, instances.clone()), 0..100), expected);
        }
    }

    #[test]
    fn two_instances_at_one_address_are_two() {
        let mut subset = subset(1, 1);
        subset.insert(1, "a:1");
        assert_eq!(subset.insert(2, "a:1"), Moved::default());
        assert!(subset.contains(1, "a:1") && !subset.contains(2, "a:1"));
        assert_eq!(subset.remove(1, "a:1"), Moved { joined: Some(2), left: None });
    }

    #[test]
    fn who_is_unknown_changes_nothing_by_leaving_and_who_comes_twice_counts_once() {
        let mut subset = filled(2, 1, 0..3);
        let before = chosen(&subset, 0..3);
        assert_eq!(subset.remove(9, &address(9)), Moved::default());
        for known in 0..3 {
            subset.insert(known, &address(known));
        }
        assert_eq!(chosen(&subset, 0..3), before);
    }

    /// 32 of 100 for each of 200 clients: 64 clients an instance in the mean, with a deviation of 6.6
    #[test]
    fn clients_spread_over_all_instances() {
        let mut random = fastrand::Rng::with_seed(7);
        let mut clients = BTreeMap::new();
        for _ in 0..200 {
            for one in chosen(&filled(32, random.u64(..), 0..100), 0..100) {
                *clients.entry(one).or_insert(0) += 1;
            }
        }
        let (least, most) = (clients.values().min().unwrap(), clients.values().max().unwrap());
        assert_eq!(clients.len(), 100, "everybody has clients");
        assert!(*most <= 96, "max/mean is {most}/64");
        assert!(*least >= 32, "min/mean is {least}/64");
    }

    /// Seeds that follow each other are as good as any
    #[test]
    fn two_clients_choose_differently() {
        let mut shared = HashMap::new();
        for seed in 0..100 {
            *shared.entry(chosen(&filled(32, seed, 0..100), 0..100)).or_insert(0) += 1;
        }
        assert_eq!(shared.len(), 100);
    }
}
