//! The key: put under the lease, watched, put again

use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, Event, EventType, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
    WatchOptions,
};
use tokio::time::sleep;

use super::{LossCause, lease::Lease, report::Report};
use crate::etcd::{
    lane::{Lane, REQUEST},
    pace::Pace,
    request::RequestError,
    watching::Watch,
};

/// How often the key is looked at although its watch is quiet: old servers have lost a DELETE.
const LOOK: Duration = Duration::from_secs(300);

/// The key of one registration and what stands in it
#[derive(Debug)]
pub(super) struct Key {
    key: String,
    value: String,
    /// The lease that the key was put under last; `None` before the first time
    claimed: Option<i64>,
}

/// Why a key is no longer tended
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    LeaseGone,
    Overwritten,
}

/// What an attempt to claim the key found
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// It is there and ours, as of this revision
    Held { lease: i64, revision: i64 },
    /// Someone else has put it
    Foreign,
}

/// What the last event says about the key
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Ours,
    Deleted,
    Foreign,
}

impl Key {
    pub(super) fn new(key: String, value: String) -> Self {
        Self { key, value, claimed: None }
    }

    /// Keeps the key in etcd, under `lease`, until that is no longer possible
    pub(super) async fn tend(&mut self, lane: &Lane, lease: Lease, report: &Report) -> Ended {
        let mut pace = Pace::new();
        loop {
            pace.on_attempt();
            let error = match self.tend_on_one_watch(lane, lease, report).await {
                Ok(Seen::Foreign) => return Ended::Overwritten,
                Ok(Seen::Deleted) => {
                    report.on_lost(LossCause::KeyDeleted);
                    pace.after_loss().await;
                    continue;
                }
                Ok(Seen::Ours) => continue,
                Err(error) => error,
            };
            if error.is_lease_gone() {
                return Ended::LeaseGone;
            }
            report.on_failed(&error);
            pace.after(&error).await;
        }
    }

    /// Claims the key, then watches it; `Ours` means that it is time to look again
    async fn tend_on_one_watch(
        &mut self,
        lane: &Lane,
        lease: Lease,
        report: &Report,
    ) -> Result<Seen, RequestError> {
        let claim = self.claim(lane, lease.id).await?;
        self.on_claimed(&claim);
        let Claim::Held { revision, .. } = claim else { return Ok(Seen::Foreign) };
        report.on_registered(lease);
        let options = WatchOptions::new().with_start_revision(revision + 1);
        let (mut watch, _) = Watch::open(lane, &self.key, options).await?;
        let look = sleep(LOOK.mul_f64(0.9 + 0.2 * fastrand::f64()));
        tokio::pin!(look);
        loop {
            let message = tokio::select! {
                message = watch.next() => message?,
                () = &mut look => return Ok(Seen::Ours),
            };
            match seen(message.events(), lease.id) {
                Seen::Ours => {}
                news => return Ok(news),
            }
        }
    }

    pub(super) fn on_claimed(&mut self, claim: &Claim) {
        if let Claim::Held { lease, .. } = claim {
            self.claimed = Some(*lease);
        }
    }

    /// Puts the key under `lease`: the first time in any case, later only where it is missing or still ours
    ///
    /// The later of two instances with one id wins. One that has lost its lease meanwhile is the earlier one.
    pub(super) async fn claim(&self, lane: &Lane, lease: i64) -> Result<Claim, RequestError> {
        let held = |answer: &TxnResponse| {
            let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
            Claim::Held { lease, revision }
        };
        if self.claimed.is_none() {
            return Ok(held(&txn(lane, REQUEST, Txn::new().and_then([self.put(lease)])).await?));
        }
        let absent = Compare::create_revision(self.key.as_str(), CompareOp::Equal, 0);
        let get = TxnOp::get(self.key.as_str(), None);
        let answer =
            txn(lane, REQUEST, Txn::new().when([absent]).and_then([self.put(lease)]).or_else([get])).await?;
        let Some(present) = present(&answer) else { return Ok(held(&answer)) };
        match self.owner(&present, lease) {
            Owner::Us => Ok(held(&answer)),
            Owner::SomeoneElse => Ok(Claim::Foreign),
            Owner::OurFormerLease => {
                let same = Compare::mod_revision(self.key.as_str(), CompareOp::Equal, present.mod_revision());
                let answer = txn(lane, REQUEST, Txn::new().when([same]).and_then([self.put(lease)])).await?;
                Ok(if answer.succeeded() { held(&answer) } else { Claim::Foreign })
            }
        }
    }

    /// Deletes the key if it is still under `lease`
    pub(super) async fn delete(&self, lane: &Lane, lease: i64, limit: Duration) -> Result<(), RequestError> {
        let ours = Compare::lease(self.key.as_str(), CompareOp::Equal, lease);
        let delete = TxnOp::delete(self.key.as_str(), None);
        txn(lane, limit, Txn::new().when([ours]).and_then([delete])).await.map(drop)
    }

    fn put(&self, lease: i64) -> TxnOp {
        // Without its lease the key would stay for ever.
        TxnOp::put(self.key.as_str(), self.value.as_str(), Some(PutOptions::new().with_lease(lease)))
    }

    fn owner(&self, present: &KeyValue, lease: i64) -> Owner {
        if present.lease() == lease {
            Owner::Us
        } else if Some(present.lease()) == self.claimed {
            Owner::OurFormerLease
        } else {
            Owner::SomeoneElse
        }
    }
}

enum Owner {
    Us,
    /// A lease that etcd has reported gone, with its keys still there
    OurFormerLease,
    SomeoneElse,
}

async fn txn(lane: &Lane, limit: Duration, txn: Txn) -> Result<TxnResponse, RequestError> {
    lane.request(limit, |client| async move { client.kv_client().txn(txn).await }).await
}

/// The pair that a get in the transaction's else branch has found
fn present(answer: &TxnResponse) -> Option<KeyValue> {
    answer.op_responses().into_iter().find_map(|response| match response {
        TxnOpResponse::Get(mut got) => got.take_kvs().pop(),
        _ => None,
    })
}

/// What `events` leave behind: only the last one counts
fn seen(events: &[Event], lease: i64) -> Seen {
    match events.last() {
        None => Seen::Ours,
        Some(event) if event.event_type() == EventType::Delete => Seen::Deleted,
        Some(event) if event.kv().is_some_and(|pair| pair.lease() == lease) => Seen::Ours,
        Some(_) => Seen::Foreign,
    }
}
