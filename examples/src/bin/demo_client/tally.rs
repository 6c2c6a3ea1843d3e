//! Who answered, when, and what became of the rest

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::{self, Display},
    time::Instant,
};

use callsign::Address;
use tonic::Status;

/// More calls than this cannot be in flight to one of two servers at 200 a second that answer in milliseconds
const MAX_LOST: usize = 5;

/// When a call started
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Both servers run
    Before,
    /// One was killed
    During,
    /// It was started again
    After,
}

impl Phase {
    const ALL: [Self; 3] = [Self::Before, Self::During, Self::After];
}

impl Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Before => "before the kill",
            Self::During => "while killed",
            Self::After => "after the restart",
        })
    }
}

/// A call that has ended
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) phase: Phase,
    pub(crate) started: Instant,
    /// The server that answered
    pub(crate) answer: Result<String, Status>,
}

/// The calls that have ended so far
#[derive(Debug, Default)]
pub(crate) struct Tally {
    answered: BTreeMap<(Phase, String), usize>,
    failures: Vec<(Phase, Instant, Status)>,
}

impl Tally {
    pub(crate) fn add(&mut self, Call { phase, started, answer }: Call) {
        match answer {
            Ok(server) => *self.answered.entry((phase, server)).or_default() += 1,
            Err(status) => self.failures.push((phase, started, status)),
        }
    }

    /// The running count, on one line
    pub(crate) fn running(&self) -> String {
        let mut servers = BTreeMap::<_, usize>::new();
        for ((_, server), calls) in &self.answered {
            *servers.entry(server).or_default() += calls;
        }
        let counts =
            servers.iter().map(|(server, calls)| format!("{server} {calls:>5}    ")).collect::<String>();
        format!("{counts}errors {:>3}", self.failures.len())
    }

    /// Tells the lost calls from the failed ones, by when the channel reported the killed server as lost
    ///
    /// Before that report no client could know better: a call that started earlier and that the killed server took
    /// with it was lost in flight. Every other failure is the channel's.
    pub(crate) fn result(self, killed: &Address, reported: Option<Instant>) -> Outcome {
        let is_lost = |started: &Instant, status: &Status| {
            reported.is_none_or(|reported| *started < reported)
                && status.message().contains(killed.authority())
        };
        let failures = self.failures.into_iter();
        let failures =
            failures.map(|(phase, started, status)| (phase, is_lost(&started, &status), status)).collect();
        Outcome { answered: self.answered, failures }
    }
}

/// What the demo has shown; displayed as the table and the last line
#[derive(Debug)]
pub(crate) struct Outcome {
    answered: BTreeMap<(Phase, String), usize>,
    /// Each with whether it was lost in flight
    failures: Vec<(Phase, bool, Status)>,
}

impl Outcome {
    pub(crate) fn is_good(&self) -> bool {
        self.count(|_, lost| !lost) == 0 && self.count(|_, lost| lost) <= MAX_LOST
    }

    fn count(&self, of: impl Fn(Phase, bool) -> bool) -> usize {
        self.failures.iter().filter(|(phase, lost, _)| of(*phase, *lost)).count()
    }

    /// Why calls were lost or failed, each reason once
    fn reasons(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut reasons = BTreeMap::<_, usize>::new();
        for (phase, lost, status) in &self.failures {
            let kind = if *lost { "lost in flight" } else { "failed" };
            let reason = format!("{kind:<20}{phase}: {:?}: {}", status.code(), status.message());
            *reasons.entry(reason).or_default() += 1;
        }
        reasons.iter().try_for_each(|(reason, calls)| writeln!(f, "{reason} ({calls})"))
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, phase: Phase, servers: &BTreeSet<&String>) -> fmt::Result {
        let answered = |server: &String| self.answered.get(&(phase, server.clone())).copied().unwrap_or(0);
        let all: usize = servers.iter().map(|server| answered(server)).sum();
        write!(f, "{phase:<20}")?;
        for server in servers {
            let calls = answered(server);
            let share = 100.0 * calls as f64 / all.max(1) as f64;
            write!(f, "{calls:>10} {share:>6.1} %")?;
        }
        let [lost, failed] = [true, false].map(|kind| self.count(|of, lost| of == phase && lost == kind));
        writeln!(f, "{lost:>18}{failed:>10}")
    }
}

impl Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.reasons(f)?;
        let servers = self.answered.keys().map(|(_, server)| server).collect();
        write!(f, "\n{:<20}", "answered by")?;
        for server in &servers {
            write!(f, "{server:>19}")?;
        }
        writeln!(f, "{:>18}{:>10}", "lost in flight", "failed")?;
        for phase in Phase::ALL {
            self.row(f, phase, &servers)?;
        }
        let [lost, failed] = [true, false].map(|kind| self.count(|_, lost| lost == kind));
        let calls = self.answered.values().sum::<usize>() + lost + failed;
        writeln!(f, "\ndemo: {calls} calls, {lost} lost in flight, {failed} failed")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const A: &str = "127.0.0.1:9090";
    const B: &str = "127.0.0.1:9091";

    fn killed() -> Address {
        A.parse().unwrap()
    }

    fn failed(started: Instant, message: &str) -> Call {
        Call { phase: Phase::During, started, answer: Err(Status::unavailable(message)) }
    }

    fn outcome(started: Instant, message: &str, reported: Option<Instant>) -> String {
        let mut tally = Tally::default();
        tally.add(failed(started, message));
        tally.result(&killed(), reported).to_string().lines().last().unwrap().to_owned()
    }

    #[test]
    fn a_call_that_the_killed_server_took_with_it_is_lost_in_flight() {
        let start = Instant::now();
        let lost = "demo: 1 calls, 1 lost in flight, 0 failed";
        assert_eq!(outcome(start, "127.0.0.1:9090: reset", Some(start + Duration::from_millis(1))), lost);
        assert_eq!(outcome(start, "127.0.0.1:9090: reset", None), lost);
    }

    #[test]
    fn a_call_that_started_after_the_report_or_failed_elsewhere_has_failed() {
        let start = Instant::now();
        let failed = "demo: 1 calls, 0 lost in flight, 1 failed";
        assert_eq!(outcome(start, "127.0.0.1:9090: reset", Some(start)), failed);
        assert_eq!(outcome(start, "127.0.0.1:9091: reset", Some(start + Duration::from_millis(1))), failed);
        assert_eq!(outcome(start, "no endpoint is ready", None), failed);
    }

    #[test]
    fn five_lost_calls_are_good_and_one_failed_call_is_not() {
        let result = |lost, failures| {
            let start = Instant::now();
            let mut tally = Tally::default();
            (0..lost).for_each(|_| tally.add(failed(start, A)));
            (0..failures).for_each(|_| tally.add(failed(start, B)));
            tally.result(&killed(), None).is_good()
        };
        assert!(result(0, 0) && result(5, 0));
        assert!(!result(6, 0) && !result(0, 1));
    }

    #[test]
    fn the_table_shows_calls_and_share_of_each_server_in_each_phase() {
        let start = Instant::now();
        let mut tally = Tally::default();
        for (phase, server, calls) in [(Phase::Before, A, 1), (Phase::Before, B, 3), (Phase::During, B, 2)] {
            (0..calls).for_each(|_| tally.add(Call { phase, started: start, answer: Ok(server.to_owned()) }));
        }
        assert_eq!(tally.running(), "127.0.0.1:9090     1    127.0.0.1:9091     5    errors   0");
        tally.add(failed(start, A));
        let table = tally.result(&killed(), None).to_string();
        let rows: Vec<_> =
            table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            rows[1..],
            [
                "",
                "answered by 127.0.0.1:9090 127.0.0.1:9091 lost in flight failed",
                "before the kill 1 25.0 % 3 75.0 % 0 0",
                "while killed 0 0.0 % 2 100.0 % 1 0",
                "after the restart 0 0.0 % 0 0.0 % 0 0",
                "",
                "demo: 7 calls, 1 lost in flight, 0 failed",
            ]
        );
    }
}
