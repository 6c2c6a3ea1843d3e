//! Which endpoint takes a call
//!
//! A [`Policy`] looks at the [`Candidate`]s, the endpoints that are ready, and names one of them. It runs on the
//! caller's task, once a call, so it must neither block nor allocate. Each policy has a file of its own:
//!
//! | policy | picks |
//! | --- | --- |
//! | [`P2c`] (default) | of two drawn at random the one with fewer calls in flight |
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
//!     fn pick(&self, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
//!         candidates.iter().position(|candidate| call.allows(candidate))
//!     }
//! }
//! ```

mod p2c;

use std::sync::Arc;

pub use self::p2c::P2c;

use crate::{load::Load, streams::Streams};

/// The rule that picks an endpoint for one call
pub trait Policy: Send + Sync + 'static {
    /// The index of the candidate that takes this call, or `None` if [`Pick::allows`] none of them
    ///
    /// An answer out of bounds, or of a candidate that the call does not allow, counts as `None`.
    fn pick(&self, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize>;
}

/// An endpoint that is ready, as a policy sees it: to be read, not to be changed
#[derive(Clone, Debug)]
pub struct Candidate {
    endpoint: u64,
    load: Arc<Load>,
    streams: Arc<Streams>,
}

impl Candidate {
    /// A candidate with these statistics; channels make them, and tests of policies
    pub fn new(endpoint: u64, load: Arc<Load>, streams: Arc<Streams>) -> Self {
        Self { endpoint, load, streams }
    }

    /// Number of the endpoint, unique within its channel and never used again
    pub fn endpoint(&self) -> u64 {
        self.endpoint
    }

    /// Calls in flight to it, streams included
    pub fn in_flight(&self) -> u32 {
        self.load.in_flight()
    }

    /// Calls sent to it since it is known
    pub fn started(&self) -> u64 {
        self.load.started()
    }

    /// Whether its connection allows one more stream now
    pub fn has_room(&self) -> bool {
        self.streams.has_room()
    }

    /// Whether its connection takes new streams at all
    pub fn is_open(&self) -> bool {
        self.streams.limit() > 0
    }
}

/// What a policy may know of the call that it picks for
#[derive(Debug)]
pub struct Pick<'a> {
    /// The random source: uniform, not for secrets
    pub random: &'a mut fastrand::Rng,
    /// An endpoint that has just handed this call back: another one is wanted
    pub avoid: Option<u64>,
}

impl Pick<'_> {
    /// Whether this call may go to `candidate`: its connection has room, and it is not the one to avoid
    pub fn allows(&self, candidate: &Candidate) -> bool {
        candidate.has_room() && self.avoid != Some(candidate.endpoint)
    }
}
