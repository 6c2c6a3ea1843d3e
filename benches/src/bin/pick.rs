//! What a pick costs: every policy at 1 to 10 000 endpoints, on one thread and on two
//!
//! Endpoints differ in latency (1 to 10 ms) and calls in flight (none to 3), as of a service at work. A pick has its `now`
//! from outside, as in a channel, which reads the clock once a call. Next to it `p2c::Balance` of tower over `PeakEwma`
//! loads: its `poll_ready`, its `call` of a service that answers at once, the drop of the answer; on two threads behind a
//! mutex, as it takes `&mut self`. `counted` is as much of ours: the clock, a pick by `p2c_ewma`, the call's beginning, its answer and
//! its end. All take turns; medians over the rounds, nanoseconds per pick and thread. Allocations are counted in this process.

use std::{
    alloc::System,
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    sync::{Arc, Barrier, Mutex},
    task::{Context, Poll, Waker},
    thread,
    time::{Duration, Instant},
};

use callsign_benches::{Result, median};
use callsign_core::{
    load::Load,
    policy::{
        Candidate, LeastRequest, P2cEwma, Pick, PickFirst, Policy, RingHash, RoundRobin, WeightedRoundRobin,
    },
    streams::Streams,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tower::{
    Service,
    balance::p2c::Balance,
    discover::ServiceList,
    load::{CompleteOnResponse, PeakEwma},
};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

#[derive(Clone, Copy)]
struct Size {
    rounds: usize,
    /// Per round and thread
    picks: u32,
}

const FULL: Size = Size { rounds: 15, picks: 200_000 };
const QUICK: Size = Size { rounds: 9, picks: 40_000 };

const ENDPOINTS: [usize; 5] = [1, 10, 100, 1_000, 10_000];
const THREADS: [usize; 2] = [1, 2];

/// Every variant, made for a number of endpoints; `true`: one of our policies, and nothing else
const VARIANTS: [(&str, bool, Make); 9] = [
    ("p2c_ewma", true, |endpoints| planned(P2cEwma::new(), equal(endpoints))),
    ("p2c_ewma 1..7", true, |endpoints| planned(P2cEwma::new(), weighted(endpoints))),
    ("least_request", true, |endpoints| planned(LeastRequest::new(), equal(endpoints))),
    ("round_robin", true, |endpoints| planned(RoundRobin::new(), equal(endpoints))),
    ("weighted 1..7", true, |endpoints| planned(WeightedRoundRobin::new(), weighted(endpoints))),
    ("ring_hash", true, |endpoints| planned(RingHash::new(), equal(endpoints))),
    ("pick_first", true, |endpoints| planned(PickFirst::new(), equal(endpoints))),
    ("counted", false, |endpoints| Box::new(Counted(equal(endpoints)))),
    ("tower", false, |endpoints| Box::new(Tower::new(endpoints))),
];

type Make = fn(usize) -> Box<dyn Subject>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let size = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => FULL,
        ["--quick"] => QUICK,
        _ => return Err("usage: pick [--quick]".into()),
    };
    println!("{:<16}{:>8}{}", "ns per pick", "threads", columns(ENDPOINTS.iter(), 0));
    let mut figures = Vec::new();
    for threads in THREADS {
        let rows = measure(size, threads);
        for ((name, ..), row) in VARIANTS.iter().zip(&rows) {
            println!("{name:<16}{threads:>8}{}", columns(row.iter(), 1));
        }
        if threads == 1 {
            let [_, ten, _, thousand, ten_thousand] = rows[0];
            let [counted, tower] = [&rows[7], &rows[8]].map(|row| row[3]);
            figures.push(format!("figure p2c_ewma_1000_ns {thousand:.1}"));
            figures.push(format!("figure p2c_ewma_flat_10000_over_10 {:.2}", ten_thousand / ten));
            figures.push(format!("figure counted_over_tower_1000 {:.3}", counted / tower));
        }
    }
    figures.push(format!("figure pick_allocations {}", allocations()));
    println!("{}", figures.join("\n"));
    Ok(())
}

fn columns<T: std::fmt::Display>(values: impl Iterator<Item = T>, digits: usize) -> String {
    values.map(|value| format!("{value:>10.digits$}")).collect()
}

/// Nanoseconds per pick: a row for each variant, a column for each number of endpoints
fn measure(size: Size, threads: usize) -> Vec<[f64; ENDPOINTS.len()]> {
    let mut rows = vec![[0.0; ENDPOINTS.len()]; VARIANTS.len()];
    for (column, endpoints) in ENDPOINTS.into_iter().enumerate() {
        let subjects: Vec<_> = VARIANTS.iter().map(|(.., make)| make(endpoints)).collect();
        let mut samples = vec![Vec::new(); subjects.len()];
        // The first round warms up and is not counted.
        for round in 0..=size.rounds {
            for (subject, samples) in subjects.iter().zip(&mut samples) {
                let took = time(&**subject, size.picks, threads);
                if round > 0 {
                    samples.push(took.as_nanos() as f64 / f64::from(size.picks));
                }
            }
        }
        for (row, samples) in rows.iter_mut().zip(samples) {
            row[column] = median(samples);
        }
    }
    rows
}

/// How long the slowest thread takes for its picks
fn time(subject: &dyn Subject, picks: u32, threads: usize) -> Duration {
    let start = Barrier::new(threads);
    let run = |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        start.wait();
        let began = Instant::now();
        subject.pick(picks, &mut random);
        began.elapsed()
    };
    thread::scope(|scope| {
        let run = &run;
        let others: Vec<_> = (1..threads as u64).map(|seed| scope.spawn(move || run(seed))).collect();
        let own = run(0);
        others.into_iter().map(|other| other.join().expect("it does not panic")).fold(own, Duration::max)
    })
}

/// The most that any of our policies allocates in so many picks
fn allocations() -> usize {
    let counts = VARIANTS.iter().filter(|(_, ours, _)| *ours).map(|(.., make)| {
        let subject = make(1_000);
        let mut random = fastrand::Rng::with_seed(0);
        let region = Region::new(ALLOCATOR);
        subject.pick(1_000, &mut random);
        region.change().allocations
    });
    counts.max().unwrap_or(0)
}

/// What picks
trait Subject: Sync {
    fn pick(&self, picks: u32, random: &mut fastrand::Rng);
}

/// Endpoints and the time at which they are made
struct Fleet {
    candidates: Vec<Candidate>,
    loads: Vec<Arc<Load>>,
    zero: Instant,
}

fn equal(endpoints: usize) -> Fleet {
    fleet(endpoints, |_| 1)
}

fn weighted(endpoints: usize) -> Fleet {
    fleet(endpoints, |index| index as u32 % 7 + 1)
}

fn fleet(endpoints: usize, weight: impl Fn(usize) -> u32) -> Fleet {
    let zero = Instant::now();
    let mut random = fastrand::Rng::with_seed(1);
    let endpoint = |index| {
        let (load, streams) = (Arc::new(Load::new(zero)), Arc::new(Streams::default()));
        load.seed(Duration::from_micros(random.u64(1_000..10_000)), zero);
        (0..random.u32(..4)).for_each(|_| load.start(zero));
        streams.set_limit(100);
        let name = format!("10.0.{}.{}:80", index / 256, index % 256);
        let candidate = Candidate::new(index as u64, Arc::clone(&load), streams);
        (candidate.with_weight(weight(index)).with_name(name), load)
    };
    let (candidates, loads) = (0..endpoints).map(endpoint).unzip();
    Fleet { candidates, loads, zero }
}

struct Planned<P: Policy> {
    policy: P,
    plan: P::Plan,
    fleet: Fleet,
}

fn planned<P: Policy>(policy: P, fleet: Fleet) -> Box<dyn Subject> {
    Box::new(Planned { plan: policy.plan(&fleet.candidates), policy, fleet })
}

impl<P: Policy> Subject for Planned<P> {
    fn pick(&self, picks: u32, random: &mut fastrand::Rng) {
        let Self { policy, plan, fleet: Fleet { candidates, zero, .. } } = self;
        for pick in 0..picks {
            // As at some hundred thousand calls a second.
            let now = *zero + Duration::from_micros(u64::from(pick) + 5_000);
            black_box(policy.pick(plan, candidates, &mut Pick::new(random, now)));
        }
    }
}

/// All that a channel does of a call's balancing
struct Counted(Fleet);

impl Subject for Counted {
    fn pick(&self, picks: u32, random: &mut fastrand::Rng) {
        let (policy, Fleet { candidates, loads, .. }) = (P2cEwma::new(), &self.0);
        let plan = policy.plan(candidates);
        for _ in 0..picks {
            let now = Instant::now();
            let picked = policy.pick(&plan, candidates, &mut Pick::new(random, now));
            let load = &loads[picked.expect("all have room")];
            load.start(now);
            let answered = Instant::now();
            load.answered(Some(answered - now), answered);
            load.succeeded();
            load.finish();
        }
    }
}

/// tower's balancer of services that answer at once
struct Tower(Mutex<Balance<ServiceList<Vec<PeakEwma<AtOnce>>>, ()>>);

impl Tower {
    fn new(endpoints: usize) -> Self {
        let mut random = fastrand::Rng::with_seed(1);
        let service = |_| {
            let latency = Duration::from_micros(random.u64(1_000..10_000));
            // In nanoseconds; the time constant of `p2c_ewma`.
            PeakEwma::new(AtOnce, latency, 2e9, CompleteOnResponse::default())
        };
        let services: Vec<_> = (0..endpoints).map(service).collect();
        Self(Mutex::new(Balance::new(ServiceList::new(services))))
    }
}

impl Subject for Tower {
    fn pick(&self, picks: u32, _: &mut fastrand::Rng) {
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..picks {
            let mut balance = self.0.lock().expect("nobody panics");
            assert!(balance.poll_ready(&mut context).is_ready());
            let answer = balance.call(());
            drop(balance);
            drop(black_box(answer));
        }
    }
}

struct AtOnce;

impl Service<()> for AtOnce {
    type Response = ();
    type Error = Infallible;
    type Future = Ready<std::result::Result<(), Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, (): ()) -> Self::Future {
        ready(Ok(()))
    }
}
