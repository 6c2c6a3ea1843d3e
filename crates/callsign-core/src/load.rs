//! What is known of an endpoint's load

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Load statistics of one endpoint
///
/// They belong to the endpoint, not to a connection: they survive reconnects and a new list from discovery.
/// All operations are atomic and wait-free; readers see recent values, not a consistent cut.
#[derive(Debug, Default)]
pub struct Load {
    in_flight: AtomicU32,
    started: AtomicU64,
}

impl Load {
    /// Counts a call as in flight until the matching [`finish`](Self::finish)
    pub fn start(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.started.fetch_add(1, Ordering::Relaxed);
    }

    /// Ends a call that [`start`](Self::start) counted
    pub fn finish(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }

    /// Calls in flight: started, and neither ended nor dropped
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Calls started since the endpoint is known
    pub fn started(&self) -> u64 {
        self.started.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_in_flight_from_start_to_finish() {
        let load = Load::default();
        load.start();
        load.start();
        assert_eq!(load.in_flight(), 2);
        load.finish();
        assert_eq!((load.in_flight(), load.started()), (1, 2));
    }
}
