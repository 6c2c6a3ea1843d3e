//! Thousands of random operations, sent to the embedded server and to a real etcd, and everything they answer compared
//!
//! `ETCD_EMBEDDED_SEED` repeats a run, `ETCD_EMBEDDED_OPS` makes it shorter or longer.

mod operation;
mod side;

use std::{
    env,
    io::{self, Write as _},
    time::Duration,
};

use etcd_embedded::EmbeddedEtcd;
use tokio::{
    join,
    time::{Instant, sleep},
};

use self::{
    operation::{Generator, Operation},
    side::{Side, Watched},
};
use crate::{
    client::{all, delete, put},
    proto::etcdserverpb::{LeaseGrantRequest, PutRequest, RangeRequest},
    real::Etcd,
};

/// What is not compared, and why
const LEFT_OUT: [(&str, &str); 11] = [
    ("cluster, member and lease ids", "made up by each; lease ids are mapped to the order of granting"),
    ("raft terms", "without raft there is nothing to count"),
    ("remaining TTLs", "the two clocks are read at different times; granted TTLs and keys are compared"),
    (
        "batching of events",
        "etcd promises that revisions are not split, no more; events are compared flattened",
    ),
    ("order between watches", "etcd tells of history and compaction every 100 ms, of the present at once"),
    ("headers of events", "they say how far the server was when it sent, not what it sent"),
    ("progress answers", "3.4.23 lets them overtake events, which this server does on demand only"),
    (
        "order of equals in a sorted range",
        "Go's sort is not stable; that it is sorted is checked on both sides",
    ),
    ("a watch from a compacted revision that deleted", "3.4.23 loses that delete, a bug mended in 3.4.34"),
    ("keeping a value or lease after a delete in one transaction", "etcd panics"),
    ("leases that end at the same time", "their order is open; one at a time is compared"),
];

const OPERATIONS: usize = 6000;

/// Operations between two points where every watch is waited for.
const ROUND: usize = 150;

/// Rounds between two leases that are left to expire: each costs seconds.
const EXPIRY: usize = 16;

#[tokio::test]
async fn random_operations_have_the_same_answers_and_events() {
    let Some(etcd) = Etcd::start().await else { return };
    let seed = number("ETCD_EMBEDDED_SEED").unwrap_or_else(|| fastrand::u64(..));
    let operations = number("ETCD_EMBEDDED_OPS").map_or(OPERATIONS, |n| n as usize);
    // Not by a macro, whose output a passing test does not show.
    let _ = writeln!(io::stderr(), "etcd-embedded: {operations} operations, ETCD_EMBEDDED_SEED={seed}");
    let embedded = EmbeddedEtcd::start("127.0.0.1:0").await.unwrap();
    let mut pair = Pair::new(&embedded, &etcd, seed);
    for round in 0..operations / ROUND {
        for _ in 0..ROUND {
            let operation = pair.generator.operation();
            pair.apply(operation).await;
        }
        pair.meet().await;
        if round % EXPIRY == EXPIRY - 1 {
            pair.let_a_lease_expire().await;
        }
        pair.end_some_watches().await;
        let compaction = pair.generator.compaction();
        pair.apply(compaction).await;
    }
    pair.meet().await;
    pair.compare_history().await;
    let (answers, refusals, events) = (pair.answers, pair.refusals, pair.events);
    println!("compared {answers} answers, {refusals} refusals, {events} events");
    // The generator must not have gone astray: most of what it makes works.
    assert!(answers > 2 * refusals && refusals > operations / 20 && events > operations);
    for (what, why) in LEFT_OUT {
        println!("left out: {what}: {why}");
    }
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().expect("a number"))
}

struct Pair {
    embedded: Side,
    real: Side,
    generator: Generator,
    watched: Vec<Watched>,
    answers: usize,
    refusals: usize,
    events: usize,
}

impl Pair {
    fn new(embedded: &EmbeddedEtcd, real: &Etcd, seed: u64) -> Self {
        Self {
            embedded: Side::new(embedded.endpoint()),
            real: Side::new(&real.endpoint()),
            generator: Generator::new(seed),
            watched: Vec::new(),
            answers: 0,
            refusals: 0,
            events: 0,
        }
    }

    async fn apply(&mut self, operation: Operation) {
        let (ours, theirs) =
            join!(self.embedded.apply(operation.clone()), self.real.apply(operation.clone()));
        assert_eq!(ours, theirs, "embedded and real differ on {operation:#?}");
        self.generator.learn(&ours);
        *(if ours.is_refusal() { &mut self.refusals } else { &mut self.answers }) += 1;
        let compacted = self.generator.compacted_or_never();
        self.watched.extend(ours.watched(&operation).map(|watched| watched.starts_before(compacted)));
    }

    /// Waits until every watch was told everything, then compares what they were told
    async fn meet(&mut self) {
        let mut starts: Vec<_> = self.watched.iter().map(Watched::start).collect();
        starts.sort();
        starts.dedup();
        for start in starts {
            let marker = PutRequest { key: start.clone(), ..put("k", "marker") };
            let put = self.revision_of(Operation::Put(marker)).await;
            let delete = Operation::Delete(crate::client::delete_of(start.clone()));
            let deleted = self.revision_of(delete).await;
            self.watched.iter_mut().for_each(|watched| watched.expect(&start, put, deleted));
        }
        for watched in &self.watched {
            join!(self.embedded.wait_for(watched), self.real.wait_for(watched));
        }
        self.events += self.embedded.assert_told_as(&self.real);
        self.watched.retain(|watched| !watched.ends_by_itself());
    }

    async fn revision_of(&mut self, operation: Operation) -> i64 {
        self.apply(operation).await;
        self.generator.revision()
    }

    /// Only here, where nothing is on its way to them
    async fn end_some_watches(&mut self) {
        while self.watched.len() > 12 {
            let watched = self.watched.remove(self.generator.below(self.watched.len()));
            join!(self.embedded.cancel(&watched), self.real.cancel(&watched));
        }
        self.events += self.embedded.assert_told_as(&self.real);
    }

    async fn let_a_lease_expire(&mut self) {
        let slot = self.generator.next_slot();
        self.apply(Operation::Grant(LeaseGrantRequest { ttl: 2, id: 0 })).await;
        for key in ["a/1", "b", "zz"] {
            self.apply(Operation::Put(PutRequest { lease: slot, ..put(key, "short") })).await;
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while !(self.embedded.has_ended(slot).await && self.real.has_ended(slot).await) {
            assert!(Instant::now() < deadline, "a lease of 2 s is there after 10 s");
            sleep(Duration::from_millis(50)).await;
        }
        self.apply(Operation::Range(all())).await;
        self.meet().await;
    }

    /// Every key at every revision that is left
    async fn compare_history(&mut self) {
        for revision in self.generator.compacted()..=self.generator.revision() {
            self.apply(Operation::Range(RangeRequest { revision, ..all() })).await;
        }
        self.apply(Operation::Leases).await;
        for slot in 1..self.generator.next_slot() {
            self.apply(Operation::TimeToLive(slot)).await;
        }
        // Both still work.
        self.apply(Operation::Put(put("last", "one"))).await;
        self.apply(Operation::Delete(delete("last"))).await;
    }
}
