//! Every order in which threads can meet in our atomics: `cargo xtask loom`
//!
//! loom takes sequentially consistent loads and stores for acquire and release, so what rests on one order of all of them, as
//! "at least one sees the other" does, cannot be shown here.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use loom::{
    model,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    thread,
};

use crate::{
    load::Load,
    policy::{Pick, PickFirst, Policy, RoundRobin, fixture::Fleet},
    streams::Streams,
};

const MS: Duration = Duration::from_millis(1);

fn zero() -> Instant {
    #[allow(clippy::disallowed_methods, reason = "any instant will do as the zero of a test")]
    Instant::now()
}

/// Runs both at a time, and then says what they said
fn both<T: 'static>(one: impl FnOnce() -> T + 'static, other: impl FnOnce() -> T + 'static) -> (T, T) {
    let one = thread::spawn(one);
    let other = other();
    (one.join().unwrap(), other)
}

#[test]
fn streams_never_exceed_their_limit_and_one_of_two_gets_the_last() {
    model(|| {
        let streams = Arc::new(Streams::default());
        streams.set_limit(1);
        let held = Arc::new(AtomicU32::new(0));
        let call = || {
            let (streams, held) = (Arc::clone(&streams), Arc::clone(&held));
            move || {
                let opened = streams.try_open().is_some();
                if opened {
                    assert_eq!(held.fetch_add(1, Ordering::SeqCst), 0);
                    held.fetch_sub(1, Ordering::SeqCst);
                    assert!(streams.close());
                }
                opened
            }
        };
        let (one, other) = both(call(), call());
        assert!(one || other);
        assert_eq!(streams.open(), 0);
    });
}

#[test]
fn who_knows_of_a_retirement_gets_no_stream_and_who_came_before_is_counted() {
    model(|| {
        let streams = Arc::new(Streams::default());
        streams.set_limit(2);
        let retired = Arc::new(AtomicBool::new(false));
        let (late_streams, known) = (Arc::clone(&streams), Arc::clone(&retired));
        let caller = thread::spawn(move || {
            let knew = known.load(Ordering::Acquire);
            let opened = late_streams.try_open().is_some();
            assert!(!(knew && opened));
            opened
        });
        streams.set_limit(0);
        retired.store(true, Ordering::Release);
        let opened = caller.join().unwrap();
        assert_eq!((streams.open(), streams.has_room()), (u32::from(opened), false));
    });
}

#[test]
fn one_of_those_who_close_is_the_last() {
    model(|| {
        let streams = Arc::new(Streams::default());
        streams.set_limit(2);
        assert_eq!((streams.try_open(), streams.try_open()), (Some(0), Some(1)));
        let close = || {
            let streams = Arc::clone(&streams);
            move || streams.close()
        };
        let (one, other) = both(close(), close());
        assert!(one != other);
    });
}

/// A call from its beginning to its end
fn call(load: &Arc<Load>, at: Instant, end: impl FnOnce(&Load) + 'static) -> impl FnOnce() + 'static {
    let load = Arc::clone(load);
    move || {
        load.start(at);
        end(&load);
        load.finish();
    }
}

#[test]
fn when_all_calls_have_ended_nothing_is_counted_and_nobody_waits() {
    let answered = |load: &Load, now| load.answered(None, now);
    let given_up = |load: &Load, now| load.given_up(Duration::ZERO, now);
    let untaken = |load: &Load, _| load.untaken();
    let ends: [[fn(&Load, Instant); 2]; 3] =
        [[answered, answered], [answered, given_up], [given_up, untaken]];
    // All orders of two calls are too many to wait for.
    let mut few = model::Builder::new();
    few.preemption_bound = Some(3);
    for [one, other] in ends {
        few.check(move || {
            let t0 = zero();
            let load = Arc::new(Load::new(t0));
            let end = move |end: fn(&Load, Instant)| move |load: &Load| end(load, t0 + MS);
            both(call(&load, t0, end(one)), call(&load, t0, end(other)));
            assert_eq!((load.in_flight(), load.waiting(), load.started()), (0, 0, 2));
            assert_eq!(load.unanswered(t0 + 1000 * MS), Duration::ZERO);
        });
    }
}

#[test]
fn a_call_that_waits_may_be_without_an_age_until_the_next_begins_but_is_counted() {
    model(|| {
        let t0 = zero();
        let load = Arc::new(Load::new(t0));
        load.start(t0);
        let (answered, begun) = (Arc::clone(&load), Arc::clone(&load));
        both(move || answered.answered(Some(MS), t0 + MS), move || begun.start(t0 + MS));
        assert_eq!((load.in_flight(), load.waiting(), load.answers()), (2, 1, 1));
        let age = load.unanswered(t0 + 10 * MS);
        assert!(age == Duration::ZERO || age == 9 * MS, "{age:?}");
        load.start(t0 + 20 * MS);
        assert!(load.unanswered(t0 + 30 * MS) >= 10 * MS);
    });
}

/// A call that gets a stream if a trial lets it in; whether it began
fn begin(load: &Arc<Load>, at: Instant) -> impl FnOnce() -> bool + 'static {
    let load = Arc::clone(load);
    move || load.try_start(at, || Some(())).is_some()
}

#[test]
fn of_two_calls_on_trial_one_is_let_in_and_the_other_leaves_no_trace() {
    model(|| {
        let t0 = zero();
        let load = Arc::new(Load::new(t0));
        load.try_out();
        let (one, other) = both(begin(&load, t0), begin(&load, t0));
        assert!(one != other);
        assert_eq!((load.in_flight(), load.waiting(), load.started()), (1, 1, 1));
        load.answered(None, t0);
        assert!(load.lets_in());
    });
}

#[test]
fn who_comes_when_a_trial_call_is_answered_is_let_in_or_finds_room_afterwards() {
    model(|| {
        let t0 = zero();
        let load = Arc::new(Load::new(t0));
        load.try_out();
        assert!(begin(&load, t0)());
        let answered = Arc::clone(&load);
        let answer = move || {
            answered.answered(None, t0);
            true
        };
        let (_, is_let_in) = both(answer, begin(&load, t0));
        assert_eq!((load.waiting(), load.lets_in()), (u32::from(is_let_in), !is_let_in));
    });
}

#[test]
fn a_trial_that_has_failed_stays_over_until_all_are_let_in() {
    let repeated: [fn(&Load); 2] = [Load::try_out, Load::let_one_more_in];
    for again in repeated {
        model(move || {
            let t0 = zero();
            let load = Arc::new(Load::new(t0));
            load.try_out();
            let (failed, judge) = (Arc::clone(&load), Arc::clone(&load));
            both(
                move || {
                    failed.failed(t0);
                },
                move || again(&judge),
            );
            assert!(load.is_on_trial() && !load.lets_in());
            load.let_all_in();
            assert!(load.lets_in() && !load.is_on_trial());
        });
    }
}

#[test]
fn who_comes_when_all_are_let_in_is_counted_once_or_not_at_all() {
    model(|| {
        let t0 = zero();
        let load = Arc::new(Load::new(t0));
        load.try_out();
        load.failed(t0);
        let judge = Arc::clone(&load);
        let let_in = move || {
            judge.let_all_in();
            true
        };
        let (_, has_begun) = both(let_in, begin(&load, t0));
        let count = u32::from(has_begun);
        assert_eq!((load.in_flight(), load.waiting(), load.started()), (count, count, count.into()));
        assert!(load.lets_in());
    });
}

#[test]
fn of_two_samples_at_the_same_time_one_counts_and_nothing_in_between() {
    model(|| {
        let t0 = zero();
        let load = Arc::new(Load::new(t0));
        load.seed(10 * MS, t0);
        // The time constant: each would move the estimate by 1 - 1/e.
        let now = t0 + 2000 * MS;
        let answer = |latency| {
            let load = Arc::clone(&load);
            move || load.answered(Some(latency), now)
        };
        load.start(t0);
        load.start(t0);
        both(answer(15 * MS), answer(18 * MS));
        let latency = load.latency(now).unwrap();
        let moved =
            [15 * MS, 18 * MS].map(|sample| 10 * MS + (sample - 10 * MS).mul_f32(1.0 - (-1_f32).exp()));
        assert!(moved.iter().any(|moved| latency.abs_diff(*moved) < MS / 10), "{latency:?}");
    });
}

#[test]
fn a_seed_and_a_first_sample_leave_one_of_them() {
    model(|| {
        let t0 = zero();
        let load = Arc::new(Load::new(t0));
        load.start(t0);
        let (seeded, answered) = (Arc::clone(&load), Arc::clone(&load));
        both(move || seeded.seed(70 * MS, t0), move || answered.answered(Some(10 * MS), t0));
        let latency = load.latency(t0).unwrap();
        assert!([10 * MS, 70 * MS].iter().any(|sample| latency.abs_diff(*sample) < MS / 100), "{latency:?}");
    });
}

/// What two callers of one policy pick at the same time
fn two_picks<P: Policy>(policy: P) -> (Option<usize>, Option<usize>) {
    let fleet = Fleet::new(2);
    let plan = policy.plan(fleet.candidates());
    let shared = Arc::new((policy, plan, fleet));
    let pick = |seed| {
        let shared = Arc::clone(&shared);
        move || {
            let (policy, plan, fleet) = &*shared;
            let mut random = fastrand::Rng::with_seed(seed);
            policy.pick(plan, fleet.candidates(), &mut Pick::new(&mut random, fleet.zero()))
        }
    };
    both(pick(0), pick(1))
}

#[test]
fn callers_that_choose_at_the_same_time_choose_the_same() {
    model(|| {
        let (one, other) = two_picks(PickFirst::new().shuffled());
        assert!(one.is_some() && one == other);
    });
}

#[test]
fn callers_at_the_same_time_have_different_turns() {
    model(|| {
        let (one, other) = two_picks(RoundRobin::new());
        assert!(one.is_some() && other.is_some() && one != other);
    });
}
