//! Reading: the options of a range request, in the order in which etcd applies them

use super::{keys::Keys, refused::Refused, span::Span};
use crate::proto::{
    etcdserverpb::{
        RangeRequest, RangeResponse,
        range_request::{SortOrder, SortTarget},
    },
    mvccpb::KeyValue,
};

/// What a request says that needs no store to be refused
pub(crate) fn check(request: &RangeRequest) -> Result<(), Refused> {
    if request.key.is_empty() { Err(Refused::EmptyKey) } else { Ok(()) }
}

/// Answers a request against the keys as they are, an open revision included
pub(crate) fn range(keys: &Keys, request: &RangeRequest) -> Result<RangeResponse, Refused> {
    let current = keys.revision();
    let revision = match request.revision {
        r if r > current => return Err(Refused::FutureRevision),
        r if r <= 0 => current,
        r if r < keys.compacted() => return Err(Refused::Compacted),
        r => r,
    };
    let span = Span::new(&request.key, &request.range_end);
    let header = Some(super::header(current));
    if request.count_only {
        let count = keys.range(&span, revision).count() as i64;
        return Ok(RangeResponse { header, count, ..RangeResponse::default() });
    }
    let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0);
    // Sorting and filtering see every key; else one more than asked for tells whether there are more.
    let take = if sorts(request) || filters(request) { None } else { limit.map(|limit| limit + 1) };
    let mut count = 0;
    let mut kvs: Vec<KeyValue> = Vec::new();
    for kv in keys.range(&span, revision) {
        count += 1;
        if take.is_none_or(|take| kvs.len() < take) && passes(request, kv) {
            kvs.push(kv.clone());
        }
    }
    sort(request, &mut kvs);
    let more = limit.is_some_and(|limit| kvs.len() > limit);
    kvs.truncate(limit.unwrap_or(usize::MAX));
    if request.keys_only {
        kvs.iter_mut().for_each(|kv| kv.value.clear());
    }
    Ok(RangeResponse { header, kvs, more, count })
}

fn sorts(request: &RangeRequest) -> bool {
    request.sort_order != SortOrder::None as i32
}

fn filters(request: &RangeRequest) -> bool {
    let bounds = [
        request.min_mod_revision,
        request.max_mod_revision,
        request.min_create_revision,
        request.max_create_revision,
    ];
    bounds.iter().any(|bound| *bound != 0)
}

fn passes(request: &RangeRequest, kv: &KeyValue) -> bool {
    let inside = |value, min, max| (min == 0 || value >= min) && (max == 0 || value <= max);
    inside(kv.mod_revision, request.min_mod_revision, request.max_mod_revision)
        && inside(kv.create_revision, request.min_create_revision, request.max_create_revision)
}

/// Stable, so that equal ones stay in the order of their keys; etcd leaves that open
fn sort(request: &RangeRequest, kvs: &mut [KeyValue]) {
    let descending = request.sort_order == SortOrder::Descend as i32;
    // Keys come in order; any other target is sorted even if no order is asked for.
    match SortTarget::try_from(request.sort_target) {
        Ok(SortTarget::Key) if descending => kvs.reverse(),
        Ok(SortTarget::Key) | Err(_) => {}
        Ok(target) => kvs.sort_by(|a, b| {
            let order = match target {
                SortTarget::Version => a.version.cmp(&b.version),
                SortTarget::Create => a.create_revision.cmp(&b.create_revision),
                SortTarget::Mod => a.mod_revision.cmp(&b.mod_revision),
                SortTarget::Value | SortTarget::Key => a.value.cmp(&b.value),
            };
            if descending { order.reverse() } else { order }
        }),
    }
}
