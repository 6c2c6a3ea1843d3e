//! The run: rounds of faults, each healed and judged

use std::{
    collections::{BTreeMap, BTreeSet},
    process::ExitCode,
    time::{Duration, Instant},
};

use callsign_tests::{
    checker::{Violation, changed, left_behind, until_none},
    cluster::Traces,
    load::Tally,
};
use lexopt::prelude::*;
use tokio::{
    runtime::Handle,
    signal::unix::{SignalKind, signal},
    time::sleep,
};

use crate::{
    judge::{self, Deadlines},
    schedule::{Round, Schedule},
    stage::Stage,
};

/// From one look at everything to the next
const LOOK: Duration = Duration::from_millis(100);

/// All has to be well for this long: a server that has just come is not registered yet, and a lease that was lost
/// during an outage may end after it.
const CALM: Duration = Duration::from_millis(1_500);

/// A round that is not well by then never will be.
const NEVER: Duration = Duration::from_secs(60);

/// Of the calls that failed in one round, as many are told in detail.
const TOLD: usize = 5;

struct Options {
    seed: u64,
    lasting: Duration,
}

impl Options {
    fn parse() -> Result<Self, lexopt::Error> {
        let mut options = Self { seed: fastrand::u64(..1_000_000), lasting: Duration::from_secs(60) };
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("seed") => options.seed = arguments.value()?.parse()?,
                Long("minutes") => {
                    let minutes: f64 = arguments.value()?.parse()?;
                    let lasting = Duration::try_from_secs_f64(minutes * 60.0);
                    options.lasting = lasting.map_err(|_| "--minutes is a positive number")?;
                }
                other => return Err(other.unexpected()),
            }
        }
        Ok(options)
    }
}

/// Runs until the time is over, or until someone stops it
pub(crate) async fn main() -> ExitCode {
    let options = match Options::parse() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("chaos: {error}\nusage: chaos [--seed N] [--minutes M]");
            return ExitCode::FAILURE;
        }
    };
    let mut term = signal(SignalKind::terminate()).expect("signals can be had");
    // Whoever is dropped here takes his processes with him.
    tokio::select! {
        passed = run(&options) => if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE },
        _ = tokio::signal::ctrl_c() => ExitCode::FAILURE,
        _ = term.recv() => ExitCode::FAILURE,
    }
}

async fn run(options: &Options) -> bool {
    let tasks = tasks();
    println!("chaos --seed {} --minutes {}", options.seed, options.lasting.as_secs_f64() / 60.0);
    let mut run = Run::start().await;
    let schedule = Schedule::new(options.seed, run.stage.targets());
    for (number, round) in schedule.enumerate() {
        if run.start.elapsed() > options.lasting || run.is_lost {
            break;
        }
        run.round(number + 1, &round).await;
    }
    run.end(tasks).await
}

struct Run {
    stage: Stage,
    start: Instant,
    /// What there was before the first fault
    before: Traces,
    /// By view: how many removals have been judged
    removals: BTreeMap<String, usize>,
    /// By client: how many failed calls have been judged
    failed: Vec<usize>,
    violations: usize,
    failed_calls: usize,
    faults: usize,
    /// It did not become well, so nothing more can be learnt
    is_lost: bool,
}

impl Run {
    async fn start() -> Self {
        let mut stage = Stage::start().await;
        until_well(&stage).await;
        stage.add_callers().await;
        until_well(&stage).await;
        let before = settled(&stage).await;
        let failed = vec![0; stage.callers.len()];
        let start = Instant::now();
        let (removals, violations, failed_calls, faults, is_lost) = (BTreeMap::new(), 0, 0, 0, false);
        Self { stage, start, before, removals, failed, violations, failed_calls, faults, is_lost }
    }

    /// Makes the faults, heals, and judges
    async fn round(&mut self, number: usize, round: &Round) {
        println!("{:6.1} s  {number:3}  {round}", self.start.elapsed().as_secs_f64());
        self.faults += round.0.len();
        self.stage.play(round).await;
        let healed = Instant::now();
        let (wrong, well) = self.until_well(healed, round.is_of_members()).await;
        for violation in wrong {
            self.violated(&format!("round {number}"), &violation);
        }
        for (at, violation) in self.removed() {
            let at = at.saturating_duration_since(self.start).as_secs_f64();
            self.violated(&format!("round {number}, at {at:.1} s"), &violation);
        }
        self.judge_calls(&format!("round {number}"));
        self.stage.excuses.clear();
        self.stage.aftermath = Duration::ZERO;
        if self.is_lost {
            println!("              not well {NEVER:?} after healing: the run ends here");
        } else {
            println!("              well {:.1} s after healing", well.as_secs_f64());
        }
    }

    /// Waits until every view shows what etcd says, which is one key for each that lives; what was late, and how long
    /// it took
    async fn until_well(&mut self, healed: Instant, disturbed: bool) -> (Vec<Violation>, Duration) {
        let mut deadlines = Deadlines::new(healed, disturbed);
        let (mut told, mut violations) = (BTreeSet::new(), Vec::new());
        let mut well = healed;
        loop {
            let wrong = self.stage.evidence().await.violations();
            if !wrong.is_empty() {
                well = Instant::now();
            } else if well.elapsed() > CALM && healed.elapsed() > self.stage.aftermath {
                return (violations, well - healed);
            }
            self.is_lost = healed.elapsed() > NEVER;
            if self.is_lost {
                return (wrong, NEVER);
            }
            let late = deadlines.late(wrong, &self.stage.fleet.lives(), Instant::now());
            violations.extend(late.into_iter().filter(|late| told.insert(judge::subject(late))));
            sleep(LOOK).await;
        }
    }

    fn removed(&mut self) -> Vec<(Instant, Violation)> {
        let (stage, lives) = (&self.stage, self.stage.fleet.lives());
        let mut violations = Vec::new();
        for view in stage.views() {
            let seen = self.removals.entry(view.name().to_owned()).or_default();
            violations.extend(judge::removed(view, seen, &lives, &stage.excuses));
        }
        violations
    }

    /// Counts the calls that have failed since the last time, and tells the first few
    fn judge_calls(&mut self, when: &str) {
        let mut told = 0;
        for (number, caller) in self.stage.callers.iter().enumerate() {
            let tally = caller.client.load.tally();
            for failed in &tally.failed[self.failed[number]..] {
                if judge::was_in_flight(failed, &self.stage.killed, &caller.log) {
                    continue;
                }
                told += 1;
                if told <= TOLD {
                    let (at, took, status) = failed;
                    let at = at.saturating_duration_since(self.start).as_secs_f64();
                    println!("FAILED CALL   {when}: client {number} at {at:.1} s, after {took:?}: {status}");
                }
            }
            self.failed[number] = tally.failed.len();
        }
        self.failed_calls += told;
        if told > TOLD {
            println!("FAILED CALLS  {when}: {told} in all");
        }
    }

    fn violated(&mut self, when: &str, violation: &Violation) {
        self.violations += 1;
        println!("VIOLATION     {when}: {violation}");
    }

    /// Looks for what is left behind, ends everything and looks again; whether nothing was wrong
    async fn end(mut self, tasks_before: usize) -> bool {
        let leaked = until_none(async || left_behind(&self.before, &self.stage.traces().await)).await;
        leaked.iter().for_each(|violation| self.violated("in the end", violation));
        self.judge_calls("in the end");
        let tally = self.stage.callers.iter().map(|caller| caller.client.load.tally());
        let Tally { calls, slowest, held_up, failed } = tally.fold(Tally::default(), Tally::and);
        self.stage.end_callers().await;
        let Stage { cluster, fleet, .. } = self.stage;
        let (_, servers) = fleet.end_clients().await;
        servers.terminate().await;
        let nothing = Traces { leases: BTreeSet::new(), watchers: 0, connections: 0 };
        let left = until_none(async || {
            let mut left = left_behind(&nothing, &cluster.traces().await);
            left.extend(changed("tasks", tasks_before, tasks()));
            left
        })
        .await;
        for violation in &left {
            self.violations += 1;
            println!("VIOLATION     after the end: {violation}");
        }
        println!("slowest call {slowest:?}, held up {held_up:?} at most, {} failed in all", failed.len());
        println!("figure chaos_faults {}", self.faults);
        println!("figure chaos_calls {calls}");
        println!("figure chaos_violations {}", self.violations);
        println!("figure chaos_failed_calls {}", self.failed_calls);
        self.violations == 0 && self.failed_calls == 0 && calls > 0 && self.faults > 0
    }
}

fn tasks() -> usize {
    Handle::current().metrics().num_alive_tasks()
}

/// Before the first fault: a start that fails is no finding
async fn until_well(stage: &Stage) {
    let wrong = until_none(async || stage.evidence().await.violations()).await;
    assert!(wrong.is_empty(), "it did not even start: {wrong:?}");
}

/// The traces once they have stood still for two seconds
async fn settled(stage: &Stage) -> Traces {
    let (mut last, mut since) = (stage.traces().await, Instant::now());
    while since.elapsed() < Duration::from_secs(2) {
        sleep(LOOK).await;
        let now = stage.traces().await;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    last
}
