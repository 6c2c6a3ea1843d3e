//! Leases: who holds which keys, and until when

use std::{
    collections::{BTreeSet, HashMap},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::refused::Refused;

/// etcd's floor: one and a half election timeouts of 1 s, rounded up.
const MIN_TTL: i64 = 2;

/// etcd's `MaxLeaseTTL`.
const MAX_TTL: i64 = 9_000_000_000;

#[derive(Debug, Default)]
pub(crate) struct Leases {
    leases: HashMap<i64, Lease>,
    /// The same leases by the moment they end.
    deadlines: BTreeSet<(Instant, i64)>,
}

#[derive(Debug)]
pub(crate) struct Lease {
    /// As granted, in seconds.
    pub(crate) ttl: i64,
    pub(crate) deadline: Instant,
    pub(crate) keys: BTreeSet<Bytes>,
}

impl Leases {
    /// Grants a lease; an id of 0 is replaced by one from `random`; returns id and TTL
    pub(crate) fn grant(
        &mut self,
        now: Instant,
        ttl: i64,
        id: i64,
        random: &mut fastrand::Rng,
    ) -> Result<(i64, i64), Refused> {
        if ttl > MAX_TTL {
            return Err(Refused::LeaseTtlTooLarge);
        }
        let id = match id {
            0 => std::iter::repeat_with(|| random.i64(1..))
                .find(|id| !self.leases.contains_key(id))
                .expect("the iterator has no end"),
            id => id,
        };
        if self.leases.contains_key(&id) {
            return Err(Refused::LeaseExists);
        }
        let ttl = ttl.max(MIN_TTL);
        let deadline = deadline(now, ttl);
        self.leases.insert(id, Lease { ttl, deadline, keys: BTreeSet::new() });
        self.deadlines.insert((deadline, id));
        Ok((id, ttl))
    }

    /// Starts a lease's time again; returns its TTL
    pub(crate) fn keep_alive(&mut self, now: Instant, id: i64) -> Option<i64> {
        let ttl = self.leases.get(&id)?.ttl;
        self.ends_at(id, deadline(now, ttl));
        Some(ttl)
    }

    /// Takes a lease away; its keys are the caller's to delete
    pub(crate) fn remove(&mut self, id: i64) -> Option<Lease> {
        let lease = self.leases.remove(&id)?;
        self.deadlines.remove(&(lease.deadline, id));
        Some(lease)
    }

    pub(crate) fn lookup(&self, id: i64) -> Option<&Lease> {
        self.leases.get(&id)
    }

    /// Every id, the first to end first
    pub(crate) fn ids(&self) -> impl Iterator<Item = i64> {
        self.deadlines.iter().map(|(_, id)| *id)
    }

    /// A lease whose time is over
    pub(crate) fn due(&self, now: Instant) -> Option<i64> {
        self.deadlines.first().filter(|(deadline, _)| *deadline <= now).map(|(_, id)| *id)
    }

    /// When the next lease ends
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    pub(crate) fn attach(&mut self, id: i64, key: &[u8]) {
        if let Some(lease) = self.leases.get_mut(&id) {
            // A copy, as a request's key is a slice of the whole request.
            lease.keys.insert(Bytes::copy_from_slice(key));
        }
    }

    pub(crate) fn detach(&mut self, id: i64, key: &[u8]) {
        if let Some(lease) = self.leases.get_mut(&id) {
            lease.keys.remove(key);
        }
    }

    fn ends_at(&mut self, id: i64, deadline: Instant) {
        if let Some(lease) = self.leases.get_mut(&id) {
            self.deadlines.remove(&(lease.deadline, id));
            lease.deadline = deadline;
            self.deadlines.insert((deadline, id));
        }
    }
}

impl Lease {
    /// Whole seconds left, rounded down as etcd does
    pub(crate) fn remaining(&self, now: Instant) -> i64 {
        self.deadline.saturating_duration_since(now).as_secs() as i64
    }
}

fn deadline(now: Instant, ttl: i64) -> Instant {
    now + Duration::from_secs(ttl.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn granted(leases: &mut Leases, now: Instant, ttl: i64) -> (i64, i64) {
        leases.grant(now, ttl, 0, &mut fastrand::Rng::with_seed(7)).unwrap()
    }

    #[test]
    fn a_short_ttl_is_raised_to_the_floor() {
        let mut leases = Leases::default();
        assert_eq!(granted(&mut leases, Instant::now(), 1).1, MIN_TTL);
        assert_eq!(granted(&mut leases, Instant::now(), -1).1, MIN_TTL);
    }

    #[test]
    fn a_kept_lease_ends_later() {
        let (mut leases, start) = (Leases::default(), Instant::now());
        let (id, _) = granted(&mut leases, start, 5);
        let later = start + Duration::from_secs(4);
        assert_eq!(leases.keep_alive(later, id), Some(5));
        assert_eq!(leases.due(start + Duration::from_secs(8)), None);
        assert_eq!(leases.due(start + Duration::from_secs(9)), Some(id));
    }

    #[test]
    fn a_removed_lease_is_never_due() {
        let (mut leases, start) = (Leases::default(), Instant::now());
        let (id, _) = granted(&mut leases, start, 5);
        leases.remove(id).unwrap();
        assert_eq!((leases.next_deadline(), leases.keep_alive(start, id)), (None, None));
    }
}
