//! The same key, the same endpoint

use std::fmt::Write;

use twox_hash::XxHash64;

use super::{Candidate, Pick, Policy};

/// Calls with the same key go to the same endpoint, as long as it is there; all clients agree on which
///
/// The key is what the caller says ([`Pick::key`]), else the value of a [header](Self::header), else a random one. It is
/// hashed to a point on a ring on which each endpoint has entries in proportion to its weight, and the next entry on the
/// ring takes the call, or the next after it whose endpoint allows it. So an endpoint that leaves moves its own keys and no
/// others, each to another endpoint, and they return with it, as long as each endpoint keeps its number of entries (below).
/// As `ring_hash` of gRFC A42 and A76: XXH64 with seed 0, of the endpoint's name with `_` and the entry's number.
///
/// An endpoint has 128 entries, or 128 for each time that its weight holds the greatest common divisor of all weights: shares
/// of keys are then fair within some tenth. While the ring would have more than 16 384 entries, everybody has half as many,
/// and nobody less than one. (A42 scales all entries whenever the number of endpoints changes, which moves keys of all of
/// them.) A pick is a binary search.
///
/// So a change that crosses that bound, as from 128 equal endpoints to 129, or that changes the greatest common divisor of the
/// weights, moves keys of the others as well: half of them where numbers halve or double, more with other factors. There is
/// no hysteresis, since clients that came to the same set in different ways have to agree.
///
/// Of endpoints with the same name, each has entries of its own, in the order in which they became known.
#[derive(Clone, Debug, Default)]
pub struct RingHash {
    header: Option<Box<str>>,
    /// At least 1.
    bound: Option<f64>,
}

impl RingHash {
    /// The policy, with keys from the callers alone
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls that bring no key are hashed by the value of this request header, by the first one if there are several
    ///
    /// Default: none.
    #[must_use]
    pub fn header(self, name: &str) -> Self {
        Self { header: Some(name.to_ascii_lowercase().into()), ..self }
    }

    /// Passes over an endpoint that has more than `factor` times its share of the calls in flight
    ///
    /// So a popular key cannot overload its endpoint; the nearer to 1, the more keys move when it is busy. The share is by
    /// weight, and never less than one call. If all allowed endpoints are above it, the first takes the call. Costs a look
    /// at all endpoints for a call whose endpoint is busy.
    ///
    /// Default: no bound. 1.25 to 2 is usual; what is below 1 counts as 1. "Consistent Hashing with Bounded Loads" (Mirrokni,
    /// Thorup, Zadimoghaddam, 2016); Envoy's `hash_balance_factor`, there in percent.
    #[must_use]
    pub fn bounded_load(self, factor: f64) -> Self {
        // Not a number counts as 1, too.
        Self { bound: Some(factor.max(1.0)), ..self }
    }

    fn point(&self, call: &mut Pick<'_>) -> u64 {
        let header = || self.header.as_deref().and_then(|name| call.headers.get(name));
        match call.key.or_else(header) {
            Some(key) => hash(key),
            None => call.random.u64(..),
        }
    }
}

/// Entries per unit of weight while there are few endpoints.
const PER_WEIGHT: u64 = 128;
/// The entries of all, from which on each endpoint has fewer: 256 KiB of memory, sorted in about a millisecond.
const MOST: u64 = 16_384;

/// Entries in the order of their points, each with the index of its candidate
#[derive(Debug)]
pub struct Ring {
    entries: Box<[(u64, u32)]>,
    total_weight: u64,
}

impl Ring {
    fn new(candidates: &[Candidate]) -> Self {
        let mut order: Vec<_> = (0..candidates.len()).collect();
        // By name, so that namesakes stand together.
        order.sort_unstable_by_key(|&index| (candidates[index].name(), candidates[index].endpoint()));
        let number = Entries::new(candidates);
        let mut entries = Vec::new();
        let mut text = String::new();
        for namesakes in order.chunk_by(|&one, &next| candidates[one].name() == candidates[next].name()) {
            for (occurrence, &index) in namesakes.iter().enumerate() {
                let candidate = &candidates[index];
                for entry in 0..number.of(candidate.weight().into()) {
                    text.clear();
                    let name = candidate.name();
                    // Writing to a string cannot fail.
                    let _ = match occurrence {
                        0 => write!(text, "{name}_{entry}"),
                        _ => write!(text, "{name}#{occurrence}_{entry}"),
                    };
                    entries.push((hash(text.as_bytes()), index as u32));
                }
            }
        }
        entries.sort_unstable();
        let total_weight = candidates.iter().map(|candidate| u64::from(candidate.weight())).sum();
        Self { entries: entries.into(), total_weight }
    }

    /// All candidates from a point on, most of them several times
    fn from(&self, point: u64) -> impl Iterator<Item = usize> {
        let next = self.entries.partition_point(|&(at, _)| at < point);
        let (before, after) = self.entries.split_at(next);
        after.iter().chain(before).map(|&(_, index)| index as usize)
    }
}

/// How many entries a weight has
struct Entries {
    /// The weight with the full number: all weights are multiples of it.
    unit: u64,
    /// How often the full number is halved.
    halvings: u32,
}

impl Entries {
    fn new(candidates: &[Candidate]) -> Self {
        let weights = || candidates.iter().map(|candidate| u64::from(candidate.weight()));
        let unit = weights().fold(0, common_divisor).max(1);
        // After that many everybody has one, which may be too many still.
        let all = u32::BITS + PER_WEIGHT.ilog2();
        let total = |halvings| weights().map(|weight| Self { unit, halvings }.of(weight)).sum::<u64>();
        Self { unit, halvings: (0..all).find(|&halvings| total(halvings) <= MOST).unwrap_or(all) }
    }

    fn of(&self, weight: u64) -> u64 {
        ((weight / self.unit * PER_WEIGHT) >> self.halvings).max(1)
    }
}

fn common_divisor(one: u64, other: u64) -> u64 {
    if other == 0 { one } else { common_divisor(other, one % other) }
}

fn hash(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

impl Policy for RingHash {
    type Plan = Ring;

    fn plan(&self, candidates: &[Candidate]) -> Ring {
        Ring::new(candidates)
    }

    fn pick(&self, ring: &Ring, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        let mut allowed = ring.from(self.point(call)).filter(|&index| call.allows(&candidates[index]));
        let first = allowed.next()?;
        let Some(factor) = self.bound else { return Some(first) };
        if candidates[first].in_flight() == 0 {
            return Some(first);
        }
        let in_flight: u64 = candidates.iter().map(|candidate| u64::from(candidate.in_flight())).sum();
        // With this call in it.
        let per_weight = factor * (in_flight + 1) as f64 / ring.total_weight as f64;
        let has_share_left = |&index: &usize| {
            let candidate = &candidates[index];
            f64::from(candidate.in_flight()) < (per_weight * f64::from(candidate.weight())).ceil()
        };
        Some(std::iter::once(first).chain(allowed).find(has_share_left).unwrap_or(first))
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Headers, fixture::Fleet},
        *,
    };

    const KEYS: usize = 2000;

    /// The endpoint of each of many keys
    fn owners(fleet: &Fleet, policy: &RingHash) -> Vec<Option<u64>> {
        let plan = policy.plan(fleet.candidates());
        let mut random = fastrand::Rng::with_seed(0);
        let owner = |key: usize| {
            let key = format!("user-{key}");
            let mut call = Pick { key: Some(key.as_bytes()), ..Pick::new(&mut random, fleet.zero()) };
            let index = policy.pick(&plan, fleet.candidates(), &mut call)?;
            Some(fleet.candidates()[index].endpoint())
        };
        (0..KEYS).map(owner).collect()
    }

    fn moved(before: &[Option<u64>], after: &[Option<u64>]) -> Vec<(Option<u64>, Option<u64>)> {
        before.iter().copied().zip(after.iter().copied()).filter(|(before, after)| before != after).collect()
    }

    #[test]
    fn hashes_are_xxh64_with_seed_0() {
        // Test vectors of the xxHash specification.
        assert_eq!((hash(b""), hash(b"abc")), (0xef46_db37_51d8_e999, 0x44bc_2cf5_ad77_0999));
    }

    #[test]
    fn of_ten_the_one_that_leaves_moves_its_own_keys_and_no_others_and_they_come_back_with_it() {
        let policy = RingHash::new();
        let before = owners(&Fleet::new(10), &policy);
        let mut fleet = Fleet::new(10);
        fleet.remove(3);
        let without = owners(&fleet, &policy);
        let moved = moved(&before, &without);
        assert!(moved.iter().all(|(owner, _)| *owner == Some(3)), "{moved:?}");
        assert!((KEYS / 20..KEYS / 5).contains(&moved.len()), "{}", moved.len());
        let heirs: std::collections::HashSet<_> = moved.iter().map(|(_, heir)| heir).collect();
        assert!(heirs.len() > 5, "{heirs:?}");
        assert_eq!(owners(&Fleet::new(10), &policy), before);
    }

    #[test]
    fn one_that_is_full_is_passed_over_for_the_same_ones_that_would_follow_it() {
        let policy = RingHash::new();
        let fleet = Fleet::new(10);
        fleet.fill(3);
        let mut smaller = Fleet::new(10);
        smaller.remove(3);
        assert_eq!(owners(&fleet, &policy), owners(&smaller, &policy));
    }

    #[test]
    fn keys_are_shared_by_weight() {
        let owners = owners(&Fleet::weighted(&[1, 2, 7]), &RingHash::new());
        for (endpoint, fair) in [(0, KEYS / 10), (1, KEYS / 5), (2, KEYS * 7 / 10)] {
            let keys = owners.iter().filter(|owner| **owner == Some(endpoint)).count();
            assert!(keys.abs_diff(fair) < fair / 3, "{endpoint}: {keys}");
        }
    }

    #[test]
    fn beyond_the_most_entries_everybody_has_half_as_many_and_at_least_one() {
        let entries = |weights: &[u32]| Ring::new(Fleet::weighted(weights).candidates()).entries.len();
        assert_eq!(entries(&[1; 128]), 16_384);
        assert_eq!(entries(&[1; 129]), 129 * 64);
        assert_eq!(entries(&[1; 20_000]), 20_000);
        assert_eq!(entries(&[2, 127]), (2 + 127) * 64);
        assert!(entries(&[u32::MAX, 1]) <= 16_384);
        assert_eq!(entries(&[u32::MAX; 20_000]), 20_000);
    }

    #[test]
    fn weights_count_by_their_proportion_alone() {
        let alike = |one: &[u32], other: &[u32]| {
            owners(&Fleet::weighted(one), &RingHash::new())
                == owners(&Fleet::weighted(other), &RingHash::new())
        };
        assert!(alike(&[1; 10], &[100; 10]));
        assert!(alike(&[1, 2, 7], &[50, 100, 350]));
    }

    #[test]
    fn namesakes_have_keys_of_their_own() {
        let mut fleet = Fleet::new(3);
        fleet.rename("10.0.0.1:80");
        let owners = owners(&fleet, &RingHash::new());
        for endpoint in 0..3 {
            assert!(owners.iter().filter(|owner| **owner == Some(endpoint)).count() > KEYS / 5);
        }
    }

    #[derive(Debug)]
    struct User(&'static str);

    impl Headers for User {
        fn get(&self, name: &str) -> Option<&[u8]> {
            (name == "x-user").then_some(self.0.as_bytes())
        }
    }

    #[test]
    fn a_caller_s_key_counts_before_the_header_and_the_header_before_chance() {
        let fleet = Fleet::new(50);
        let policy = RingHash::new().header("X-User");
        let of = |key: Option<&'static [u8]>, user: &'static dyn Headers| {
            let shares = fleet.shares_with(policy.clone(), 1000, |call| {
                call.key = key;
                call.headers = user;
            });
            shares
                .iter()
                .enumerate()
                .filter(|(_, share)| **share > 0)
                .map(|(index, _)| index)
                .collect::<Vec<_>>()
        };
        let (ada, bob) = (of(None, &User("ada")), of(None, &User("bob")));
        assert_eq!((ada.len(), bob.len()), (1, 1));
        assert_ne!(ada, bob);
        assert_eq!(of(Some(b"ada"), &User("bob")), ada);
        assert_eq!(of(None, &()).len(), 50, "without either all have their share");
    }

    #[test]
    fn a_bound_keeps_a_popular_key_from_overloading_its_endpoint() {
        let popular = |call: &mut Pick<'_>| call.key = Some(b"popular");
        let unbounded = Fleet::new(10);
        unbounded.hold_with(RingHash::new(), 1000, popular);
        assert_eq!(unbounded.in_flight().iter().max(), Some(&1000));
        let fleet = Fleet::new(10);
        fleet.hold_with(RingHash::new().bounded_load(1.25), 1000, popular);
        assert_eq!(fleet.in_flight().iter().max(), Some(&125), "{:?}", fleet.in_flight());
        let even = Fleet::new(10);
        even.hold_with(RingHash::new().bounded_load(f64::NAN), 1000, popular);
        assert_eq!(even.in_flight(), [100; 10]);
    }

    #[test]
    fn a_bound_moves_nothing_while_loads_are_below_it_and_refuses_nobody() {
        let fleet = Fleet::new(10);
        let bounded = RingHash::new().bounded_load(2.0);
        assert_eq!(owners(&fleet, &bounded), owners(&fleet, &RingHash::new()));
        (1..10).for_each(|index| fleet.fill(index));
        fleet.start(0, 1000);
        assert_eq!(owners(&fleet, &bounded), [Some(0); KEYS]);
    }
}
