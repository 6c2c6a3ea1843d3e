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

/// Watches one connection for silence
///
/// The owner reports what happens ([`on_read`](Self::on_read), [`on_message`](Self::on_message)) and asks for a
/// [`verdict`](Self::verdict) when the time of the last one has come.
#[derive(Debug)]
pub struct Watchdog {
    keep_alive: KeepAlive,
    last_read: Instant,
    last_ping: Option<Instant>,
    unanswered: bool,
    pings_since_message: u32,
}

/// Pings allowed between two messages before the slow pace: gRFC A8's two strikes.
const FREE_PINGS: u32 = 2;
/// The slow pace: grpc-go counts a strike for pings closer than 5 min; ten seconds of margin.
const SLOW_PACE: Duration = Duration::from_secs(310);

impl Watchdog {
    /// Starts watching; `now` counts as the last time something was read
    pub fn new(keep_alive: KeepAlive, now: Instant) -> Self {
        Self { keep_alive, last_read: now, last_ping: None, unanswered: false, pings_since_message: 0 }
    }

    /// Bytes came in; any byte proves that the peer lives
    pub fn on_read(&mut self, now: Instant) {
        self.last_read = now;
        self.unanswered = false;
    }

    /// HEADERS or DATA came in: the peer's ping policy starts anew
    pub fn on_message(&mut self) {
        self.pings_since_message = 0;
    }

    /// What to do now; `busy_since` is when the connection last went from no calls in flight to one
    ///
    /// `None` for `busy_since` means that no call is in flight.
    pub fn verdict(&mut self, now: Instant, busy_since: Option<Instant>) -> Verdict {
        let (KeepAlive::OnDemand { timeout, .. } | KeepAlive::Periodic { timeout, .. }) = self.keep_alive;
        if let (true, Some(sent)) = (self.unanswered, self.last_ping) {
            return if now >= sent + timeout { Verdict::Dead } else { Verdict::Wait(sent + timeout) };
        }
        let Some(busy_since) = busy_since else { return Verdict::Idle };
        let due = match self.keep_alive {
            KeepAlive::OnDemand { silence, .. } => {
                let silent = self.last_read.max(busy_since) + silence;
                match self.last_ping {
                    Some(last) if self.pings_since_message >= FREE_PINGS => silent.max(last + SLOW_PACE),
                    _ => silent,
                }
            }
            KeepAlive::Periodic { interval, .. } => {
                self.last_ping.unwrap_or(busy_since).max(busy_since) + interval
            }
        };
        if now < due {
            return Verdict::Wait(due);
        }
        self.last_ping = Some(now);
        self.unanswered = true;
        self.pings_since_message += 1;
        Verdict::Ping
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    fn start() -> Instant {
        #[allow(clippy::disallowed_methods, reason = "any instant will do as the zero of a test")]
        Instant::now()
    }

    #[test]
    fn an_idle_connection_is_left_alone() {
        let t0 = start();
        let mut dog = Watchdog::new(KeepAlive::default(), t0);
        assert_eq!(dog.verdict(t0 + secs(3600), None), Verdict::Idle);
    }

    #[test]
    fn silence_counts_from_the_first_call_not_from_the_last_byte_of_an_older_one() {
        let t0 = start();
        let mut dog = Watchdog::new(KeepAlive::default(), t0);
        let busy = Some(t0 + secs(100));
        assert_eq!(dog.verdict(t0 + secs(101), busy), Verdict::Wait(t0 + secs(105)));
        assert_eq!(dog.verdict(t0 + secs(105), busy), Verdict::Ping);
        assert_eq!(dog.verdict(t0 + secs(105), busy), Verdict::Wait(t0 + secs(108)));
        assert_eq!(dog.verdict(t0 + secs(108), busy), Verdict::Dead);
    }

    #[test]
    fn any_byte_answers_a_ping() {
        let t0 = start();
        let mut dog = Watchdog::new(KeepAlive::default(), t0);
        assert_eq!(dog.verdict(t0 + secs(5), Some(t0)), Verdict::Ping);
        dog.on_read(t0 + secs(6));
        assert_eq!(dog.verdict(t0 + secs(8), Some(t0)), Verdict::Wait(t0 + secs(11)));
    }

    #[test]
    fn an_unanswered_ping_kills_even_when_the_call_that_caused_it_is_gone() {
        let t0 = start();
        let mut dog = Watchdog::new(KeepAlive::default(), t0);
        assert_eq!(dog.verdict(t0 + secs(5), Some(t0)), Verdict::Ping);
        assert_eq!(dog.verdict(t0 + secs(8), None), Verdict::Dead);
    }

    #[test]
    fn a_quiet_stream_costs_two_pings_then_one_every_310_s_until_a_message_comes() {
        let t0 = start();
        let mut dog = Watchdog::new(KeepAlive::default(), t0);
        let mut pings = Vec::new();
        let mut now = t0;
        let mut run = |dog: &mut Watchdog, until: Instant| {
            while now < until {
                match dog.verdict(now, Some(t0)) {
                    Verdict::Wait(at) => now = at,
                    Verdict::Ping => {
                        pings.push((now - t0).as_secs());
                        dog.on_read(now);
                    }
                    other => panic!("{other:?}"),
                }
            }
            std::mem::take(&mut pings)
        };
        assert_eq!(run(&mut dog, t0 + secs(700)), [5, 10, 320, 630]);
        dog.on_message();
        dog.on_read(t0 + secs(940));
        assert_eq!(run(&mut dog, t0 + secs(1000)), [945, 950]);
    }

    #[test]
    fn periodic_pings_go_out_whatever_is_read() {
        let t0 = start();
        let keep_alive = KeepAlive::Periodic { interval: secs(10), timeout: secs(3) };
        let mut dog = Watchdog::new(keep_alive, t0);
        dog.on_read(t0 + secs(9));
        assert_eq!(dog.verdict(t0 + secs(9), Some(t0)), Verdict::Wait(t0 + secs(10)));
        assert_eq!(dog.verdict(t0 + secs(10), Some(t0)), Verdict::Ping);
        dog.on_read(t0 + secs(10));
        assert_eq!(dog.verdict(t0 + secs(11), Some(t0)), Verdict::Wait(t0 + secs(20)));
        assert_eq!(dog.verdict(t0 + secs(20), Some(t0)), Verdict::Ping);
        assert_eq!(dog.verdict(t0 + secs(23), Some(t0)), Verdict::Dead);
    }
}
