//! Transactions: what is refused before anything is written, which branches are taken, and doing it

use std::{cmp::Ordering, collections::HashSet};

use bytes::Bytes;

use super::{Store, keys::Keys, range, refused::Refused, span::Span, write};
use crate::proto::etcdserverpb::{
    Compare, RangeRequest, RequestOp, ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
    compare::{CompareResult, CompareTarget, TargetUnion},
    request_op::Request,
    response_op::Response,
};

/// etcd's default for `--max-txn-ops`.
const MAX_OPS: usize = 128;

/// What a request says that needs no store to be refused
pub(crate) fn check(request: &TxnRequest) -> Result<(), Refused> {
    check_ops(request, MAX_OPS)?;
    check_overlaps(&request.success)?;
    check_overlaps(&request.failure)?;
    Ok(())
}

fn check_ops(request: &TxnRequest, max: usize) -> Result<(), Refused> {
    let ops = request.compare.len().max(request.success.len()).max(request.failure.len());
    // A nested transaction has what its parent's longest list leaves over.
    let left = max.checked_sub(ops).ok_or(Refused::TooManyOps)?;
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Refused::EmptyKey);
    }
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(Request::RequestRange(op)) => range::check(op)?,
            Some(Request::RequestPut(op)) => write::check_put(op)?,
            Some(Request::RequestDeleteRange(op)) => write::check_delete(op)?,
            Some(Request::RequestTxn(op)) => check_ops(op, left)?,
            None => return Err(Refused::KeyNotFound),
        }
    }
    Ok(())
}

/// The keys that a list of operations writes.
#[derive(Default)]
struct Writes {
    puts: HashSet<Bytes>,
    deletes: Vec<Deleted>,
}

/// A deleted range, as etcd's interval tree sees it.
struct Deleted {
    start: Bytes,
    end: Bytes,
}

impl Deleted {
    /// Whether the tree finds a put of the key in it
    ///
    /// The tree takes an end of one zero byte for what it is, not for "no bound": a delete from a key on meets no put.
    /// etcd accepts that, so it is accepted here.
    fn meets(&self, key: &[u8]) -> bool {
        if self.end.is_empty() { key == self.start } else { self.start <= key && key < &self.end[..] }
    }
}

impl Writes {
    fn put(&mut self, key: &Bytes) -> Result<(), Refused> {
        if self.deletes.iter().any(|deleted| deleted.meets(key)) || !self.puts.insert(key.clone()) {
            return Err(Refused::DuplicateKey);
        }
        Ok(())
    }
}

/// A key may be put once, and not be put and deleted
///
/// In etcd's order: this level's deletes, then what nested transactions put, then this level's puts. So a nested put
/// before a sibling's nested delete passes, as it does there.
fn check_overlaps(ops: &[RequestOp]) -> Result<Writes, Refused> {
    let mut writes = Writes::default();
    for op in ops {
        if let Some(Request::RequestDeleteRange(op)) = &op.request {
            writes.deletes.push(Deleted { start: op.key.clone(), end: op.range_end.clone() });
        }
    }
    for op in ops {
        if let Some(Request::RequestTxn(op)) = &op.request {
            let success = check_overlaps(&op.success)?;
            let failure = check_overlaps(&op.failure)?;
            // Only one branch is taken: a key may be in both.
            for key in success.puts.iter().chain(failure.puts.difference(&success.puts)) {
                writes.put(key)?;
            }
            writes.deletes.extend(success.deletes.into_iter().chain(failure.deletes));
        }
    }
    for op in ops {
        if let Some(Request::RequestPut(op)) = &op.request {
            writes.put(&op.key)?;
        }
    }
    Ok(writes)
}

/// The branch that is taken, and those of the transactions in it
struct Path {
    success: bool,
    nested: Vec<Self>,
}

/// Compares against the keys as they are before the transaction, nested ones too
fn path(keys: &Keys, request: &TxnRequest) -> Path {
    let success = request.compare.iter().all(|compare| holds(keys, compare));
    let nested = branch(request, success).iter().filter_map(|op| match &op.request {
        Some(Request::RequestTxn(op)) => Some(path(keys, op)),
        _ => None,
    });
    Path { success, nested: nested.collect() }
}

fn branch(request: &TxnRequest, success: bool) -> &[RequestOp] {
    if success { &request.success } else { &request.failure }
}

fn holds(keys: &Keys, compare: &Compare) -> bool {
    let span = Span::new(&compare.key, &compare.range_end);
    let mut found = keys.range(&span, i64::MAX).peekable();
    if found.peek().is_none() {
        // No value is not the empty value; every number of a missing key is 0.
        return compare.target != CompareTarget::Value as i32 && matches(compare, &Default::default());
    }
    found.all(|kv| matches(compare, kv))
}

fn matches(compare: &Compare, kv: &crate::proto::mvccpb::KeyValue) -> bool {
    let union = compare.target_union.as_ref();
    // A union that does not fit the target counts as zero.
    let number = |wanted: fn(&TargetUnion) -> Option<i64>| union.and_then(wanted).unwrap_or(0);
    let order = match CompareTarget::try_from(compare.target) {
        Ok(CompareTarget::Value) => match union {
            Some(TargetUnion::Value(value)) => kv.value.cmp(value),
            _ => kv.value[..].cmp(&[]),
        },
        Ok(CompareTarget::Create) => kv.create_revision.cmp(&number(|union| match union {
            TargetUnion::CreateRevision(revision) => Some(*revision),
            _ => None,
        })),
        Ok(CompareTarget::Mod) => kv.mod_revision.cmp(&number(|union| match union {
            TargetUnion::ModRevision(revision) => Some(*revision),
            _ => None,
        })),
        Ok(CompareTarget::Version) => kv.version.cmp(&number(|union| match union {
            TargetUnion::Version(version) => Some(*version),
            _ => None,
        })),
        Ok(CompareTarget::Lease) => kv.lease.cmp(&number(|union| match union {
            TargetUnion::Lease(lease) => Some(*lease),
            _ => None,
        })),
        Err(_) => Ordering::Equal,
    };
    match CompareResult::try_from(compare.result) {
        Ok(CompareResult::Equal) => order.is_eq(),
        Ok(CompareResult::NotEqual) => order.is_ne(),
        Ok(CompareResult::Greater) => order.is_gt(),
        Ok(CompareResult::Less) => order.is_lt(),
        Err(_) => true,
    }
}

/// Does a checked transaction, all of it or nothing
pub(crate) fn apply(store: &mut Store, request: &TxnRequest) -> Result<TxnResponse, Refused> {
    let path = path(&store.keys, request);
    // etcd's order: every put is looked at before any range is.
    walk(request, &path, &mut |op| match op {
        Request::RequestPut(op) => write::precheck_put(store, op),
        _ => Ok(()),
    })?;
    walk(request, &path, &mut |op| match op {
        Request::RequestRange(op) => precheck_range(&store.keys, op),
        _ => Ok(()),
    })?;
    let response = run(store, request, &path);
    let header = Some(super::header(store.keys.revision()));
    // Also after an error: one that the checks did not foresee, where etcd itself panics.
    store.keys.commit();
    Ok(TxnResponse { header, ..response? })
}

fn precheck_range(keys: &Keys, request: &RangeRequest) -> Result<(), Refused> {
    match request.revision {
        0 => Ok(()),
        revision if revision > keys.revision() => Err(Refused::FutureRevision),
        revision if revision < keys.compacted() => Err(Refused::Compacted),
        _ => Ok(()),
    }
}

fn walk(
    request: &TxnRequest,
    path: &Path,
    look: &mut dyn FnMut(&Request) -> Result<(), Refused>,
) -> Result<(), Refused> {
    let mut nested = path.nested.iter();
    for op in branch(request, path.success).iter().filter_map(|op| op.request.as_ref()) {
        match op {
            Request::RequestTxn(op) => walk(op, next(&mut nested), look)?,
            op => look(op)?,
        }
    }
    Ok(())
}

fn run(store: &mut Store, request: &TxnRequest, path: &Path) -> Result<TxnResponse, Refused> {
    let mut nested = path.nested.iter();
    let mut responses = Vec::new();
    for op in branch(request, path.success).iter().filter_map(|op| op.request.as_ref()) {
        let response = match op {
            Request::RequestRange(op) => Response::ResponseRange(range::range(&store.keys, op)?),
            Request::RequestPut(op) => Response::ResponsePut(write::put(store, op)?),
            Request::RequestDeleteRange(op) => Response::ResponseDeleteRange(write::delete(store, op)),
            Request::RequestTxn(op) => Response::ResponseTxn(run(store, op, next(&mut nested))?),
        };
        responses.push(ResponseOp { response: Some(response) });
    }
    // Only the outermost header has a revision.
    Ok(TxnResponse { header: Some(ResponseHeader::default()), succeeded: path.success, responses })
}

fn next<'a>(nested: &mut std::slice::Iter<'a, Path>) -> &'a Path {
    nested.next().expect("the path was made from the same request")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::etcdserverpb::{DeleteRangeRequest, PutRequest};

    fn put(key: &'static str) -> RequestOp {
        let key = Bytes::from_static(key.as_bytes());
        RequestOp { request: Some(Request::RequestPut(PutRequest { key, ..PutRequest::default() })) }
    }

    fn delete(key: &'static str, range_end: &'static str) -> RequestOp {
        let (key, range_end) = (Bytes::from_static(key.as_bytes()), Bytes::from_static(range_end.as_bytes()));
        let request = DeleteRangeRequest { key, range_end, ..DeleteRangeRequest::default() };
        RequestOp { request: Some(Request::RequestDeleteRange(request)) }
    }

    fn txn(success: Vec<RequestOp>, failure: Vec<RequestOp>) -> RequestOp {
        let request = TxnRequest { success, failure, ..TxnRequest::default() };
        RequestOp { request: Some(Request::RequestTxn(request)) }
    }

    fn checked(success: Vec<RequestOp>) -> Result<(), Refused> {
        check(&TxnRequest { success, ..TxnRequest::default() })
    }

    #[test]
    fn a_key_is_written_once() {
        assert_eq!(checked(vec![put("a"), put("b")]), Ok(()));
        assert_eq!(checked(vec![put("a"), put("a")]), Err(Refused::DuplicateKey));
        assert_eq!(checked(vec![put("b"), delete("a", "c")]), Err(Refused::DuplicateKey));
        assert_eq!(checked(vec![delete("a", "c"), delete("b", "")]), Ok(()));
    }

    #[test]
    fn the_two_branches_of_a_nested_transaction_may_write_the_same_key() {
        assert_eq!(checked(vec![txn(vec![put("a")], vec![put("a")])]), Ok(()));
        assert_eq!(checked(vec![txn(vec![put("a")], vec![]), put("a")]), Err(Refused::DuplicateKey));
    }

    #[test]
    fn nested_operations_count_against_what_their_parent_leaves() {
        let wide = |n| (0..n).map(|_| delete("a", "")).collect::<Vec<_>>();
        assert_eq!(checked(wide(128)), Ok(()));
        assert_eq!(checked(wide(129)), Err(Refused::TooManyOps));
        assert_eq!(checked(vec![txn(wide(127), vec![])]), Ok(()));
        assert_eq!(checked(vec![txn(wide(128), vec![])]), Err(Refused::TooManyOps));
    }
}
