//! Which endpoints get no calls although they are connected
//!
//! An endpoint is left out for one of three [`Reason`]s. For *silence*: calls wait and none is answered, and neither is a
//! PING. It is back when its connection reads a byte, or when there is another connection; no caller's call is spent on
//! finding out. For *failures*, in a row or more of them than elsewhere: after a time that grows with each time in a row it
//! is *on trial*, with one call at a time, until it has shown itself or has failed again.
//!
//! There is always somebody left: see [`Ejection::ejected`].

use std::{
    collections::HashMap,
    fmt,
    time::{Duration, Instant},
};

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
    /// Something was read since it was sent
    Answered,
    /// The peer would mind one more now
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
    /// How many stay in use from now on, because too few would be left without them; zero unless that is news
    pub spared: usize,
}

/// Leaves endpoints out, and lets them in again
///
/// The owner has it [`judge`](Self::judge) all endpoints that are ready when the time of [`due`](Self::due) has come, when
/// that set changes, when an endpoint's failures in a row reach [`MOST_FAILURES`], and when a call on trial fails.
/// What it knows belongs to an endpoint's number and outlives connections, until it is told to [`forget`](Self::forget).
#[derive(Debug)]
pub struct Ejection {
    records: HashMap<u64, Record>,
    left: Left,
    due: Option<Instant>,
}

/// Who is left
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// Enough without those that are silent or fail.
    Enough,
    /// Too few: those that fail are used, too.
    WithFailing,
    /// Too few even so: everybody is used.
    Everybody,
}

/// Time between two looks while there is something to judge. Of our own: a fifth of a short deadline, and a thousand
/// endpoints cost some 50 us.
pub const INTERVAL: Duration = Duration::from_millis(100);
/// Failures in a row that put an endpoint out: Finagle's failure accrual and Envoy's `consecutive_5xx`.
pub const MOST_FAILURES: u32 = 5;

/// No silence shorter than that is suspicious. Of our own: with [`INTERVAL`] for the PING's answer it ends well before a
/// deadline of 500 ms does, and a garbage collector's pause is over by then.
const LEAST_SILENCE: Duration = Duration::from_millis(200);
/// Any silence this long is suspicious: it is [`KeepAlive`](crate::keepalive::KeepAlive)'s.
const MOST_SILENCE: Duration = Duration::from_secs(5);
/// Silence is measured against the usual latency. Of our own: a few times is chance.
const TIMES_USUAL: u32 = 10;

/// The memory of successes and failures, as a time constant: A50's and Envoy's interval.
const WINDOW: Duration = Duration::from_secs(10);
/// Less than these calls within the window say nothing. Of our own: between Finagle's 5 and A50's 50, since a client with many
/// endpoints calls each of them rarely.
const LEAST_CALLS: f64 = 10.0;
/// Failing part of the calls that puts an endpoint out. Of our own: Finagle takes 0.2 without a look at the others, A50 0.85.
const MOST_FAILING: f64 = 0.3;
/// It is also this many times the others' part. Of our own: A50's standard deviations need five endpoints, this needs two.
const TIMES_OTHERS: f64 = 3.0;

/// The first time out for failures: the least of linkerd's breaker. Envoy's and A50's 30 s are for a control plane; a
/// trial costs one call.
const SHORTEST: Duration = Duration::from_secs(1);
/// The longest, however often: Finagle's shortest. A server that has recovered has its share within 10 s.
const LONGEST: Duration = Duration::from_secs(5);
/// Successes that end a trial. Of our own: one may be luck.
const PASSED: u64 = 3;
/// Each such time of being fine makes up for one time out: A50's and Envoy's interval.
const MAKES_UP: Duration = Duration::from_secs(10);

impl Default for Ejection {
    fn default() -> Self {
        Self::new()
    }
}

impl Ejection {
    /// Nobody is known
    pub fn new() -> Self {
        Self { records: HashMap::new(), left: Left::Enough, due: None }
    }

    /// Looks at all endpoints that are ready; sets their trials and what new ones are expected to be like
    pub fn judge<'a>(&mut self, now: Instant, looks: impl IntoIterator<Item = Look<'a>>) -> Judgement {
        let looks: Vec<_> = looks.into_iter().collect();
        let (mut probes, mut is_busy) = (Vec::new(), false);
        for look in &looks {
            let record = self.records.entry(look.endpoint);
            let record = record.or_insert_with(|| Record::new(look.load, now));
            is_busy |= record.is_news(look.load) || look.load.waiting() > 0;
            if record.judge_silence(look, now) {
                probes.push(look.endpoint);
            }
            record.count(look.load, now);
            record.judge_failures(look.load, now, self.left != Left::Enough);
            is_busy |= record.needs_looks();
        }
        self.compare(&looks, now);
        self.seed(&looks, now);
        let spared = self.spare(&looks);
        self.set_trials(&looks);
        self.due = is_busy.then(|| now + INTERVAL);
        Judgement { probes, spared }
    }

    /// Why an endpoint is left out, if it is
    ///
    /// If fewer than a third of the ready endpoints would be left, those that fail are let in again; and if that is not
    /// enough, those that are silent, too. Envoy panics below a half and Finagle, too; but of two endpoints one may be out.
    pub fn ejected(&self, endpoint: u64) -> Option<Reason> {
        let record = self.records.get(&endpoint)?;
        match (record.silence.stage, record.health, self.left) {
            (_, _, Left::Everybody) => None,
            (Stage::Out, _, _) => Some(Reason::Silent),
            (_, Health::Out { reason, .. }, Left::Enough) => Some(reason),
            _ => None,
        }
    }

    /// When to judge again although nothing else has happened; `None` until there is [news](Self::has_news)
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether calls have begun since they were last judged
    pub fn has_news<'a>(&self, looks: impl IntoIterator<Item = Look<'a>>) -> bool {
        let is_news = |look: Look<'_>| match self.records.get(&look.endpoint) {
            Some(record) => record.is_news(look.load),
            None => true,
        };
        looks.into_iter().any(is_news)
    }

    /// An endpoint is gone for good
    pub fn forget(&mut self, endpoint: u64) {
        self.records.remove(&endpoint);
    }

    /// Puts out those that fail more often than the others
    fn compare(&mut self, looks: &[Look<'_>], now: Instant) {
        let (mut all, mut count) = (Window::default(), 0);
        for record in looks.iter().filter_map(|look| self.records.get(&look.endpoint)) {
            if !record.is_out() {
                all.add(record.window, 1.0);
                count += 1;
            }
        }
        if count < 2 {
            return;
        }
        for look in looks {
            let Some(record) = self.records.get_mut(&look.endpoint) else { continue };
            let mut others = all;
            others.add(record.window, -1.0);
            if record.is_fine() && record.window.is_worse_than(others) {
                record.put_out(Reason::SuccessRate, look.load, now);
            }
        }
    }

    /// Expects those that begin anew to be like the median of the others
    fn seed(&mut self, looks: &[Look<'_>], now: Instant) {
        let (mut known, mut anew) = (Vec::new(), Vec::new());
        for look in looks {
            let Some(record) = self.records.get_mut(&look.endpoint) else { continue };
            if std::mem::take(&mut record.begins) {
                anew.push(look.load);
            } else if record.is_fine() {
                known.push(look.load);
            }
        }
        if anew.is_empty() {
            return;
        }
        let mut latencies: Vec<_> = known.iter().filter_map(|load| load.latency(now)).collect();
        if !latencies.is_empty() {
            let middle = latencies.len() / 2;
            let median = *latencies.select_nth_unstable(middle).1;
            anew.iter().for_each(|load| load.seed(median, now));
        }
    }

    /// Decides who is left; how many are spared, if that is news
    fn spare(&mut self, looks: &[Look<'_>]) -> usize {
        let (mut fine, mut heard, mut out) = (0, 0, 0);
        for record in looks.iter().filter_map(|look| self.records.get(&look.endpoint)) {
            let is_heard = record.silence.stage != Stage::Out;
            heard += usize::from(is_heard);
            fine += usize::from(is_heard && record.is_fine());
            out += usize::from(!is_heard || record.is_out());
        }
        let enough = |left: usize| 3 * left >= looks.len();
        let before = self.left;
        self.left = match (enough(fine), enough(heard)) {
            (true, _) => Left::Enough,
            (false, true) => Left::WithFailing,
            (false, false) => Left::Everybody,
        };
        if before != Left::Enough || self.left == Left::Enough {
            return 0;
        }
        out - looks.iter().filter(|look| self.ejected(look.endpoint).is_some()).count()
    }

    fn set_trials(&self, looks: &[Look<'_>]) {
        for look in looks {
            let record = self.records.get(&look.endpoint);
            let on_trial = record.is_some_and(|record| matches!(record.health, Health::OnTrial { .. }));
            // While everybody is needed there is no time for trials.
            if on_trial && self.left == Left::Enough {
                look.load.try_out();
            } else {
                look.load.let_all_in();
            }
        }
    }
}

/// What is known of one endpoint
#[derive(Debug)]
struct Record {
    looked: Instant,
    /// What its load had counted then.
    seen: Seen,
    silence: Silence,
    window: Window,
    health: Health,
    /// What its load had counted when it was put out, was put on trial, or has failed since.
    since: Seen,
    /// Times out for failures, in a row.
    times: u32,
    /// It is to be expected to be like the others: it is new, on trial, or let in again.
    begins: bool,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    started: u64,
    answers: u64,
    successes: u64,
    failures: u64,
}

impl Seen {
    fn of(load: &Load) -> Self {
        Self {
            started: load.started(),
            answers: load.answers(),
            successes: load.successes(),
            failures: load.failures(),
        }
    }
}

/// How an endpoint does as far as failures tell
#[derive(Clone, Copy, Debug)]
enum Health {
    /// Since then, or since a time out was last made up for.
    Fine(Instant),
    Out {
        reason: Reason,
        until: Instant,
    },
    /// After it was out for that reason.
    OnTrial(Reason),
}

impl Record {
    fn new(load: &Load, now: Instant) -> Self {
        let seen = Seen::of(load);
        Self {
            looked: now,
            seen,
            silence: Silence::default(),
            window: Window::default(),
            health: Health::Fine(now),
            since: seen,
            times: 0,
            begins: true,
        }
    }

    fn is_fine(&self) -> bool {
        matches!(self.health, Health::Fine(_))
    }

    fn is_out(&self) -> bool {
        matches!(self.health, Health::Out { .. })
    }

    fn is_news(&self, load: &Load) -> bool {
        load.started() != self.seen.started
    }

    /// Whether looks are due though nobody calls; a trial waits for calls, and those are news
    fn needs_looks(&self) -> bool {
        self.silence.stage != Stage::Listening || self.is_out()
    }

    /// True if a PING is to be sent
    fn judge_silence(&mut self, look: &Look<'_>, now: Instant) -> bool {
        let load = look.load;
        // Who stood still himself blames nobody.
        let step = now.saturating_duration_since(self.looked).min(INTERVAL);
        let waited = (load.waiting() > 0).then(|| load.unanswered(now));
        let was_out = self.silence.stage == Stage::Out;
        let was_answered = load.answers() != self.seen.answers;
        if was_answered {
            self.silence = Silence { usual: load.latency(now).unwrap_or_default(), ..Silence::default() };
        }
        self.silence.go_on(step, waited, self.is_news(load) && !was_answered);
        let is_suspect = self.silence.judge(look.probe, step);
        if was_out && self.silence.stage != Stage::Out {
            // What it was asked before it fell silent has taken long, which says nothing of what comes.
            self.begins = true;
            load.forget_latency();
        }
        is_suspect
    }

    fn begin_anew(&mut self, load: &Load) {
        self.begins = true;
        load.forget_latency();
        load.forget_failures_in_a_row();
    }

    fn count(&mut self, load: &Load, now: Instant) {
        let (before, seen) = (self.seen, Seen::of(load));
        self.window.fade(now.saturating_duration_since(self.looked));
        self.window.succeeded += (seen.successes - before.successes) as f64;
        self.window.failed += (seen.failures - before.failures) as f64;
        (self.seen, self.looked) = (seen, now);
    }

    /// Judges by this endpoint's failures alone
    fn judge_failures(&mut self, load: &Load, now: Instant, everybody_is_used: bool) {
        let has_failed = self.seen.failures != self.since.failures;
        let has_passed = !has_failed && self.seen.successes >= self.since.successes + PASSED;
        match self.health {
            Health::Fine(_) if load.failures_in_a_row() >= MOST_FAILURES => {
                self.put_out(Reason::ConsecutiveFailures, load, now);
            }
            Health::Fine(since) => {
                if self.times > 0 && now >= since + MAKES_UP {
                    self.times -= 1;
                    self.health = Health::Fine(since + MAKES_UP);
                }
            }
            // It is called all the same, which is as good as a trial.
            Health::Out { .. } if everybody_is_used && has_passed => self.let_in(load, now),
            Health::Out { reason, until } if now >= until => {
                self.health = Health::OnTrial(reason);
                self.since = self.seen;
                self.begin_anew(load);
            }
            Health::Out { .. } => {
                if has_failed {
                    self.since = self.seen;
                }
            }
            Health::OnTrial(reason) if has_failed => self.put_out(reason, load, now),
            Health::OnTrial(_) => {
                if has_passed {
                    self.let_in(load, now);
                }
            }
        }
    }

    fn put_out(&mut self, reason: Reason, load: &Load, now: Instant) {
        let time = SHORTEST.saturating_mul(1 << self.times.min(8)).min(LONGEST);
        self.times = self.times.saturating_add(1);
        self.health = Health::Out { reason, until: now + time };
        self.since = Seen::of(load);
    }

    fn let_in(&mut self, load: &Load, now: Instant) {
        self.health = Health::Fine(now);
        // What it did before is no reason to put it out again.
        self.window = Window::default();
        self.begin_anew(load);
    }
}

/// Successes and failures that fade
#[derive(Clone, Copy, Debug, Default)]
struct Window {
    succeeded: f64,
    failed: f64,
}

impl Window {
    fn fade(&mut self, elapsed: Duration) {
        let kept = (-elapsed.as_secs_f64() / WINDOW.as_secs_f64()).exp();
        self.succeeded *= kept;
        self.failed *= kept;
    }

    fn add(&mut self, other: Self, times: f64) {
        // What is left of a sum without one of its parts may be a hair below zero.
        self.succeeded = (self.succeeded + times * other.succeeded).max(0.0);
        self.failed = (self.failed + times * other.failed).max(0.0);
    }

    fn calls(self) -> f64 {
        self.succeeded + self.failed
    }

    /// Part of the calls that failed
    fn failing(self) -> f64 {
        if self.calls() > 0.0 { self.failed / self.calls() } else { 0.0 }
    }

    fn is_worse_than(self, others: Self) -> bool {
        let failing = self.failing();
        self.calls() >= LEAST_CALLS && failing > MOST_FAILING && failing > TIMES_OTHERS * others.failing()
    }
}

/// How long an endpoint has answered nothing although calls were made
#[derive(Debug)]
struct Silence {
    stage: Stage,
    /// As far as looks have seen it.
    lasting: Duration,
    /// The usual latency when a call was last answered: those who give up in the silence make it look slower.
    usual: Duration,
    /// How many times longer than usual it has to be: doubles with each PING that was answered while no call was.
    patience: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Listening,
    /// A PING was asked for that long ago.
    Asked(Duration),
    /// That was not answered, either.
    Out,
}

impl Default for Silence {
    fn default() -> Self {
        Self { stage: Stage::Listening, lasting: Duration::ZERO, usual: Duration::ZERO, patience: 1 }
    }
}

impl Silence {
    /// It lasts a look longer if calls have `waited`, or have come, and gone unanswered
    fn go_on(&mut self, step: Duration, waited: Option<Duration>, have_come: bool) {
        match waited {
            // Of the step in which it began, only a part.
            Some(waited) if self.lasting.is_zero() => self.lasting = step.min(waited),
            None if !have_come => {}
            _ => self.lasting += step,
        }
    }

    /// True if a PING is to be sent
    fn judge(&mut self, probe: Probe, step: Duration) -> bool {
        self.stage = match (self.stage, probe) {
            (Stage::Listening, _) => {
                let is_suspect = self.lasting >= self.bound();
                if is_suspect {
                    self.stage = Stage::Asked(Duration::ZERO);
                }
                return is_suspect;
            }
            // Another connection: its SETTINGS were read.
            (_, Probe::Unasked) => {
                *self = Self { usual: self.usual, ..Self::default() };
                return false;
            }
            // It lives, or there is no telling.
            (_, Probe::Answered | Probe::Denied) => {
                (self.lasting, self.patience) = (Duration::ZERO, self.patience.saturating_mul(2));
                Stage::Listening
            }
            (Stage::Asked(ago), Probe::Sent) if ago + step >= INTERVAL => Stage::Out,
            (Stage::Asked(ago), Probe::Sent) => Stage::Asked(ago + step),
            (stage, _) => stage,
        };
        false
    }

    fn bound(&self) -> Duration {
        let usual = self.usual.saturating_mul(TIMES_USUAL).max(LEAST_SILENCE);
        usual.saturating_mul(self.patience).min(MOST_SILENCE)
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
    }

    impl Scene {
        fn new(count: usize) -> Self {
            #[allow(clippy::disallowed_methods, reason = "any instant will do as the zero of a test")]
            let now = Instant::now();
            let loads = (0..count).map(|_| Load::new(now)).collect();
            let probes = vec![Probe::Unasked; count];
            let mut scene =
                Self { ejection: Ejection::new(), now, loads, probes, asked: Vec::new(), spared: 0 };
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
    fn who_answers_the_ping_in_time_is_never_out_and_suspected_again_after_twice_the_silence() {
        let mut scene = Scene::new(2);
        scene.start(0);
        let mut asked_at = Vec::new();
        for look in 1..=300 {
            scene.look();
            if scene.probes[0] == Probe::Sent {
                asked_at.push(look);
                scene.probes[0] = Probe::Answered;
            }
            assert_eq!(scene.out(), []);
        }
        // It takes a look to see that it was answered; the silence is five seconds at most.
        assert_eq!(asked_at[..5], [2, 7, 16, 33, 66]);
        assert_eq!(asked_at[6] - asked_at[5], 51);
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
    fn a_connection_that_may_not_be_asked_stays_in_use() {
        let mut scene = Scene::new(2);
        scene.start(1);
        for _ in 0..100 {
            scene.look();
            if scene.probes[1] == Probe::Sent {
                scene.probes[1] = Probe::Denied;
            }
            assert_eq!(scene.out(), []);
        }
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
        scene.calls(0, 100, false);
        scene.looks(10);
        assert_eq!((scene.out(), scene.spared, scene.loads[0].is_on_trial()), (vec![], 1, false));
    }

    #[test]
    fn five_failures_in_a_row_put_one_of_two_out_and_four_do_not() {
        let mut scene = Scene::new(2);
        scene.calls(1, 4, false);
        scene.call(1, true);
        scene.calls(1, 4, false);
        scene.judge();
        assert_eq!(scene.out(), []);
        scene.call(1, false);
        scene.judge();
        assert_eq!(scene.ejected(), [None, Some(Reason::ConsecutiveFailures)]);
    }

    #[test]
    fn the_time_out_doubles_up_to_five_seconds_and_each_trial_costs_one_call() {
        let mut scene = Scene::new(2);
        scene.calls(1, 5, false);
        scene.judge();
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
        (0..2).for_each(|endpoint| scene.calls(endpoint, 5, true));
        scene.calls(2, 5, false);
        scene.judge();
        scene.time_out(2);
        let expected = scene.loads[0].latency(scene.now);
        assert_eq!((scene.loads[2].latency(scene.now), scene.loads[2].failures_in_a_row()), (expected, 0));
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
            scene.calls(1, 5, false);
            scene.judge();
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
        for call in 0..20 {
            scene.call(0, true);
            scene.call(1, call % 2 == 0);
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
    fn few_calls_few_failures_or_others_that_fail_as_well_put_nobody_out() {
        for (calls, failing, others_failing) in [(8, 2, 100), (100, 4, 100), (100, 2, 2)] {
            let mut scene = Scene::new(3);
            for call in 0..calls {
                scene.call(0, true);
                scene.call(1, call % failing != 0);
                scene.call(2, call % others_failing != 1);
            }
            scene.look();
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
    fn if_all_fail_calls_go_to_all_and_the_first_to_recover_brings_all_back() {
        let mut scene = Scene::new(3);
        for look in 0..200 {
            let used: Vec<_> = (0..3).filter(|endpoint| !scene.out().contains(endpoint)).collect();
            assert!(look == 0 || used.len() == 3, "{used:?}");
            used.into_iter().for_each(|endpoint| scene.calls(endpoint, 5, false));
            scene.look();
            assert!(scene.loads.iter().all(Load::lets_in));
        }
        assert_eq!(scene.spared, 3, "which is said once");
        (0..3).for_each(|endpoint| scene.calls(endpoint, 3, true));
        scene.look();
        scene.looks(100);
        assert_eq!(scene.out(), []);
        assert!(!scene.loads.iter().any(Load::is_on_trial));
    }

    #[test]
    fn at_least_a_third_is_left() {
        for (count, failing, out) in [(3, 2, 2), (4, 2, 2), (4, 3, 0), (9, 6, 6), (9, 7, 0)] {
            let mut scene = Scene::new(count);
            (0..failing).for_each(|endpoint| scene.calls(endpoint, 5, false));
            scene.judge();
            assert_eq!((scene.out().len(), scene.spared), (out, failing - out), "{failing} of {count} fail");
        }
    }

    #[test]
    fn while_others_only_fail_a_silent_one_stays_out() {
        let mut scene = Scene::new(2);
        scene.start(0);
        scene.looks(3);
        scene.calls(1, 5, false);
        scene.look();
        assert_eq!((scene.ejected(), scene.spared), (vec![Some(Reason::Silent), None], 1));
        scene.start(1);
        scene.looks(4);
        assert_eq!(scene.out(), [], "both are silent");
    }

    #[test]
    fn a_silent_one_that_failed_too_is_on_trial_when_it_speaks() {
        let mut scene = Scene::new(2);
        scene.start(1);
        scene.calls(0, 5, true);
        for _ in 0..5 {
            scene.loads[1].failed(scene.now);
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
    fn who_is_not_looked_at_for_a_while_stays_known_until_it_is_forgotten() {
        let mut scene = Scene::new(2);
        scene.calls(1, 5, false);
        scene.judge();
        let alone = looks(&scene.loads[..1], &scene.probes[..1]);
        scene.ejection.judge(scene.now + 100 * MS, alone);
        assert_eq!(scene.out(), [1], "its connection was lost");
        scene.ejection.forget(1);
        assert_eq!(scene.out(), []);
    }

    #[test]
    fn a_call_that_begins_is_news_to_who_looks_no_more() {
        let mut scene = Scene::new(2);
        scene.look();
        let has_news = |scene: &Scene| scene.ejection.has_news(looks(&scene.loads, &scene.probes));
        assert_eq!((scene.ejection.due(), has_news(&scene)), (None, false));
        scene.call(1, true);
        assert!(has_news(&scene));
        scene.look();
        assert_eq!(scene.ejection.due(), Some(scene.now + INTERVAL));
        scene.look();
        assert_eq!((scene.ejection.due(), has_news(&scene)), (None, false));
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
                assert!(3 * used.len() >= count, "{seed}: {used:?} of {count}");
                let limited = used.iter().filter(|&&endpoint| scene.loads[endpoint].is_on_trial()).count();
                assert!(limited < used.len(), "{seed}: only trials");
                let silent = |endpoint: usize| scene.ejection.records[&(endpoint as u64)].silence.stage;
                let (heard, mute): (Vec<usize>, _) =
                    (0..count).partition(|&endpoint| silent(endpoint) != Stage::Out);
                assert!(
                    used.len() == count || mute.iter().all(|endpoint| !used.contains(endpoint)),
                    "{seed}: {used:?} with {mute:?} silent and {heard:?} not"
                );
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
