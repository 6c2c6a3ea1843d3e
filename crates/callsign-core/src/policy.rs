//! Which endpoint takes a call
//!
//! A [`Policy`] looks at the [`Candidate`]s, the endpoints that are ready, and names one of them. It runs on the
//! caller's task, once a call, so it must neither block nor allocate. Each policy has a file of its own:
//!
//! | policy | picks |
//! | --- | --- |
//! | [`P2cEwma`] (default) | of two drawn at random the one that promises the faster answer |
//! | [`LeastRequest`] | of two drawn at random the one with fewer calls in flight |
//! | [`RoundRobin`] | each in its turn |
//! | [`WeightedRoundRobin`] | each in its turn, the heavier ones more often |
//! | [`RingHash`] | the one that the call's key belongs to |
//! | [`PickFirst`] | the same one until it is lost |
//!
//! # Writing one
//!
//! ```
//! use callsign_core::policy::{Candidate, Pick, Policy};
//!
//! /// Fills the first endpoint before it uses the next.
//! struct FirstFit;
//!
//! impl Policy for FirstFit {
//!     type Plan = ();
//!
//!     fn plan(&self, _: &[Candidate]) {}
//!
//!     fn pick(&self, (): &(), candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
//!         candidates.iter().position(|candidate| call.allows(candidate))
//!     }
//! }
//! ```

mod least_request;
mod p2c_ewma;
mod pick_first;
mod ring_hash;
mod round_robin;
mod weighted_round_robin;

mod pair;
mod turns;

#[cfg(test)]
pub(crate) mod fixture;
#[cfg(test)]
mod laws;
#[cfg(test)]
mod noise;

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

pub use self::{
    least_request::LeastRequest, p2c_ewma::P2cEwma, pick_first::PickFirst, ring_hash::RingHash,
    round_robin::RoundRobin, weighted_round_robin::WeightedRoundRobin,
};

use crate::{load::Load, streams::Streams};

/// The rule that picks an endpoint for one call
pub trait Policy: Send + Sync + 'static {
    /// What is worked out once for a set of candidates, for all picks from it: a hash ring, a schedule
    ///
    /// `()` for policies that need nothing. It is published together with its candidates and never outlives them; what is to
    /// survive a change of the set belongs into the policy itself.
    type Plan: Send + Sync + 'static;

    /// Works out the plan for a set of candidates, off the callers' path; called whenever the set changes
    fn plan(&self, candidates: &[Candidate]) -> Self::Plan;

    /// The index of the candidate that takes this call, or `None` if [`Pick::allows`] none of them
    ///
    /// `plan` was made for these `candidates`. An answer out of bounds, or of a candidate that the caller does not want,
    /// counts as `None`. One that takes no call any more, since others pick at the same time, is a reason to ask again;
    /// the same answer twice counts as `None`, too.
    fn pick(&self, plan: &Self::Plan, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize>;
}

/// An endpoint that is ready, as a policy sees it: to be read, not to be changed
// One cache line: a pick reads two of thousands.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub struct Candidate {
    endpoint: u64,
    load: Arc<Load>,
    streams: Arc<Streams>,
    weight: u32,
    name: Arc<str>,
    zone: Option<Arc<str>>,
}

impl Candidate {
    /// A candidate with these statistics, weight 1, no name and no zone; channels make them, and tests of policies
    pub fn new(endpoint: u64, load: Arc<Load>, streams: Arc<Streams>) -> Self {
        Self { endpoint, load, streams, weight: 1, name: "".into(), zone: None }
    }

    /// The same with a weight; zero counts as one
    pub fn with_weight(self, weight: u32) -> Self {
        Self { weight: weight.max(1), ..self }
    }

    /// The same with a name: what hashing policies know it by
    pub fn with_name(self, name: impl Into<Arc<str>>) -> Self {
        Self { name: name.into(), ..self }
    }

    /// The same in a zone
    pub fn with_zone(self, zone: Option<Arc<str>>) -> Self {
        Self { zone, ..self }
    }

    /// Number of the endpoint, unique within its channel and never used again
    pub fn endpoint(&self) -> u64 {
        self.endpoint
    }

    /// How much of the load it wants, in proportion to the others; at least 1
    pub fn weight(&self) -> u32 {
        self.weight
    }

    /// Its address as `host:port`, the same in all clients; several candidates may have one name
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it runs, if it says so
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// Calls in flight to it, streams included
    pub fn in_flight(&self) -> u32 {
        self.load.in_flight()
    }

    /// Calls sent to it since it is known
    pub fn started(&self) -> u64 {
        self.load.started()
    }

    /// The usual time to the beginning of a response; `None` before the first
    pub fn latency(&self, now: Instant) -> Option<Duration> {
        self.load.latency(now)
    }

    /// Whether its connection allows one more stream now
    pub fn has_room(&self) -> bool {
        self.streams.has_room()
    }

    /// Whether its connection takes new streams at all
    pub fn is_open(&self) -> bool {
        self.streams.limit() > 0
    }

    pub(crate) fn load(&self) -> &Load {
        &self.load
    }
}

#[cfg(target_pointer_width = "64")]
const _: () = assert!(size_of::<Candidate>() == 64);

/// The first candidate at `start` or after it, and around, that the call allows
fn next_allowed(start: usize, candidates: &[Candidate], call: &Pick<'_>) -> Option<usize> {
    let count = candidates.len();
    (start..start + count).map(|index| index % count).find(|&index| call.allows(&candidates[index]))
}

/// What a policy may know of the call that it picks for
#[derive(Debug)]
#[non_exhaustive]
pub struct Pick<'a> {
    /// The random source: uniform, not for secrets
    pub random: &'a mut fastrand::Rng,
    /// The time of the pick
    pub now: Instant,
    /// An endpoint that has just handed this call back: another one is wanted
    pub avoid: Option<u64>,
    /// An endpoint that the caller does not want
    pub excluded: Option<u64>,
    /// What the caller wants to be hashed, if it says so
    pub key: Option<&'a [u8]>,
    /// The request's headers
    pub headers: &'a dyn Headers,
}

/// The headers of a request, whoever keeps them
pub trait Headers: fmt::Debug {
    /// The first value of a header, by its name in lower case
    fn get(&self, name: &str) -> Option<&[u8]>;
}

/// No headers
impl Headers for () {
    fn get(&self, _: &str) -> Option<&[u8]> {
        None
    }
}

impl<'a> Pick<'a> {
    /// A call about which nothing is known
    pub fn new(random: &'a mut fastrand::Rng, now: Instant) -> Self {
        Self { random, now, avoid: None, excluded: None, key: None, headers: &() }
    }

    /// Whether this call may go to `candidate`: its connection has room, it is not one that is not wanted, and if it is on
    /// trial, no other call waits there
    pub fn allows(&self, candidate: &Candidate) -> bool {
        let unwanted = Some(candidate.endpoint);
        candidate.has_room()
            && candidate.load.lets_in()
            && self.avoid != unwanted
            && self.excluded != unwanted
    }
}
