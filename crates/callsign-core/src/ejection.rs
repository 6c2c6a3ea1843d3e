//! Which endpoints get no calls although they are connected
//!
//! An endpoint is left out for one of three [`Reason`]s. For *silence*: calls wait and none is answered, and neither is a
//! PING. It is back when its connection reads a byte, or when there is another connection; no caller's call is spent on
//! finding out. For *failures*, in a row or more of them than elsewhere: after a time that grows with each time in a row it
//! is *on trial*, with one call at a time, until it has shown itself or has failed again.
//!
//! There is always somebody left: see [`Ejection::ejected`].

mod record;
mod silence;

use std::{
    collections::HashMap,
    fmt,
    time::{Duration, Instant},
};

use self::record::Record;
use crate::load::Load;

/// Why an endpoint is left out
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reason {
    /// Calls wait, and neither they nor a PING are answered
    Silent,
    /// Calls failed one after the other
    ConsecutiveFailures,
    /// More of its calls fail than of those to the others
    SuccessRate,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Silent => "silent",
            Self::ConsecutiveFailures => "failing",
            Self::SuccessRate => "failing more often than the others",
        })
    }
}

/// What a connection says of the PING that was asked for
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// None was asked for since the connection was made
    Unasked,
    /// It was asked for, and the connection has not come to it
    Asked,
    /// It is on its way, or another one was
    Sent,
    /// Something was read since it was sent, or since it was denied
    Answered,
    /// The peer would mind one more now, and nothing was read since
    Denied,
}

/// An endpoint that is ready, as it is now
#[derive(Clone, Copy, Debug)]
pub struct Look<'a> {
    /// Its number, unique and never used again
    pub endpoint: u64,
    /// Its statistics
    pub load: &'a Load,
    /// What its present connection says
    pub probe: Probe,
}

/// What follows from a look at all endpoints
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Those whose connections are to be asked for a PING
    pub probes: Vec<u64>,
    /// Whether somebody is [ejected](Ejection::ejected) who was not, or the other way round
    pub is_news: bool,
    /// Whether somebody is on trial, and lets one call in
    pub on_trial: bool,
    /// Whether a trial has ended, or is not needed any more: there is room for calls that were not let in
    pub lets_all_in: bool,
    /// How many stay in use from now on, because too few would be left without them; zero unless that is news
    pub spared: usize,
}

/// Leaves endpoints out, and lets them in again
///
/// The owner has it [`judge`](Self::judge) all endpoints that are ready when the time of [`due`](Self::due) has come, when
/// that set changes, when an endpoint's failures in a row reach [`MOST_FAILURES`], and when a call on trial ends.
/// What it knows belongs to an endpoint's number and outlives connections, until it is told to [`forget`](Self::forget).
#[derive(Debug, Default)]
pub struct Ejection {
    records: HashMap<u64, Record>,
    /// Those that are left out.
    ejected: HashMap<u64, Reason>,
    /// How many are not, though they should be.
    spared: usize,
    /// Whether too few would be left without those that fail.
    is_panic: bool,
    due: Option<Instant>,
}

/// Time between two looks while there is something to judge. Of our own: a fifth of a short deadline.
pub const INTERVAL: Duration = Duration::from_millis(100);
/// Failures in a row that put an endpoint out: Finagle's failure accrual and Envoy's `consecutive_5xx`.
pub const MOST_FAILURES: u32 = 5;

impl Ejection {
    /// Nobody is known
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at all endpoints that are ready; limits those on trial, and sets what new ones are expected to be like
    pub fn judge<'a>(&mut self, now: Instant, looks: impl IntoIterator<Item = Look<'a>>) -> Judgement {
        let looks: Vec<_> = looks.into_iter().collect();
        let mut probes = Vec::new();
        let (mut is_busy, mut begins, mut is_suspect, mut is_troubled) = (false, false, false, false);
        let mut limited = Vec::new();
        for look in &looks {
            limited.extend(look.load.is_on_trial().then_some(look.load));
            let record = self.records.entry(look.endpoint);
            let record = record.or_insert_with(|| Record::new(look.load, now));
            is_busy |= record.is_busy(look.load);
            if record.judge(look, now, self.is_panic) {
                probes.push(look.endpoint);
            }
            begins |= record.has_begun();
            is_suspect |= record.suspicion(look.load).is_some();
            is_troubled |= record.is_troubled();
        }
        if begins {
            self.seed(&looks, now);
        }
        if is_suspect {
            self.compare(&looks, now);
        }
        // Mostly nothing is the matter, and nobody has to be counted.
        let troubled: &[Look<'_>] = if is_suspect || is_troubled { &looks } else { &[] };
        let (is_news, spared) = self.settle(troubled);
        let on_trial = self.set_trials(troubled);
        let needs_looks = |look: &Look<'_>| self.records.get(&look.endpoint).is_some_and(Record::needs_looks);
        let is_due = is_busy || troubled.iter().any(needs_looks);
        self.due = is_due.then(|| now + INTERVAL);
        let lets_all_in = limited.iter().any(|load| !load.is_on_trial());
        Judgement { probes, is_news, on_trial, lets_all_in, spared }
    }

    /// Why an endpoint is left out, if it is
    ///
    /// If fewer than a third of the ready endpoints would be left, those that fail are let in again; those that are silent
    /// only if all are. Envoy panics below a half and Finagle, too; but of two endpoints one may be out.
    pub fn ejected(&self, endpoint: u64) -> Option<Reason> {
        self.ejected.get(&endpoint).copied()
    }

    /// When to judge again although nothing else has happened; `None` until a call begins
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// An endpoint is gone for good
    pub fn forget(&mut self, endpoint: u64) {
        self.records.remove(&endpoint);
        self.ejected.remove(&endpoint);
    }

    /// Puts out those that fail more often than the others
    fn compare(&mut self, looks: &[Look<'_>], now: Instant) {
        let known = looks.iter().filter_map(|look| self.records.get(&look.endpoint));
        // Whoever is out did what it did long ago.
        let used: Vec<_> = known.filter(|record| record.is_out().is_none()).collect();
        let mut windows: Vec<_> = used.iter().filter_map(|record| record.window.now(now)).collect();
        let recent: Vec<_> = used.iter().map(|record| record.lately(now)).collect();
        for look in looks {
            let Some(record) = self.records.get_mut(&look.endpoint) else { continue };
            let Some(reason) = record.suspicion(look.load) else { continue };
            let is_worse = match reason {
                Reason::ConsecutiveFailures => record.is_far_worse_lately(&recent, now),
                _ => record.window.is_far_worse_than(&mut windows),
            };
            if is_worse {
                record.put_out(reason, look.load, now);
            }
        }
    }

    /// Expects those that begin anew to be like the median of the others
    fn seed(&mut self, looks: &[Look<'_>], now: Instant) {
        let (mut known, mut anew) = (Vec::new(), Vec::new());
        for look in looks {
            let Some(record) = self.records.get_mut(&look.endpoint) else { continue };
            if record.begins() && look.load.last_latency().is_none() {
                anew.push(look);
            } else if record.is_fine() {
                known.extend(look.load.latency(now));
            }
        }
        let median = known.len() / 2;
        let median = (!known.is_empty()).then(|| *known.select_nth_unstable(median).1);
        for look in anew {
            match (median, self.records.get_mut(&look.endpoint)) {
                (Some(median), _) => look.load.seed(median, now),
                // Of all that are new together, one that only fails has no latency of its own for long.
                (None, Some(record)) => record.ask_again(),
                (None, None) => {}
            }
        }
    }

    /// Decides who is left out; whether that is news, and how many are spared, if that is
    fn settle(&mut self, looks: &[Look<'_>]) -> (bool, usize) {
        let known =
            || looks.iter().filter_map(|look| Some((look.endpoint, self.records.get(&look.endpoint)?)));
        let heard = known().filter(|(_, record)| !record.is_silent()).count();
        let fine = known().filter(|(_, record)| !record.is_silent() && record.is_fine()).count();
        let is_panic = 3 * fine < looks.len();
        let out = known().filter(|(_, record)| record.is_silent() || record.is_out().is_some()).count();
        let ejected: HashMap<_, _> = known()
            .filter_map(|(endpoint, record)| {
                let silent = (record.is_silent() && heard > 0).then_some(Reason::Silent);
                let failing = record.is_out().filter(|_| !is_panic && !record.is_silent());
                Some((endpoint, silent.or(failing)?))
            })
            .collect();
        let spared = out - ejected.len();
        let news = (ejected != self.ejected, if self.spared == 0 { spared } else { 0 });
        (self.ejected, self.spared, self.is_panic) = (ejected, spared, is_panic);
        news
    }

    /// Lets one call at a time in to those on trial, unless everybody is needed; whether there are any
    fn set_trials(&self, looks: &[Look<'_>]) -> bool {
        let mut any = false;
        for look in looks {
            if self.records.get(&look.endpoint).is_some_and(Record::is_on_trial) {
                if self.is_panic {
                    look.load.let_all_in();
                } else {
                    look.load.try_out();
                    any = true;
                }
            }
        }
        any
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);

    /// Endpoints and what is said of them; connections answer PINGs unless told otherwise
    struct Scene {
        ejection: Ejection,
        now: Instant,
        loads: Vec<Load>,
        probes: Vec<Probe>,
        asked: Vec<u64>,
        spared: usize,
        /// Looks that let all calls in where not all were
        lifted: usize,
    }

    impl Scene {
        fn new(count: usize) -> Self {
            #[allow(clippy::disallowed_methods, reason = "any instant will do as the zero of a test")]
            let now = Instant::now();
            let loads = (0..count).map(|_| Load::new(now)).collect();
            let probes = vec![Probe::Unasked; count];
            let mut scene = Self {
                ejection: Ejection::new(),
                now,
                loads,
                probes,
                asked: Vec::new(),
                spared: 0,
                lifted: 0,
            };
            scene.judge();
            scene
        }

        fn judge(&mut self) {
            let looks = looks(&self.loads, &self.probes);
            let judgement = self.ejection.judge(self.now, looks);
            for &endpoint in &judgement.probes {
                self.probes[endpoint as usize] = Probe::Asked;
            }
            self.asked.extend(judgement.probes);
            self.spared += judgement.spared;
            self.lifted += usize::from(judgement.lets_all_in);
        }

        /// The next look
        fn look(&mut self) {
            self.now += INTERVAL;
            self.judge();
            // Connections get to it at once.
            for probe in &mut self.probes {
                if *probe == Probe::Asked {
                    *probe = Probe::Sent;
                }
            }
        }

        /// Calls that fail one after the other, for longer than a moment
        fn fail(&mut self, endpoints: impl IntoIterator<Item = usize>) {
            let endpoints: Vec<_> = endpoints.into_iter().collect();
            endpoints.iter().for_each(|&endpoint| self.calls(endpoint, 4, false));
            self.looks(2);
            endpoints.iter().for_each(|&endpoint| self.call(endpoint, false));
            self.look();
        }

        /// Calls to the others, which are fine
        fn serve(&mut self, endpoints: impl IntoIterator<Item = usize>) {
            endpoints.into_iter().for_each(|endpoint| self.calls(endpoint, 5, true));
        }

        fn looks(&mut self, count: u32) {
            (0..count).for_each(|_| self.look());
        }

        fn ejected(&self) -> Vec<Option<Reason>> {
            (0..self.loads.len() as u64).map(|endpoint| self.ejection.ejected(endpoint)).collect()
        }

        fn out(&self) -> Vec<usize> {
            (0..self.loads.len())
                .filter(|&endpoint| self.ejection.ejected(endpoint as u64).is_some())
                .collect()
        }

        fn start(&self, endpoint: usize) {
            self.loads[endpoint].start(self.now);
        }

        /// A call from its start to its end
        fn call(&self, endpoint: usize, is_good: bool) {
            let load = &self.loads[endpoint];
            load.start(self.now);
            load.answered(is_good.then_some(2 * MS), self.now);
            if is_good {
                load.succeeded();
            } else {
                load.failed(self.now);
            }
            load.finish();
        }

        fn calls(&self, endpoint: usize, count: u32, is_good: bool) {
            (0..count).for_each(|_| self.call(endpoint, is_good));
        }

        /// A call whose caller gave up
        fn dropped(&self, endpoint: usize) {
            let load = &self.loads[endpoint];
            load.start(self.now);
            load.given_up(50 * MS, self.now);
            load.finish();
        }

        /// How long `endpoint` is out from now on
        fn time_out(&mut self, endpoint: u64) -> Duration {
            let began = self.now;
            while self.ejection.ejected(endpoint).is_some() {
                self.look();
                assert!(self.now - began < 60 * SECOND, "for ever");
            }
            self.now - began
        }
    }

    fn looks<'a>(loads: &'a [Load], probes: &'a [Probe]) -> impl Iterator<Item = Look<'a>> {
        let numbered = loads.iter().zip(probes).enumerate();
        numbered.map(|(endpoint, (load, &probe))| Look { endpoint: endpoint as u64, load, probe })
    }

    #[test]
    fn one_of_two_that_says_nothing_is_asked_with_a_ping_and_out_a_look_later() {
        let mut scene = Scene::new(2);
        scene.start(1);
        for _ in 0..2 {
            assert_eq!(scene.asked, [0; 0]);
            scene.look();
        }
        assert_eq!((&scene.asked, scene.out()), (&vec![1], vec![]));
        scene.look();
        assert_eq!(scene.ejected(), [None, Some(Reason::Silent)]);
        scene.looks(100);
        assert_eq!((&scene.asked, scene.out()), (&vec![1], vec![1]));
    }

    #[test]
    fn a_long_call_on_trial_lets_another_one_in_once_a_ping_was_answered_and_a_passed_trial_is_told() {
        let mut scene = Scene::new(2);
        scene.serve([0]);
        scene.fail([1]);
        assert_eq!(scene.out(), [1]);
        scene.time_out(1);
        scene.start(1);
        assert!(scene.loads[1].is_on_trial() && !scene.loads[1].lets_in());
        while scene.probes[1] != Probe::Sent {
            scene.look();
        }
        assert!(!scene.loads[1].lets_in(), "it may be silent");
        scene.probes[1] = Probe::Answered;
        scene.look();
        assert!(scene.loads[1].is_on_trial() && scene.loads[1].lets_in());
        assert_eq!(scene.lifted, 0);
        for _ in 0..3 {
            assert!(scene.loads[1].lets_in());
            scene.call(1, true);
        }
        scene.look();
        assert_eq!((scene.loads[1].is_on_trial(), scene.lifted), (false, 1));
        scene.look();
        assert_eq!(scene.lifted, 1, "said once");
    }

    #[test]
    fn all_are_let_in_and_that_is_told_when_too_few_would_be_left() {
        let mut scene = Scene::new(2);
        scene.serve([0]);
        scene.fail([1]);
        scene.time_out(1);
        assert!(scene.loads[1].is_on_trial());
        scene.start(0);
        scene.looks(10);
        assert_eq!((scene.ejected()[0], scene.loads[1].is_on_trial()), (Some(Reason::Silent), false));
        assert_eq!(scene.lifted, 1);
    }

    #[test]
    fn who_answers_the_ping_in_time_is_never_out_and_suspected_again_after_twice_the_silence() {
        let mut scene = Scene::new(2);
        scene.start(0);
        let mut asked_at = Vec::new();
        for look in 1..=300 {
            scene.look();
            if scene.probes[0] == Probe::Sent {
                asked_at.push(look);
                scene.probes[0] = Probe::Answered;
            } else if scene.probes[0] == Probe::Answered && scene.loads[0].unanswered(scene.now).is_zero() {
                scene.start(0);
            }
            assert_eq!(scene.out(), []);
        }
        // It takes a look to see that it was answered; the silence is five seconds at most.
        assert_eq!(asked_at[..5], [2, 7, 16, 33, 66]);
        assert_eq!(asked_at[6] - asked_at[5], 51);
    }

    #[test]
    fn a_long_call_alone_is_suspected_once_and_then_needs_no_looks() {
        let mut scene = Scene::new(2);
        scene.start(0);
        scene.looks(2);
        scene.probes[0] = Probe::Answered;
        scene.looks(100);
        assert_eq!((&scene.asked, scene.ejection.due()), (&vec![0], None));
    }

    #[test]
    fn an_answer_ends_it_at_the_next_look_and_so_does_another_connection() {
        for end in [Probe::Answered, Probe::Unasked] {
            let mut scene = Scene::new(2);
            scene.start(1);
            scene.looks(50);
            assert_eq!(scene.out(), [1]);
            scene.loads[0].seed(2 * MS, scene.now);
            scene.loads[1].given_up(5 * SECOND, scene.now);
            scene.probes[1] = end;
            scene.look();
            assert_eq!(scene.out(), []);
            let expected = scene.loads[0].latency(scene.now);
            assert_eq!(scene.loads[1].latency(scene.now), expected, "the past says nothing");
        }
    }

    #[test]
    fn one_that_may_not_be_asked_stays_in_use_and_whatever_is_read_speaks_for_it() {
        let mut scene = Scene::new(2);
        scene.start(1);
        scene.looks(2);
        scene.probes[1] = Probe::Denied;
        scene.looks(50);
        assert_eq!((&scene.asked, scene.out()), (&vec![1], vec![]));
        assert!(scene.loads[1].unanswered(scene.now) > 5 * SECOND);
        // The connection has sent a PING on its own account.
        scene.probes[1] = Probe::Answered;
        scene.looks(3);
        assert_eq!(scene.loads[1].unanswered(scene.now), Duration::ZERO);
        assert_eq!((&scene.asked, scene.ejection.due()), (&vec![1], None), "a long call needs no looks");
    }

    #[test]
    fn one_that_nobody_asks_is_called_again_after_ten_seconds() {
        let mut scene = Scene::new(2);
        scene.start(1);
        scene.looks(2);
        scene.probes[1] = Probe::Denied;
        scene.looks(102);
        assert_eq!((&scene.asked, scene.out()), (&vec![1], vec![]));
        assert_eq!(scene.loads[1].unanswered(scene.now), Duration::ZERO);
        scene.looks(2);
        assert_eq!(scene.ejection.due(), None);
        scene.start(1);
        scene.looks(3);
        assert_eq!(scene.asked, [1]);
        scene.look();
        assert_eq!(scene.asked, [1, 1], "after twice the silence");
    }

    #[test]
    fn a_ping_that_was_not_sent_yet_says_nothing() {
        let mut scene = Scene::new(2);
        scene.start(1);
        for _ in 0..100 {
            scene.now += INTERVAL;
            scene.judge();
        }
        assert_eq!((&scene.asked, scene.out()), (&vec![1], vec![]));
    }

    #[test]
    fn a_client_that_stood_still_blames_nobody() {
        let mut scene = Scene::new(3);
        (0..3).for_each(|endpoint| scene.start(endpoint));
        scene.now += 10 * SECOND;
        scene.judge();
        assert_eq!((&scene.asked, scene.out()), (&vec![], vec![]));
        (0..3).for_each(|endpoint| scene.calls(endpoint, 1, true));
        scene.looks(1);
        assert_eq!(scene.asked, [0; 0]);
    }

    #[test]
    fn a_client_that_stood_still_after_its_ping_has_yet_to_read_the_answer() {
        let mut scene = Scene::new(2);
        scene.start(1);
        scene.looks(2);
        assert_eq!(scene.asked, [1]);
        scene.probes[1] = Probe::Sent;
        scene.now += SECOND;
        scene.judge();
        assert_eq!(scene.out(), [0; 0]);
        scene.looks(1);
        assert_eq!(scene.out(), [1]);
    }

    #[test]
    fn looks_in_quick_succession_make_no_silence_longer() {
        let mut scene = Scene::new(2);
        scene.start(1);
        for _ in 0..190 {
            scene.now += MS;
            scene.judge();
        }
        assert_eq!(scene.asked, [0; 0]);
        for _ in 0..100 {
            scene.now += MS;
            scene.judge();
            scene.probes[1] = Probe::Sent;
        }
        assert_eq!((&scene.asked, scene.out()), (&vec![1], vec![]));
    }

    #[test]
    fn calls_that_callers_give_up_before_anything_is_answered_are_silence() {
        let mut scene = Scene::new(2);
        scene.calls(1, 3, true);
        scene.look();
        for _ in 0..10 {
            (0..30).for_each(|_| scene.dropped(1));
            scene.call(0, true);
            scene.look();
        }
        assert_eq!(scene.ejected(), [None, Some(Reason::Silent)]);
    }

    #[test]
    fn who_is_not_called_is_not_silent() {
        let mut scene = Scene::new(2);
        scene.dropped(1);
        scene.looks(100);
        assert_eq!((&scene.asked, scene.ejection.due()), (&vec![], None));
    }

    #[test]
    fn a_quiet_stream_is_not_suspected_and_needs_no_looks() {
        let mut scene = Scene::new(2);
        scene.start(1);
        scene.loads[1].answered(Some(MS), scene.now);
        scene.looks(600);
        assert_eq!((scene.loads[1].in_flight(), &scene.asked), (1, &vec![]));
        assert_eq!(scene.ejection.due(), None);
    }

    #[test]
    fn long_calls_beside_short_ones_are_not_suspected() {
        let mut scene = Scene::new(2);
        scene.start(1);
        for _ in 0..600 {
            scene.call(1, true);
            scene.look();
        }
        assert_eq!(scene.asked, [0; 0]);
    }

    #[test]
    fn silence_is_ten_times_the_usual_latency() {
        let mut scene = Scene::new(2);
        for _ in 0..20 {
            scene.start(1);
            scene.loads[1].answered(Some(100 * MS), scene.now);
        }
        scene.look();
        scene.start(1);
        scene.looks(9);
        assert_eq!(scene.asked, [0; 0]);
        scene.looks(3);
        assert_eq!(scene.asked, [1]);
    }

    #[test]
    fn the_only_one_is_never_left_out() {
        let mut scene = Scene::new(1);
        scene.start(0);
        scene.looks(10);
        assert_eq!((&scene.asked, scene.out(), scene.spared), (&vec![0], vec![], 1));
        for _ in 0..20 {
            scene.fail([0]);
            assert_eq!((scene.out(), scene.spared, scene.loads[0].is_on_trial()), (vec![], 1, false));
        }
    }

    #[test]
    fn five_failures_in_a_row_put_one_of_two_out_and_four_do_not() {
        let mut scene = Scene::new(2);
        scene.serve([0]);
        scene.calls(1, 4, false);
        scene.looks(2);
        scene.call(1, true);
        scene.calls(1, 3, false);
        scene.looks(2);
        scene.call(1, false);
        scene.looks(3);
        assert_eq!(scene.out(), []);
        scene.call(1, false);
        scene.look();
        assert_eq!(scene.ejected(), [None, Some(Reason::ConsecutiveFailures)]);
    }

    #[test]
    fn deadlines_that_all_pass_in_one_moment_put_nobody_out() {
        let mut scene = Scene::new(2);
        scene.serve([0]);
        scene.calls(1, 24, false);
        for _ in 0..20 {
            scene.now += 4 * MS;
            scene.judge();
            scene.call(1, false);
        }
        scene.looks(5);
        assert_eq!(scene.out(), []);
        scene.call(1, false);
        scene.look();
        assert_eq!(scene.out(), [1], "unless it goes on");
    }

    #[test]
    fn one_that_gets_all_calls_and_fails_them_is_out_beside_another_that_is_ready() {
        let mut scene = Scene::new(2);
        scene.fail([0]);
        assert_eq!(
            scene.ejected(),
            [Some(Reason::ConsecutiveFailures), None],
            "nothing is known of the other"
        );
        scene.fail([1]);
        assert_eq!(scene.out(), [0], "the other fails, too: whoever is left is not compared with who is out");
        let mut scene = Scene::new(4);
        scene.fail([0, 1]);
        assert_eq!(scene.out(), [0, 1], "a zone as a whole");
    }

    #[test]
    fn what_an_endpoint_did_before_a_streak_elsewhere_began_does_not_speak_against_it() {
        let mut scene = Scene::new(2);
        scene.call(1, false);
        scene.looks(3);
        scene.fail([0]);
        assert_eq!(scene.out(), [0], "it is not called any more");
        let mut scene = Scene::new(2);
        scene.call(1, false);
        scene.fail([0]);
        assert_eq!(scene.out(), [], "it failed in the same moment");
    }

    #[test]
    fn who_is_silent_or_on_trial_is_nobody_to_turn_to() {
        let mut scene = Scene::new(2);
        scene.start(1);
        scene.looks(4);
        assert_eq!(scene.ejected(), [None, Some(Reason::Silent)]);
        scene.fail([0]);
        assert_eq!((scene.ejected(), scene.spared), (vec![None, Some(Reason::Silent)], 0));
        let mut scene = Scene::new(2);
        scene.fail([1]);
        scene.time_out(1);
        scene.fail([0]);
        assert_eq!((scene.out(), scene.spared), (vec![], 0));
    }

    #[test]
    fn the_time_out_doubles_up_to_five_seconds_and_each_trial_costs_one_call() {
        let mut scene = Scene::new(2);
        scene.serve([0]);
        scene.fail([1]);
        let mut times = Vec::new();
        for _ in 0..6 {
            times.push(scene.time_out(1).as_secs());
            assert!(scene.loads[1].lets_in() && scene.loads[1].is_on_trial());
            scene.call(1, false);
            assert!(!scene.loads[1].lets_in(), "before anybody has looked");
            scene.judge();
        }
        assert_eq!(times, [1, 2, 4, 5, 5, 5]);
    }

    #[test]
    fn three_successes_on_trial_make_it_one_of_the_others() {
        let mut scene = Scene::new(3);
        scene.serve([0, 1]);
        scene.fail([2]);
        scene.time_out(2);
        assert_eq!(scene.loads[2].latency(scene.now), scene.loads[0].latency(scene.now));
        assert_eq!(scene.loads[2].failures_in_a_row(), 0);
        scene.start(2);
        assert!(!scene.loads[2].lets_in());
        scene.loads[2].untaken();
        scene.calls(2, 2, true);
        scene.look();
        assert!(scene.loads[2].is_on_trial());
        scene.call(2, true);
        scene.look();
        assert!(!scene.loads[2].is_on_trial());
        scene.looks(10);
        assert_eq!(scene.out(), []);
    }

    #[test]
    fn ten_seconds_of_being_fine_make_up_for_one_time_out() {
        let mut scene = Scene::new(2);
        let mut time_out = |fine_before| {
            scene.looks(fine_before);
            scene.serve([0]);
            scene.fail([1]);
            let time = scene.time_out(1).as_secs();
            scene.calls(1, 3, true);
            scene.look();
            time
        };
        assert_eq!([time_out(0), time_out(0), time_out(0)], [1, 2, 4]);
        assert_eq!([time_out(101), time_out(250), time_out(600)], [4, 2, 1]);
    }

    #[test]
    fn one_that_fails_half_of_its_calls_is_out_beside_one_other() {
        let mut scene = Scene::new(2);
        for call in 0..30 {
            scene.call(0, true);
            scene.call(1, call % 2 == 0);
            if call % 10 == 9 {
                assert_eq!(scene.out(), []);
                scene.look();
            }
        }
        scene.look();
        assert_eq!(scene.ejected(), [None, Some(Reason::SuccessRate)]);
        scene.time_out(1);
        scene.call(1, false);
        scene.look();
        assert_eq!(scene.ejected(), [None, Some(Reason::SuccessRate)]);
        scene.time_out(1);
        scene.calls(1, 3, true);
        scene.looks(3);
        assert_eq!(scene.out(), [], "what it did before is forgiven");
    }

    #[test]
    fn two_of_three_that_fail_are_both_found() {
        let mut scene = Scene::new(3);
        for call in 0..30 {
            scene.call(0, true);
            scene.call(1, call % 2 == 0);
            scene.call(2, call % 2 == 1);
            if call % 10 == 9 {
                scene.look();
            }
        }
        assert_eq!(scene.out(), [1, 2]);
    }

    #[test]
    fn few_calls_few_failures_or_others_that_fail_as_well_put_nobody_out() {
        for (calls, failing, others_failing) in [(8, 2, 100), (100, 4, 100), (100, 2, 4), (100, 2, 2)] {
            let mut scene = Scene::new(3);
            for call in 0..calls {
                scene.call(0, call % others_failing != others_failing - 1);
                scene.call(1, call % failing != 0);
                scene.call(2, call % others_failing != 1);
                if call % 4 == 3 {
                    scene.look();
                }
            }
            assert_eq!(scene.out(), [], "{calls} calls, one of {failing} fails");
        }
    }

    #[test]
    fn failures_of_long_ago_are_forgotten() {
        let mut scene = Scene::new(2);
        for call in 0..9 {
            scene.call(1, call % 2 == 1);
        }
        scene.looks(300);
        scene.calls(0, 20, true);
        scene.calls(1, 10, true);
        scene.look();
        assert_eq!(scene.out(), []);
    }

    #[test]
    fn if_all_begin_to_fail_at_the_same_time_nobody_is_worse_than_the_others() {
        let mut scene = Scene::new(3);
        for look in 0..600 {
            (0..3).for_each(|endpoint| scene.calls(endpoint, 6 + endpoint as u32, look < 300));
            scene.look();
            assert_eq!((scene.out(), scene.spared), (vec![], 0));
        }
        scene.looks(2);
        assert_eq!(scene.ejection.due(), None);
    }

    #[test]
    fn if_one_after_the_other_fails_calls_go_to_all_and_their_successes_bring_all_back() {
        let mut scene = Scene::new(4);
        for failing in 1..4 {
            scene.serve(failing..4);
            scene.fail([failing - 1]);
        }
        assert_eq!((scene.out(), scene.spared), (vec![], 3));
        for _ in 0..200 {
            (0..4).for_each(|endpoint| scene.calls(endpoint, 5, false));
            scene.look();
            assert_eq!((scene.out(), scene.spared), (vec![], 3), "said once");
            assert!(scene.loads.iter().all(Load::lets_in));
        }
        scene.serve(0..4);
        scene.looks(2);
        assert!(!scene.loads.iter().any(Load::is_on_trial));
        scene.looks(100);
        assert_eq!(scene.out(), []);
    }

    #[test]
    fn at_least_a_third_is_left() {
        for (count, failing) in [(3, 2), (4, 2), (9, 6)] {
            let mut scene = Scene::new(count);
            scene.serve(failing..count);
            scene.fail(0..failing);
            assert_eq!((scene.out().len(), scene.spared), (failing, 0), "{failing} of {count} fail");
            scene.serve(failing + 1..count);
            scene.fail([failing]);
            assert!(3 * scene.out().len() <= 2 * count, "one more of {count} fails");
        }
    }

    #[test]
    fn while_others_only_fail_a_silent_one_stays_out() {
        let mut scene = Scene::new(3);
        scene.serve([0, 2]);
        scene.start(0);
        scene.looks(3);
        scene.serve([2]);
        scene.fail([1]);
        assert_eq!(scene.ejected(), [Some(Reason::Silent), Some(Reason::ConsecutiveFailures), None]);
        scene.start(2);
        scene.looks(3);
        assert_eq!((scene.out(), scene.spared), (vec![0, 2], 1), "what fails is used");
        scene.start(1);
        scene.looks(3);
        assert_eq!((scene.out(), scene.spared), (vec![], 1), "all are silent");
    }

    #[test]
    fn a_silent_one_that_failed_too_is_on_trial_when_it_speaks() {
        let mut scene = Scene::new(2);
        scene.serve([0]);
        scene.start(1);
        for _ in 0..3 {
            (0..5).for_each(|_| assert!(scene.loads[1].failed(scene.now) > 0));
            scene.look();
        }
        scene.looks(50);
        assert_eq!(scene.ejected(), [None, Some(Reason::Silent)]);
        scene.probes[1] = Probe::Answered;
        scene.look();
        assert_eq!((scene.out(), scene.loads[1].is_on_trial()), (vec![], true));
    }

    #[test]
    fn a_new_endpoint_is_expected_to_be_like_the_median() {
        let mut scene = Scene::new(3);
        for (endpoint, latency) in [10 * MS, 20 * MS, 70 * MS].into_iter().enumerate() {
            scene.loads[endpoint].seed(latency, scene.now);
        }
        scene.loads.push(Load::new(scene.now));
        scene.probes.push(Probe::Unasked);
        scene.judge();
        assert_eq!(scene.loads[3].latency(scene.now), scene.loads[1].latency(scene.now));
    }

    #[test]
    fn of_those_that_are_new_together_one_that_only_fails_is_expected_to_be_like_the_others() {
        let mut scene = Scene::new(2);
        scene.call(1, false);
        scene.look();
        assert_eq!(scene.loads[1].latency(scene.now), None);
        scene.call(0, true);
        scene.look();
        assert_eq!(scene.loads[1].latency(scene.now), scene.loads[0].latency(scene.now));
    }

    #[test]
    fn who_is_not_looked_at_for_a_while_stays_known_until_it_is_forgotten() {
        let mut scene = Scene::new(2);
        scene.serve([0]);
        scene.fail([1]);
        let alone = looks(&scene.loads[..1], &scene.probes[..1]);
        assert!(scene.ejection.judge(scene.now, alone).is_news, "its connection was lost");
        scene.judge();
        assert_eq!(scene.out(), [1]);
        scene.ejection.forget(1);
        scene.judge();
        assert_eq!(scene.out(), []);
    }

    #[test]
    fn looks_are_due_while_calls_begin_or_somebody_is_out_and_trials_wait_for_calls() {
        let mut scene = Scene::new(2);
        assert_eq!(scene.ejection.due(), None);
        scene.call(1, true);
        scene.look();
        assert_eq!(scene.ejection.due(), Some(scene.now + INTERVAL));
        scene.look();
        assert_eq!(scene.ejection.due(), None);
        scene.serve([0]);
        scene.fail([1]);
        scene.look();
        assert_eq!(scene.ejection.due(), Some(scene.now + INTERVAL));
        scene.time_out(1);
        scene.look();
        assert_eq!((scene.ejection.due(), scene.loads[1].is_on_trial()), (None, true));
    }

    #[test]
    fn whatever_happens_somebody_is_left_and_no_call_goes_to_a_silent_one_unless_to_all() {
        for seed in 0..20 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut scene = Scene::new(random.usize(1..8));
            let count = scene.loads.len();
            // How each is: silent, failing some of its calls, long ones.
            let mut tempers: Vec<f64> = (0..count).map(|_| random.f64() * 2.0 - 0.5).collect();
            for _ in 0..600 {
                let used: Vec<_> = (0..count).filter(|endpoint| !scene.out().contains(endpoint)).collect();
                let limited = used.iter().filter(|&&endpoint| scene.loads[endpoint].is_on_trial()).count();
                assert!(limited < used.len(), "{seed}: only trials");
                let is_silent = |endpoint: usize| scene.ejection.records[&(endpoint as u64)].is_silent();
                let (mute, heard): (Vec<usize>, Vec<usize>) =
                    (0..count).partition(|&endpoint| is_silent(endpoint));
                let enough = 3 * used.len() >= count || used == heard;
                let no_silent_one =
                    used.len() == count || mute.iter().all(|endpoint| !used.contains(endpoint));
                assert!(enough && no_silent_one, "{seed}: {used:?} with {mute:?} silent and {heard:?} not");
                assert!(!used.is_empty(), "{seed}: nobody is left");
                for &endpoint in &used {
                    for _ in 0..random.u32(0..5) {
                        match tempers[endpoint] {
                            ..0.0 => scene.dropped(endpoint),
                            temper => scene.call(endpoint, random.f64() > temper.min(1.0) - 0.3),
                        }
                    }
                }
                for (probe, temper) in scene.probes.iter_mut().zip(&mut tempers) {
                    if *probe == Probe::Sent && (*temper >= 0.0 || random.u32(..30) == 0) {
                        *probe = *random.choice(&[Probe::Answered, Probe::Denied]).unwrap_or(probe);
                    } else if random.u32(..500) == 0 {
                        (*probe, *temper) = (Probe::Unasked, random.f64() * 2.0 - 0.5);
                    }
                }
                scene.now += Duration::from_millis(random.u64(0..50));
                scene.look();
            }
        }
    }
}
