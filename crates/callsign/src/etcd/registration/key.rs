//! The key: put under the lease, watched, put again

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use etcd_client::{
    Compare, CompareOp, Event, EventType, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse, TxnResponse,
    WatchOptions,
};
use tokio::time::sleep;

use super::{
    LossCause,
    claims::Claims,
    lease::Lease,
    report::Report,
    wish::{Followed, Wish},
};
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
    /// Locked because attempts in a row borrow the key together; never across a wait
    claims: Mutex<Claims>,
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
    Held(i64),
    /// Someone else has put it
    Foreign,
}

/// Why a watch on the key is left
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum News {
    Deleted,
    Foreign,
    /// It is there although it should not be, or it is time to look, or something else is wished for
    Look,
}

/// What the last event says about the key
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Ours,
    Deleted,
    /// Put under another lease
    Other(i64),
}

impl Key {
    pub(super) fn new(key: String, value: String) -> Self {
        Self { key, value, claims: Mutex::default() }
    }

    /// Keeps the key in etcd, under `lease`, or out of it, as wished, until that is no longer possible
    pub(super) async fn tend(
        &mut self,
        lane: &Lane,
        lease: Lease,
        wish: &mut Followed,
        report: &Report,
    ) -> Ended {
        let mut pace = Pace::new();
        loop {
            pace.on_attempt();
            let error = match self.tend_on_one_watch(lane, lease, wish, report).await {
                Ok(News::Foreign) => return Ended::Overwritten,
                Ok(News::Deleted) => {
                    report.on_lost(LossCause::KeyDeleted);
                    tokio::select! {
                        () = pace.after_loss() => {}
                        () = wish.changed() => {}
                    }
                    continue;
                }
                Ok(News::Look) => continue,
                Err(error) => error,
            };
            if error.is_lease_gone() {
                return Ended::LeaseGone;
            }
            report.on_failed(&error);
            tokio::select! {
                () = pace.after(&error) => {}
                () = wish.changed() => {}
            }
        }
    }

    /// Puts the key or takes it away, then watches it
    ///
    /// No wish interrupts a request that writes: what is under way could overtake the next one.
    async fn tend_on_one_watch(
        &mut self,
        lane: &Lane,
        lease: Lease,
        wish: &mut Followed,
        report: &Report,
    ) -> Result<News, RequestError> {
        let wished = wish.current();
        let revision = if wished.present {
            report.on_wanted();
            let Claim::Held(revision) = self.claim(lane, lease.id).await? else { return Ok(News::Foreign) };
            report.on_registered(lease);
            report.on_followed(wished);
            revision
        } else {
            if !self.may_stand() {
                report.on_paused(wished);
            }
            let revision = self.withdraw(lane, lease.id).await?;
            report.on_paused(wished);
            revision
        };
        let options = WatchOptions::new().with_start_revision(revision + 1);
        let mut watch = tokio::select! {
            opened = Watch::open(lane, &self.key, options) => opened?,
            () = wish.changed() => return Ok(News::Look),
        };
        let look = sleep(Pace::new().vary(LOOK));
        tokio::pin!(look);
        loop {
            let message = tokio::select! {
                message = watch.next() => message?,
                () = &mut look => return Ok(News::Look),
                () = wish.changed() => return Ok(News::Look),
            };
            if let Some(news) = self.news(message.events(), lease.id, wished) {
                return Ok(news);
            }
        }
    }

    /// Whether the key may be in etcd: asked for, and not confirmed to be gone since
    pub(super) fn may_stand(&self) -> bool {
        self.claims().may_stand()
    }

    pub(super) fn claims(&self) -> MutexGuard<'_, Claims> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the key under `lease`: the first time in any case, later only where it is missing or still ours
    ///
    /// The later of two instances with one id wins. One that has lost its lease meanwhile is the earlier one.
    pub(super) async fn claim(&self, lane: &Lane, lease: i64) -> Result<Claim, RequestError> {
        self.claims().on_claiming(lease);
        let claim = self.ask_for(lane, lease).await;
        if !matches!(&claim, Err(error) if error.is_of_host()) {
            self.claims().on_answered(lease);
        }
        if let Ok(Claim::Held(_)) = claim {
            self.claims().on_held(lease);
        }
        claim
    }

    async fn ask_for(&self, lane: &Lane, lease: i64) -> Result<Claim, RequestError> {
        let held = |answer: &TxnResponse| Claim::Held(revision(answer));
        if !self.claims().confirmed() {
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

    /// Deletes the key if it is ours, under whichever lease; tells the revision as of which it is gone
    pub(super) async fn delete(&self, lane: &Lane, limit: Duration) -> Result<i64, RequestError> {
        // One lease, unless some were lost with claims that nobody heard of.
        let deletes = self.claims().leases().rev().fold(None, |otherwise, lease| {
            let ours = Compare::lease(self.key.as_str(), CompareOp::Equal, lease);
            let delete = TxnOp::delete(self.key.as_str(), None);
            let otherwise = otherwise.map(TxnOp::txn);
            Some(
                Txn::new().when([ours]).and_then([delete]).or_else(otherwise.into_iter().collect::<Vec<_>>()),
            )
        });
        // A key that was never asked for is gone as of now.
        let request = deletes.unwrap_or_else(|| Txn::new().and_then([TxnOp::get(self.key.as_str(), None)]));
        Ok(revision(&txn(lane, limit, request).await?))
    }

    /// The same while the registration goes on
    async fn withdraw(&mut self, lane: &Lane, lease: i64) -> Result<i64, RequestError> {
        let revision = self.delete(lane, REQUEST).await?;
        self.claims().on_gone(lease);
        Ok(revision)
    }

    fn put(&self, lease: i64) -> TxnOp {
        // Without its lease the key would stay for ever.
        TxnOp::put(self.key.as_str(), self.value.as_str(), Some(PutOptions::new().with_lease(lease)))
    }

    /// What `events` call for
    fn news(&self, events: &[Event], lease: i64, wished: Wish) -> Option<News> {
        match (seen(events, lease)?, wished.present) {
            (Seen::Ours, true) => None,
            (Seen::Deleted, true) => Some(News::Deleted),
            // A lease that was reported gone lives on after all, and a claim under it has come through.
            (Seen::Other(lease), _) if self.claims().contains(lease) => Some(News::Look),
            (Seen::Other(_), true) => Some(News::Foreign),
            // A claim that was given up has come through after all.
            (Seen::Ours, false) => Some(News::Look),
            // Whether it is free is asked when it is wanted again.
            (Seen::Deleted | Seen::Other(_), false) => None,
        }
    }

    fn owner(&self, present: &KeyValue, lease: i64) -> Owner {
        if present.lease() == lease {
            Owner::Us
        } else if self.claims().contains(present.lease()) {
            Owner::OurFormerLease
        } else {
            Owner::SomeoneElse
        }
    }
}

enum Owner {
    Us,
    /// A lease that etcd has reported gone, with its keys still there; perhaps put there unheard
    OurFormerLease,
    SomeoneElse,
}

async fn txn(lane: &Lane, limit: Duration, txn: Txn) -> Result<TxnResponse, RequestError> {
    lane.request(limit, |client| async move { client.kv_client().txn(txn).await }).await
}

fn revision(answer: &TxnResponse) -> i64 {
    answer.header().map_or(0, etcd_client::ResponseHeader::revision)
}

/// The pair that a get in the transaction's else branch has found
fn present(answer: &TxnResponse) -> Option<KeyValue> {
    answer.op_responses().into_iter().find_map(|response| match response {
        TxnOpResponse::Get(mut got) => got.take_kvs().pop(),
        _ => None,
    })
}

/// What `events` leave behind: only the last one counts
fn seen(events: &[Event], lease: i64) -> Option<Seen> {
    let last = events.last()?;
    let put_under = last.kv().map_or(0, KeyValue::lease);
    Some(match last.event_type() {
        EventType::Delete => Seen::Deleted,
        EventType::Put if put_under == lease => Seen::Ours,
        EventType::Put => Seen::Other(put_under),
    })
}
