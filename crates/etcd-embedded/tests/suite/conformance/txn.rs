//! Transactions

use tonic::Code;

use super::{both, refusal, refused};
use crate::{
    client::{Client, bytes, delete, delete_prefix, get, get_prefix, keys, put},
    proto::etcdserverpb::{
        Compare, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest, RequestOp, ResponseOp,
        TxnRequest,
        compare::{CompareResult, CompareTarget, TargetUnion},
        request_op::Request,
        response_op::Response,
    },
};

fn range_op(request: RangeRequest) -> RequestOp {
    RequestOp { request: Some(Request::RequestRange(request)) }
}

fn put_op(request: PutRequest) -> RequestOp {
    RequestOp { request: Some(Request::RequestPut(request)) }
}

fn delete_op(request: DeleteRangeRequest) -> RequestOp {
    RequestOp { request: Some(Request::RequestDeleteRange(request)) }
}

fn txn_op(request: TxnRequest) -> RequestOp {
    RequestOp { request: Some(Request::RequestTxn(request)) }
}

fn then(success: Vec<RequestOp>) -> TxnRequest {
    TxnRequest { success, ..TxnRequest::default() }
}

fn compare(key: &str, result: CompareResult, target: CompareTarget, union: TargetUnion) -> Compare {
    let (result, target) = (result as i32, target as i32);
    Compare { result, target, key: bytes(key), target_union: Some(union), ..Compare::default() }
}

async fn holds(client: &Client, compare: Compare) -> bool {
    let request = TxnRequest { compare: vec![compare], ..TxnRequest::default() };
    client.send(request).await.unwrap().succeeded
}

fn shape(response: &ResponseOp) -> String {
    match response.response.as_ref().unwrap() {
        Response::ResponseRange(range) => format!("{:?}", keys(&range.kvs)),
        Response::ResponsePut(put) => format!("put at {}", put.header.unwrap().revision),
        Response::ResponseDeleteRange(delete) => format!("deleted {}", delete.deleted),
        Response::ResponseTxn(txn) => format!("{} {:?}", txn.succeeded, txn.header),
    }
}

both! {
    async fn every_target_is_compared_in_every_way(client: Client) {
        let base = client.revision().await;
        let lease = client.send(LeaseGrantRequest { ttl: 60, id: 0 }).await.unwrap().id;
        client.send(put("k", "a")).await.unwrap();
        client.send(PutRequest { lease, ..put("k", "b") }).await.unwrap();
        type Union = fn(i64) -> TargetUnion;
        let targets: [(CompareTarget, Union, i64); 4] = [
            (CompareTarget::Version, TargetUnion::Version, 2),
            (CompareTarget::Create, TargetUnion::CreateRevision, base + 1),
            (CompareTarget::Mod, TargetUnion::ModRevision, base + 2),
            (CompareTarget::Lease, TargetUnion::Lease, lease),
        ];
        for (target, union, value) in targets {
            for (result, at, expected) in [
                (CompareResult::Equal, value, true),
                (CompareResult::NotEqual, value, false),
                (CompareResult::Greater, value - 1, true),
                (CompareResult::Greater, value, false),
                (CompareResult::Less, value + 1, true),
                (CompareResult::Less, value, false),
            ] {
                let held = holds(&client, compare("k", result, target, union(at))).await;
                assert_eq!(held, expected, "{target:?} {result:?}");
            }
        }
        let value = |result, text| compare("k", result, CompareTarget::Value, TargetUnion::Value(bytes(text)));
        assert!(holds(&client, value(CompareResult::Equal, "b")).await);
        assert!(holds(&client, value(CompareResult::Greater, "a")).await);
        assert!(!holds(&client, value(CompareResult::Less, "b")).await);
    }

    async fn a_missing_key_has_zeros_and_no_value(client: Client) {
        let zero = compare("no", CompareResult::Equal, CompareTarget::Version, TargetUnion::Version(0));
        assert!(holds(&client, zero).await);
        let value = |result| compare("no", result, CompareTarget::Value, TargetUnion::Value(bytes("")));
        assert!(!holds(&client, value(CompareResult::Equal)).await);
        assert!(!holds(&client, value(CompareResult::NotEqual)).await);
    }

    async fn a_comparison_of_a_range_holds_for_every_key(client: Client) {
        client.send(put("k/a", "1")).await.unwrap();
        client.send(put("k/b", "1")).await.unwrap();
        let ones = compare("k/", CompareResult::Equal, CompareTarget::Value, TargetUnion::Value(bytes("1")));
        let ones = Compare { range_end: bytes("k0"), ..ones };
        assert!(holds(&client, ones.clone()).await);
        client.send(put("k/b", "2")).await.unwrap();
        assert!(!holds(&client, ones).await);
    }

    async fn writes_of_a_transaction_share_a_revision_and_are_seen_by_its_reads(client: Client) {
        let base = client.revision().await;
        let ops = vec![
            range_op(get_prefix("k/")),
            put_op(put("k/a", "1")),
            put_op(put("k/b", "1")),
            range_op(get_prefix("k/")),
            delete_op(delete("k/x")),
        ];
        let answer = client.send(then(ops)).await.unwrap();
        let shapes: Vec<_> = answer.responses.iter().map(shape).collect();
        let at = format!("put at {}", base + 1);
        assert_eq!(shapes, ["[]", &at, &at, "[\"k/a\", \"k/b\"]", "deleted 0"]);
        assert_eq!((answer.succeeded, answer.header.unwrap().revision), (true, base + 1));
        let kvs = client.send(get_prefix("k/")).await.unwrap().kvs;
        assert!(kvs.iter().all(|kv| kv.mod_revision == base + 1 && kv.version == 1));
    }

    async fn headers_inside_a_transaction_have_a_revision_and_nested_ones_nothing(client: Client) {
        let base = client.revision().await;
        let nested = then(vec![put_op(put("k/b", "1"))]);
        let ops = vec![put_op(put("k/a", "1")), range_op(get("k/a")), txn_op(nested)];
        let answer = client.send(then(ops)).await.unwrap();
        let Some(Response::ResponsePut(put)) = &answer.responses[0].response else { panic!() };
        let Some(Response::ResponseRange(range)) = &answer.responses[1].response else { panic!() };
        let Some(Response::ResponseTxn(nested)) = &answer.responses[2].response else { panic!() };
        for header in [put.header.unwrap(), range.header.unwrap()] {
            assert_eq!((header.cluster_id, header.revision, header.raft_term), (0, base + 1, 0));
        }
        assert_eq!(nested.header, Some(Default::default()));
    }

    async fn a_transaction_without_writes_is_no_revision(client: Client) {
        let base = client.revision().await;
        let answer = client.send(then(vec![delete_op(delete("no")), range_op(get("no"))])).await.unwrap();
        assert_eq!(answer.header.unwrap().revision, base);
        assert_eq!(client.revision().await, base);
    }

    async fn nested_comparisons_see_the_keys_as_they_were_before(client: Client) {
        let missing = compare("k", CompareResult::Equal, CompareTarget::Version, TargetUnion::Version(0));
        let nested = TxnRequest {
            compare: vec![missing],
            success: vec![put_op(put("yes", ""))],
            failure: vec![put_op(put("no", ""))],
        };
        client.send(then(vec![put_op(put("k", "1")), txn_op(nested)])).await.unwrap();
        assert_eq!(client.send(get("yes")).await.unwrap().count, 1);
    }

    async fn a_key_is_written_once_in_a_transaction(client: Client) {
        let expected = refused(Code::InvalidArgument, "etcdserver: duplicate key given in txn request");
        let twice = then(vec![put_op(put("k", "1")), put_op(put("k", "2"))]);
        assert_eq!(refusal(client.send(twice).await), expected);
        let deleted = then(vec![put_op(put("k/b", "1")), delete_op(delete_prefix("k/"))]);
        assert_eq!(refusal(client.send(deleted).await), expected);
        let branches = TxnRequest {
            success: vec![put_op(put("k", "1"))],
            failure: vec![put_op(put("k", "2"))],
            ..TxnRequest::default()
        };
        client.send(branches).await.unwrap();
    }

    async fn a_nested_delete_behind_a_nested_put_of_its_key_is_let_through(client: Client) {
        let first = then(vec![put_op(put("k", "1"))]);
        let second = then(vec![delete_op(delete("k"))]);
        let answer = client.send(then(vec![txn_op(first), txn_op(second)])).await.unwrap();
        assert_eq!(client.send(get("k")).await.unwrap().count, 0);
        assert_eq!(client.revision().await, answer.header.unwrap().revision);
    }

    async fn a_delete_from_a_key_on_meets_no_put(client: Client) {
        client.send(put("b", "old")).await.unwrap();
        let from_a = DeleteRangeRequest { range_end: bytes([0]), ..delete("a") };
        let ops = vec![delete_op(from_a), put_op(put("a", "1")), put_op(put("b", "1"))];
        client.send(then(ops)).await.unwrap();
        for key in ["a", "b"] {
            let kv = client.send(get(key)).await.unwrap().kvs.remove(0);
            assert_eq!((kv.version, kv.create_revision == kv.mod_revision), (1, true));
        }
    }

    async fn a_transaction_that_cannot_be_done_writes_nothing(client: Client) {
        let base = client.revision().await;
        let lease = then(vec![put_op(put("k", "1")), put_op(PutRequest { lease: 4711, ..put("l", "1") })]);
        let text = "etcdserver: requested lease not found";
        assert_eq!(refusal(client.send(lease).await), refused(Code::NotFound, text));
        let future = RangeRequest { revision: base + 9, ..get("k") };
        let future = then(vec![put_op(put("k", "1")), range_op(future)]);
        let text = "etcdserver: mvcc: required revision is a future revision";
        assert_eq!(refusal(client.send(future).await), refused(Code::OutOfRange, text));
        let keep = then(vec![put_op(PutRequest { ignore_value: true, ..put("no", "") })]);
        let text = "etcdserver: key not found";
        assert_eq!(refusal(client.send(keep).await), refused(Code::InvalidArgument, text));
        assert_eq!(client.revision().await, base);
    }

    async fn too_many_and_empty_operations_are_refused(client: Client) {
        let many = then((0..129).map(|n| range_op(get(&format!("k{n}")))).collect());
        let text = "etcdserver: too many operations in txn request";
        assert_eq!(refusal(client.send(many).await), refused(Code::InvalidArgument, text));
        let empty = then(vec![RequestOp { request: None }]);
        let text = "etcdserver: key not found";
        assert_eq!(refusal(client.send(empty).await), refused(Code::InvalidArgument, text));
        let text = "etcdserver: key is not provided";
        let keyless = TxnRequest { compare: vec![Compare::default()], ..TxnRequest::default() };
        assert_eq!(refusal(client.send(keyless).await), refused(Code::InvalidArgument, text));
        let keyless = then(vec![put_op(put("", "1"))]);
        assert_eq!(refusal(client.send(keyless).await), refused(Code::InvalidArgument, text));
    }
}
