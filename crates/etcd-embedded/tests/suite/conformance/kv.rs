//! Put, range, delete, compact

use tonic::Code;

use super::{both, refusal, refused};
use crate::{
    client::{Client, all, bytes, delete, delete_prefix, get, get_prefix, keys, put},
    proto::{
        etcdserverpb::{
            CompactionRequest, DeleteRangeRequest, LeaseGrantRequest, PutRequest, RangeRequest,
            range_request::{SortOrder, SortTarget},
        },
        mvccpb::KeyValue,
    },
};

/// Puts a=1, b=2, b=3, c=0 and returns the revision before
async fn four_puts(client: &Client) -> i64 {
    let base = client.revision().await;
    for (key, value) in [("k/a", "1"), ("k/b", "2"), ("k/b", "3"), ("k/c", "0")] {
        client.send(put(key, value)).await.unwrap();
    }
    base
}

fn sorted(target: SortTarget, order: SortOrder) -> RangeRequest {
    RangeRequest { sort_target: target as i32, sort_order: order as i32, ..get_prefix("k/") }
}

both! {
    #[fresh] async fn a_new_etcd_is_at_revision_one_and_its_first_write_is_two(client: Client) {
        assert_eq!(client.revision().await, 1);
        assert_eq!(client.send(put("a", "1")).await.unwrap().header.unwrap().revision, 2);
    }

    async fn a_key_has_the_revisions_of_its_creation_and_its_last_write_and_counts_versions(client: Client) {
        let base = four_puts(&client).await;
        let answer = client.send(get("k/b")).await.unwrap();
        let kv = KeyValue {
            key: bytes("k/b"),
            create_revision: base + 2,
            mod_revision: base + 3,
            version: 2,
            value: bytes("3"),
            lease: 0,
        };
        assert_eq!((answer.kvs, answer.count, answer.more), (vec![kv], 1, false));
    }

    async fn a_header_names_cluster_member_and_term(client: Client) {
        let header = client.send(get("nothing")).await.unwrap().header.unwrap();
        assert!(header.cluster_id != 0 && header.member_id != 0 && header.raft_term > 0, "{header:?}");
    }

    async fn ranges_are_one_key_up_to_an_end_or_from_a_key_on(client: Client) {
        four_puts(&client).await;
        client.send(put("z", "")).await.unwrap();
        let to_c = RangeRequest { range_end: bytes("k/c"), ..get("k/a") };
        let from_c = RangeRequest { range_end: bytes([0]), ..get("k/c") };
        let backwards = RangeRequest { range_end: bytes("k/a"), ..get("k/c") };
        assert_eq!(keys(&client.send(to_c).await.unwrap().kvs), ["k/a", "k/b"]);
        assert_eq!(keys(&client.send(from_c).await.unwrap().kvs), ["k/c", "z"]);
        assert_eq!(keys(&client.send(backwards).await.unwrap().kvs), [""; 0]);
        assert_eq!(client.send(all()).await.unwrap().count, 4);
    }

    async fn a_limit_cuts_the_keys_and_not_the_count(client: Client) {
        four_puts(&client).await;
        let answer = client.send(RangeRequest { limit: 2, ..get_prefix("k/") }).await.unwrap();
        assert_eq!((keys(&answer.kvs), answer.more, answer.count), (vec!["k/a".into(), "k/b".into()], true, 3));
        let answer = client.send(RangeRequest { limit: 3, ..get_prefix("k/") }).await.unwrap();
        assert_eq!((answer.kvs.len(), answer.more), (3, false));
        let answer = client.send(RangeRequest { limit: -1, ..get_prefix("k/") }).await.unwrap();
        assert_eq!((answer.kvs.len(), answer.more), (3, false));
    }

    async fn count_only_has_no_keys_and_keys_only_has_no_values(client: Client) {
        four_puts(&client).await;
        let answer = client.send(RangeRequest { count_only: true, ..get_prefix("k/") }).await.unwrap();
        assert_eq!((answer.kvs.len(), answer.count), (0, 3));
        let answer = client.send(RangeRequest { keys_only: true, ..get_prefix("k/") }).await.unwrap();
        assert!(answer.kvs.iter().all(|kv| kv.value.is_empty() && kv.version > 0));
        assert_eq!(answer.kvs.len(), 3);
    }

    async fn ranges_are_sorted_by_any_field_in_either_order(client: Client) {
        four_puts(&client).await;
        let cases = [
            (SortTarget::Key, SortOrder::Descend, ["k/c", "k/b", "k/a"]),
            (SortTarget::Value, SortOrder::Ascend, ["k/c", "k/a", "k/b"]),
            (SortTarget::Value, SortOrder::None, ["k/c", "k/a", "k/b"]),
            (SortTarget::Mod, SortOrder::Descend, ["k/c", "k/b", "k/a"]),
            (SortTarget::Create, SortOrder::Ascend, ["k/a", "k/b", "k/c"]),
        ];
        for (target, order, expected) in cases {
            let answer = client.send(sorted(target, order)).await.unwrap();
            assert_eq!(keys(&answer.kvs), expected, "{target:?} {order:?}");
        }
        let most = RangeRequest { limit: 1, ..sorted(SortTarget::Version, SortOrder::Descend) };
        let answer = client.send(most).await.unwrap();
        assert_eq!((keys(&answer.kvs), answer.more), (vec!["k/b".to_owned()], true));
    }

    async fn revisions_filter_keys_and_not_the_count(client: Client) {
        let base = four_puts(&client).await;
        let cases = [
            (RangeRequest { min_mod_revision: base + 3, ..get_prefix("k/") }, vec!["k/b", "k/c"]),
            (RangeRequest { max_mod_revision: base + 3, ..get_prefix("k/") }, vec!["k/a", "k/b"]),
            (RangeRequest { min_create_revision: base + 2, ..get_prefix("k/") }, vec!["k/b", "k/c"]),
            (RangeRequest { max_create_revision: base + 1, ..get_prefix("k/") }, vec!["k/a"]),
        ];
        for (request, expected) in cases {
            let answer = client.send(request).await.unwrap();
            assert_eq!((keys(&answer.kvs), answer.count), (expected.iter().map(|key| (*key).to_owned()).collect(), 3));
        }
    }

    async fn the_past_is_read_at_its_revision_and_the_future_is_refused(client: Client) {
        let base = four_puts(&client).await;
        let then = client.send(RangeRequest { revision: base + 2, ..get_prefix("k/") }).await.unwrap();
        assert_eq!(keys(&then.kvs), ["k/a", "k/b"]);
        assert_eq!((&then.kvs[1].value[..], then.header.unwrap().revision), (&b"2"[..], base + 4));
        let future = client.send(RangeRequest { revision: base + 5, ..get("k/a") }).await;
        let text = "etcdserver: mvcc: required revision is a future revision";
        assert_eq!(refusal(future), refused(Code::OutOfRange, text));
    }

    async fn a_put_and_a_delete_return_what_was_there_if_asked(client: Client) {
        four_puts(&client).await;
        let answer = client.send(PutRequest { prev_kv: true, ..put("k/b", "4") }).await.unwrap();
        assert_eq!(answer.prev_kv.map(|kv| (kv.value, kv.version)), Some((bytes("3"), 2)));
        let answer = client.send(PutRequest { prev_kv: true, ..put("k/new", "") }).await.unwrap();
        assert_eq!(answer.prev_kv, None);
        let answer = client.send(DeleteRangeRequest { prev_kv: true, ..delete_prefix("k/") }).await.unwrap();
        assert_eq!((answer.deleted, keys(&answer.prev_kvs).len()), (4, 4));
    }

    async fn a_put_can_keep_the_value_or_the_lease(client: Client) {
        let lease = client.send(LeaseGrantRequest { ttl: 60, id: 0 }).await.unwrap().id;
        client.send(PutRequest { lease, ..put("k", "1") }).await.unwrap();
        client.send(PutRequest { ignore_lease: true, ..put("k", "2") }).await.unwrap();
        let kv = client.send(get("k")).await.unwrap().kvs.remove(0);
        assert_eq!((&kv.value[..], kv.lease), (&b"2"[..], lease));
        client.send(PutRequest { ignore_value: true, ..put("k", "") }).await.unwrap();
        let kv = client.send(get("k")).await.unwrap().kvs.remove(0);
        assert_eq!((&kv.value[..], kv.lease, kv.version), (&b"2"[..], 0, 3));
    }

    async fn puts_that_contradict_themselves_are_refused(client: Client) {
        let cases = [
            (put("", "1"), "etcdserver: key is not provided"),
            (PutRequest { ignore_value: true, ..put("k", "1") }, "etcdserver: value is provided"),
            (PutRequest { ignore_lease: true, lease: 1, ..put("k", "1") }, "etcdserver: lease is provided"),
            (PutRequest { ignore_value: true, ..put("no", "") }, "etcdserver: key not found"),
            (PutRequest { ignore_lease: true, ..put("no", "1") }, "etcdserver: key not found"),
        ];
        for (request, text) in cases {
            assert_eq!(refusal(client.send(request).await), refused(Code::InvalidArgument, text));
        }
        let text = "etcdserver: requested lease not found";
        let unknown = client.send(PutRequest { lease: 4711, ..put("k", "1") }).await;
        assert_eq!(refusal(unknown), refused(Code::NotFound, text));
        assert_eq!(client.send(all()).await.unwrap().count, 0);
    }

    async fn empty_keys_are_refused_everywhere(client: Client) {
        let expected = refused(Code::InvalidArgument, "etcdserver: key is not provided");
        assert_eq!(refusal(client.send(get("")).await), expected);
        assert_eq!(refusal(client.send(delete("")).await), expected);
    }

    async fn a_delete_of_nothing_is_no_revision(client: Client) {
        let base = client.revision().await;
        let answer = client.send(delete("nothing")).await.unwrap();
        assert_eq!((answer.deleted, answer.header.unwrap().revision), (0, base));
    }

    async fn a_delete_of_many_keys_is_one_revision(client: Client) {
        let base = four_puts(&client).await;
        let answer = client.send(delete_prefix("k/")).await.unwrap();
        assert_eq!((answer.deleted, answer.header.unwrap().revision), (3, base + 5));
    }

    async fn what_was_compacted_is_refused_and_the_compacted_revision_is_not(client: Client) {
        let base = four_puts(&client).await;
        let answer = client.send(CompactionRequest { revision: base + 3, physical: true }).await.unwrap();
        assert_eq!(answer.header.unwrap().revision, base + 4);
        let text = "etcdserver: mvcc: required revision has been compacted";
        let expected = refused(Code::OutOfRange, text);
        assert_eq!(refusal(client.send(RangeRequest { revision: base + 2, ..get("k/b") }).await), expected);
        let kept = client.send(RangeRequest { revision: base + 3, ..get_prefix("k/") }).await.unwrap();
        assert_eq!(keys(&kept.kvs), ["k/a", "k/b"]);
        let again = CompactionRequest { revision: base + 3, physical: false };
        assert_eq!(refusal(client.send(again).await), expected);
        let future = CompactionRequest { revision: base + 5, physical: false };
        let text = "etcdserver: mvcc: required revision is a future revision";
        assert_eq!(refusal(client.send(future).await), refused(Code::OutOfRange, text));
    }

    #[fresh] async fn revision_zero_can_be_compacted_once(client: Client) {
        client.send(CompactionRequest { revision: 0, physical: false }).await.unwrap();
        let again = client.send(CompactionRequest { revision: 0, physical: false }).await;
        let text = "etcdserver: mvcc: required revision has been compacted";
        assert_eq!(refusal(again), refused(Code::OutOfRange, text));
    }

    async fn a_request_that_is_too_large_is_refused(client: Client) {
        let large = put("k", &"x".repeat(1_600_000));
        let text = "etcdserver: request is too large";
        assert_eq!(refusal(client.send(large).await), refused(Code::InvalidArgument, text));
        let (code, text) = refusal(client.send(put("k", &"x".repeat(2_200_000))).await);
        assert_eq!(code, Code::ResourceExhausted);
        assert_eq!(text, "grpc: received message larger than max (2200008 vs. 2097152)");
    }

    async fn an_unknown_sort_order_is_taken_for_none(client: Client) {
        four_puts(&client).await;
        let odd = RangeRequest { sort_order: 7, sort_target: 9, ..get_prefix("k/") };
        assert_eq!(keys(&client.send(odd).await.unwrap().kvs), ["k/a", "k/b", "k/c"]);
    }
}
