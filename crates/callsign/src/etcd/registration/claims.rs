//! Under which leases a registration has asked for its key, and what may have come of it

/// Leases that are remembered; each one more was granted, asked under without an answer, and lost.
const REMEMBERED: usize = 8;

/// What is known of the claims of one registration
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Oldest first
    tried: Vec<Tried>,
    /// Whether any claim was ever confirmed
    confirmed: bool,
}

#[derive(Debug)]
struct Tried {
    lease: i64,
    /// Claims that were sent and not answered: as far as anyone knows they are still on their way
    open: usize,
    /// Whether the key may be in etcd under this lease
    may_stand: bool,
}

impl Claims {
    /// A claim under `lease` is about to be sent: from now on nobody knows
    pub(super) fn on_claiming(&mut self, lease: i64) {
        let known = self.tried.iter_mut().find(|tried| tried.lease == lease);
        if let Some(tried) = known {
            (tried.open, tried.may_stand) = (tried.open + 1, true);
            return;
        }
        if self.tried.len() == REMEMBERED {
            self.tried.remove(0);
        }
        self.tried.push(Tried { lease, open: 1, may_stand: true });
    }

    /// etcd has answered a claim under `lease`, whatever it said
    pub(super) fn on_answered(&mut self, lease: i64) {
        for tried in self.tried.iter_mut().filter(|tried| tried.lease == lease) {
            tried.open = tried.open.saturating_sub(1);
        }
    }

    /// The key is under `lease`, and so under no other
    pub(super) fn on_held(&mut self, lease: i64) {
        self.confirmed = true;
        for tried in &mut self.tried {
            tried.may_stand = tried.lease == lease;
        }
    }

    /// The key is under none of the leases; a claim that is still on its way may put it under `lease`
    pub(super) fn on_gone(&mut self, lease: i64) {
        for tried in &mut self.tried {
            tried.may_stand = tried.lease == lease && tried.open > 0;
        }
    }

    pub(super) fn confirmed(&self) -> bool {
        self.confirmed
    }

    /// Whether the key may be in etcd: asked for, and not confirmed to be gone since
    pub(super) fn may_stand(&self) -> bool {
        self.tried.iter().any(|tried| tried.may_stand)
    }

    /// Whether the key may be in etcd under another lease than this one, which has outlived its lease then
    pub(super) fn may_outlive(&self, lease: i64) -> bool {
        self.tried.iter().any(|tried| tried.may_stand && tried.lease != lease)
    }

    /// Whether a claim under `lease` may still put the key
    pub(super) fn is_open(&self, lease: i64) -> bool {
        self.tried.iter().any(|tried| tried.lease == lease && tried.open > 0)
    }

    /// Whether a key under `lease` is ours
    pub(super) fn contains(&self, lease: i64) -> bool {
        self.tried.iter().any(|tried| tried.lease == lease)
    }

    /// Newest first
    pub(super) fn leases(&self) -> impl DoubleEndedIterator<Item = i64> {
        self.tried.iter().rev().map(|tried| tried.lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_that_nobody_heard_of_is_remembered_as_ones_own() {
        let mut claims = Claims::default();
        claims.on_claiming(1);
        claims.on_answered(1);
        claims.on_held(1);
        claims.on_claiming(2);
        claims.on_claiming(3);
        assert!([1, 2, 3].into_iter().all(|lease| claims.contains(lease)) && !claims.contains(4));
        assert!(claims.may_outlive(3));
        claims.on_answered(3);
        claims.on_held(3);
        assert!(claims.may_stand() && !claims.may_outlive(3));
    }

    #[test]
    fn what_was_given_up_stays_open_whatever_a_later_claim_says() {
        let mut claims = Claims::default();
        for _ in 0..2 {
            claims.on_claiming(1);
        }
        claims.on_answered(1);
        claims.on_held(1);
        assert!(claims.is_open(1) && !claims.is_open(2));
        claims.on_gone(1);
        assert!(claims.may_stand(), "it may be put again");
        claims.on_gone(2);
        assert!(!claims.may_stand(), "not under a lease that is over");
    }

    #[test]
    fn of_many_leases_the_newest_are_remembered() {
        let mut claims = Claims::default();
        (1..=100).for_each(|lease| claims.on_claiming(lease));
        assert_eq!(claims.leases().collect::<Vec<_>>(), [100, 99, 98, 97, 96, 95, 94, 93]);
    }
}
