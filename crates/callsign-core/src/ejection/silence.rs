//! How long an endpoint has answered nothing although calls were made

use std::time::Duration;

use super::{INTERVAL, Probe};

/// No silence shorter than that is suspicious. Of our own: with [`INTERVAL`] for the PING's answer it ends well before a
/// deadline of 500 ms does, and a garbage collector's pause is over by then.
const LEAST: Duration = Duration::from_millis(200);
/// Any silence this long is suspicious: it is [`KeepAlive`](crate::keepalive::KeepAlive)'s.
const MOST: Duration = Duration::from_secs(5);
/// Silence is measured against the usual latency. Of our own: a few times is chance.
const TIMES_USUAL: u32 = 10;

/// After so long without a byte nobody will have asked a peer that minds PINGs: twice
/// [`KeepAlive`](crate::keepalive::KeepAlive)'s silence. A call has to find out then.
const UNSURE: Duration = Duration::from_secs(10);

/// Silence, as far as looks have seen it
#[derive(Debug)]
pub(super) struct Silence {
    stage: Stage,
    lasting: Duration,
    /// The usual latency when a call was last answered: those who give up in the silence make it look slower.
    usual: Duration,
    /// How many times longer than usual it has to be: doubles with each PING that was answered while no call was.
    patience: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Listening,
    /// A PING was asked for, and is on its way for that long.
    Asked(Duration),
    /// None may be sent, for that long: the connection's own, or whatever else is read, has to tell.
    Unsure(Duration),
    /// That was not answered, either.
    Out,
}

/// What is to be done
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Wait,
    /// A PING is to be sent.
    Ask,
    /// Something was read although no call was answered: it lives. Or nobody can tell.
    Lives,
}

impl Silence {
    /// A call was answered, and that is how long calls take
    pub(super) fn broken(usual: Option<Duration>) -> Self {
        let usual = usual.unwrap_or_default();
        Self { stage: Stage::Listening, lasting: Duration::ZERO, usual, patience: 1 }
    }

    /// It is over, and nobody suspects anything
    pub(super) fn is_over(&self) -> bool {
        self.stage == Stage::Listening && self.lasting.is_zero()
    }

    /// Neither calls nor a PING were answered
    pub(super) fn is_out(&self) -> bool {
        self.stage == Stage::Out
    }

    /// A PING is on its way, or cannot be, or was not answered
    pub(super) fn is_suspect(&self) -> bool {
        self.stage != Stage::Listening
    }

    /// It lasts a `step` longer, or as long as calls are `unanswered` now
    pub(super) fn go_on(&mut self, step: Duration, unanswered: Duration) {
        // Of the step in which it began, only a part.
        self.lasting += if self.lasting.is_zero() { step.min(unanswered) } else { step };
    }

    pub(super) fn judge(&mut self, probe: Probe, step: Duration) -> Verdict {
        match (self.stage, probe) {
            (Stage::Listening, _) if self.lasting >= self.bound() => {
                self.stage = Stage::Asked(Duration::ZERO);
                return Verdict::Ask;
            }
            (Stage::Listening, _) => {}
            // Another connection: its SETTINGS were read.
            (_, Probe::Unasked) => {
                *self = Self::broken(Some(self.usual));
                return Verdict::Lives;
            }
            (_, Probe::Answered) => {
                self.wait_longer();
                return Verdict::Lives;
            }
            (Stage::Unsure(ago), Probe::Denied) if ago >= UNSURE => {
                self.wait_longer();
                return Verdict::Lives;
            }
            (Stage::Unsure(ago), Probe::Denied) => self.stage = Stage::Unsure(ago + step),
            (_, Probe::Denied) => self.stage = Stage::Unsure(Duration::ZERO),
            (Stage::Asked(ago), Probe::Sent) => {
                let ago = ago + step;
                self.stage = if ago >= INTERVAL { Stage::Out } else { Stage::Asked(ago) };
            }
            (Stage::Asked(_) | Stage::Unsure(_) | Stage::Out, _) => {}
        }
        Verdict::Wait
    }

    fn wait_longer(&mut self) {
        let patience = self.patience.saturating_mul(2);
        *self = Self { patience, ..Self::broken(Some(self.usual)) };
    }

    fn bound(&self) -> Duration {
        let usual = self.usual.saturating_mul(TIMES_USUAL).max(LEAST);
        usual.saturating_mul(self.patience).min(MOST)
    }
}
