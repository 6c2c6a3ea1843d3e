//! Random operations, the same for both sides

use bytes::Bytes;

use super::side::Answer;
use crate::{
    client::bytes,
    proto::etcdserverpb::{
        CompactionRequest, Compare, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest,
        RequestOp, TxnRequest, WatchCreateRequest, compare::TargetUnion, request_op::Request,
    },
};

/// Streams of watches on each side.
pub(super) const STREAMS: usize = 3;

/// One operation; a lease is a slot, the how-manieth that was granted
#[derive(Clone, Debug)]
pub(super) enum Operation {
    Range(RangeRequest),
    Put(PutRequest),
    Delete(DeleteRangeRequest),
    Txn(TxnRequest),
    Compact(CompactionRequest),
    Grant(LeaseGrantRequest),
    Revoke(i64),
    KeepAlive(i64),
    TimeToLive(i64),
    Leases,
    Watch(usize, WatchCreateRequest),
}

/// Few, so that operations meet; of every order and prefix there can be.
const KEYS: [&[u8]; 14] = [
    b"a",
    b"a/",
    b"a/1",
    b"a/2",
    b"a/b/c",
    b"a0",
    b"b",
    b"b/1",
    b"c",
    b"zz",
    b"\0",
    b"\0\0",
    b"\xff",
    b"\xff\xff\x01",
];

/// Makes operations, and knows of the state only what answers have told
pub(super) struct Generator {
    random: fastrand::Rng,
    revision: i64,
    compacted: i64,
    slots: i64,
}

impl Generator {
    pub(super) fn new(seed: u64) -> Self {
        Self { random: fastrand::Rng::with_seed(seed), revision: 1, compacted: -1, slots: 0 }
    }

    pub(super) fn learn(&mut self, answer: &Answer) {
        self.revision = answer.revision().unwrap_or(self.revision).max(self.revision);
        self.slots += i64::from(answer.granted());
        self.compacted = answer.compacted().unwrap_or(self.compacted);
    }

    pub(super) fn revision(&self) -> i64 {
        self.revision
    }

    /// The first revision that can be read
    pub(super) fn compacted(&self) -> i64 {
        self.compacted.max(1)
    }

    /// What the last compaction named; -1 before the first, as in etcd
    pub(super) fn compacted_or_never(&self) -> i64 {
        self.compacted
    }

    /// The slot of the next lease
    pub(super) fn next_slot(&self) -> i64 {
        self.slots + 1
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        self.random.usize(..n)
    }

    pub(super) fn operation(&mut self) -> Operation {
        match self.random.u8(..100) {
            0..30 => Operation::Put(self.put(true)),
            30..50 => Operation::Range(self.range(true)),
            50..60 => Operation::Delete(self.delete()),
            60..80 => Operation::Txn(self.txn(2)),
            80..85 => Operation::Grant(self.grant()),
            85..88 => Operation::Revoke(self.slot()),
            88..91 => Operation::KeepAlive(self.slot()),
            91..94 => Operation::TimeToLive(self.slot()),
            94..95 => Operation::Leases,
            _ => Operation::Watch(self.random.usize(..STREAMS), self.watch()),
        }
    }

    /// Near the present, so that most of history is soon gone; sometimes refused
    pub(super) fn compaction(&mut self) -> Operation {
        let revision = match self.random.u8(..10) {
            0 => self.revision + 1,
            1 => self.compacted,
            _ => self.random.i64(self.compacted..=self.revision),
        };
        Operation::Compact(CompactionRequest { revision, physical: self.random.bool() })
    }

    fn key(&mut self) -> Bytes {
        // An empty key is refused, so it is rare.
        if self.random.u8(..100) == 0 { Bytes::new() } else { self.some_key() }
    }

    fn some_key(&mut self) -> Bytes {
        bytes(KEYS[self.random.usize(..KEYS.len())])
    }

    fn range_end(&mut self, key: &[u8]) -> Bytes {
        match self.random.u8(..10) {
            0..4 => Bytes::new(),
            4..7 => after_prefix(key),
            7 => bytes([0]),
            _ => self.some_key(),
        }
    }

    /// Mostly none; sometimes one that is gone, or never was
    fn slot(&mut self) -> i64 {
        self.random.i64(1..=self.slots + 2)
    }

    fn maybe_slot(&mut self) -> i64 {
        if self.random.u8(..4) == 0 { self.slot() } else { 0 }
    }

    fn some_revision(&mut self) -> i64 {
        self.random.i64(self.compacted - 1..=self.revision + 1)
    }

    fn put(&mut self, may_ignore: bool) -> PutRequest {
        let value = bytes(["", "1", "2", "33", "a longer value"][self.random.usize(..5)]);
        let mut put =
            PutRequest { key: self.key(), value, lease: self.maybe_slot(), ..PutRequest::default() };
        put.prev_kv = self.random.bool();
        if may_ignore && self.random.u8(..5) == 0 {
            // Sometimes together with what is ignored, which is refused.
            (put.ignore_value, put.ignore_lease) = (self.random.bool(), self.random.bool());
            if put.ignore_value && self.random.u8(..5) > 0 {
                put.value = Bytes::new();
            }
            if put.ignore_lease && self.random.u8(..5) > 0 {
                put.lease = 0;
            }
        }
        put
    }

    fn range(&mut self, any_sort: bool) -> RangeRequest {
        let key = self.key();
        let mut range = RangeRequest { range_end: self.range_end(&key), key, ..RangeRequest::default() };
        range.sort_order = self.random.i32(0..3);
        range.keys_only = self.random.u8(..8) == 0;
        range.count_only = self.random.u8(..8) == 0;
        range.serializable = self.random.bool();
        if self.random.u8(..4) == 0 {
            range.revision = self.some_revision();
        }
        if self.random.u8(..4) == 0 {
            range.min_mod_revision = self.some_revision().max(0);
            range.max_create_revision = self.some_revision().max(0);
        }
        if self.random.u8(..8) == 0 {
            range.max_mod_revision = self.some_revision().max(0);
            range.min_create_revision = self.some_revision().max(0);
        }
        // With a limit, which of equal ones are left is open.
        if any_sort && self.random.bool() {
            range.sort_target = self.random.i32(0..5);
        } else {
            range.limit = self.random.i64(-1..5);
        }
        range
    }

    fn delete(&mut self) -> DeleteRangeRequest {
        let key = self.key();
        // Wide ones are rare, so that there is something to delete.
        let range_end = if self.random.u8(..3) == 0 { self.range_end(&key) } else { Bytes::new() };
        DeleteRangeRequest { key, range_end, prev_kv: self.random.bool() }
    }

    fn grant(&mut self) -> LeaseGrantRequest {
        let ttl = [600, 3600, 100_000, 9_000_000_001][self.random.usize(..4)];
        // One in three has an id of its own, and one of these is there already.
        let id = if self.random.u8(..3) == 0 { 1000 + self.random.i64(0..30) } else { 0 };
        LeaseGrantRequest { ttl, id }
    }

    fn txn(&mut self, depth: u8) -> TxnRequest {
        let may_ignore = self.random.bool();
        TxnRequest {
            compare: (0..self.random.usize(..3)).map(|_| self.compare()).collect(),
            success: self.ops(depth, may_ignore),
            failure: self.ops(depth, may_ignore),
        }
    }

    /// Either with deletes or with puts that keep something, which in one transaction make etcd panic
    fn ops(&mut self, depth: u8, may_ignore: bool) -> Vec<RequestOp> {
        let op = |this: &mut Self| match this.random.u8(..10) {
            0..5 => Request::RequestPut(this.put(may_ignore)),
            5..7 => Request::RequestRange(this.range(false)),
            7..9 if !may_ignore => Request::RequestDeleteRange(this.delete()),
            _ if depth > 0 => {
                let (success, failure) = (this.ops(depth - 1, may_ignore), this.ops(depth - 1, may_ignore));
                Request::RequestTxn(TxnRequest { compare: vec![this.compare()], success, failure })
            }
            _ => Request::RequestRange(this.range(false)),
        };
        (0..self.random.usize(..4)).map(|_| RequestOp { request: Some(op(self)) }).collect()
    }

    fn compare(&mut self) -> Compare {
        let key = self.some_key();
        let (union, target) = match self.random.u8(..5) {
            0 => (TargetUnion::Version(self.random.i64(0..4)), 0),
            1 => (TargetUnion::CreateRevision(self.some_revision()), 1),
            2 => (TargetUnion::ModRevision(self.some_revision()), 2),
            3 => (TargetUnion::Value(bytes(["", "1", "2"][self.random.usize(..3)])), 3),
            _ => (TargetUnion::Lease(self.maybe_slot()), 4),
        };
        // Order between leases means nothing after mapping.
        let results = if target == 4 { [0, 3, 0, 3] } else { [0, 1, 2, 3] };
        let result = results[self.random.usize(..4)];
        let range_end = self.range_end(&key);
        Compare { result, target, key, range_end, target_union: Some(union) }
    }

    fn watch(&mut self) -> WatchCreateRequest {
        let key = self.key();
        let mut watch = WatchCreateRequest { range_end: self.range_end(&key), key, ..Default::default() };
        watch.start_revision = match self.random.u8(..4) {
            0 | 1 => 0,
            // Not the compacted revision itself: what it deleted is lost in 3.4.23.
            2 => self.random.i64(self.compacted() + 1..=self.revision + 8),
            _ => match self.some_revision() {
                revision if revision == self.compacted => 0,
                revision => revision,
            },
        };
        watch.prev_kv = self.random.bool();
        watch.watch_id = if self.random.u8(..8) == 0 { self.random.i64(1..40) } else { 0 };
        watch.filters = match self.random.u8(..6) {
            0 => vec![0],
            1 => vec![1],
            _ => Vec::new(),
        };
        watch
    }
}

/// The key after every key of the prefix; without one, no bound
fn after_prefix(key: &[u8]) -> Bytes {
    match key.iter().rposition(|byte| *byte < 0xff) {
        Some(last) => [&key[..last], &[key[last] + 1]].concat().into(),
        None => bytes([0]),
    }
}
