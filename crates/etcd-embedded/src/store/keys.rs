//! Keys through time: every version since the last compaction, and the order in which they came

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use super::{refused::Refused, span::Span};
use crate::proto::mvccpb::KeyValue;

/// What an entry of the log costs beside its key and value: two [`KeyValue`]s and their places.
const ENTRY_OVERHEAD: usize = 256;

/// The multi-version map
///
/// A version is a [`KeyValue`]; one with `version` 0 is a tombstone. Writes go to the revision after the current one;
/// [`commit`](Self::commit) ends it, so that a transaction's writes share theirs.
#[derive(Debug)]
pub(crate) struct Keys {
    revision: i64,
    /// History before it is gone; -1 as in etcd, so that a compaction at 0 works once.
    compacted: i64,
    /// Versions of a key, oldest first.
    histories: BTreeMap<Bytes, Vec<KeyValue>>,
    /// Every version from `compacted` on, in the order of the writes.
    log: VecDeque<KeyValue>,
    /// Of the log, as [`cost`] counts.
    bytes: usize,
    limit: usize,
    /// Whether the next revision has writes.
    dirty: bool,
}

impl Keys {
    /// An empty map whose history is compacted when it takes more than `limit` bytes
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            // etcd's: the first write is revision 2.
            revision: 1,
            compacted: -1,
            histories: BTreeMap::new(),
            log: VecDeque::new(),
            bytes: 0,
            limit,
            dirty: false,
        }
    }

    /// The last revision, or the one that is being written
    pub(crate) fn revision(&self) -> i64 {
        self.revision + i64::from(self.dirty)
    }

    pub(crate) fn compacted(&self) -> i64 {
        self.compacted
    }

    /// Bytes that history takes, about
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The key as it was at that revision
    pub(crate) fn at(&self, key: &[u8], revision: i64) -> Option<&KeyValue> {
        alive(self.histories.get(key)?, revision)
    }

    /// The key as it is, this revision's writes included
    pub(crate) fn latest(&self, key: &[u8]) -> Option<&KeyValue> {
        self.at(key, i64::MAX)
    }

    /// Keys of the span as they were at that revision, in order
    pub(crate) fn range(&self, span: &Span, revision: i64) -> impl Iterator<Item = &KeyValue> {
        let histories =
            if span.is_empty() { None } else { Some(self.histories.range::<[u8], _>(span.bounds())) };
        histories.into_iter().flatten().filter_map(move |(_, history)| alive(history, revision))
    }

    /// Writes a value; returns the version before, if the key was there
    ///
    /// Key and value are copied: what comes off the wire is a slice of a buffer many times its size.
    pub(crate) fn put(&mut self, key: &[u8], value: &[u8], lease: i64) -> Option<KeyValue> {
        let before = self.latest(key).cloned();
        let value = Bytes::copy_from_slice(value);
        let key = before.as_ref().map_or_else(|| Bytes::copy_from_slice(key), |kv| kv.key.clone());
        let mod_revision = self.revision + 1;
        let (create_revision, version) =
            before.as_ref().map_or((mod_revision, 1), |kv| (kv.create_revision, kv.version + 1));
        self.push(KeyValue { key, create_revision, mod_revision, version, value, lease });
        before
    }

    /// Deletes every key of the span; returns what they were
    pub(crate) fn delete(&mut self, span: &Span) -> Vec<KeyValue> {
        let before: Vec<_> = self.range(span, i64::MAX).cloned().collect();
        for kv in &before {
            let mod_revision = self.revision + 1;
            self.push(KeyValue { key: kv.key.clone(), mod_revision, ..KeyValue::default() });
        }
        before
    }

    /// Ends the revision that is being written, if there is one
    pub(crate) fn commit(&mut self) {
        if std::mem::take(&mut self.dirty) {
            self.revision += 1;
            if self.bytes > self.limit {
                self.compact_to_half();
            }
        }
    }

    /// Drops history before the revision
    pub(crate) fn compact(&mut self, revision: i64) -> Result<(), Refused> {
        if revision <= self.compacted {
            return Err(Refused::Compacted);
        }
        if revision > self.revision {
            return Err(Refused::FutureRevision);
        }
        self.compacted = revision;
        let overtaken = self.log.partition_point(|kv| kv.mod_revision < revision);
        for old in self.log.drain(..overtaken) {
            self.bytes -= cost(&old);
            trim(&mut self.histories, &old.key, revision);
        }
        // The compacted revision itself can still be watched, its keys have no older versions though.
        for kept in self.log.iter().take_while(|kv| kv.mod_revision == revision) {
            trim(&mut self.histories, &kept.key, revision);
        }
        Ok(())
    }

    /// Every write from that revision on, oldest first
    pub(crate) fn since(&self, revision: i64) -> impl DoubleEndedIterator<Item = &KeyValue> {
        let start = self.log.partition_point(|kv| kv.mod_revision < revision);
        self.log.range(start..)
    }

    /// Every write before that revision, newest first
    pub(crate) fn before(&self, revision: i64) -> impl Iterator<Item = &KeyValue> {
        let end = self.log.partition_point(|kv| kv.mod_revision < revision);
        self.log.range(..end).rev()
    }

    fn push(&mut self, kv: KeyValue) {
        self.dirty = true;
        self.bytes += cost(&kv);
        self.histories.entry(kv.key.clone()).or_default().push(kv.clone());
        self.log.push_back(kv);
    }

    fn compact_to_half(&mut self) {
        let mut left = self.bytes;
        let half = self.limit / 2;
        let boundary = self.log.iter().find(|kv| {
            left -= cost(kv);
            left <= half
        });
        if let Some(revision) = boundary.map(|kv| kv.mod_revision.max(self.compacted + 1)) {
            // Between the last compaction and now by construction.
            let _ = self.compact(revision);
        }
    }
}

fn cost(kv: &KeyValue) -> usize {
    kv.key.len() + kv.value.len() + ENTRY_OVERHEAD
}

/// The last version up to the revision, if it is no tombstone
fn alive(history: &[KeyValue], revision: i64) -> Option<&KeyValue> {
    // Most reads are of the present.
    let last = match history.last()? {
        last if last.mod_revision <= revision => last,
        _ => history[..history.partition_point(|kv| kv.mod_revision <= revision)].last()?,
    };
    (last.version > 0).then_some(last)
}

/// Drops a key's versions that no revision from `compacted` on shows
fn trim(histories: &mut BTreeMap<Bytes, Vec<KeyValue>>, key: &Bytes, compacted: i64) {
    let Some(history) = histories.get_mut(key) else { return };
    let seen = history.partition_point(|kv| kv.mod_revision <= compacted);
    let tombstone = seen > 0 && history[seen - 1].version == 0;
    history.drain(..if tombstone { seen } else { seen.saturating_sub(1) });
    if history.is_empty() {
        histories.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    fn one(text: &'static str) -> Span {
        Span::new(&key(text), &Bytes::new())
    }

    fn put(keys: &mut Keys, name: &'static str, value: &'static str) -> i64 {
        keys.put(name.as_bytes(), value.as_bytes(), 0);
        keys.commit();
        keys.revision()
    }

    fn delete(keys: &mut Keys, name: &'static str) -> i64 {
        keys.delete(&one(name));
        keys.commit();
        keys.revision()
    }

    #[test]
    fn the_past_stays_readable_until_it_is_compacted() {
        let mut keys = Keys::new(usize::MAX);
        let first = put(&mut keys, "a", "1");
        let second = put(&mut keys, "a", "2");
        let gone = delete(&mut keys, "a");
        assert_eq!(keys.at(b"a", first).map(|kv| kv.value.clone()), Some(key("1")));
        assert_eq!(keys.at(b"a", second).map(|kv| kv.version), Some(2));
        assert_eq!(keys.at(b"a", gone), None);
        keys.compact(second).unwrap();
        assert_eq!(keys.at(b"a", second).map(|kv| kv.version), Some(2));
        assert_eq!(keys.since(0).count(), 2);
    }

    #[test]
    fn a_deleted_key_leaves_nothing_behind_a_compaction() {
        let mut keys = Keys::new(usize::MAX);
        put(&mut keys, "a", "1");
        delete(&mut keys, "a");
        put(&mut keys, "b", "1");
        keys.compact(keys.revision()).unwrap();
        assert_eq!(keys.histories.len(), 1);
        assert_eq!(keys.log.len(), 1);
    }

    #[test]
    fn a_key_made_again_starts_at_version_one() {
        let mut keys = Keys::new(usize::MAX);
        put(&mut keys, "a", "1");
        delete(&mut keys, "a");
        let again = put(&mut keys, "a", "2");
        let kv = keys.latest(b"a").unwrap();
        assert_eq!((kv.create_revision, kv.version), (again, 1));
    }

    #[test]
    fn compaction_refuses_the_past_and_the_future() {
        let mut keys = Keys::new(usize::MAX);
        put(&mut keys, "a", "1");
        assert_eq!(keys.compact(3), Err(Refused::FutureRevision));
        keys.compact(2).unwrap();
        assert_eq!(keys.compact(2), Err(Refused::Compacted));
    }

    #[test]
    fn what_is_kept_holds_nothing_of_the_request() {
        let request = Bytes::from(vec![b'x'; 8192]);
        let mut keys = Keys::new(usize::MAX);
        keys.put(&request.slice(10..13), &request.slice(20..30), 0);
        keys.commit();
        let within = |bytes: &Bytes| request.as_ptr_range().contains(&bytes.as_ptr());
        let kv = keys.latest(b"xxx").unwrap();
        assert!(!within(&kv.key) && !within(&kv.value));
    }

    #[test]
    fn history_is_compacted_when_it_takes_too_much() {
        let limit = 100 * ENTRY_OVERHEAD;
        let mut keys = Keys::new(limit);
        for _ in 0..1000 {
            put(&mut keys, "a", "1");
            assert!(keys.bytes <= limit);
        }
        assert!(keys.histories[&key("a")].len() <= 100);
        assert!(keys.compacted() > 900);
        assert_eq!(keys.latest(b"a").map(|kv| kv.version), Some(1000));
    }
}
