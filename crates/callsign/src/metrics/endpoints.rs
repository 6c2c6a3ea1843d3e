//! Of a channel's endpoints: how many are in which state

use super::{ChannelMeters, ENDPOINTS, HELD, share::Share};
use crate::endpoint::EndpointState;

/// How many endpoints of one channel are in which state
#[derive(Debug)]
pub(crate) struct EndpointGauges {
    by_state: [Share; STATES.len()],
    held: Share,
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
        Self { by_state, held: Share::new(HELD.gauge([service.clone()])) }
    }

    /// How many are in `state`
    pub(crate) fn count(&self, state: EndpointState) -> usize {
        position(state).map_or(0, |position| self.by_state[position].value())
    }

    /// One endpoint more, or one less, in `state`
    pub(crate) fn change(&mut self, state: EndpointState, held: bool, more: bool) {
        let step = |share: &mut Share| {
            share.set(if more { share.value() + 1 } else { share.value().saturating_sub(1) });
        };
        if let Some(position) = position(state) {
            step(&mut self.by_state[position]);
        }
        if held {
            step(&mut self.held);
        }
    }
}

fn position(state: EndpointState) -> Option<usize> {
    STATES.iter().position(|(known, _)| *known == state)
}
