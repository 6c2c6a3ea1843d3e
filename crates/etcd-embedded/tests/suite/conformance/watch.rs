//! Watches

use std::time::Duration;

use super::both;
use crate::{
    client::{Client, bytes, delete, delete_prefix, put, watch_prefix},
    proto::{
        etcdserverpb::{
            CompactionRequest, WatchCreateRequest, WatchResponse, watch_create_request::FilterType,
        },
        mvccpb::{Event, KeyValue, event::EventType},
    },
};

/// `+key@revision` for a put, `-key@revision` for a delete, the revision counted from `base`
fn brief(base: i64, events: &[Event]) -> Vec<String> {
    let one = |event: &Event| {
        let kv = event.kv.as_ref().unwrap();
        let sign = if event.r#type == EventType::Put as i32 { '+' } else { '-' };
        format!("{sign}{}@{}", String::from_utf8_lossy(&kv.key), kv.mod_revision - base)
    };
    events.iter().map(one).collect()
}

async fn write(client: &Client, key: &str) {
    client.send(put(key, "v")).await.unwrap();
}

fn from(revision: i64, prefix: &str) -> WatchCreateRequest {
    WatchCreateRequest { start_revision: revision, ..watch_prefix(prefix) }
}

both! {
    async fn a_watch_is_told_puts_and_deletes_from_now_on(client: Client) {
        write(&client, "k/before").await;
        let base = client.revision().await;
        let mut watch = client.watch();
        watch.create(watch_prefix("k/"));
        let created = watch.next().await;
        assert!(created.created && !created.canceled && created.events.is_empty());
        assert_eq!((created.watch_id, created.header.unwrap().revision), (0, base));
        write(&client, "k/a").await;
        write(&client, "other").await;
        client.send(delete_prefix("k/")).await.unwrap();
        let events = watch.events(3).await;
        assert_eq!(brief(base, &events), ["+k/a@1", "-k/a@3", "-k/before@3"]);
        let kv = KeyValue { key: bytes("k/a"), mod_revision: base + 3, ..KeyValue::default() };
        assert_eq!(events[1].kv, Some(kv));
    }

    async fn a_watch_of_one_key_is_told_of_that_key_only(client: Client) {
        let base = client.revision().await;
        let mut watch = client.watch();
        watch.created(WatchCreateRequest { key: bytes("k"), ..WatchCreateRequest::default() }).await;
        for key in ["j", "k", "ka"] {
            write(&client, key).await;
        }
        client.send(delete("k")).await.unwrap();
        assert_eq!(brief(base, &watch.events(2).await), ["+k@2", "-k@4"]);
    }

    async fn a_watch_without_a_key_is_told_of_every_key(client: Client) {
        let base = client.revision().await;
        let mut watch = client.watch();
        watch.created(WatchCreateRequest { range_end: bytes([0]), ..WatchCreateRequest::default() }).await;
        write(&client, "a").await;
        write(&client, "z").await;
        assert_eq!(brief(base, &watch.events(2).await), ["+a@1", "+z@2"]);
    }

    async fn a_watch_from_a_past_revision_is_told_history_first(client: Client) {
        let base = client.revision().await;
        for key in ["k/a", "k/b", "k/a"] {
            write(&client, key).await;
        }
        let mut watch = client.watch();
        watch.created(from(base + 2, "k/")).await;
        write(&client, "k/c").await;
        assert_eq!(brief(base, &watch.events(3).await), ["+k/b@2", "+k/a@3", "+k/c@4"]);
    }

    async fn a_watch_from_a_future_revision_waits_for_it_in_silence(client: Client) {
        let base = client.revision().await;
        let mut watch = client.watch();
        watch.create(from(base + 3, "k/"));
        let created = watch.next().await;
        assert!(created.created && !created.canceled);
        assert_eq!(created.header.unwrap().revision, base);
        for key in ["k/a", "k/b", "k/c"] {
            write(&client, key).await;
        }
        assert_eq!(brief(base, &watch.events(1).await), ["+k/c@3"]);
    }

    async fn a_watch_from_a_compacted_revision_is_created_and_canceled(client: Client) {
        let base = client.revision().await;
        for _ in 0..3 {
            write(&client, "k/a").await;
        }
        client.send(CompactionRequest { revision: base + 2, physical: false }).await.unwrap();
        let mut watch = client.watch();
        let id = watch.created(from(base + 1, "k/")).await;
        let canceled = watch.next().await;
        assert!(canceled.canceled && !canceled.created && canceled.cancel_reason.is_empty());
        assert_eq!((canceled.watch_id, canceled.compact_revision), (id, base + 2));
        assert_eq!(canceled.header.unwrap().revision, 0);
        // Its id stays taken until it is canceled.
        watch.create(WatchCreateRequest { watch_id: 9, ..from(base + 1, "k/") });
        assert!(watch.next().await.created && watch.next().await.canceled);
        watch.create(WatchCreateRequest { watch_id: 9, ..from(base + 1, "k/") });
        assert_eq!(watch.next().await.watch_id, -1);
        watch.cancel(9);
        assert_eq!(watch.next().await.watch_id, 9);
        watch.created(WatchCreateRequest { watch_id: 9, ..watch_prefix("l/") }).await;
        // The stream lives on, and the compacted revision itself can be watched.
        watch.created(from(base + 2, "k/")).await;
        assert_eq!(brief(base, &watch.events(2).await), ["+k/a@2", "+k/a@3"]);
    }

    async fn events_carry_what_was_before_if_asked(client: Client) {
        let mut watch = client.watch();
        watch.created(WatchCreateRequest { prev_kv: true, ..watch_prefix("k/") }).await;
        client.send(put("k/a", "1")).await.unwrap();
        client.send(put("k/a", "2")).await.unwrap();
        client.send(delete("k/a")).await.unwrap();
        let before: Vec<_> = watch.events(3).await.into_iter().map(|event| event.prev_kv).collect();
        let values: Vec<_> = before.into_iter().map(|kv| kv.map(|kv| kv.value)).collect();
        assert_eq!(values, [None, Some(bytes("1")), Some(bytes("2"))]);
    }

    async fn filters_leave_out_puts_or_deletes(client: Client) {
        let base = client.revision().await;
        let mut watch = client.watch();
        let filtered = |filter: FilterType| WatchCreateRequest {
            filters: vec![filter as i32],
            ..watch_prefix("k/")
        };
        let deletes = watch.created(filtered(FilterType::Noput)).await;
        let puts = watch.created(filtered(FilterType::Nodelete)).await;
        write(&client, "k/a").await;
        client.send(delete("k/a")).await.unwrap();
        write(&client, "k/b").await;
        let mut told = [Vec::new(), Vec::new()];
        while told.iter().map(Vec::len).sum::<usize>() < 3 {
            let response = watch.next().await;
            told[usize::from(response.watch_id == puts)].extend(brief(base, &response.events));
            assert!([puts, deletes].contains(&response.watch_id));
        }
        assert_eq!(told, [vec!["-k/a@2"], vec!["+k/a@1", "+k/b@3"]]);
    }

    async fn watches_of_a_stream_have_ids_of_their_own(client: Client) {
        let mut watch = client.watch();
        assert_eq!(watch.created(watch_prefix("a/")).await, 0);
        assert_eq!(watch.created(WatchCreateRequest { watch_id: 2, ..watch_prefix("b/") }).await, 2);
        assert_eq!(watch.created(watch_prefix("c/")).await, 1);
        assert_eq!(watch.created(watch_prefix("d/")).await, 3);
        write(&client, "b/1").await;
        assert_eq!(watch.next().await.watch_id, 2);
        write(&client, "d/1").await;
        assert_eq!(watch.next().await.watch_id, 3);
    }

    async fn a_watch_that_cannot_be_is_refused_in_its_stream(client: Client) {
        let mut watch = client.watch();
        let told = |response: WatchResponse| {
            assert!(response.created && response.canceled && response.header.is_some());
            (response.watch_id, response.cancel_reason)
        };
        watch.created(WatchCreateRequest { watch_id: 7, ..watch_prefix("a/") }).await;
        watch.create(WatchCreateRequest { watch_id: 7, ..watch_prefix("b/") });
        let text = "mvcc: duplicate watch ID provided on the WatchStream";
        assert_eq!(told(watch.next().await), (-1, text.to_owned()));
        watch.create(WatchCreateRequest { range_end: bytes("a"), ..watch_prefix("b/") });
        assert_eq!(told(watch.next().await), (-1, "mvcc: watcher range is empty".to_owned()));
        write(&client, "a/1").await;
        assert_eq!(watch.next().await.watch_id, 7);
    }

    async fn a_canceled_watch_is_told_so_and_then_nothing(client: Client) {
        let mut watch = client.watch();
        let gone = watch.created(watch_prefix("k/")).await;
        let kept = watch.created(watch_prefix("k/")).await;
        watch.cancel(4711);
        watch.cancel(gone);
        let canceled = watch.next().await;
        assert!(canceled.canceled && canceled.cancel_reason.is_empty() && canceled.compact_revision == 0);
        assert_eq!((canceled.watch_id, canceled.header.unwrap().revision), (gone, client.revision().await));
        write(&client, "k/a").await;
        assert_eq!(watch.next().await.watch_id, kept);
    }

    async fn progress_is_told_under_no_id_when_it_is_asked_for(client: Client) {
        let mut watch = client.watch();
        watch.created(watch_prefix("k/")).await;
        write(&client, "other").await;
        watch.progress();
        let progress = watch.next().await;
        assert_eq!((progress.watch_id, progress.events.len()), (-1, 0));
        assert!(!progress.created && !progress.canceled);
        assert_eq!(progress.header.unwrap().revision, client.revision().await);
    }

    async fn a_revision_of_many_events_comes_in_one_response(client: Client) {
        for n in 0..100 {
            write(&client, &format!("k/{n}")).await;
        }
        let mut watch = client.watch();
        watch.created(watch_prefix("k/")).await;
        client.send(delete_prefix("k/")).await.unwrap();
        assert_eq!(watch.next().await.events.len(), 100);
    }

    async fn a_large_response_comes_in_fragments_if_asked(client: Client) {
        let base = client.revision().await;
        let large = "x".repeat(1_000_000);
        for key in ["k/a", "k/b", "k/c", "k/d"] {
            client.send(put(key, &large)).await.unwrap();
        }
        let mut watch = client.watch();
        watch.created(WatchCreateRequest { fragment: true, ..from(base + 1, "k/") }).await;
        let (mut events, mut fragments) = (Vec::new(), 0);
        while events.len() < 4 {
            let response = watch.next().await;
            fragments += usize::from(response.fragment);
            events.extend(response.events);
        }
        assert_eq!(brief(base, &events), ["+k/a@1", "+k/b@2", "+k/c@3", "+k/d@4"]);
        // etcd sends the four in one batch, this server in several of its own; both split what is too large.
        assert!(fragments < 4);
    }

    async fn watches_outlive_the_end_of_the_requests(client: Client) {
        let mut watch = client.watch();
        watch.created(watch_prefix("k/")).await;
        watch.close_requests();
        write(&client, "k/a").await;
        assert_eq!(watch.events(1).await.len(), 1);
    }

    async fn a_watch_that_is_not_read_loses_nothing(client: Client) {
        let mut watch = client.watch();
        watch.created(watch_prefix("k/")).await;
        let value = "x".repeat(20_000);
        for n in 0..500 {
            client.send(put(&format!("k/{n}"), &value)).await.unwrap();
        }
        let keys: Vec<_> = watch.events(500).await.into_iter().map(|event| event.kv.unwrap().key).collect();
        assert!(keys.iter().enumerate().all(|(n, key)| *key == bytes(format!("k/{n}"))));
    }

    async fn writes_of_one_transaction_come_in_their_order(client: Client) {
        use crate::proto::etcdserverpb::{RequestOp, TxnRequest, request_op::Request};
        let base = client.revision().await;
        write(&client, "k/c").await;
        let mut watch = client.watch();
        watch.created(watch_prefix("k/")).await;
        let op = |request| RequestOp { request: Some(request) };
        let success = vec![
            op(Request::RequestPut(put("k/b", "1"))),
            op(Request::RequestDeleteRange(delete("k/c"))),
            op(Request::RequestPut(put("k/a", "1"))),
        ];
        client.send(TxnRequest { success, ..TxnRequest::default() }).await.unwrap();
        let response = tokio::time::timeout(Duration::from_secs(5), watch.next()).await.unwrap();
        assert_eq!(brief(base, &response.events), ["+k/b@2", "-k/c@2", "+k/a@2"]);
    }
}
