//! What is known of an endpoint's load: calls in flight, latency, failures

mod latency;

use std::time::{Duration, Instant};

use self::latency::{Latency, half_to_the};
use crate::sync::{
    AtomicU32, AtomicU64,
    Ordering::{AcqRel, Relaxed},
};

/// Load statistics of one endpoint
///
/// They belong to the endpoint, not to a connection: they survive reconnects and a new list from discovery.
/// All operations are atomic and wait-free or nearly so; readers see recent values, not a consistent cut.
///
/// A call goes through [`start`](Self::start), then one of [`answered`](Self::answered), [`given_up`](Self::given_up) and
/// [`untaken`](Self::untaken), then [`finish`](Self::finish); how it ended is told by [`succeeded`](Self::succeeded) or
/// [`failed`](Self::failed), or not at all.
///
/// When nobody waits, nobody has an age. A call that begins just when another is answered or the last one ends may have none
/// until the next call begins: it is counted in flight and as waiting all the same.
// What a pick reads lies in the first cache line, whatever the compiler thinks; all in one, since each call writes it.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Load {
    /// The zero of all times here.
    epoch: Instant,
    in_flight: AtomicU32,
    /// Failures in a row.
    failures: AtomicU32,
    latency: Latency,
    /// Since when calls wait and nothing was heard, in nanoseconds after the epoch and one more; zero if none does.
    unanswered_since: AtomicU64,
    /// When the last of the failures in a row was, in nanoseconds after the epoch.
    failed_at: AtomicU64,
    /// Calls in flight whose response has not begun.
    waiting: AtomicU32,
    /// Calls that may wait at the same time; [`UNLIMITED`] but on trial.
    most_waiting: AtomicU32,
    started: AtomicU64,
    answers: AtomicU64,
    succeeded: AtomicU64,
    failed: AtomicU64,
}

#[cfg(all(target_pointer_width = "64", not(loom)))]
const _: () = assert!(std::mem::offset_of!(Load, waiting) < 64);

impl Load {
    /// Nothing is known yet
    pub fn new(now: Instant) -> Self {
        Self {
            epoch: now,
            in_flight: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
            most_waiting: AtomicU32::new(UNLIMITED),
            unanswered_since: AtomicU64::new(0),
            latency: Latency::default(),
            failures: AtomicU32::new(0),
            failed_at: AtomicU64::new(0),
            started: AtomicU64::new(0),
            answers: AtomicU64::new(0),
            succeeded: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// Counts a call as in flight until the matching [`finish`](Self::finish), and as waiting until its response begins,
    /// whether or not a [trial](Self::try_out) would let it in
    pub fn start(&self, now: Instant) {
        self.waiting.fetch_add(1, Relaxed);
        self.begin(now);
    }

    /// Counts a call as [`start`](Self::start) does, if a [trial](Self::try_out) lets it in and `open` gives it a stream;
    /// else nothing is counted
    ///
    /// `open` is only asked who is let in: a stream that is given back wakes those who wait for one, and that may be
    /// this very caller.
    pub fn try_start<S>(&self, now: Instant, open: impl FnOnce() -> Option<S>) -> Option<S> {
        if !self.enter() {
            return None;
        }
        let stream = open();
        if stream.is_some() {
            self.begin(now);
        } else {
            self.untaken();
        }
        stream
    }

    /// Takes a place among those that wait, if there is one; who finds none has taken none meanwhile, either
    fn enter(&self) -> bool {
        match self.most_waiting.load(Relaxed) {
            UNLIMITED => {
                self.waiting.fetch_add(1, Relaxed);
                true
            }
            most => {
                let place = |waiting| (waiting < most).then_some(waiting + 1);
                self.waiting.fetch_update(AcqRel, Relaxed, place).is_ok()
            }
        }
    }

    fn begin(&self, now: Instant) {
        self.in_flight.fetch_add(1, Relaxed);
        self.started.fetch_add(1, Relaxed);
        if self.unanswered_since.load(Relaxed) == 0 {
            self.unanswered_since.store(self.nanos(now) + 1, Relaxed);
        }
    }

    /// The response of a call has begun, `latency` after it was sent; `None` if that says nothing of the usual latency,
    /// because the endpoint has failed: who refuses is not fast
    pub fn answered(&self, latency: Option<Duration>, now: Instant) {
        self.stop_waiting();
        self.answers.fetch_add(1, Relaxed);
        self.heard();
        if let Some(latency) = latency {
            self.latency.observe(latency, self.millis(now));
        }
    }

    /// The endpoint has spoken: who waits on waits for its own reasons, and no longer speaks against the endpoint
    ///
    /// Else one long poll would turn all other calls away. The next call that begins to wait counts again.
    pub fn heard(&self) {
        if self.unanswered_since.load(Relaxed) != 0 {
            self.unanswered_since.store(0, Relaxed);
        }
    }

    /// Nobody waits any more for the response of a call that was sent `waited` ago: a sample of at least that much, and none
    /// if calls take as long anyway
    pub fn given_up(&self, waited: Duration, now: Instant) {
        self.latency.at_least(waited, self.millis(now));
        self.untaken();
    }

    /// The call does not wait any more, and says nothing of the latency: it was not taken
    pub fn untaken(&self) {
        if !self.stop_waiting() {
            self.heard();
        }
    }

    /// Whether others wait still
    fn stop_waiting(&self) -> bool {
        // The last one clears the age, and has to see what those before it have stored there: else an endpoint for
        // which nobody waits would grow older and older, and never be picked again.
        self.waiting.fetch_sub(1, AcqRel) > 1
    }

    /// Ends a call that [`start`](Self::start) counted
    pub fn finish(&self) {
        self.in_flight.fetch_sub(1, Relaxed);
    }

    /// A call ended as it should
    pub fn succeeded(&self) {
        self.succeeded.fetch_add(1, Relaxed);
        // Written only when it changes: most calls succeed, on all cores at once.
        if self.failures.load(Relaxed) != 0 {
            self.failures.store(0, Relaxed);
        }
    }

    /// A call failed, and its endpoint may be to blame; how many did so in a row
    pub fn failed(&self, now: Instant) -> u32 {
        self.failed.fetch_add(1, Relaxed);
        self.failed_at.store(self.nanos(now), Relaxed);
        self.end_trial();
        self.failures.fetch_add(1, Relaxed).saturating_add(1)
    }

    /// Calls in flight: started, and neither ended nor dropped
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Calls in flight whose response has not begun
    pub fn waiting(&self) -> u32 {
        self.waiting.load(Relaxed)
    }

    /// Calls started since the endpoint is known
    pub fn started(&self) -> u64 {
        self.started.load(Relaxed)
    }

    /// Calls whose response has begun
    pub fn answers(&self) -> u64 {
        self.answers.load(Relaxed)
    }

    /// Calls told by [`succeeded`](Self::succeeded) so far
    pub fn successes(&self) -> u64 {
        self.succeeded.load(Relaxed)
    }

    /// Calls told by [`failed`](Self::failed) so far
    pub fn failures(&self) -> u64 {
        self.failed.load(Relaxed)
    }

    /// Failures since the last success
    pub fn failures_in_a_row(&self) -> u32 {
        self.failures.load(Relaxed)
    }

    /// The usual time to the beginning of a response, as estimated now; `None` before the first sample
    ///
    /// The mean of the last seconds: an EWMA with a time constant of 2 s, which no single sample more than doubles while it is
    /// fresh. It fades while there are no samples, so that an endpoint that was slow is tried again.
    pub fn latency(&self, now: Instant) -> Option<Duration> {
        self.latency.read(self.millis(now)).map(|nanos| Duration::from_nanos(nanos as u64))
    }

    /// The same as of the last sample, however long ago that is
    pub(crate) fn last_latency(&self) -> Option<Duration> {
        self.latency.last().map(|nanos| Duration::from_nanos(nanos as u64))
    }

    /// What a new endpoint is expected to be like; without effect once there was a sample
    pub fn seed(&self, latency: Duration, now: Instant) {
        self.latency.seed(latency, self.millis(now));
    }

    /// The latency is unknown again, and can be [seeded](Self::seed) as a new endpoint's
    pub fn forget_latency(&self) {
        self.latency.forget();
    }

    /// The next failure is the first in its row
    pub fn forget_failures_in_a_row(&self) {
        self.failures.store(0, Relaxed);
    }

    /// From here on one call at a time is let in, beside those that wait already, and none after the first that
    /// [failed](Self::failed)
    ///
    /// Asked for again and again: who waits no more does not count.
    pub fn try_out(&self) {
        let most = self.waiting().saturating_add(1);
        // Only lowered: a trial that has failed is over.
        self.most_waiting.fetch_min(most, Relaxed);
    }

    /// Lets one more call in, if on [trial](Self::try_out): those that wait do so for reasons of their own
    pub fn let_one_more_in(&self) {
        let most = self.waiting().saturating_add(1);
        let raise = |present| (present != UNLIMITED && present != 0).then_some(most.max(present));
        // An error means that there is no trial, or that it has failed.
        let _ = self.most_waiting.fetch_update(Relaxed, Relaxed, raise);
    }

    /// Ends a [trial](Self::try_out), if there is one: all calls are let in
    pub fn let_all_in(&self) {
        // Asked for again and again, and hardly ever news.
        if self.is_on_trial() {
            self.most_waiting.store(UNLIMITED, Relaxed);
        }
    }

    /// Whether calls are let in one at a time, or none since one has failed
    pub fn is_on_trial(&self) -> bool {
        self.most_waiting.load(Relaxed) != UNLIMITED
    }

    /// Whether one more call is let in
    pub(crate) fn lets_in(&self) -> bool {
        // The limit first: but on trial nothing else is looked at.
        match self.most_waiting.load(Relaxed) {
            UNLIMITED => true,
            most => self.waiting() < most,
        }
    }

    /// Lets nobody in any more, if on trial
    fn end_trial(&self) {
        // An error means that there is none, or that it has just ended otherwise.
        let on_trial = |most| (most != UNLIMITED).then_some(0);
        let _ = self.most_waiting.fetch_update(Relaxed, Relaxed, on_trial);
    }

    /// How long calls have waited without an answer to any of them; zero if none waits
    pub fn unanswered(&self, now: Instant) -> Duration {
        Duration::from_nanos(self.unanswered_nanos(self.nanos(now)))
    }

    /// The latency a call now has to reckon with, times the penalty for recent failures, and what those who wait have waited
    /// already, in nanoseconds; the first is never zero, and both are finite
    pub(crate) fn expected(&self, now: Instant) -> (f32, f32) {
        let nanos = self.nanos(now);
        let usual = self.latency.read(nanos_to_millis(nanos)).unwrap_or(0.0).max(FLOOR);
        let penalty = match self.failures.load(Relaxed) {
            0 => 1.0,
            failures => self.penalty(failures, nanos),
        };
        (usual * penalty, self.unanswered_nanos(nanos) as f32)
    }

    fn unanswered_nanos(&self, now: u64) -> u64 {
        match self.unanswered_since.load(Relaxed) {
            0 => 0,
            since => (now + 1).saturating_sub(since),
        }
    }

    fn penalty(&self, failures: u32, now: u64) -> f32 {
        let ago = now.saturating_sub(self.failed_at.load(Relaxed));
        1.0 + PENALTY * failures.min(MOST_PENALTIES) as f32 * half_to_the(ago / (PENALTY_HALVES >> 23))
    }

    fn nanos(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.epoch);
        since
            .as_secs()
            .saturating_mul(1_000_000_000)
            .saturating_add(since.subsec_nanos().into())
            .min(u64::MAX - 1)
    }

    fn millis(&self, now: Instant) -> u32 {
        nanos_to_millis(self.nanos(now))
    }
}

/// No limit to the calls that wait.
const UNLIMITED: u32 = u32::MAX;
/// Below it latencies are alike, in nanoseconds: 1 ms, as in linkerd2-proxy. Less is the machine's noise.
const FLOOR: f32 = 1e6;
/// What each failure in a row adds to the factor on the expected latency. Of our own: an endpoint that fails at once has no
/// calls in flight, and has to look worse than a dozen that wait elsewhere.
const PENALTY: f32 = 10.0;
/// Failures beyond these weigh no more: that many in a row are a matter for ejection, and what has failed
/// for long is not to be avoided for long once it is well.
const MOST_PENALTIES: u32 = 5;
/// The time in which the penalty halves, in nanoseconds: a single failure is forgiven after some three seconds.
const PENALTY_HALVES: u64 = 1_000_000_000;

fn nanos_to_millis(nanos: u64) -> u32 {
    // Wraps after 49 days, see `kept`.
    (nanos / 1_000_000) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);

    fn load() -> (Load, Instant) {
        #[allow(clippy::disallowed_methods, reason = "any instant will do as the zero of a test")]
        let zero = Instant::now();
        (Load::new(zero), zero)
    }

    fn near(latency: Option<Duration>, expected: Duration) -> bool {
        latency.is_some_and(|latency| latency.abs_diff(expected) < expected / 50)
    }

    #[test]
    fn a_call_is_in_flight_from_start_to_finish_and_waits_until_it_is_answered() {
        let (load, t0) = load();
        load.start(t0);
        load.start(t0 + MS);
        assert_eq!((load.in_flight(), load.waiting(), load.unanswered(t0 + 5 * MS)), (2, 2, 5 * MS));
        load.answered(Some(6 * MS), t0 + 6 * MS);
        assert_eq!((load.in_flight(), load.waiting()), (2, 1));
        load.given_up(8 * MS, t0 + 9 * MS);
        load.finish();
        assert_eq!((load.in_flight(), load.waiting(), load.started()), (1, 0, 2));
        assert_eq!(load.unanswered(t0 + SECOND), Duration::ZERO);
    }

    #[test]
    fn one_slow_answer_or_one_stall_at_most_doubles_the_estimate_and_slow_ones_that_follow_are_believed() {
        let (load, t0) = load();
        let answer = |latency: Duration, at| {
            load.start(at);
            load.answered(Some(latency), at);
            load.latency(at)
        };
        assert!(near(answer(2 * MS, t0), 2 * MS));
        for _ in 0..20 {
            assert!(near(answer(5 * SECOND, t0 + 20 * MS), 4 * MS), "one stall holds many up");
        }
        let seconds = [1, 2, 3, 8].map(|seconds| t0 + seconds * SECOND);
        let risen = seconds.map(|at| answer(100 * MS, at));
        assert!(risen[0] < Some(14 * MS), "what is old counts less: {risen:?}");
        assert!(
            risen[1] < Some(45 * MS) && risen[2] > Some(50 * MS) && risen[3] > Some(90 * MS),
            "{risen:?}"
        );
        let faded = load.latency(seconds[3] + 2 * SECOND);
        assert!(near(faded, risen[3].unwrap().div_f32(1_f32.exp())), "{faded:?}");
    }

    #[test]
    fn the_estimate_is_the_mean_of_the_last_seconds_however_often_calls_are_made() {
        for (every, calls) in [(MS, 10_000), (10 * MS, 1000), (100 * MS, 100)] {
            let (load, t0) = load();
            load.seed(10 * MS, t0);
            let mut now = t0;
            for call in 0..calls {
                now += every;
                load.start(now);
                load.answered(Some(if call % 4 == 0 { 6 * MS } else { 2 * MS }), now);
            }
            let latency = load.latency(now).unwrap();
            assert!(latency.abs_diff(3 * MS) < MS / 4, "{latency:?} with one call every {every:?}");
        }
    }

    #[test]
    fn a_long_poll_does_not_speak_against_an_endpoint_that_answers_others() {
        let (load, t0) = load();
        load.start(t0);
        load.start(t0 + MS);
        load.answered(Some(MS), t0 + 2 * MS);
        assert_eq!((load.waiting(), load.unanswered(t0 + SECOND)), (1, Duration::ZERO));
        load.start(t0 + SECOND);
        assert_eq!(load.unanswered(t0 + 2 * SECOND), SECOND, "counts again from the next call on");
    }

    #[test]
    fn the_estimate_falls_with_time_however_many_answers_there_are() {
        let (load, t0) = load();
        load.seed(100 * MS, t0);
        for _ in 0..1000 {
            load.start(t0);
            load.answered(Some(MS), t0);
        }
        assert!(near(load.latency(t0), 100 * MS));
        load.start(t0);
        load.answered(Some(MS), t0 + 10 * SECOND);
        assert!(load.latency(t0 + 10 * SECOND).unwrap() < 3 * MS);
    }

    #[test]
    fn who_gives_up_says_at_least_and_never_makes_it_look_faster() {
        let (load, t0) = load();
        load.seed(10 * MS, t0);
        load.start(t0);
        load.given_up(MS, t0 + MS);
        assert!(near(load.latency(t0 + MS), 10 * MS));
        load.start(t0);
        load.given_up(15 * MS, t0 + 2 * SECOND);
        assert!(near(load.latency(t0 + 2 * SECOND), Duration::from_secs_f32(0.015 - 0.005 / 1_f32.exp())));
    }

    #[test]
    fn a_seed_is_for_who_is_unknown() {
        let (load, t0) = load();
        assert_eq!(load.latency(t0), None);
        load.seed(7 * MS, t0);
        load.seed(70 * MS, t0);
        assert!(near(load.latency(t0), 7 * MS));
    }

    #[test]
    fn failures_in_a_row_weigh_until_a_success_or_some_seconds_have_passed() {
        let (load, t0) = load();
        load.seed(10 * MS, t0);
        let usual = |now| load.expected(now).0;
        let healthy = usual(t0);
        assert_eq!((load.failed(t0), load.failed(t0)), (1, 2));
        assert!(usual(t0) > 20.0 * healthy);
        assert!(usual(t0 + 10 * SECOND) < 1.1 * healthy);
        load.succeeded();
        assert_eq!((usual(t0), load.failures_in_a_row()), (healthy, 0));
        assert_eq!((load.successes(), load.failures()), (1, 2));
    }

    #[test]
    fn a_new_beginning_forgets_failures_and_latency_but_no_count() {
        let (load, t0) = load();
        load.seed(70 * MS, t0);
        load.failed(t0);
        load.forget_latency();
        load.forget_failures_in_a_row();
        load.seed(7 * MS, t0);
        assert!(near(load.latency(t0), 7 * MS));
        assert_eq!((load.failures_in_a_row(), load.failures()), (0, 1));
    }

    #[test]
    fn on_trial_one_call_at_a_time_is_let_in_beside_those_that_wait_already() {
        let (load, t0) = load();
        load.start(t0);
        load.try_out();
        assert!(load.is_on_trial() && load.lets_in());
        let started = |stream: Option<()>| load.try_start(t0, || stream).is_some();
        assert!(!started(None) && load.lets_in(), "who gets no stream leaves its place to another");
        assert!(started(Some(())) && !load.lets_in());
        let unasked = || -> Option<()> { panic!("nobody is let in: no stream is to be touched") };
        assert_eq!(load.try_start(t0, unasked), None);
        assert_eq!(
            (load.waiting(), load.in_flight(), load.started()),
            (2, 2, 2),
            "sent calls count, no others"
        );
        load.answered(Some(MS), t0);
        assert!(load.lets_in());
        load.given_up(MS, t0);
        load.try_out();
        load.start(t0);
        assert!(!load.lets_in(), "who waited already has left");
        load.let_all_in();
        assert!(load.lets_in() && !load.is_on_trial());
    }

    #[test]
    fn on_trial_one_more_is_let_in_beside_one_that_waits_for_its_own_reasons() {
        let (load, t0) = load();
        load.let_one_more_in();
        assert!(!load.is_on_trial());
        load.try_out();
        load.start(t0);
        assert!(!load.lets_in());
        load.let_one_more_in();
        load.try_out();
        assert!(load.lets_in());
        load.failed(t0);
        load.let_one_more_in();
        assert!(!load.lets_in(), "a trial that has failed is over");
    }

    #[test]
    fn on_trial_nobody_is_let_in_after_a_failure() {
        let (load, t0) = load();
        load.failed(t0);
        assert!(load.lets_in(), "without a trial failures shut nobody out");
        load.try_out();
        load.failed(t0);
        load.try_out();
        assert!(!load.lets_in() && load.is_on_trial());
        load.let_all_in();
        load.try_out();
        assert!(load.lets_in());
    }

    #[test]
    fn whatever_is_told_the_expectation_is_a_positive_number() {
        let (load, t0) = load();
        for (latency, at) in
            [(Duration::ZERO, t0), (Duration::MAX, t0), (MS, t0 + Duration::from_secs(1 << 40))]
        {
            load.start(at);
            load.answered(Some(latency), at);
            load.failed(at);
            // A clock that steps back is possible between threads.
            for now in [t0, at, at + 3600 * SECOND] {
                let (usual, waited) = load.expected(now);
                assert!(usual.is_finite() && usual >= FLOOR, "{usual}");
                assert!(waited.is_finite() && waited >= 0.0, "{waited}");
            }
        }
    }
}
