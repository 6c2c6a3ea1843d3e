//! What a busy machine does to endpoints that are equal, and to one that is not, with made-up times

use std::time::Duration;

use super::{fixture::Fleet, *};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// What times are rounded up to.
const STEP: Duration = Duration::from_micros(100);

/// Calls, and what disturbs them
struct Scene {
    /// How long each endpoint takes, give or take a fifth.
    times: &'static [Duration],
    calls: Calls,
    is_noisy: bool,
}

#[derive(Clone, Copy, Debug)]
enum Calls {
    /// That many at each beat.
    Beats(usize, Duration),
    /// That many in flight at all times.
    Loop(usize),
}

struct Call {
    began: Instant,
    ends: Instant,
    index: usize,
}

impl Scene {
    /// How many calls each endpoint got in each of so many seconds
    fn play(&self, lasting: u32, seed: u64) -> Vec<Vec<usize>> {
        let fleet = Fleet::new(self.times.len());
        let policy = P2cEwma::new();
        let plan = policy.plan(fleet.candidates());
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut under_way, mut seconds) =
            (Vec::<Call>::new(), vec![vec![0; self.times.len()]; lasting as usize]);
        let mut stall = fleet.zero()..fleet.zero();
        let (mut now, mut next_beat) = (fleet.zero(), fleet.zero());
        while now + STEP < fleet.zero() + lasting * SECOND {
            now += STEP;
            if now >= stall.end {
                stall = next_stall(now, &mut random);
            }
            // A client that stands still sees all that ends meanwhile when it goes on, and begins nothing.
            if self.is_noisy && stall.contains(&now) {
                continue;
            }
            for call in under_way.extract_if(.., |call| call.ends <= now) {
                end(&fleet, &call, now);
            }
            let begin = match self.calls {
                Calls::Loop(most) => most - under_way.len(),
                Calls::Beats(..) if now < next_beat => 0,
                Calls::Beats(count, beat) => {
                    next_beat = now + beat;
                    count
                }
            };
            for _ in 0..begin {
                let picked = policy.pick(&plan, fleet.candidates(), &mut Pick::new(&mut random, now));
                let index = picked.expect("there is room everywhere");
                fleet.candidates()[index].load().start(now);
                seconds[(now - fleet.zero()).as_secs() as usize][index] += 1;
                under_way.push(Call { began: now, ends: now + self.time(index, &mut random), index });
            }
        }
        seconds
    }

    fn time(&self, index: usize, random: &mut fastrand::Rng) -> Duration {
        let time = self.times[index].mul_f32(0.8 + 0.4 * random.f32());
        let is_late = self.is_noisy && random.u32(..100) == 0;
        if is_late { time + MS.mul_f32(5.0 + 25.0 * random.f32()) } else { time }
    }

    /// The least and the largest share of an endpoint in any six of 30 s
    fn shares(&self, seed: u64) -> (f64, f64) {
        let seconds = self.play(30, seed);
        let (mut least, mut most) = (1.0_f64, 0.0_f64);
        for window in seconds.windows(6) {
            let all: usize = window.iter().flatten().sum();
            for index in 0..self.times.len() {
                let share = window.iter().map(|second| second[index]).sum::<usize>() as f64 / all as f64;
                (least, most) = (least.min(share), most.max(share));
            }
        }
        (least, most)
    }
}

fn end(fleet: &Fleet, call: &Call, now: Instant) {
    let load = fleet.candidates()[call.index].load();
    load.answered(Some(now - call.began), now);
    load.succeeded();
    load.finish();
}

/// The next 20 to 60 ms in which the client stands still; one of three follows the last within 100 ms
fn next_stall(now: Instant, random: &mut fastrand::Rng) -> std::ops::Range<Instant> {
    let pause = if random.u32(..3) == 0 { 100 } else { 3000 };
    let begin = now + MS.mul_f32(pause as f32 * random.f32());
    begin..begin + MS.mul_f32(20.0 + 40.0 * random.f32())
}

const EQUAL: [&[Duration]; 2] = [&[MS.saturating_mul(2); 2], &[MS.saturating_mul(2); 3]];
const ONE_IS_SLOW: [[Duration; 3]; 2] = [
    [MS.saturating_mul(2), MS.saturating_mul(2), MS.saturating_mul(20)],
    [MS.saturating_mul(20), MS.saturating_mul(20), MS.saturating_mul(200)],
];

#[test]
fn equal_endpoints_get_about_equal_shares_whatever_disturbs_them() {
    for times in EQUAL {
        for calls in [Calls::Beats(1, 5 * MS), Calls::Beats(16, 80 * MS)] {
            for seed in 0..4 {
                let (least, most) = Scene { times, calls, is_noisy: true }.shares(seed);
                let fair = 1.0 / times.len() as f64;
                let is_fair = least > 0.8 * fair && most < 1.2 * fair;
                assert!(is_fair, "{} {calls:?} {seed}: {least:.3} to {most:.3}", times.len());
            }
        }
    }
}

#[test]
fn one_that_is_ten_times_slower_gets_little_whatever_disturbs_it() {
    for times in &ONE_IS_SLOW {
        for is_noisy in [false, true] {
            let seconds = Scene { times, calls: Calls::Loop(32), is_noisy }.play(10, 1);
            let all: usize = seconds.iter().flatten().sum();
            let slow: usize = seconds.iter().map(|second| second[2]).sum();
            assert!(slow > 0 && slow * 1000 < all * 35, "{slow} of {all}, {times:?}, {is_noisy}");
        }
    }
}
