//! What holds for every policy, whatever its rule is

use std::time::Duration;

use super::{fixture::Fleet, *};

/// One policy under test
struct Subject {
    name: &'static str,
    /// Whether calls of which nothing is known go to all endpoints.
    spreads: bool,
    /// A new policy with its plan for a fleet, told apart by nothing but its picks.
    planned: fn(&Fleet) -> Box<Picker<'_>>,
}

type Picker<'a> = dyn Fn(&mut Pick<'_>) -> Option<usize> + 'a;

/// A new policy is one line here.
const SUBJECTS: [Subject; 8] = [
    Subject { name: "p2c_ewma", spreads: true, planned: |fleet| planned(P2cEwma::new(), fleet) },
    Subject { name: "least_request", spreads: true, planned: |fleet| planned(LeastRequest::new(), fleet) },
    Subject { name: "round_robin", spreads: true, planned: |fleet| planned(RoundRobin::new(), fleet) },
    Subject { name: "weighted", spreads: true, planned: |fleet| planned(WeightedRoundRobin::new(), fleet) },
    Subject { name: "ring_hash", spreads: true, planned: |fleet| planned(RingHash::new(), fleet) },
    Subject {
        name: "bounded",
        spreads: true,
        planned: |fleet| planned(RingHash::new().bounded_load(1.5), fleet),
    },
    Subject { name: "pick_first", spreads: false, planned: |fleet| planned(PickFirst::new(), fleet) },
    Subject {
        name: "shuffled",
        spreads: false,
        planned: |fleet| planned(PickFirst::new().shuffled(), fleet),
    },
];

fn planned(policy: impl Policy, fleet: &Fleet) -> Box<Picker<'_>> {
    let plan = policy.plan(fleet.candidates());
    Box::new(move |call| policy.pick(&plan, fleet.candidates(), call))
}

impl Subject {
    /// The numbers of the endpoints picked, by one client
    fn picks(&self, fleet: &Fleet, picks: usize, seed: u64) -> Vec<Option<u64>> {
        let pick = (self.planned)(fleet);
        let mut random = fastrand::Rng::with_seed(seed);
        let mut endpoint = |_| {
            let index = pick(&mut Pick::new(&mut random, fleet.zero()))?;
            Some(fleet.candidates()[index].endpoint())
        };
        (0..picks).map(&mut endpoint).collect()
    }

    /// How many of the picks went to each endpoint, by its number
    fn shares(&self, fleet: &Fleet, picks: usize) -> Vec<usize> {
        let mut shares = vec![0; fleet.candidates().len()];
        self.picks(fleet, picks, 11)
            .into_iter()
            .flatten()
            .for_each(|endpoint| shares[endpoint as usize] += 1);
        shares
    }
}

const WEIGHTS: [u32; 6] = [1, 3, 2, 1, 5, 2];

#[test]
fn shares_do_not_depend_on_the_order_of_the_candidates() {
    for subject in SUBJECTS.iter().filter(|subject| subject.spreads) {
        let mut fleet = Fleet::weighted(&WEIGHTS);
        fleet.start(4, 3);
        let one_way = subject.shares(&fleet, 30_000);
        fleet.reverse();
        let other_way = subject.shares(&fleet, 30_000);
        let alike = one_way.iter().zip(&other_way).all(|(one, other)| one.abs_diff(*other) < 30_000 / 50);
        assert!(alike, "{}: {one_way:?}, {other_way:?}", subject.name);
    }
}

#[test]
fn every_endpoint_gets_calls() {
    for subject in SUBJECTS.iter().filter(|subject| subject.spreads) {
        for count in [1, 2, 3, 17, 300] {
            let mut fleet = Fleet::weighted(&WEIGHTS.repeat(50)[..count]);
            let shares = subject.shares(&fleet, 100 * count);
            assert!(shares.iter().all(|share| *share > 0), "{}, {count}: {shares:?}", subject.name);
            fleet.rename("10.0.0.1:80");
            let shares = subject.shares(&fleet, 100 * count);
            assert!(
                shares.iter().all(|share| *share > 0),
                "{}, namesakes, {count}: {shares:?}",
                subject.name
            );
        }
    }
}

#[test]
fn of_nobody_nobody_is_picked_and_of_one_that_one() {
    for subject in &SUBJECTS {
        assert_eq!(subject.picks(&Fleet::new(0), 3, 0), [None; 3], "{}", subject.name);
        assert_eq!(subject.picks(&Fleet::new(1), 3, 0), [Some(0); 3], "{}", subject.name);
    }
}

#[test]
fn where_all_are_full_nobody_is_picked() {
    for subject in &SUBJECTS {
        for count in 0..6 {
            let fleet = Fleet::weighted(&WEIGHTS[..count]);
            (0..count).for_each(|index| fleet.fill(index));
            assert_eq!(subject.picks(&fleet, 10, 0), [None; 10], "{} of {count}", subject.name);
        }
    }
}

#[test]
fn where_all_are_on_trial_each_gets_one_call_and_then_nobody_does() {
    for subject in &SUBJECTS {
        for count in 1..6 {
            let fleet = Fleet::weighted(&WEIGHTS[..count]);
            fleet.candidates().iter().for_each(|candidate| candidate.load().try_out());
            let pick = (subject.planned)(&fleet);
            let mut random = fastrand::Rng::with_seed(3);
            for _ in 0..2 {
                let mut called = vec![0; count];
                while let Some(index) = pick(&mut Pick::new(&mut random, fleet.zero())) {
                    fleet.start(index, 1);
                    called[index] += 1;
                }
                assert_eq!(called, vec![1; count], "{}", subject.name);
                fleet.candidates().iter().for_each(|candidate| candidate.load().untaken());
            }
            fleet
                .candidates()
                .iter()
                .for_each(|candidate| assert_eq!(candidate.load().failed(fleet.zero()), 1));
            assert_eq!(subject.picks(&fleet, 10, 0), [None; 10], "{}: all have failed", subject.name);
        }
    }
}

#[test]
fn one_on_trial_is_passed_over_while_its_call_waits() {
    for subject in &SUBJECTS {
        let fleet = Fleet::weighted(&WEIGHTS);
        fleet.candidates()[2].load().try_out();
        fleet.start(2, 1);
        let picks = subject.picks(&fleet, 1000, 3);
        assert!(picks.iter().all(|picked| picked.is_some_and(|endpoint| endpoint != 2)), "{}", subject.name);
    }
}

#[test]
fn the_same_chance_makes_the_same_picks() {
    for subject in &SUBJECTS {
        let fleet = Fleet::weighted(&WEIGHTS);
        assert_eq!(subject.picks(&fleet, 1000, 5), subject.picks(&fleet, 1000, 5), "{}", subject.name);
    }
}

/// A fleet of the kind that only accidents make
fn odd_fleet(random: &mut fastrand::Rng) -> Fleet {
    let weights: Vec<_> = (0..random.usize(..9)).map(|_| [1, 2, 1000, u32::MAX][random.usize(..4)]).collect();
    let fleet = Fleet::weighted(&weights);
    for (index, candidate) in fleet.candidates().iter().enumerate() {
        let load = candidate.load();
        let then = fleet.zero() + Duration::from_millis(random.u64(..100_000));
        match random.u8(..6) {
            0 => fleet.fill(index),
            // In flight: as many as can be counted.
            1 => load.finish(),
            2 => fleet.start(index, 1000),
            3 => load.seed([Duration::ZERO, Duration::MAX][random.usize(..2)], then),
            4 => assert_eq!((0..200).map(|_| load.failed(then)).last(), Some(200)),
            _ => {}
        }
        // On trial: one call is let in, or is there already, or was and has failed.
        match random.u8(..6) {
            0 => load.try_out(),
            1 => {
                load.try_out();
                fleet.start(index, 1);
            }
            2 => {
                load.try_out();
                assert!(load.failed(then) > 0);
            }
            _ => {}
        }
    }
    fleet
}

#[test]
fn an_allowed_candidate_is_picked_if_there_is_one_whatever_the_numbers_are() {
    let mut random = fastrand::Rng::with_seed(13);
    for _ in 0..100 {
        let fleet = odd_fleet(&mut random);
        let count = fleet.candidates().len() as u64;
        for subject in &SUBJECTS {
            let pick = (subject.planned)(&fleet);
            for _ in 0..20 {
                // Clocks of different threads: now and then a step back.
                let now = fleet.zero() + Duration::from_millis(random.u64(..100_000));
                let unwanted = |random: &mut fastrand::Rng| random.bool().then(|| random.u64(..=count));
                let (avoid, excluded) = (unwanted(&mut random), unwanted(&mut random));
                let mut call = Pick { avoid, excluded, ..Pick::new(&mut random, now) };
                let picked = pick(&mut call);
                let expected = fleet.candidates().iter().any(|one| call.allows(one));
                assert_eq!(picked.is_some(), expected, "{}", subject.name);
                assert!(
                    picked.is_none_or(|index| call.allows(&fleet.candidates()[index])),
                    "{}",
                    subject.name
                );
            }
        }
    }
}
