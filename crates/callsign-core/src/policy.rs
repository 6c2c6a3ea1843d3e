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

/// An endpoint that is ready, as a policy sees it
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Number of the endpoint, unique within its channel and never used again
    pub endpoint: u64,
    /// Its load statistics
    pub load: Arc<Load>,
    /// The streams of its connection
    pub streams: Arc<Streams>,
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
        candidate.streams.has_room() && self.avoid != Some(candidate.endpoint)
    }
}
