//! What is counted and measured: the right numbers, every row of the table, and nothing else
//!
//! Each test has a recorder of its own, for its own thread, in which everything runs.

#![cfg(unix)]

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use callsign::{
    Address, Channel, Etcd, EtcdOptions, Registration, discover,
    discover::EtcdDiscover,
    metrics::{Kind, Metric, TABLE},
    policy::LeastRequest,
};
use callsign_tests::{
    bare::{Answer, Bare, headers},
    channel::changing,
    echo::{Chunk, echo_client::EchoClient},
    peers::Peer,
    proxy::Proxy,
    registry,
    scripted::Scripted,
    view::View,
    wait,
};
use http::StatusCode;
use metrics_util::{
    MetricKind,
    debugging::{DebugValue, DebuggingRecorder, Snapshotter},
};
use tonic::{Code, Request, Status};

const BOUND: Duration = Duration::from_secs(20);
const SERVICE: &str = "hello.rpc";

/// Everything that was recorded
struct Recorded {
    snapshotter: Snapshotter,
    series: Mutex<BTreeMap<(String, Labels), Series>>,
}

type Labels = BTreeMap<String, String>;

/// What was recorded of one series
#[derive(Clone, Default)]
struct Series {
    kind: Option<MetricKind>,
    is_described: bool,
    /// The sum of a counter or gauge, the number of samples of a histogram
    value: f64,
    /// The highest that a look has found
    most: f64,
    samples: Vec<f64>,
}

impl Recorded {
    /// What there is by now
    ///
    /// A snapshot takes the values away: what is added up here is what was added since the last one.
    fn look(&self) -> BTreeMap<(String, Labels), Series> {
        let mut all = self.series.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, unit, description, value) in self.snapshotter.snapshot().into_vec() {
            let (kind, key) = key.into_parts();
            let label = |label: &metrics::Label| (label.key().to_owned(), label.value().to_owned());
            let series = all.entry((key.name().to_owned(), key.labels().map(label).collect())).or_default();
            series.kind = Some(kind);
            series.is_described = unit.is_some() && description.is_some();
            match value {
                DebugValue::Counter(more) => series.value += more as f64,
                DebugValue::Gauge(more) => series.value += more.into_inner(),
                DebugValue::Histogram(more) => {
                    series.value += more.len() as f64;
                    series.samples.extend(more.into_iter().map(f64::from));
                }
            }
            series.most = series.most.max(series.value);
        }
        all.clone()
    }

    /// The sum of all series of a metric that have these labels
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        assert!(TABLE.iter().any(|metric| metric.name == name), "no such metric: {name}");
        let all = self.look();
        let has = |of: &Labels| {
            labels.iter().all(|(label, value)| of.get(*label).is_some_and(|known| known == value))
        };
        all.iter().filter(|((of, all), _)| of == name && has(all)).map(|(_, series)| series.value).sum()
    }

    async fn until(&self, name: &str, labels: &[(&str, &str)], expected: f64) {
        let what = format!("{name} {labels:?} is {expected}");
        wait::until(&what, BOUND, || (self.value(name, labels) == expected).then_some(())).await;
    }

    async fn until_some(&self, name: &str, labels: &[(&str, &str)]) {
        wait::until(name, BOUND, || (self.value(name, labels) > 0.0).then_some(())).await;
    }

    /// Waits until nothing is left of what is there now and then
    async fn until_gauges_are_zero(&self) {
        let is_left = |series: &Series| series.kind == Some(MetricKind::Gauge) && series.value != 0.0;
        wait::until("all gauges are back to zero", BOUND, || {
            (!self.look().values().any(is_left)).then_some(())
        })
        .await;
    }
}

/// Runs a scenario in this thread, with a recorder of its own; it is to record these rows, as the table says, and no others
fn record(rows: &[&str], scenario: impl AsyncFnOnce(&Recorded)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let recorder = DebuggingRecorder::new();
    let recorded = Recorded { snapshotter: recorder.snapshotter(), series: Mutex::default() };
    metrics::with_local_recorder(&recorder, || {
        callsign::metrics::describe();
        runtime.block_on(scenario(&recorded));
    });
    let seen = recorded.look();
    for ((name, labels), series) in &seen {
        let metric = TABLE.iter().find(|metric| metric.name == *name);
        let metric = metric.unwrap_or_else(|| panic!("{name} is not in the table"));
        let mut expected = metric.labels.to_vec();
        expected.sort_unstable();
        assert_eq!(labels.keys().map(String::as_str).collect::<Vec<_>>(), expected, "{name}");
        assert_eq!(series.kind, Some(kind(metric)), "{name}");
        assert!(series.is_described, "{name}");
    }
    let is_seen = |row: &&str| seen.iter().any(|((name, _), series)| name == row && series.most > 0.0);
    let never: Vec<_> = rows.iter().filter(|row| !is_seen(row)).collect();
    assert!(never.is_empty(), "never recorded: {never:?}");
}

/// Which rows of the table are recorded by which scenario
const OF_CALLS: &[&str] = &[
    "callsign_calls_total",
    "callsign_call_latency_seconds",
    "callsign_picks_total",
    "callsign_replays_total",
];
const OF_WAITING: &[&str] = &["callsign_waiting_calls"];
const OF_ENDPOINTS: &[&str] = &["callsign_endpoints", "callsign_held_endpoints"];
const OF_EJECTIONS: &[&str] = &["callsign_ejected_endpoints", "callsign_ejections_total"];
const OF_ETCD: &[&str] = &[
    "callsign_discoveries",
    "callsign_discovery_lists_total",
    "callsign_discovery_resumes_total",
    "callsign_discovery_skipped_keys_total",
    "callsign_discovery_instances",
    "callsign_sessions",
    "callsign_session_moves_total",
    "callsign_registrations",
    "callsign_registration_grants_total",
    "callsign_registration_losses_total",
];
const OF_LOGINS: &[&str] = &["callsign_session_logins_refused_total"];

fn channel(addresses: impl IntoIterator<Item = Address>) -> Channel {
    let addresses: Vec<_> = addresses.into_iter().collect();
    Channel::builder(discover::fixed(addresses)).name(SERVICE).build().expect("the defaults are valid")
}

fn resting() -> Request<Chunk> {
    Request::new(Chunk::default())
}

/// A server that refuses its first call, answers the next two, and no more
async fn fickle() -> Scripted {
    Scripted::start(|_, peer| async move {
        peer.settings(None).await;
        for nth in 0..3 {
            let stream = peer.headers(nth).await;
            peer.end(stream).await;
            match nth {
                0 => peer.refuse(stream).await,
                _ => peer.respond(stream).await,
            }
        }
        peer.closed().await;
    })
    .await
}

async fn calls_and_replays(recorded: &Recorded) {
    let server = fickle().await;
    let (address, service) = (server.address().to_string(), ("service", SERVICE));
    let here = [service, ("endpoint", &address)];
    let with = |code: &'static str| [here[0], here[1], ("code", code)];
    let mut client = EchoClient::new(channel([server.address()]));
    for _ in 0..2 {
        client.unary(resting()).await.expect("it is answered");
    }
    assert_eq!(recorded.value("callsign_calls_total", &with("OK")), 2.0);
    assert_eq!(recorded.value("callsign_picks_total", &here), 3.0);
    assert_eq!(recorded.value("callsign_replays_total", &[service, ("reason", "refused")]), 1.0);
    assert_eq!(recorded.value("callsign_call_latency_seconds", &here), 2.0);

    let mut late = resting();
    late.set_timeout(Duration::from_millis(50));
    assert_eq!(client.unary(late).await.expect_err("nobody answers").code(), Code::DeadlineExceeded);
    assert_eq!(recorded.value("callsign_calls_total", &with("DEADLINE_EXCEEDED")), 1.0);

    let mut dropped = Box::pin(client.unary(resting()));
    wait::assert_waits("a call that nobody answers", &mut dropped);
    drop(dropped);
    assert_eq!(recorded.value("callsign_calls_total", &with("CANCELLED")), 1.0);
    assert_eq!(recorded.value("callsign_calls_total", &[service]), 4.0, "each has ended once");
    assert_eq!(recorded.value("callsign_replays_total", &[service]), 1.0);
    assert_eq!(recorded.value("callsign_call_latency_seconds", &here), 2.0, "no headers, no latency");
    let all = recorded.look();
    let samples = all.iter().filter(|((name, _), _)| name == "callsign_call_latency_seconds");
    let mut samples = samples.flat_map(|(_, series)| &series.samples);
    assert!(samples.all(|seconds| *seconds > 0.0 && *seconds < BOUND.as_secs_f64()));
}

async fn errors_without_a_body(recorded: &Recorded) {
    let stated = || headers(&Status::not_found("no"));
    for (answer, code) in [
        (Answer::Headers(stated()), "NOT_FOUND"),
        (Answer::HeadersThenEnd(stated()), "NOT_FOUND"),
        (Answer::Page(StatusCode::BAD_GATEWAY), "UNAVAILABLE"),
    ] {
        let server = Bare::start(answer).await;
        let mut client = EchoClient::new(channel([server.address()]));
        client.unary(resting()).await.expect_err("it has nothing");
        let address = server.address().to_string();
        let here = ("endpoint", address.as_str());
        assert_eq!(recorded.value("callsign_calls_total", &[here, ("code", code)]), 1.0);
        assert_eq!(recorded.value("callsign_calls_total", &[here]), 1.0);
    }
}

async fn calls_that_wait(recorded: &Recorded) {
    let peer = Peer::deaf();
    let mut client = EchoClient::new(channel([peer.address()]));
    let nowhere = |code| [("service", SERVICE), ("endpoint", "none"), ("code", code)];
    let before = recorded.value("callsign_calls_total", &[]);
    let mut waiting = Box::pin(client.unary(resting()));
    wait::assert_waits("a call without an endpoint", &mut waiting);
    assert_eq!(recorded.value("callsign_waiting_calls", &[("service", SERVICE)]), 1.0);
    assert_eq!(
        waiting.await.expect_err("nobody is there").code(),
        Code::Unavailable,
        "after the pick timeout"
    );
    assert_eq!(recorded.value("callsign_waiting_calls", &[("service", SERVICE)]), 0.0);
    assert_eq!(recorded.value("callsign_calls_total", &nowhere("UNAVAILABLE")), 1.0);

    let mut dropped = Box::pin(client.unary(resting()));
    wait::assert_waits("a call without an endpoint", &mut dropped);
    drop(dropped);
    assert_eq!(recorded.value("callsign_waiting_calls", &[("service", SERVICE)]), 0.0);
    assert_eq!(recorded.value("callsign_calls_total", &nowhere("CANCELLED")), 1.0);
    assert_eq!(recorded.value("callsign_calls_total", &[]), before + 2.0);
}

async fn endpoints_by_state(recorded: &Recorded) {
    let silent = Scripted::start(|_, peer| async move {
        peer.settings(None).await;
        peer.closed().await;
    });
    let (server, deaf) = (silent.await, Peer::deaf());
    let (channel, log, changes) = changing(|builder| builder.name(SERVICE).hold_window(BOUND));
    let endpoints = |state| ("callsign_endpoints", [("service", SERVICE), ("state", state)]);
    let until = async |state, count| {
        let (name, labels) = endpoints(state);
        recorded.until(name, &labels, count).await;
    };
    changes.insert(server.address());
    changes.insert(deaf.address());
    until("ready", 1.0).await;
    until("backoff", 1.0).await;
    changes.remove(&deaf.address());
    until("backoff", 0.0).await;
    // The last one is gone as well: it is held.
    changes.remove(&server.address());
    recorded.until("callsign_held_endpoints", &[("service", SERVICE)], 1.0).await;
    until("ready", 1.0).await;
    drop((channel, log));
    recorded.until_gauges_are_zero().await;
}

async fn ejections(recorded: &Recorded) {
    let failing = Bare::start(Answer::Headers(headers(&Status::unavailable("not today")))).await;
    let well = Bare::well().await;
    let way = Proxy::to(failing.address().to_string()).await;
    let reached: Address = way.endpoint().trim_start_matches("http://").parse().expect("an address");
    // One that goes by calls in flight alone, and so sends the failing one its share until that is ejected.
    let channel = Channel::builder(discover::fixed([reached, well.address()]))
        .name(SERVICE)
        .policy(LeastRequest::new())
        .build();
    let mut client = EchoClient::new(channel.expect("valid settings"));
    let ejected = async {
        while recorded.value("callsign_ejected_endpoints", &[("service", SERVICE)]) == 0.0 {
            // Whether it fails depends on who is drawn.
            let _ = client.unary(resting()).await;
        }
    };
    wait::within("the failing endpoint is ejected", BOUND, ejected).await;
    assert!(recorded.value("callsign_ejections_total", &[("service", SERVICE)]) > 0.0);
    assert_eq!(recorded.value("callsign_ejections_total", &[("reason", "silent")]), 0.0);
    let ready = [("service", SERVICE), ("state", "ready")];
    let decisions = recorded.value("callsign_ejections_total", &[]);
    for _ in 0..3 {
        way.cut().await;
        recorded.until("callsign_endpoints", &ready, 1.0).await;
        way.heal();
        recorded.until("callsign_endpoints", &ready, 2.0).await;
    }
    assert_eq!(recorded.value("callsign_ejections_total", &[]), decisions, "no reconnect is an ejection");
    drop(client);
    recorded.until_gauges_are_zero().await;
}

async fn discovery_session_and_registration(recorded: &Recorded) {
    let etcd = registry::etcd().await;
    let proxies = [Proxy::to(etcd.endpoint()).await, Proxy::to(etcd.endpoint()).await];
    etcd.put("hello.rpc/garbage", "no address").await;
    let session =
        Etcd::connect(EtcdOptions::new(proxies.each_ref().map(Proxy::endpoint))).await.expect("etcd answers");
    assert_eq!(recorded.value("callsign_sessions", &[("state", "connected")]), 1.0);
    assert_eq!(recorded.value("callsign_sessions", &[]), 1.0);

    let address: Address = "127.0.0.1:9090".parse().expect("an address");
    let registration =
        Registration::builder(&session, SERVICE, address).register().await.expect("etcd lets it");
    let registered = [("service", SERVICE), ("state", "registered")];
    assert_eq!(recorded.value("callsign_registrations", &registered), 1.0);
    assert_eq!(recorded.value("callsign_registrations", &[]), 1.0);
    assert_eq!(recorded.value("callsign_registration_grants_total", &[("service", SERVICE)]), 1.0);

    let lost = [("service", SERVICE), ("cause", "key_deleted")];
    let losing = async {
        // What is deleted before the registration has begun to watch its key is put again without a word.
        while recorded.value("callsign_registration_losses_total", &lost) == 0.0 {
            etcd.delete(registration.key()).await;
        }
    };
    wait::within("the registration is lost", BOUND, losing).await;
    recorded.until("callsign_registrations", &registered, 1.0).await;
    assert_eq!(recorded.value("callsign_registrations", &[]), 1.0);

    let name = [("name", SERVICE)];
    let discover = EtcdDiscover::new(&session, SERVICE).expect("a valid name");
    let view = View::of(discover);
    recorded.until("callsign_discovery_instances", &name, 1.0).await;
    let standing = |state| [name[0], ("state", state)];
    recorded.until("callsign_discoveries", &standing("watching"), 1.0).await;
    assert_eq!(recorded.value("callsign_discoveries", &name), 1.0, "in one state at a time");
    assert_eq!(recorded.value("callsign_discovery_lists_total", &name), 1.0);
    assert_eq!(recorded.value("callsign_discovery_skipped_keys_total", &name), 1.0);
    assert_eq!(recorded.value("callsign_discovery_resumes_total", &name), 0.0);

    let used = session.state().borrow().clone();
    let callsign::SessionState::Connected { host } = used else { panic!("{used:?}") };
    let used = proxies.iter().find(|proxy| proxy.endpoint() == host.to_string()).expect("one of them");
    used.refuse().await;
    recorded.until_some("callsign_discovery_resumes_total", &name).await;
    recorded.until_some("callsign_session_moves_total", &[]).await;

    registration.deregister().await.expect("etcd answers");
    recorded.until("callsign_discovery_instances", &name, 0.0).await;
    drop((view, session));
    recorded.until_gauges_are_zero().await;
}

async fn refused_logins(recorded: &Recorded) {
    let etcd = registry::etcd().await;
    etcd.enable_auth().await;
    let session =
        Etcd::connect_lazy(EtcdOptions::new([etcd.endpoint()]).user("root", "wrong")).expect("valid options");
    session.services().await.expect_err("a wrong password");
    assert_eq!(recorded.value("callsign_session_logins_refused_total", &[]), 1.0);
    assert_eq!(recorded.value("callsign_sessions", &[("state", "refused")]), 1.0);
    drop(session);
    recorded.until_gauges_are_zero().await;
}

#[test]
fn a_call_is_counted_once_with_its_endpoint_and_code_and_a_replay_as_such() {
    record(OF_CALLS, calls_and_replays);
}

/// It was counted as cancelled: who finds an error in the headers drops the body unread
#[test]
fn a_call_that_ends_with_its_headers_is_counted_with_what_they_say() {
    record(&[], errors_without_a_body);
}

#[test]
fn a_call_that_no_endpoint_takes_waits_and_ends_as_all_others() {
    record(OF_WAITING, calls_that_wait);
}

#[test]
fn endpoints_are_counted_where_they_stand_until_the_channel_ends() {
    record(OF_ENDPOINTS, endpoints_by_state);
}

#[test]
fn an_endpoint_that_is_ejected_is_counted_with_the_reason() {
    record(OF_EJECTIONS, ejections);
}

#[test]
fn a_session_and_what_is_built_from_it_are_counted_until_they_are_dropped() {
    record(OF_ETCD, discovery_session_and_registration);
}

#[test]
fn a_refused_login_is_counted() {
    record(OF_LOGINS, refused_logins);
}

#[test]
fn every_row_of_the_table_is_recorded_by_one_of_these_scenarios() {
    let rows = [OF_CALLS, OF_WAITING, OF_ENDPOINTS, OF_EJECTIONS, OF_ETCD, OF_LOGINS].concat();
    let missing: Vec<_> = TABLE.iter().map(|metric| metric.name).filter(|row| !rows.contains(row)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

fn kind(metric: &Metric) -> MetricKind {
    match metric.kind {
        Kind::Counter => MetricKind::Counter,
        Kind::Gauge => MetricKind::Gauge,
        Kind::Histogram => MetricKind::Histogram,
        _ => panic!("{metric:?}"),
    }
}
