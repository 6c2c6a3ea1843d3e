//! What is known of one endpoint

use std::time::{Duration, Instant};

use super::{
    INTERVAL, Look, MOST_FAILURES, Reason,
    silence::{Silence, Verdict},
};
use crate::load::Load;

/// The memory of successes and failures, as a time constant: A50's and Envoy's interval.
const WINDOW: Duration = Duration::from_secs(10);
/// The memory that failures in a row are compared by. Of our own: if all endpoints begin to fail at the same time, what they
/// did before must not make the first look worse than the others.
const RECENT: Duration = Duration::from_secs(1);
/// Less than these calls within the window say nothing. Of our own: between Finagle's 5 and A50's 50, since a client with many
/// endpoints calls each of them rarely.
const LEAST_CALLS: f64 = 10.0;
/// Failing part of the calls that puts an endpoint out. Of our own: Finagle takes 0.2 without a look at the others, A50 0.85.
const MOST_FAILING: f64 = 0.3;
/// It is also this many times the others' part. Of our own: A50's standard deviations need five endpoints, this needs two.
const TIMES_OTHERS: f64 = 3.0;

/// The first time out for failures: the least of linkerd's breaker. Envoy and A50 take 30 s; a trial of ours costs one call.
const SHORTEST: Duration = Duration::from_secs(1);
/// The longest, however often: Finagle's shortest. A server that has recovered has its share within 10 s.
const LONGEST: Duration = Duration::from_secs(5);
/// Successes that end a trial. Of our own: one may be luck.
const PASSED: u64 = 3;
/// Each such time of being fine makes up for one time out: A50's and Envoy's interval.
const MAKES_UP: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(super) struct Record {
    looked: Instant,
    /// What its load had counted then.
    seen: Seen,
    /// When a look saw last that calls had begun.
    called: Option<Instant>,
    silence: Silence,
    /// Calls that wait for reasons of their own: they did so when a PING was answered.
    excused: u32,
    /// Failures in a row.
    streak: Option<Spell>,
    /// Failures, none of them long after the last.
    spell: Option<Spell>,
    pub(super) window: Window,
    recent: Window,
    health: Health,
    /// What its load had counted when it was put out, was put on trial, or has failed since.
    since: Seen,
    /// Times out for failures, in a row.
    times: u32,
    /// It is to be expected to be like the others: it is new, on trial, or back.
    begins: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// Failures that belong together
#[derive(Clone, Copy, Debug)]
struct Spell {
    since: Instant,
    last: Instant,
}

impl Spell {
    fn new(now: Instant) -> Self {
        Self { since: now, last: now }
    }

    /// Whether it is longer than a moment, which may fall into two looks: a client that stands still sees all its deadlines
    /// pass in one
    fn lasts(self) -> bool {
        self.last >= self.since + 2 * INTERVAL
    }
}

/// How an endpoint does as far as failures tell
#[derive(Clone, Copy, Debug)]
enum Health {
    /// Since then.
    Fine(Instant),
    Out {
        reason: Reason,
        until: Instant,
    },
    /// After it was out for that reason.
    OnTrial(Reason),
}

impl Record {
    pub(super) fn new(load: &Load, now: Instant) -> Self {
        let seen = Seen::of(load);
        Self {
            looked: now,
            seen,
            called: None,
            silence: Silence::broken(load.last_latency()),
            excused: 0,
            streak: None,
            spell: None,
            window: Window::new(WINDOW, now),
            recent: Window::new(RECENT, now),
            health: Health::Fine(now),
            since: seen,
            times: 0,
            begins: true,
        }
    }

    pub(super) fn is_fine(&self) -> bool {
        matches!(self.health, Health::Fine(_))
    }

    /// Why it is out for its failures, if it is
    pub(super) fn is_out(&self) -> Option<Reason> {
        match self.health {
            Health::Out { reason, .. } => Some(reason),
            _ => None,
        }
    }

    pub(super) fn is_on_trial(&self) -> bool {
        matches!(self.health, Health::OnTrial(_))
    }

    pub(super) fn is_silent(&self) -> bool {
        self.silence.is_out()
    }

    /// Whether calls have begun, or wait that are not excused
    pub(super) fn is_busy(&self, load: &Load) -> bool {
        load.started() != self.seen.started || load.waiting() > self.excused
    }

    /// Whether it is anything else than fine
    pub(super) fn is_troubled(&self) -> bool {
        self.silence.is_suspect() || !self.is_fine()
    }

    /// Whether looks are due though nobody calls; a trial waits for calls, and those are news
    pub(super) fn needs_looks(&self) -> bool {
        self.silence.is_suspect() || self.is_out().is_some()
    }

    /// Whether it begins anew, which is said once
    pub(super) fn begins(&mut self) -> bool {
        std::mem::take(&mut self.begins)
    }

    pub(super) fn has_begun(&self) -> bool {
        self.begins
    }

    /// Nothing is known yet of what is to be expected of it
    pub(super) fn ask_again(&mut self) {
        self.begins = true;
    }

    /// Judges by what this endpoint has done; true if its PING is to be sent
    pub(super) fn judge(&mut self, look: &Look<'_>, now: Instant, everybody_is_used: bool) -> bool {
        let load = look.load;
        let (before, seen, waiting) = (self.seen, Seen::of(load), load.waiting());
        self.excused = self.excused.min(waiting);
        if seen == before && waiting == self.excused && self.is_fine() && self.silence.is_over() {
            // Most of many endpoints, most of the time.
            return false;
        }
        // Who stood still himself blames nobody.
        let elapsed = now.saturating_duration_since(self.looked);
        let step = elapsed.min(INTERVAL);
        // Nor has he had the time to read what came meanwhile.
        let to_answer = if elapsed < 2 * INTERVAL { step } else { step / 2 };
        (self.seen, self.looked) = (seen, now);
        if seen.started != before.started {
            self.called = Some(now);
        }
        self.count(before, now);
        self.follow(load, before, now);
        self.judge_failures(load, now, everybody_is_used);
        let unanswered = (waiting > self.excused).then(|| load.unanswered(now));
        self.judge_silence(look, before, unanswered, [step, to_answer])
    }

    fn judge_silence(
        &mut self,
        look: &Look<'_>,
        before: Seen,
        unanswered: Option<Duration>,
        [step, to_answer]: [Duration; 2],
    ) -> bool {
        let was_out = self.silence.is_out();
        let was_answered = self.seen.answers != before.answers;
        if was_answered {
            self.silence = Silence::broken(look.load.last_latency());
        }
        if let Some(unanswered) = unanswered {
            // Since when is not always known.
            self.silence.go_on(step, if unanswered.is_zero() { step } else { unanswered });
        } else if self.seen.started != before.started && !was_answered {
            // They have given up.
            self.silence.go_on(step, step);
        }
        let verdict = self.silence.judge(look.probe, to_answer);
        if verdict == Verdict::Lives {
            look.load.heard();
            self.excused = look.load.waiting();
            // Else a call that lasts would be the only one.
            look.load.let_one_more_in();
        }
        if was_out && !self.silence.is_out() {
            // Calls from before it fell silent have taken long, which says nothing of those that come.
            look.load.forget_latency();
            self.begins = true;
        }
        verdict == Verdict::Ask
    }

    fn count(&mut self, before: Seen, now: Instant) {
        let succeeded = self.seen.successes - before.successes;
        let failed = self.seen.failures - before.failures;
        for window in [&mut self.window, &mut self.recent] {
            window.fade(now);
            window.succeeded += succeeded as f64;
            window.failed += failed as f64;
        }
    }

    /// Follows the spells of failures
    fn follow(&mut self, load: &Load, before: Seen, now: Instant) {
        self.streak = self.streak.filter(|_| self.seen.successes == before.successes);
        self.spell = self.spell.filter(|spell| now < spell.last + WINDOW);
        if self.seen.failures != before.failures {
            self.spell.get_or_insert(Spell::new(now)).last = now;
            if load.failures_in_a_row() > 0 {
                self.streak.get_or_insert(Spell::new(now)).last = now;
            }
        }
    }

    fn judge_failures(&mut self, load: &Load, now: Instant, everybody_is_used: bool) {
        let has_failed = self.seen.failures != self.since.failures;
        let has_passed = !has_failed && self.seen.successes >= self.since.successes + PASSED;
        match self.health {
            Health::Fine(_) => {}
            // It is called all the same, which is as good as a trial.
            Health::Out { .. } if everybody_is_used && has_passed => self.let_in(load, now),
            Health::Out { reason, until } => {
                // A trial that has failed let nobody in until calls no longer picked it.
                load.let_all_in();
                if now >= until {
                    self.health = Health::OnTrial(reason);
                    self.begin_anew(load);
                }
                if now >= until || has_failed {
                    self.since = self.seen;
                }
            }
            Health::OnTrial(reason) if has_failed => self.put_out(reason, load, now),
            Health::OnTrial(_) if has_passed => self.let_in(load, now),
            Health::OnTrial(_) => {}
        }
    }

    /// Why it should be out, if it also fails more than the others
    pub(super) fn suspicion(&self, load: &Load) -> Option<Reason> {
        if !self.is_fine() {
            return None;
        }
        let has_streak = load.failures_in_a_row() >= MOST_FAILURES && self.streak.is_some_and(Spell::lasts);
        let has_calls = self.window.calls() >= LEAST_CALLS && self.spell.is_some_and(Spell::lasts);
        let is_failing = has_calls && self.window.failing() > MOST_FAILING;
        let reason = if has_streak { Reason::ConsecutiveFailures } else { Reason::SuccessRate };
        (has_streak || is_failing).then_some(reason)
    }

    /// What is to be said of it when another one's failures in a row are looked at
    pub(super) fn lately(&self, now: Instant) -> Lately {
        let is_fine = self.is_fine() && !self.is_silent();
        Lately { called: self.called, is_fine, recent: self.recent.now(now) }
    }

    /// Whether it fails far more than others do, or would do as far as anybody knows
    ///
    /// Whoever is fine and was not called since this one's failures began may take its calls: policies that do not spread
    /// calls, and preferred zones, have nobody else to compare with.
    pub(super) fn is_far_worse_lately(&self, used: &[Lately], now: Instant) -> bool {
        let Some(streak) = self.streak else { return false };
        let mut windows: Vec<_> = used.iter().filter_map(|other| other.since(streak, now)).collect();
        self.recent.is_far_worse_than(&mut windows)
    }

    pub(super) fn put_out(&mut self, reason: Reason, load: &Load, now: Instant) {
        if let Health::Fine(since) = self.health {
            let made_up = now.saturating_duration_since(since).as_secs() / MAKES_UP.as_secs();
            self.times = self.times.saturating_sub(made_up.try_into().unwrap_or(u32::MAX));
        }
        let time = SHORTEST.saturating_mul(1 << self.times.min(8)).min(LONGEST);
        self.times = self.times.saturating_add(1);
        self.health = Health::Out { reason, until: now + time };
        self.since = Seen::of(load);
    }

    fn let_in(&mut self, load: &Load, now: Instant) {
        self.health = Health::Fine(now);
        // What it did before is no reason to put it out again.
        (self.window, self.recent) = (Window::new(WINDOW, now), Window::new(RECENT, now));
        self.spell = None;
        load.let_all_in();
        self.begin_anew(load);
    }

    fn begin_anew(&mut self, load: &Load) {
        self.begins = true;
        self.streak = None;
        load.forget_latency();
        load.forget_failures_in_a_row();
    }
}

/// What an endpoint did within the last seconds, for comparison
#[derive(Clone, Copy, Debug)]
pub(super) struct Lately {
    called: Option<Instant>,
    is_fine: bool,
    recent: Option<Window>,
}

impl Lately {
    fn since(&self, streak: Spell, now: Instant) -> Option<Window> {
        let was_called = self.called.is_some_and(|called| called >= streak.since);
        if was_called || !self.is_fine { self.recent } else { Some(Window::clean(RECENT, now)) }
    }
}

/// Successes and failures that fade
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    succeeded: f64,
    failed: f64,
    at: Instant,
    memory: Duration,
}

impl Window {
    fn new(memory: Duration, at: Instant) -> Self {
        Self { succeeded: 0.0, failed: 0.0, at, memory }
    }

    /// As of one whose only call was fine
    fn clean(memory: Duration, at: Instant) -> Self {
        Self { succeeded: 1.0, failed: 0.0, at, memory }
    }

    fn fade(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at);
        let kept = (-elapsed.as_secs_f64() / self.memory.as_secs_f64()).exp();
        self.succeeded *= kept;
        self.failed *= kept;
        self.at = now;
    }

    fn calls(&self) -> f64 {
        self.succeeded + self.failed
    }

    /// Part of the calls that failed
    fn failing(&self) -> f64 {
        if self.calls() > 0.0 { self.failed / self.calls() } else { 0.0 }
    }

    /// Whether it fails far more than the best third of `all`
    ///
    /// Of the best third, since most of the others may be as bad as this one, and it may be the best itself.
    pub(super) fn is_far_worse_than(&self, all: &mut [Self]) -> bool {
        all.sort_unstable_by(|one, other| one.failing().total_cmp(&other.failing()));
        let best = &all[..all.len().div_ceil(3)];
        let (failed, calls) = best
            .iter()
            .fold((0.0, 0.0), |(failed, calls), window| (failed + window.failed, calls + window.calls()));
        // Multiplied out: there may be no calls at all.
        calls > 0.0 && self.failing() * calls > TIMES_OTHERS * failed
    }

    /// As it has faded, if anything is left of it
    pub(super) fn now(mut self, now: Instant) -> Option<Self> {
        self.fade(now);
        (self.calls() > f64::MIN_POSITIVE).then_some(self)
    }
}
