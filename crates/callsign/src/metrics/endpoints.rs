//! Of a channel's endpoints: how many are in which state

use callsign_core::ejection::Reason;
use metrics::SharedString;

use super::{ChannelMeters, EJECTED, EJECTIONS, ENDPOINTS, HELD, share::Share};
use crate::endpoint::EndpointState;

/// How many endpoints of one channel are in which state
#[derive(Debug)]
pub(crate) struct EndpointGauges {
    by_state: [Share; STATES.len()],
    held: Share,
    ejected: Share,
    service: SharedString,
}

/// In which endpoints can be that the channel has.
const STATES: [(EndpointState, &str); 5] = [
    (EndpointState::Idle, "idle"),
    (EndpointState::Connecting, "connecting"),
    (EndpointState::Ready, "ready"),
    (EndpointState::Backoff, "backoff"),
    (EndpointState::Draining, "draining"),
];

impl EndpointGauges {
    pub(crate) fn new(channel: &ChannelMeters) -> Self {
        let service = channel.service();
        let by_state = STATES.map(|(_, state)| Share::new(ENDPOINTS.gauge([service.clone(), state.into()])));
        Self {
            by_state,
            held: Share::new(HELD.gauge([service.clone()])),
            ejected: Share::new(EJECTED.gauge([service.clone()])),
            service: service.clone(),
        }
    }

    /// How many are in `state`
    pub(crate) fn count(&self, state: EndpointState) -> usize {
        position(state).map_or(0, |position| self.by_state[position].value())
    }

    /// An endpoint was ejected: rare enough to ask for the handle each time
    pub(crate) fn ejected(&self, reason: Reason) {
        let reason = match reason {
            Reason::Silent => "silent",
            Reason::ConsecutiveFailures => "consecutive_failures",
            Reason::SuccessRate => "success_rate",
            _ => "other",
        };
        EJECTIONS.counter([self.service.clone(), reason.into()]).increment(1);
    }

    /// One endpoint more, or one less, in `state`
    pub(crate) fn change(&mut self, state: EndpointState, held: bool, ejected: bool, more: bool) {
        let step = |share: &mut Share| {
            share.set(if more { share.value() + 1 } else { share.value().saturating_sub(1) });
        };
        if let Some(position) = position(state) {
            step(&mut self.by_state[position]);
        }
        if held {
            step(&mut self.held);
        }
        if ejected {
            step(&mut self.ejected);
        }
    }
}

fn position(state: EndpointState) -> Option<usize> {
    STATES.iter().position(|(known, _)| *known == state)
}
