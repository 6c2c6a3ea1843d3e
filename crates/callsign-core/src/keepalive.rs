//! When to ask a silent peer whether it lives, and when to give it up

use std::time::{Duration, Instant};

/// When a connection sends PINGs
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeepAlive {
    /// Only when calls are in flight and nothing was read for `silence`
    ///
    /// A default gRPC server answers pings that come too often with GOAWAY (gRFC A8: two strikes, a strike being a ping
    /// less than five minutes after the last one, forgotten when the server sends HEADERS or DATA). So at most two pings
    /// go out between two messages, then one every 310 s.
    OnDemand {
        /// Time without a byte, while calls are in flight, that makes a peer suspect
        silence: Duration,
        /// Time a suspect has to answer
        timeout: Duration,
    },
    /// Every `interval` while a stream is open, whatever was read
    Periodic {
        /// Time between pings; a server may ask for more with ENHANCE_YOUR_CALM
        interval: Duration,
        /// Time the peer has to answer
        timeout: Duration,
    },
}

impl Default for KeepAlive {
    /// On demand, after 5 s of silence, with 3 s to answer
    fn default() -> Self {
        Self::OnDemand { silence: Duration::from_secs(5), timeout: Duration::from_secs(3) }
    }
}

/// The interval at which doubling ends: gRFC A8 has servers themselves ping every two hours.
const CALMEST: Duration = Duration::from_secs(2 * 3600);

impl KeepAlive {
    /// The same for a peer that has said ENHANCE_YOUR_CALM: half as often, as in gRFC A8
    ///
    /// Up to every two hours. On demand stays as it is: it keeps within what a default server bears with.
    pub fn calmed(self) -> Self {
        match self {
            Self::Periodic { interval, timeout } => {
                let calmer = interval.saturating_mul(2).min(CALMEST);
                Self::Periodic { interval: calmer.max(interval), timeout }
            }
            on_demand @ Self::OnDemand { .. } => on_demand,
        }
    }
}

/// What to do about a connection now
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// No calls are in flight: nothing to watch until there are
    Idle,
    /// Ask again at this time
    Wait(Instant),
    /// Send a PING, then ask again
    Ping,
    /// The peer did not answer: the connection is dead
    Dead,
}

/// What became of the wish for a PING
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Send one, then ask for a verdict
    Ping,
    /// One that was sent before is not answered yet: it will do
    Before,
    /// The peer might mind one more
    Denied,
}

/// Watches one connection for silence
///
/// The owner reports what happens ([`on_read`](Self::on_read), [`on_message`](Self::on_message)) and asks for a
/// [`verdict`](Self::verdict) when the time of the last one has come.
#[derive(Debug)]
pub struct Watchdog {
    keep_alive: KeepAlive,
    /// When a call was first seen in flight since something was read. Stays when the calls end unanswered: callers with
    /// deadlines would otherwise hide a dead peer from us for ever.
    waiting_since: Option<Instant>,
    last_ping: Option<Instant>,
    /// When the peer is dead, if a ping is not answered.
    dead_at: Option<Instant>,
    pings_since_message: u32,
    /// Calls begun when the last ping went out.
    calls_at_ping: u64,
}

/// What a connection is doing, as far as its watchdog cares
#[derive(Clone, Copy, Debug)]
pub struct Activity {
    /// Whether calls are in flight
    pub busy: bool,
    /// Calls begun since the connection was made
    pub calls: u64,
}

/// Pings allowed between two messages before the slow pace: gRFC A8's two strikes.
const FREE_PINGS: u32 = 2;
/// The slow pace: grpc-go counts a strike for pings closer than 5 min; ten seconds of margin.
const SLOW_PACE: Duration = Duration::from_secs(310);

impl Watchdog {
    /// Starts watching
    pub fn new(keep_alive: KeepAlive) -> Self {
        Self {
            keep_alive,
            waiting_since: None,
            last_ping: None,
            dead_at: None,
            pings_since_message: 0,
            calls_at_ping: 0,
        }
    }

    /// Bytes came in; any byte proves that the peer lives
    pub fn on_read(&mut self) {
        self.waiting_since = None;
        self.dead_at = None;
    }

    /// HEADERS or DATA came in: the peer's ping policy starts anew
    pub fn on_message(&mut self) {
        self.pings_since_message = 0;
    }

    /// Calls are in flight; `now` is asked for if this is the first news of it since something was read
    pub fn on_busy(&mut self, now: impl FnOnce() -> Instant) {
        if self.waiting_since.is_none() {
            self.waiting_since = Some(now());
        }
    }

    /// What to do now
    pub fn verdict(&mut self, now: Instant, activity: Activity) -> Verdict {
        if let Some(dead_at) = self.dead_at {
            return if now >= dead_at { Verdict::Dead } else { Verdict::Wait(dead_at) };
        }
        if !activity.busy {
            return Verdict::Idle;
        }
        let waiting_since = *self.waiting_since.get_or_insert(now);
        let (due, look_again) = match self.keep_alive {
            KeepAlive::OnDemand { silence, .. } => match self.may_ping_from(activity.calls) {
                Some(at) => (at.max(waiting_since + silence), silence),
                None => (waiting_since + silence, silence),
            },
            KeepAlive::Periodic { interval, .. } => {
                (self.last_ping.unwrap_or(waiting_since) + interval, interval)
            }
        };
        if now < due {
            // A message or a new call may bring the next ping forward: never sleep for longer than it would then take.
            return Verdict::Wait(due.min(now + look_again));
        }
        self.on_ping(now, now, activity.calls);
        Verdict::Ping
    }

    /// Somebody has reason to believe that the peer is dead, and wants it to be asked now; `calls` have begun since the
    /// connection was made
    ///
    /// Only the first ping after a message is for this: the next is for a peer that dies later. Nor does it bring a death
    /// forward: who pauses for a few seconds is alive.
    pub fn suspect(&mut self, now: Instant, calls: u64) -> Asked {
        if self.dead_at.is_some() {
            return Asked::Before;
        }
        let is_long_ago = self.last_ping.is_none_or(|last| now >= last + SLOW_PACE);
        if self.pings_since_message > 0 && !is_long_ago {
            return Asked::Denied;
        }
        let waiting_since = *self.waiting_since.get_or_insert(now);
        let due = match self.keep_alive {
            KeepAlive::OnDemand { silence, .. } => waiting_since + silence,
            KeepAlive::Periodic { interval, .. } => self.last_ping.unwrap_or(waiting_since) + interval,
        };
        self.on_ping(now, due, calls);
        Asked::Ping
    }

    /// A ping goes out that was `due`, if early
    fn on_ping(&mut self, now: Instant, due: Instant, calls: u64) {
        let (KeepAlive::OnDemand { timeout, .. } | KeepAlive::Periodic { timeout, .. }) = self.keep_alive;
        self.last_ping = Some(now);
        self.dead_at = Some(now.max(due) + timeout);
        self.pings_since_message += 1;
        self.calls_at_ping = calls;
    }

    /// Before when the peer would mind another ping; `None` if it would not
    fn may_ping_from(&self, calls: u64) -> Option<Instant> {
        // The third ping is the last that grpc-go bears with. It is kept for calls that began after the second: the peer
        // may have frozen since.
        let free = if calls > self.calls_at_ping { FREE_PINGS + 1 } else { FREE_PINGS };
        self.last_ping.filter(|_| self.pings_since_message >= free).map(|last| last + SLOW_PACE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    const IDLE: Activity = Activity { busy: false, calls: 1 };
    const BUSY: Activity = Activity { busy: true, calls: 1 };

    fn start() -> (Watchdog, Instant) {
        #[allow(clippy::disallowed_methods, reason = "any instant will do as the zero of a test")]
        let zero = Instant::now();
        (Watchdog::new(KeepAlive::default()), zero)
    }

    /// Follows the verdicts up to `until`, answering every ping at once; the seconds of the pings
    fn pings(dog: &mut Watchdog, zero: Instant, from: u64, until: u64, activity: Activity) -> Vec<u64> {
        let (mut now, mut pings) = (zero + secs(from), Vec::new());
        while now < zero + secs(until) {
            match dog.verdict(now, activity) {
                Verdict::Wait(at) => now = at,
                Verdict::Ping => {
                    pings.push((now - zero).as_secs());
                    dog.on_read();
                }
                other => panic!("{other:?}"),
            }
        }
        pings
    }

    #[test]
    fn an_idle_connection_is_left_alone() {
        let (mut dog, t0) = start();
        assert_eq!(dog.verdict(t0 + secs(3600), IDLE), Verdict::Idle);
    }

    #[test]
    fn silence_counts_from_the_first_call_and_ends_in_death() {
        let (mut dog, t0) = start();
        dog.on_read();
        assert_eq!(dog.verdict(t0 + secs(100), BUSY), Verdict::Wait(t0 + secs(105)));
        assert_eq!(dog.verdict(t0 + secs(105), BUSY), Verdict::Ping);
        assert_eq!(dog.verdict(t0 + secs(105), BUSY), Verdict::Wait(t0 + secs(108)));
        assert_eq!(dog.verdict(t0 + secs(108), BUSY), Verdict::Dead);
    }

    #[test]
    fn any_byte_answers_a_ping() {
        let (mut dog, t0) = start();
        dog.verdict(t0, BUSY);
        assert_eq!(dog.verdict(t0 + secs(5), BUSY), Verdict::Ping);
        dog.on_read();
        assert_eq!(dog.verdict(t0 + secs(8), BUSY), Verdict::Wait(t0 + secs(13)));
    }

    #[test]
    fn calls_that_time_out_one_after_the_other_do_not_hide_a_dead_peer() {
        let (mut dog, t0) = start();
        for second in 0..5 {
            assert_eq!(dog.verdict(t0 + secs(second), BUSY), Verdict::Wait(t0 + secs(5)));
            assert_eq!(dog.verdict(t0 + secs(second), IDLE), Verdict::Idle);
        }
        assert_eq!(dog.verdict(t0 + secs(5), BUSY), Verdict::Ping);
        assert_eq!(dog.verdict(t0 + secs(8), IDLE), Verdict::Dead);
    }

    #[test]
    fn a_quiet_stream_costs_two_pings_then_one_every_310_s_until_a_message_comes() {
        let (mut dog, t0) = start();
        assert_eq!(pings(&mut dog, t0, 0, 700, BUSY), [5, 10, 320, 630]);
        dog.on_message();
        dog.on_read();
        assert_eq!(pings(&mut dog, t0, 700, 800, BUSY), [705, 710]);
    }

    #[test]
    fn a_call_that_begins_after_the_free_pings_gets_one_of_its_own() {
        let (mut dog, t0) = start();
        assert_eq!(pings(&mut dog, t0, 0, 60, BUSY), [5, 10]);
        let another = Activity { busy: true, calls: 2 };
        assert_eq!(pings(&mut dog, t0, 60, 300, another), [60]);
        let one_more = Activity { busy: true, calls: 3 };
        assert_eq!(pings(&mut dog, t0, 300, 400, one_more), [370], "the fourth would be one too many");
    }

    #[test]
    fn a_peer_that_wants_calm_is_pinged_half_as_often_each_time() {
        let timeout = secs(3);
        let periodic = |interval| KeepAlive::Periodic { interval: secs(interval), timeout };
        assert_eq!(periodic(10).calmed(), periodic(20));
        assert_eq!(periodic(10).calmed().calmed(), periodic(40));
        assert_eq!((0..20).fold(periodic(10), |keep_alive, _| keep_alive.calmed()), periodic(7200));
        assert_eq!(periodic(86_400).calmed(), periodic(86_400), "never more often");
        let longest = KeepAlive::Periodic { interval: Duration::MAX, timeout };
        assert_eq!(longest.calmed(), longest);
        assert_eq!(KeepAlive::default().calmed(), KeepAlive::default());
    }

    #[test]
    fn a_suspect_is_asked_at_once_and_dies_no_earlier_than_without_suspicion() {
        let (mut dog, t0) = start();
        dog.on_busy(|| t0);
        assert_eq!(dog.suspect(t0 + secs(1), 1), Asked::Ping);
        assert_eq!(dog.suspect(t0 + secs(2), 2), Asked::Before);
        assert_eq!(dog.verdict(t0 + secs(2), IDLE), Verdict::Wait(t0 + secs(8)));
        assert_eq!(dog.verdict(t0 + secs(8), IDLE), Verdict::Dead);
    }

    #[test]
    fn a_suspect_that_was_silent_for_long_has_the_usual_time_to_answer() {
        let (mut dog, t0) = start();
        dog.on_busy(|| t0);
        assert_eq!(dog.suspect(t0 + secs(100), 1), Asked::Ping);
        assert_eq!(dog.verdict(t0 + secs(102), IDLE), Verdict::Wait(t0 + secs(103)));
        assert_eq!(dog.verdict(t0 + secs(103), IDLE), Verdict::Dead);
    }

    #[test]
    fn a_suspect_that_answers_late_is_watched_as_before() {
        let (mut dog, t0) = start();
        dog.verdict(t0, BUSY);
        assert_eq!(dog.suspect(t0, 1), Asked::Ping);
        dog.on_read();
        assert_eq!(dog.verdict(t0 + secs(7), IDLE), Verdict::Idle);
        assert_eq!(pings(&mut dog, t0, 7, 200, BUSY), [12], "the second of two");
    }

    #[test]
    fn a_suspicion_during_the_watchdogs_own_ping_costs_none() {
        let (mut dog, t0) = start();
        dog.verdict(t0, BUSY);
        assert_eq!(dog.verdict(t0 + secs(5), BUSY), Verdict::Ping);
        assert_eq!(dog.suspect(t0 + secs(6), 2), Asked::Before);
        assert_eq!(dog.verdict(t0 + secs(8), BUSY), Verdict::Dead);
    }

    #[test]
    fn suspicions_get_one_ping_between_two_messages_and_leave_the_others_for_silence() {
        let (mut dog, t0) = start();
        let mut asked = |after, calls| {
            let asked = dog.suspect(t0 + secs(after), calls);
            dog.on_read();
            asked
        };
        assert_eq!([asked(0, 1), asked(10, 1), asked(20, 2)], [Asked::Ping, Asked::Denied, Asked::Denied]);
        assert_eq!([asked(309, 3), asked(310, 3)], [Asked::Denied, Asked::Ping]);
        dog.on_message();
        assert_eq!(dog.suspect(t0 + secs(311), 3), Asked::Ping);
        dog.on_read();
        let another = Activity { busy: true, calls: 4 };
        assert_eq!(pings(&mut dog, t0, 311, 400, another), [316], "for a peer that dies later");
    }

    #[test]
    fn suspicions_beside_periodic_pings_are_within_the_same_bounds() {
        let (_, t0) = start();
        let mut dog = Watchdog::new(KeepAlive::Periodic { interval: secs(10), timeout: secs(3) });
        dog.verdict(t0, BUSY);
        assert_eq!(dog.suspect(t0 + secs(4), 1), Asked::Ping);
        assert_eq!(dog.verdict(t0 + secs(5), BUSY), Verdict::Wait(t0 + secs(13)));
        dog.on_read();
        assert_eq!(dog.verdict(t0 + secs(5), BUSY), Verdict::Wait(t0 + secs(14)));
        assert_eq!(dog.verdict(t0 + secs(14), BUSY), Verdict::Ping);
        dog.on_read();
        assert_eq!(dog.suspect(t0 + secs(15), 1), Asked::Denied);
    }

    #[test]
    fn periodic_pings_go_out_whatever_is_read() {
        let (_, t0) = start();
        let mut dog = Watchdog::new(KeepAlive::Periodic { interval: secs(10), timeout: secs(3) });
        assert_eq!(dog.verdict(t0, BUSY), Verdict::Wait(t0 + secs(10)));
        assert_eq!(dog.verdict(t0 + secs(10), BUSY), Verdict::Ping);
        dog.on_read();
        assert_eq!(dog.verdict(t0 + secs(11), BUSY), Verdict::Wait(t0 + secs(20)));
        assert_eq!(dog.verdict(t0 + secs(20), BUSY), Verdict::Ping);
        assert_eq!(dog.verdict(t0 + secs(23), BUSY), Verdict::Dead);
    }
}
