//! Ids that nobody else has

use std::hash::{BuildHasher, RandomState};

/// A positive number that no other process draws: for an instance, or for its lease
///
/// fastrand seeds itself with the uptime: of machines that booted together two may draw the same, and would then share a
/// key, and a lease, which looks like a grant whose answer was lost. The standard library's hashing keys come from the
/// system's own source.
pub(super) fn random() -> i64 {
    fastrand::Rng::with_seed(RandomState::new().hash_one(())).i64(1..)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ids were drawn from the thread's generator
    #[test]
    fn processes_whose_generators_were_seeded_alike_draw_other_ids() {
        let draw = || {
            fastrand::seed(7);
            random()
        };
        let (one, other) = (draw(), draw());
        assert!(one > 0 && other > 0 && one != other, "{one} and {other}");
    }
}
