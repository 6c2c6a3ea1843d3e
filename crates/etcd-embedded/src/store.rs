//! What etcd decides, without sockets, tasks or a clock of its own
//!
//! A [`Store`] answers requests. Time is an argument, so that it runs under tokio's paused clock; watches read its
//! history by a cursor of their own, so that it knows nothing of who watches.

mod auth;
mod keys;
mod lease;
mod range;
mod refused;
mod span;
mod txn;
mod watch;
mod write;

use std::time::{Duration, Instant};

pub(crate) use self::{
    auth::{Auth, Need},
    refused::Refused,
    watch::{Watches, progress, refuse_watch},
};
use self::{keys::Keys, lease::Leases, span::Span};
use crate::proto::etcdserverpb::{
    CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, LeaseGrantRequest,
    LeaseGrantResponse, LeaseKeepAliveResponse, LeaseLeasesResponse, LeaseRevokeResponse, LeaseStatus,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, PutRequest, PutResponse, RangeRequest, RangeResponse,
    ResponseHeader, TxnRequest, TxnResponse,
};

/// How a store is bounded
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// History is compacted when it takes more, in bytes.
    pub(crate) history: usize,
    /// How long an unused token lives.
    pub(crate) token_ttl: Duration,
}

/// All of etcd's state
///
/// Responses have headers with a revision only; whoever sends them knows the rest.
#[derive(Debug)]
pub(crate) struct Store {
    keys: Keys,
    leases: Leases,
    pub(crate) auth: Auth,
    random: fastrand::Rng,
}

impl Store {
    /// An empty store at revision 1
    pub(crate) fn new(limits: Limits, random: fastrand::Rng) -> Self {
        let keys = Keys::new(limits.history);
        Self { keys, leases: Leases::default(), auth: Auth::new(limits.token_ttl), random }
    }

    pub(crate) fn revision(&self) -> i64 {
        self.keys.revision()
    }

    /// Bytes that history takes, about
    pub(crate) fn size(&self) -> usize {
        self.keys.bytes()
    }

    pub(crate) fn range(&self, request: &RangeRequest) -> Result<RangeResponse, Refused> {
        range::check(request)?;
        range::range(&self.keys, request)
    }

    pub(crate) fn put(&mut self, request: &PutRequest) -> Result<PutResponse, Refused> {
        write::check_put(request)?;
        let response = write::put(self, request)?;
        self.keys.commit();
        Ok(response)
    }

    pub(crate) fn delete(&mut self, request: &DeleteRangeRequest) -> Result<DeleteRangeResponse, Refused> {
        write::check_delete(request)?;
        let response = write::delete(self, request);
        self.keys.commit();
        Ok(response)
    }

    pub(crate) fn txn(&mut self, request: &TxnRequest) -> Result<TxnResponse, Refused> {
        txn::check(request)?;
        txn::apply(self, request)
    }

    pub(crate) fn compact(&mut self, request: &CompactionRequest) -> Result<CompactionResponse, Refused> {
        self.keys.compact(request.revision)?;
        Ok(CompactionResponse { header: self.header() })
    }

    pub(crate) fn grant(
        &mut self,
        now: Instant,
        request: &LeaseGrantRequest,
    ) -> Result<LeaseGrantResponse, Refused> {
        let (id, ttl) = self.leases.grant(now, request.ttl, request.id, &mut self.random)?;
        Ok(LeaseGrantResponse { header: self.header(), id, ttl, error: String::new() })
    }

    /// Ends a lease and deletes its keys in one revision
    pub(crate) fn revoke(&mut self, id: i64) -> Result<LeaseRevokeResponse, Refused> {
        let lease = self.leases.remove(id).ok_or(Refused::LeaseNotFound)?;
        for key in lease.keys {
            self.keys.delete(&Span::new(&key, &bytes::Bytes::new()));
        }
        self.keys.commit();
        Ok(LeaseRevokeResponse { header: self.header() })
    }

    /// Whether a lease holds keys; revoking such a one is writing
    pub(crate) fn holds_keys(&self, id: i64) -> bool {
        self.leases.lookup(id).is_some_and(|lease| !lease.keys.is_empty())
    }

    /// An unknown lease is answered too, with a TTL of 0
    pub(crate) fn keep_alive(&mut self, now: Instant, id: i64) -> LeaseKeepAliveResponse {
        let ttl = self.leases.keep_alive(now, id).unwrap_or(0);
        LeaseKeepAliveResponse { header: self.header(), id, ttl }
    }

    /// An unknown lease is answered too, with a TTL of -1
    pub(crate) fn time_to_live(
        &self,
        now: Instant,
        request: &LeaseTimeToLiveRequest,
    ) -> LeaseTimeToLiveResponse {
        let (header, id) = (self.header(), request.id);
        match self.leases.lookup(id) {
            None => LeaseTimeToLiveResponse { header, id, ttl: -1, ..Default::default() },
            Some(lease) => LeaseTimeToLiveResponse {
                header,
                id,
                ttl: lease.remaining(now),
                granted_ttl: lease.ttl,
                keys: if request.keys { lease.keys.iter().cloned().collect() } else { Vec::new() },
            },
        }
    }

    pub(crate) fn leases(&self) -> LeaseLeasesResponse {
        let leases = self.leases.ids().map(|id| LeaseStatus { id }).collect();
        LeaseLeasesResponse { header: self.header(), leases }
    }

    /// Ends every lease whose time is over, each in a revision of its own
    pub(crate) fn expire(&mut self, now: Instant) {
        while let Some(id) = self.leases.due(now) {
            // A lease that is due is there.
            let _ = self.revoke(id);
        }
    }

    /// When [`expire`](Self::expire) has something to do
    pub(crate) fn next_expiry(&self) -> Option<Instant> {
        self.leases.next_deadline()
    }

    pub(crate) fn authenticate(
        &mut self,
        now: Instant,
        name: &str,
        password: &str,
    ) -> Result<String, Refused> {
        self.auth.authenticate(now, name, password, &mut self.random)
    }

    pub(crate) fn header(&self) -> Option<ResponseHeader> {
        Some(header(self.keys.revision()))
    }
}

fn header(revision: i64) -> ResponseHeader {
    ResponseHeader { revision, ..ResponseHeader::default() }
}
