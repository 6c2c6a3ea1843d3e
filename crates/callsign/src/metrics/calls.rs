//! Of calls, per channel and per endpoint

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use metrics::{Counter, Gauge, Histogram, SharedString};
use tonic::Code;

use super::{CALLS, LATENCY, PICKS, REPLAYS, WAITING};
use crate::instance::Address;

/// What is told of a channel's calls as a whole
#[derive(Debug)]
pub(crate) struct ChannelMeters {
    service: SharedString,
    waiting: Gauge,
    unsent: Counter,
    refused: Counter,
    /// That ended before an endpoint took them.
    untaken: Calls,
}

impl ChannelMeters {
    pub(crate) fn new(service: &str) -> Self {
        let service: SharedString = Arc::<str>::from(service).into();
        let replays = |reason: &'static str| REPLAYS.counter([service.clone(), reason.into()]);
        Self {
            waiting: WAITING.gauge([service.clone()]),
            unsent: replays("unsent"),
            refused: replays("refused"),
            untaken: Calls::new([service.clone(), "none".into()]),
            service,
        }
    }

    pub(crate) fn endpoint(&self, address: &Address) -> EndpointMeters {
        let labels = [self.service.clone(), Arc::<str>::from(address.authority()).into()];
        EndpointMeters {
            picks: PICKS.counter(labels.clone()),
            latency: LATENCY.histogram(labels.clone()),
            calls: Calls::new(labels),
        }
    }

    pub(super) fn service(&self) -> &SharedString {
        &self.service
    }

    /// A call has ended before an endpoint took it
    pub(crate) fn untaken(&self, code: Code) {
        self.untaken.ended(code);
    }

    /// A call is sent again
    pub(crate) fn replayed(&self, reason: Replay) {
        match reason {
            Replay::Unsent => self.unsent.increment(1),
            Replay::Refused => self.refused.increment(1),
        }
    }

    /// A call waits until what is returned is dropped
    pub(crate) fn wait(&self) -> Waiting<'_> {
        self.waiting.increment(1.0);
        Waiting(&self.waiting)
    }
}

/// Why a call is sent again
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Replay {
    /// The connection took it no more: the server has seen nothing of it
    Unsent,
    /// The server said that it has not processed it
    Refused,
}

/// A call that waits
#[derive(Debug)]
pub(crate) struct Waiting<'a>(&'a Gauge);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// What is told of the calls to one endpoint
#[derive(Debug)]
pub(crate) struct EndpointMeters {
    picks: Counter,
    latency: Histogram,
    calls: Calls,
}

impl EndpointMeters {
    /// It was given a call
    pub(crate) fn picked(&self) {
        self.picks.increment(1);
    }

    /// Response headers came
    pub(crate) fn answered(&self, latency: Duration) {
        self.latency.record(latency);
    }

    /// A call has ended
    pub(crate) fn ended(&self, code: Code) {
        self.calls.ended(code);
    }
}

/// Calls by code
#[derive(Debug)]
struct Calls {
    labels: [SharedString; 2],
    /// Asked for when a code is first seen: most never are, and each would be a series in the exporter.
    by_code: [OnceLock<Counter>; CODES.len()],
}

impl Calls {
    fn new(labels: [SharedString; 2]) -> Self {
        Self { labels, by_code: [const { OnceLock::new() }; CODES.len()] }
    }

    fn ended(&self, code: Code) {
        let counter = self.by_code[code as usize].get_or_init(|| {
            let [service, endpoint] = self.labels.clone();
            CALLS.counter([service, endpoint, code_name(code).into()])
        });
        counter.increment(1);
    }
}

/// gRPC's name of a code
pub(crate) fn code_name(code: Code) -> &'static str {
    CODES[code as usize]
}

/// By number ("Status codes and their use in gRPC").
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_has_the_name_that_grpc_gives_it() {
        for number in 0..17 {
            let code = Code::from_i32(number);
            let camel: String = code_name(code)
                .split('_')
                .flat_map(|word| {
                    let mut letters = word.chars();
                    letters.next().into_iter().chain(letters.flat_map(char::to_lowercase)).collect::<Vec<_>>()
                })
                .collect();
            assert_eq!(camel, format!("{code:?}"));
        }
    }
}
