//! A typed value in etcd: the latest one is told, whatever becomes of etcd

#![cfg(unix)]

use std::{pin::pin, time::Duration};

use callsign::{
    Etcd, EtcdOptions,
    discover::DiscoveryState,
    etcd::{ValueError, Values},
};
use callsign_tests::{peers::Peer, proxy::Proxy, registry, wait};
use serde::{Deserialize, Serialize};
use tokio_stream::StreamExt;

const KEY: &str = "config/hello";
/// How soon a change is seen
const SEEN: Duration = Duration::from_secs(2);
/// For what waits for a ping or a backoff
const BOUND: Duration = Duration::from_secs(20);

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
struct Config {
    greeting: String,
    limit: u32,
}

fn config(limit: u32) -> Config {
    Config { greeting: "Hello".to_owned(), limit }
}

fn session(hosts: impl IntoIterator<Item = String>) -> Etcd {
    Etcd::connect_lazy(EtcdOptions::new(hosts)).expect("valid hosts")
}

async fn next(values: &mut Values<Config>, bound: Duration) -> Result<Option<Config>, ValueError> {
    wait::within("a value is told", bound, values.next()).await.expect("the stream never ends")
}

/// Asserts that the next value is this
async fn expect(values: &mut Values<Config>, expected: Option<Config>, bound: Duration) {
    assert_eq!(next(values, bound).await, Ok(expected));
}

/// Asserts that nothing is told now
fn expect_none(values: &mut Values<Config>) {
    wait::assert_waits("a value that did not change", &mut pin!(values.next()));
}

async fn until_watching(values: &Values<Config>) {
    let mut state = values.state();
    let watching = state.wait_for(|state| matches!(state, DiscoveryState::Watching { .. }));
    wait::within("watching", BOUND, watching).await.expect("the task lives");
}

async fn until_resuming(values: &Values<Config>) {
    let mut state = values.state();
    let resuming = state.wait_for(|state| matches!(state, DiscoveryState::Resuming { .. }));
    wait::within("resuming", BOUND, resuming).await.expect("the task lives");
}

#[tokio::test]
async fn a_value_is_told_as_it_is_put_changed_and_deleted() {
    let etcd = registry::etcd().await;
    let session = session([etcd.endpoint()]);
    let mut values = session.watch_value::<Config>(KEY).unwrap();
    expect(&mut values, None, BOUND).await;
    session.put_value(KEY, &config(1)).await.unwrap();
    expect(&mut values, Some(config(1)), SEEN).await;
    session.put_value(KEY, &config(1)).await.unwrap();
    session.put_value("config/hello/deeper", &config(8)).await.unwrap();
    session.put_value("config/hell", &config(9)).await.unwrap();
    session.put_value(KEY, &config(2)).await.unwrap();
    expect(&mut values, Some(config(2)), SEEN).await;
    session.delete_value(KEY).await.unwrap();
    expect(&mut values, None, SEEN).await;
    session.delete_value(KEY).await.unwrap();
    session.put_value(KEY, &config(3)).await.unwrap();
    expect(&mut values, Some(config(3)), SEEN).await;
    expect_none(&mut values);
    let late = Etcd::connect_lazy(EtcdOptions::new([etcd.endpoint()])).unwrap();
    expect(&mut late.watch_value(KEY).unwrap(), Some(config(3)), BOUND).await;
}

#[tokio::test]
async fn what_does_not_decode_is_an_error_and_the_stream_goes_on() {
    let etcd = registry::etcd().await;
    let session = session([etcd.endpoint()]);
    let mut values = session.watch_value::<Config>(KEY).unwrap();
    expect(&mut values, None, BOUND).await;
    for (garbage, reason) in [
        (b"not JSON".to_vec(), "expected"),
        (b"{\"greeting\":\"\"}".to_vec(), "missing field `limit`"),
        (b"\xff\xfe".to_vec(), "expected"),
        (vec![b'1'; (1 << 20) + 1], "1048577 bytes"),
        (b"".to_vec(), "EOF"),
    ] {
        etcd.put(KEY, garbage).await;
        let error = next(&mut values, SEEN).await.unwrap_err().to_string();
        assert!(error.starts_with("bad value of config/hello") && error.contains(reason), "{error}");
    }
    session.put_value(KEY, &config(1)).await.unwrap();
    expect(&mut values, Some(config(1)), SEEN).await;
}

#[tokio::test]
async fn a_restarted_etcd_changes_nothing_and_the_next_change_is_told() {
    let Some(mut etcd) = registry::real(registry::PERSISTENCE).await else { return };
    let session = session([etcd.endpoint()]);
    session.put_value(KEY, &config(1)).await.unwrap();
    let mut values = session.watch_value::<Config>(KEY).unwrap();
    expect(&mut values, Some(config(1)), BOUND).await;
    until_watching(&values).await;
    etcd.kill9();
    until_resuming(&values).await;
    etcd.restart().await;
    until_watching(&values).await;
    expect_none(&mut values);
    let lists = etcd.metric("grpc_server_started_total", "grpc_method=\"Range\"").await;
    assert_eq!(lists, Some(0), "resumed, not listed again");
    session.put_value(KEY, &config(2)).await.unwrap();
    expect(&mut values, Some(config(2)), SEEN).await;
}

#[tokio::test]
async fn what_was_compacted_while_away_is_skipped_for_the_latest() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    let (direct, session) = (session([etcd.endpoint()]), session([proxy.endpoint()]));
    direct.put_value(KEY, &config(1)).await.unwrap();
    let mut values = session.watch_value::<Config>(KEY).unwrap();
    expect(&mut values, Some(config(1)), BOUND).await;
    until_watching(&values).await;
    proxy.cut().await;
    until_resuming(&values).await;
    for limit in 2..10 {
        direct.put_value(KEY, &config(limit)).await.unwrap();
    }
    etcd.compact().await;
    expect_none(&mut values);
    proxy.heal();
    expect(&mut values, Some(config(9)), BOUND).await;
    until_watching(&values).await;
    direct.put_value(KEY, &config(10)).await.unwrap();
    expect(&mut values, Some(config(10)), SEEN).await;
}

#[tokio::test]
async fn a_wiped_etcd_has_no_value_and_then_the_new_one() {
    let mut etcd = registry::etcd().await;
    let session = session([etcd.endpoint()]);
    for limit in 0..10 {
        session.put_value(KEY, &config(limit)).await.unwrap();
    }
    let mut values = session.watch_value::<Config>(KEY).unwrap();
    expect(&mut values, Some(config(9)), BOUND).await;
    until_watching(&values).await;
    etcd.kill9();
    until_resuming(&values).await;
    etcd.wipe();
    etcd.restart().await;
    expect(&mut values, None, BOUND).await;
    until_watching(&values).await;
    session.put_value(KEY, &config(1)).await.unwrap();
    expect(&mut values, Some(config(1)), SEEN).await;
}

#[tokio::test]
async fn values_are_read_and_written_over_the_host_that_works() {
    let etcd = registry::etcd().await;
    let (dead, mute) = (Peer::deaf(), Peer::mute().await);
    let session = session([dead.address().to_string(), mute.address().to_string(), etcd.endpoint()]);
    wait::within("a put", BOUND, session.put_value(KEY, &config(1))).await.unwrap();
    let mut values = session.watch_value::<Config>(KEY).unwrap();
    expect(&mut values, Some(config(1)), BOUND).await;
}

#[tokio::test]
async fn a_write_that_nobody_confirms_fails_in_bounded_time() {
    let mute = Peer::mute().await;
    let session = session([mute.address().to_string()]);
    let (written, took) = wait::timed(session.put_value(KEY, &config(1))).await;
    let error = written.unwrap_err().to_string();
    assert!(error.starts_with("config/hello was not written"), "{error}");
    assert!(took < Duration::from_secs(11), "{took:?}");
}

#[tokio::test]
async fn all_who_watch_a_key_share_one_watch_whatever_they_take_it_for() {
    let Some(etcd) = registry::real(registry::METRICS).await else { return };
    let session = session([etcd.endpoint()]);
    session.put_value(KEY, &config(1)).await.unwrap();
    let mut values = session.watch_value::<Config>(KEY).unwrap();
    let mut raw = session.watch_value::<serde_json::Value>(KEY).unwrap();
    expect(&mut values, Some(config(1)), BOUND).await;
    let told = wait::within("the same value", BOUND, raw.next()).await.unwrap().unwrap();
    assert_eq!(told.unwrap()["limit"], 1);
    until_watching(&values).await;
    let watchers = async || etcd.metric("etcd_debugging_mvcc_watcher_total", "").await;
    assert_eq!(watchers().await, Some(1));
    drop((values, raw));
    let none = async {
        while watchers().await > Some(0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    wait::within("the watch ends with the last", SEEN, none).await;
}

#[test]
fn a_value_outlives_the_runtime_that_its_watch_began_in() {
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (first, second) = (runtime(), runtime());
    let etcd = second.block_on(registry::etcd());
    let session = session([etcd.endpoint()]);
    let mut values = first.block_on(async { session.watch_value::<Config>(KEY).unwrap() });
    first.block_on(expect(&mut values, None, BOUND));
    drop(first);
    second.block_on(async {
        wait::within("a put", BOUND, session.put_value(KEY, &config(1))).await.unwrap();
        expect(&mut values, Some(config(1)), BOUND).await;
    });
}

#[tokio::test]
async fn two_namespaces_do_not_see_each_other() {
    let etcd = registry::etcd().await;
    let within = |namespace| {
        let options = EtcdOptions::new([etcd.endpoint()]).namespace(namespace);
        Etcd::connect_lazy(options).expect("a valid namespace")
    };
    let (blue, green) = (within("/blue"), within("/green"));
    let mut values = blue.watch_value::<Config>(KEY).unwrap();
    expect(&mut values, None, BOUND).await;
    green.put_value(KEY, &config(2)).await.unwrap();
    blue.put_value(KEY, &config(1)).await.unwrap();
    expect(&mut values, Some(config(1)), SEEN).await;
    let keys: Vec<_> = etcd.pairs("").await.into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["/blue/config/hello", "/green/config/hello"]);
}
