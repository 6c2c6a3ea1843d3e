//! Turns that all callers of a policy take from one counter

use std::sync::OnceLock;

use super::{Candidate, Pick};
use crate::sync::{AtomicU64, Ordering::Relaxed};

/// A counter that goes on when the set changes: or its first endpoints would be called more than their share
#[derive(Debug, Default)]
pub(super) struct Turns {
    taken: AtomicU64,
    /// Random: clients that start together do not call the same endpoint together. Small, so that products of turns fit.
    first: OnceLock<u32>,
}

impl Turns {
    /// Takes turns until one is an allowed candidate's; `whose` may give a turn to nobody, but at least one of any
    /// `count` turns to somebody
    pub(super) fn pick(
        &self,
        count: usize,
        candidates: &[Candidate],
        call: &mut Pick<'_>,
        whose: impl Fn(u64) -> Option<usize>,
    ) -> Option<usize> {
        if count == 0 {
            return None;
        }
        let first = u64::from(*self.first.get_or_init(|| call.random.u32(..)));
        let mut last = 0;
        for _ in 0..2 * count {
            let turn = first + self.taken.fetch_add(1, Relaxed);
            if let Some(index) = whose(turn) {
                if call.allows(&candidates[index]) {
                    return Some(index);
                }
                last = index;
            }
        }
        // Others took the turns of those with room, or those have few: any of them is better than to wait.
        super::next_allowed(last + 1, candidates, call)
    }
}
