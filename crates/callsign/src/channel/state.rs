//! Where a channel stands as a whole

use callsign_core::ejection::Reason;

use crate::{
    endpoint::EndpointState,
    metrics::{ChannelMeters, EndpointGauges},
};

/// Where a channel stands: gRPC's connectivity states, aggregated over its endpoints as gRPC's own policies do (gRFC A48)
///
/// gRPC's `IDLE` is missing: a channel connects by itself, always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChannelState {
    /// gRPC's `CONNECTING`: no endpoint is ready, and one may be soon, since a first attempt or one after a lost connection
    /// is under way, or since there was no endpoint yet. Calls wait
    Connecting,
    /// gRPC's `READY`: at least one endpoint is ready, a held one included
    Ready,
    /// gRPC's `TRANSIENT_FAILURE`: the last attempt to connect to each endpoint has failed, or none is left. Calls fail after
    /// the pick timeout. An endpoint whose attempt has failed counts as failed until it is ready
    TransientFailure,
    /// gRPC's `SHUTDOWN`: the last handle of the channel is gone, or the runtime that it was made in; the last state
    Shutdown,
}

/// What one endpoint adds to the whole
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Standpoint {
    pub(super) state: EndpointState,
    pub(super) held: bool,
    pub(super) ejected: bool,
    /// Whether the last attempt to connect that has ended has failed
    pub(super) failing: bool,
}

impl Standpoint {
    fn is_promising(self) -> bool {
        matches!(self.state, EndpointState::Idle | EndpointState::Connecting) && !self.failing
    }
}

/// The endpoints counted by where they stand, kept up with each change: of thousands one is always changing
#[derive(Debug)]
pub(super) struct Tally {
    gauges: EndpointGauges,
    promising: usize,
    /// Whether there was an endpoint ever
    begun: bool,
}

impl Tally {
    pub(super) fn new(meters: &ChannelMeters) -> Self {
        Self { gauges: EndpointGauges::new(meters), promising: 0, begun: false }
    }

    /// An endpoint stands elsewhere; `None` before it came and after it went
    pub(super) fn change(&mut self, before: Option<Standpoint>, after: Option<Standpoint>) {
        if before == after {
            return;
        }
        self.begun = true;
        // First the one more: a count that a reader sees in between is never below zero.
        if let Some(after) = after {
            self.gauges.change(after.state, after.held, after.ejected, true);
            self.promising += usize::from(after.is_promising());
        }
        if let Some(before) = before {
            self.gauges.change(before.state, before.held, before.ejected, false);
            self.promising -= usize::from(before.is_promising());
        }
    }

    /// The channel has decided to leave an endpoint out
    pub(super) fn count_ejection(&self, reason: Reason) {
        self.gauges.ejected(reason);
    }

    pub(super) fn state(&self) -> ChannelState {
        if self.gauges.count(EndpointState::Ready) > 0 {
            ChannelState::Ready
        } else if self.promising > 0 || !self.begun {
            ChannelState::Connecting
        } else {
            ChannelState::TransientFailure
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(state: EndpointState, failing: bool) -> Option<Standpoint> {
        Some(Standpoint { state, held: false, ejected: false, failing })
    }

    #[test]
    fn the_best_endpoint_decides_and_one_that_fails_does_so_until_it_is_ready() {
        use EndpointState::{Backoff, Connecting, Draining, Idle, Ready};
        let mut tally = Tally::new(&ChannelMeters::new("a"));
        assert_eq!(tally.state(), ChannelState::Connecting, "there was no endpoint yet");
        let path = [
            (at(Idle, false), ChannelState::Connecting),
            (at(Connecting, false), ChannelState::Connecting),
            (at(Backoff, true), ChannelState::TransientFailure),
            (at(Connecting, true), ChannelState::TransientFailure),
            (at(Ready, false), ChannelState::Ready),
            (at(Connecting, false), ChannelState::Connecting),
            (at(Draining, false), ChannelState::TransientFailure),
            (None, ChannelState::TransientFailure),
        ];
        let mut before = None;
        for (after, expected) in path {
            tally.change(before, after);
            assert_eq!(tally.state(), expected, "{after:?}");
            before = after;
        }
        tally.change(None, at(Backoff, true));
        tally.change(None, at(Connecting, false));
        assert_eq!(tally.state(), ChannelState::Connecting);
        tally.change(None, at(Ready, false));
        assert_eq!(tally.state(), ChannelState::Ready);
    }
}
