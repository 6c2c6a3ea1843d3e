//! Writing: puts and deletes, and the leases they move keys between

use super::{Store, header, refused::Refused, span::Span};
use crate::proto::etcdserverpb::{DeleteRangeRequest, DeleteRangeResponse, PutRequest, PutResponse};

/// What a put says that needs no store to be refused
pub(crate) fn check_put(request: &PutRequest) -> Result<(), Refused> {
    if request.key.is_empty() {
        return Err(Refused::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(Refused::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(Refused::LeaseProvided);
    }
    Ok(())
}

/// What a delete says that needs no store to be refused
pub(crate) fn check_delete(request: &DeleteRangeRequest) -> Result<(), Refused> {
    if request.key.is_empty() { Err(Refused::EmptyKey) } else { Ok(()) }
}

/// Whether a put of a transaction could be done before the transaction starts
pub(crate) fn precheck_put(store: &Store, request: &PutRequest) -> Result<(), Refused> {
    if (request.ignore_value || request.ignore_lease) && store.keys.latest(&request.key).is_none() {
        return Err(Refused::KeyNotFound);
    }
    known_lease(store, request.lease)
}

fn known_lease(store: &Store, lease: i64) -> Result<(), Refused> {
    if lease != 0 && store.leases.lookup(lease).is_none() {
        return Err(Refused::LeaseNotFound);
    }
    Ok(())
}

/// Does a checked put in the open revision; the caller commits
pub(crate) fn put(store: &mut Store, request: &PutRequest) -> Result<PutResponse, Refused> {
    known_lease(store, request.lease)?;
    let (mut value, mut lease) = (request.value.clone(), request.lease);
    if request.ignore_value || request.ignore_lease {
        let kept = store.keys.latest(&request.key).ok_or(Refused::KeyNotFound)?;
        if request.ignore_value {
            value = kept.value.clone();
        }
        if request.ignore_lease {
            lease = kept.lease;
        }
    }
    let before = store.keys.put(&request.key, &value, lease);
    if let Some(before) = &before {
        store.leases.detach(before.lease, &request.key);
    }
    if lease != 0 {
        store.leases.attach(lease, &request.key);
    }
    let header = Some(header(store.keys.revision()));
    Ok(PutResponse { header, prev_kv: before.filter(|_| request.prev_kv) })
}

/// Does a checked delete in the open revision; the caller commits
pub(crate) fn delete(store: &mut Store, request: &DeleteRangeRequest) -> DeleteRangeResponse {
    let before = store.keys.delete(&Span::new(&request.key, &request.range_end));
    for kv in &before {
        store.leases.detach(kv.lease, &kv.key);
    }
    let header = Some(header(store.keys.revision()));
    let deleted = before.len() as i64;
    DeleteRangeResponse { header, deleted, prev_kvs: if request.prev_kv { before } else { Vec::new() } }
}
