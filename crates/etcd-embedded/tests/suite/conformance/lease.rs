//! Leases

use std::time::{Duration, Instant};

use tonic::Code;

use super::{both, refusal, refused};
use crate::{
    client::{Client, bytes, get, get_prefix, put, watch_prefix},
    proto::etcdserverpb::{
        LeaseGrantRequest, LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, PutRequest,
    },
};

async fn grant(client: &Client, ttl: i64) -> i64 {
    client.send(LeaseGrantRequest { ttl, id: 0 }).await.unwrap().id
}

fn under(lease: i64, key: &str) -> PutRequest {
    PutRequest { lease, ..put(key, "") }
}

both! {
    async fn a_ttl_below_the_floor_is_raised_to_it(client: Client) {
        for ttl in [1, 0, -3] {
            let answer = client.send(LeaseGrantRequest { ttl, id: 0 }).await.unwrap();
            assert_eq!(answer.ttl, 2);
            assert!(answer.id > 0 && answer.error.is_empty());
        }
    }

    async fn a_ttl_above_the_ceiling_is_refused(client: Client) {
        let answer = client.send(LeaseGrantRequest { ttl: 9_000_000_001, id: 0 }).await;
        assert_eq!(refusal(answer), refused(Code::OutOfRange, "etcdserver: too large lease TTL"));
        client.send(LeaseGrantRequest { ttl: 9_000_000_000, id: 0 }).await.unwrap();
    }

    async fn a_lease_can_choose_its_id_once(client: Client) {
        assert_eq!(client.send(LeaseGrantRequest { ttl: 60, id: 42 }).await.unwrap().id, 42);
        let again = client.send(LeaseGrantRequest { ttl: 60, id: 42 }).await;
        assert_eq!(refusal(again), refused(Code::FailedPrecondition, "etcdserver: lease already exists"));
    }

    async fn granting_is_no_revision(client: Client) {
        let base = client.revision().await;
        grant(&client, 60).await;
        assert_eq!(client.revision().await, base);
    }

    async fn revoking_deletes_every_key_in_order_and_in_one_revision(client: Client) {
        let lease = grant(&client, 60).await;
        for key in ["k/b", "k/a", "k/c"] {
            client.send(under(lease, key)).await.unwrap();
        }
        let mut watch = client.watch();
        watch.created(watch_prefix("k/")).await;
        let base = client.revision().await;
        let answer = client.send(LeaseRevokeRequest { id: lease }).await.unwrap();
        assert_eq!(answer.header.unwrap().revision, base + 1);
        let events = watch.events(3).await;
        let kvs: Vec<_> = events.into_iter().map(|event| event.kv.unwrap()).collect();
        assert_eq!(crate::client::keys(&kvs), ["k/a", "k/b", "k/c"]);
        assert!(kvs.iter().all(|kv| kv.mod_revision == base + 1));
    }

    async fn revoking_a_lease_without_keys_is_no_revision(client: Client) {
        let base = client.revision().await;
        let lease = grant(&client, 60).await;
        client.send(LeaseRevokeRequest { id: lease }).await.unwrap();
        assert_eq!(client.revision().await, base);
    }

    async fn an_unknown_lease_is_refused_by_revoke_and_answered_by_the_rest(client: Client) {
        let text = "etcdserver: requested lease not found";
        let answer = client.send(LeaseRevokeRequest { id: 4711 }).await;
        assert_eq!(refusal(answer), refused(Code::NotFound, text));
        let answer = client.send(LeaseTimeToLiveRequest { id: 4711, keys: true }).await.unwrap();
        assert_eq!((answer.id, answer.ttl, answer.granted_ttl, answer.keys.len()), (4711, -1, 0, 0));
        let answer = client.keep_alive().keep(4711).await;
        assert_eq!((answer.id, answer.ttl), (4711, 0));
        assert!(answer.header.unwrap().revision > 0);
    }

    async fn time_to_live_tells_the_keys_if_asked(client: Client) {
        let lease = grant(&client, 60).await;
        client.send(under(lease, "k/a")).await.unwrap();
        let answer = client.send(LeaseTimeToLiveRequest { id: lease, keys: true }).await.unwrap();
        assert_eq!((answer.granted_ttl, answer.keys), (60, vec![bytes("k/a")]));
        assert!((58..60).contains(&answer.ttl), "{}", answer.ttl);
        let answer = client.send(LeaseTimeToLiveRequest { id: lease, keys: false }).await.unwrap();
        assert!(answer.keys.is_empty());
    }

    async fn a_key_belongs_to_the_lease_of_its_last_put(client: Client) {
        let (first, second) = (grant(&client, 60).await, grant(&client, 60).await);
        client.send(under(first, "k/a")).await.unwrap();
        client.send(under(second, "k/a")).await.unwrap();
        client.send(under(first, "k/b")).await.unwrap();
        client.send(put("k/b", "")).await.unwrap();
        client.send(LeaseRevokeRequest { id: first }).await.unwrap();
        assert_eq!(client.send(get_prefix("k/")).await.unwrap().count, 2);
        client.send(LeaseRevokeRequest { id: second }).await.unwrap();
        assert_eq!(client.send(get("k/a")).await.unwrap().count, 0);
    }

    async fn leases_are_listed_until_they_end(client: Client) {
        let (first, second) = (grant(&client, 60).await, grant(&client, 600).await);
        let ids = |answer: crate::proto::etcdserverpb::LeaseLeasesResponse| {
            answer.leases.iter().map(|lease| lease.id).collect::<Vec<_>>()
        };
        assert_eq!(ids(client.send(LeaseLeasesRequest {}).await.unwrap()), [first, second]);
        client.send(LeaseRevokeRequest { id: first }).await.unwrap();
        assert_eq!(ids(client.send(LeaseLeasesRequest {}).await.unwrap()), [second]);
    }

    async fn a_lease_expires_in_a_revision_of_its_own_unless_it_is_kept(client: Client) {
        let (ends, kept) = (grant(&client, 2).await, grant(&client, 2).await);
        client.send(under(ends, "k/a")).await.unwrap();
        client.send(under(ends, "k/b")).await.unwrap();
        client.send(under(kept, "k/c")).await.unwrap();
        let mut watch = client.watch();
        watch.created(watch_prefix("k/")).await;
        let (base, start) = (client.revision().await, Instant::now());
        let mut keeper = client.keep_alive();
        let mut deleted = Vec::new();
        while deleted.len() < 2 {
            assert_eq!(keeper.keep(kept).await.ttl, 2);
            let events = tokio::time::timeout(Duration::from_millis(300), watch.events(1)).await;
            deleted.extend(events.unwrap_or_default());
        }
        let kvs: Vec<_> = deleted.into_iter().map(|event| event.kv.unwrap()).collect();
        assert_eq!(crate::client::keys(&kvs), ["k/a", "k/b"]);
        assert!(kvs.iter().all(|kv| kv.mod_revision == base + 1));
        assert!(start.elapsed() >= Duration::from_millis(1500), "{:?}", start.elapsed());
        assert_eq!(keeper.keep(ends).await.ttl, 0);
    }
}
