//! Starting, stopping and faults: what only the embedded server can do

use std::time::Duration;

use etcd_embedded::EmbeddedEtcd;
use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{Instant, sleep, timeout},
};
use tonic::Code;

use crate::{
    client::{Client, bytes, get, put, watch_prefix},
    proto::{
        etcdserverpb::{
            AuthEnableRequest, AuthUserAddRequest, AuthUserGrantRoleRequest, LeaseGrantRequest, PutRequest,
            RangeRequest, RangeResponse, WatchCreateRequest,
        },
        mvccpb::event::EventType,
    },
};

/// A server without sockets and a client of it
fn in_memory() -> (EmbeddedEtcd, Client) {
    let etcd = EmbeddedEtcd::in_memory();
    let client = Client::over(etcd.channel());
    (etcd, client)
}

async fn write(client: &Client, key: &str) -> i64 {
    client.send(put(key, "v")).await.unwrap().header.unwrap().revision
}

#[tokio::test(start_paused = true)]
async fn leases_end_on_time_under_a_paused_clock() {
    let (_etcd, client) = in_memory();
    let lease = client.send(LeaseGrantRequest { ttl: 3600, id: 0 }).await.unwrap().id;
    client.send(PutRequest { lease, ..put("k", "1") }).await.unwrap();
    let start = Instant::now();
    let mut watch = client.watch();
    watch.created(watch_prefix("k")).await;
    let deleted = watch.try_next().await.unwrap().unwrap();
    assert_eq!(deleted.events[0].r#type, EventType::Delete as i32);
    assert_eq!(start.elapsed().as_secs(), 3600);
}

#[tokio::test(start_paused = true)]
async fn a_kept_lease_outlives_its_ttl_under_a_paused_clock() {
    let (_etcd, client) = in_memory();
    let id = client.send(LeaseGrantRequest { ttl: 30, id: 0 }).await.unwrap().id;
    let mut keeper = client.keep_alive();
    for _ in 0..100 {
        sleep(Duration::from_secs(20)).await;
        assert_eq!(keeper.keep(id).await.ttl, 30);
    }
    sleep(Duration::from_secs(31)).await;
    assert_eq!(keeper.keep(id).await.ttl, 0);
}

#[tokio::test(start_paused = true)]
async fn a_quiet_watch_is_told_of_progress_every_ten_minutes_if_it_asked() {
    let (_etcd, client) = in_memory();
    let mut watch = client.watch();
    watch.created(WatchCreateRequest { progress_notify: true, ..watch_prefix("k") }).await;
    let revision = write(&client, "other").await;
    let start = Instant::now();
    let progress = watch.try_next().await.unwrap().unwrap();
    assert_eq!((progress.watch_id, progress.events.len()), (0, 0));
    assert_eq!((progress.header.unwrap().revision, start.elapsed().as_secs()), (revision, 600));
}

#[tokio::test(start_paused = true)]
async fn a_paused_server_answers_when_it_is_resumed() {
    let (etcd, client) = in_memory();
    write(&client, "k").await;
    etcd.pause();
    let asked = tokio::spawn({
        let client = client.clone();
        async move { client.send(get("k")).await.unwrap().count }
    });
    sleep(Duration::from_secs(5)).await;
    assert!(!asked.is_finished());
    etcd.resume();
    assert_eq!(asked.await.unwrap(), 1);
}

#[tokio::test]
async fn a_paused_server_accepts_connections() {
    let etcd = EmbeddedEtcd::start("127.0.0.1:0").await.unwrap();
    etcd.pause();
    let mut socket = TcpStream::connect(etcd.endpoint()).await.unwrap();
    let silence = timeout(Duration::from_millis(100), socket.read_u8()).await;
    assert!(silence.is_err(), "{silence:?}");
}

#[tokio::test]
async fn a_cut_ends_streams_and_clients_come_back() {
    let (etcd, client) = in_memory();
    let mut watch = client.watch();
    watch.created(watch_prefix("k")).await;
    etcd.drop_connections();
    assert!(!matches!(watch.try_next().await, Ok(Some(_))));
    // The call that finds the connection gone may fail.
    let _ = client.send(put("k", "1")).await;
    write(&client, "k").await;
}

#[tokio::test(start_paused = true)]
async fn a_delay_is_that_of_every_answer() {
    let (etcd, client) = in_memory();
    let mut watch = client.watch();
    watch.created(watch_prefix("k")).await;
    etcd.delay(Duration::from_secs(3));
    let start = Instant::now();
    write(&client, "k").await;
    assert_eq!(start.elapsed().as_secs(), 3);
    watch.events(1).await;
    assert_eq!(start.elapsed().as_secs(), 6);
    etcd.delay(Duration::ZERO);
    let start = Instant::now();
    write(&client, "k").await;
    assert_eq!(start.elapsed().as_secs(), 0);
}

#[tokio::test]
async fn compacting_now_ends_a_watch_of_the_past() {
    let (etcd, client) = in_memory();
    write(&client, "k").await;
    let last = write(&client, "k").await;
    assert_eq!((etcd.compact_now(), etcd.compact_now()), (last, last));
    let refused = client.send(RangeRequest { revision: last - 1, ..get("k") }).await.unwrap_err();
    assert_eq!(refused.code(), Code::OutOfRange);
    let mut watch = client.watch();
    watch.created(WatchCreateRequest { start_revision: last - 1, ..watch_prefix("k") }).await;
    assert_eq!(watch.next().await.compact_revision, last);
}

#[tokio::test]
async fn a_lease_can_be_ended_by_name() {
    let (etcd, client) = in_memory();
    let id = client.send(LeaseGrantRequest { ttl: 3600, id: 0 }).await.unwrap().id;
    client.send(PutRequest { lease: id, ..put("k", "1") }).await.unwrap();
    assert!(etcd.expire_lease(id));
    assert!(!etcd.expire_lease(id));
    assert_eq!(client.send(get("k")).await.unwrap().count, 0);
}

#[tokio::test(start_paused = true)]
async fn tokens_end_by_time_and_by_name() {
    let etcd = EmbeddedEtcd::builder().token_ttl(Duration::from_secs(5)).in_memory();
    let mut client = Client::over(etcd.channel());
    let (name, password) = ("root".to_owned(), "secret".to_owned());
    client.send(AuthUserAddRequest { name, password, ..Default::default() }).await.unwrap();
    let (user, role) = ("root".to_owned(), "root".to_owned());
    client.send(AuthUserGrantRoleRequest { user, role }).await.unwrap();
    client.send(AuthEnableRequest {}).await.unwrap();
    client.login("root", "secret").await.unwrap();
    write(&client, "k").await;
    etcd.expire_tokens();
    assert_eq!(client.send(get("k")).await.unwrap_err().code(), Code::Unauthenticated);
    client.login("root", "secret").await.unwrap();
    sleep(Duration::from_secs(4)).await;
    write(&client, "k").await;
    sleep(Duration::from_secs(4)).await;
    write(&client, "k").await;
    sleep(Duration::from_secs(6)).await;
    assert_eq!(client.send(get("k")).await.unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_server_that_forgot_everything_is_the_same_member_at_revision_one() {
    let (etcd, client) = in_memory();
    let lease = client.send(LeaseGrantRequest { ttl: 60, id: 0 }).await.unwrap().id;
    write(&client, "k").await;
    let before = client.send(get("k")).await.unwrap().header.unwrap();
    let mut watch = client.watch();
    watch.created(watch_prefix("k")).await;
    etcd.forget_everything();
    assert!(!matches!(watch.try_next().await, Ok(Some(_))));
    // The call that finds the connection gone may fail.
    let _ = client.send(get("k")).await;
    let answer = client.send(get("k")).await.unwrap();
    let after = answer.header.unwrap();
    assert_eq!((answer.count, before.revision, after.revision), (0, 2, 1));
    assert_eq!((before.cluster_id, before.member_id), (after.cluster_id, after.member_id));
    assert!(!etcd.expire_lease(lease));
}

#[tokio::test]
async fn resent_events_are_old_ones_and_a_delete_of_what_never_was() {
    let (etcd, client) = in_memory();
    let mut watch = client.watch();
    watch.created(watch_prefix("k/")).await;
    let (first, second) = (write(&client, "k/a").await, write(&client, "k/b").await);
    watch.events(2).await;
    etcd.resend_events();
    let again = watch.events(3).await;
    let revisions: Vec<_> = again.iter().map(|event| event.kv.as_ref().unwrap().mod_revision).collect();
    assert_eq!(revisions, [first, second, second]);
    let unknown = again[2].kv.as_ref().unwrap();
    assert_eq!(again[2].r#type, EventType::Delete as i32);
    assert!(unknown.key.starts_with(b"k/") && unknown.key != bytes("k/a") && unknown.key != bytes("k/b"));
    // Once, and then as before.
    let third = write(&client, "k/c").await;
    assert_eq!(watch.events(1).await[0].kv.as_ref().unwrap().mod_revision, third);
}

#[tokio::test]
async fn progress_can_overtake_the_events_it_speaks_of() {
    let (etcd, client) = in_memory();
    let mut watch = client.watch();
    watch.created(watch_prefix("k/")).await;
    etcd.progress_ahead();
    let revision = write(&client, "k/a").await;
    let progress = watch.next().await;
    assert_eq!((progress.watch_id, progress.events.len()), (-1, 0));
    assert_eq!(progress.header.unwrap().revision, revision);
    assert_eq!(watch.next().await.events.len(), 1);
    write(&client, "k/b").await;
    assert_eq!(watch.next().await.events.len(), 1);
}

#[tokio::test]
async fn a_slow_watch_is_overtaken_by_compaction_and_told_so() {
    let etcd = EmbeddedEtcd::builder().history(1 << 20).in_memory();
    let client = Client::over(etcd.channel());
    let mut watch = client.watch();
    watch.created(watch_prefix("k")).await;
    // More than windows, queue and history hold together.
    let value = "x".repeat(100_000);
    for _ in 0..200 {
        client.send(put("k", &value)).await.unwrap();
    }
    let mut told = 0;
    let canceled = loop {
        let response = watch.next().await;
        if response.canceled {
            break response;
        }
        told += response.events.len();
    };
    assert!(told < 200 && canceled.compact_revision > 100, "{told} {canceled:?}");
}

#[tokio::test]
async fn what_is_not_there_is_unimplemented_by_name() {
    let (_etcd, client) = in_memory();
    for path in ["/v3lockpb.Lock/Lock", "/etcdserverpb.Maintenance/Snapshot", "/etcdserverpb.Auth/RoleGet"] {
        let refused = client.unary::<RangeRequest, RangeResponse>(path, get("k")).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unimplemented);
        assert_eq!(refused.message(), format!("etcd-embedded: {path} is not implemented"));
    }
}

#[tokio::test]
async fn a_stopped_server_frees_its_port_even_with_watches_open() {
    let etcd = EmbeddedEtcd::start("127.0.0.1:0").await.unwrap();
    let endpoint = etcd.endpoint().to_owned();
    let client = Client::connect(&endpoint);
    let mut watch = client.watch();
    watch.created(watch_prefix("k")).await;
    etcd.shutdown().await;
    assert!(!matches!(watch.try_next().await, Ok(Some(_))));
    let again = EmbeddedEtcd::start(&endpoint).await.unwrap();
    write(&Client::connect(again.endpoint()), "k").await;
}

#[tokio::test]
async fn a_dropped_server_is_gone() {
    let etcd = EmbeddedEtcd::start("127.0.0.1:0").await.unwrap();
    let endpoint = etcd.endpoint().to_owned();
    let client = Client::connect(&endpoint);
    let mut watch = client.watch();
    watch.created(watch_prefix("k")).await;
    drop(etcd);
    assert!(!matches!(watch.try_next().await, Ok(Some(_))));
    while TcpStream::connect(&endpoint).await.is_ok() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn many_streams_share_one_connection() {
    let (_etcd, client) = in_memory();
    let mut watches: Vec<_> = (0..500).map(|_| client.watch()).collect();
    for watch in &mut watches {
        watch.created(watch_prefix("k")).await;
    }
    write(&client, "k").await;
    for watch in &mut watches {
        assert_eq!(watch.events(1).await.len(), 1);
    }
}
