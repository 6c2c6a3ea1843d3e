//! Asking etcd for instances and services, and watching them for one's own purposes

#![cfg(unix)]

use std::{pin::pin, sync::mpsc, thread, time::Duration};

use callsign::{
    Etcd, EtcdOptions, Instance, Registration,
    discover::{DiscoveryState, EtcdDiscover},
    etcd::{Instances, Snapshots, Update},
};
use callsign_tests::{etcd::EtcdProcess, peers::Peer, registry, view::View, wait};
use tokio::{sync::oneshot, task::JoinSet};
use tokio_stream::StreamExt;

const SERVICE: &str = "hello.rpc";
/// How soon a change is seen
const SEEN: Duration = Duration::from_secs(2);
/// For what waits for other hosts, or is much
const BOUND: Duration = Duration::from_secs(20);

const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";

fn session(hosts: impl IntoIterator<Item = String>) -> Etcd {
    Etcd::connect_lazy(EtcdOptions::new(hosts)).expect("valid hosts")
}

async fn put(etcd: &EtcdProcess, id: &str, address: &str) {
    etcd.put(&format!("{SERVICE}/{id}"), address).await;
}

async fn delete(etcd: &EtcdProcess, id: &str) {
    etcd.delete(&format!("{SERVICE}/{id}")).await;
}

async fn update(updates: &mut Instances) -> Update {
    wait::within("an update", BOUND, updates.next()).await.expect("the stream never ends")
}

async fn snapshot(snapshots: &mut Snapshots) -> Vec<String> {
    shown(&wait::within("a snapshot", BOUND, snapshots.next()).await.expect("the stream never ends"))
}

/// `id=address`, in the order given
fn shown(instances: &[Instance]) -> Vec<String> {
    instances.iter().map(|instance| format!("{}={}", instance.id, instance.address)).collect()
}

#[tokio::test]
async fn instances_are_listed_by_id_and_what_is_none_is_left_out() {
    let etcd = registry::etcd().await;
    let session = session([etcd.endpoint()]);
    assert_eq!(session.instances(SERVICE).await.unwrap(), []);
    for (id, value) in [("7", A), ("10", B), ("garbage", "not an address"), ("deeper/1", A), ("", A)] {
        put(&etcd, id, value).await;
    }
    etcd.put("hello.rpc_other/1", A).await;
    let instances = session.instances(SERVICE).await.unwrap();
    assert_eq!(shown(&instances), ["10=10.0.0.2:80", "7=10.0.0.1:80"]);
    assert!(instances[0].mod_revision > instances[1].mod_revision);
}

#[tokio::test]
async fn services_are_those_with_an_instance() {
    let etcd = registry::etcd().await;
    let session = session([etcd.endpoint()]);
    assert_eq!(session.services().await.unwrap(), [""; 0]);
    for (key, value) in [
        ("hello.rpc/1", A),
        ("hello.rpc/2", B),
        ("team/other.rpc/1", A),
        ("garbage.rpc/1", "not an address"),
        ("garbage.rpc/2", ""),
        ("config", A),
        ("/elsewhere/1", A),
        ("odd\nname/1", A),
        ("empty/", A),
    ] {
        etcd.put(key, value).await;
    }
    assert_eq!(session.services().await.unwrap(), ["hello.rpc", "team/other.rpc"]);
}

#[tokio::test]
async fn two_namespaces_do_not_see_each_other() {
    let etcd = registry::etcd().await;
    let within = |namespace| {
        let options = EtcdOptions::new([etcd.endpoint()]).namespace(namespace);
        Etcd::connect_lazy(options).expect("a valid namespace")
    };
    let (blue, green) = (within("/blue"), within("/green"));
    let mut snapshots = green.watch(SERVICE).unwrap().snapshots();
    assert_eq!(snapshot(&mut snapshots).await, [""; 0]);
    let register = async |etcd: &Etcd, service: &str, id: i64, address: &str| {
        let builder = Registration::builder(etcd, service, address.parse().unwrap()).id(id);
        builder.register().await.unwrap()
    };
    let _blue = [register(&blue, SERVICE, 1, A).await, register(&blue, "team/blue.rpc", 1, A).await];
    let _green = register(&green, SERVICE, 2, B).await;
    assert_eq!(snapshot(&mut snapshots).await, ["2=10.0.0.2:80"]);
    assert_eq!(shown(&blue.instances(SERVICE).await.unwrap()), ["1=10.0.0.1:80"]);
    assert_eq!(blue.services().await.unwrap(), ["hello.rpc", "team/blue.rpc"]);
    assert_eq!(green.services().await.unwrap(), ["hello.rpc"]);
    assert_eq!(session([etcd.endpoint()]).services().await.unwrap(), [""; 0], "a name begins with no slash");
}

#[tokio::test]
async fn a_list_longer_than_a_page_is_whole() {
    let etcd = registry::etcd().await;
    let session = session([etcd.endpoint()]);
    changes(&etcd, 1_203, |number| (format!("service{number:04}/1"), A.to_owned())).await;
    let services = session.services().await.unwrap();
    assert_eq!(
        (services.len(), services[0].as_str(), services[1_202].as_str()),
        (1_203, "service0000", "service1202")
    );
    changes(&etcd, 1_203, |number| (format!("{SERVICE}/{number}"), A.to_owned())).await;
    assert_eq!(session.instances(SERVICE).await.unwrap().len(), 1_203);
}

#[tokio::test]
async fn the_host_that_works_is_asked() {
    let etcd = registry::etcd().await;
    let (dead, mute) = (Peer::deaf(), Peer::mute().await);
    put(&etcd, "1", A).await;
    let hosts = || [dead.address().to_string(), mute.address().to_string(), etcd.endpoint()];
    let (listed, took) = wait::timed(session(hosts()).instances(SERVICE)).await;
    assert_eq!(shown(&listed.unwrap()), ["1=10.0.0.1:80"]);
    assert!(took < Duration::from_secs(9), "{took:?}");
    assert_eq!(session(hosts()).services().await.unwrap(), [SERVICE]);
}

#[tokio::test]
async fn updates_tell_steps_and_snapshots_what_came_of_them() {
    let etcd = registry::etcd().await;
    let session = session([etcd.endpoint()]);
    put(&etcd, "2", B).await;
    let mut updates = session.watch(SERVICE).unwrap();
    let mut snapshots = session.watch(SERVICE).unwrap().snapshots();
    let Update::Reset(first) = update(&mut updates).await else { panic!("the first one is a reset") };
    assert_eq!(
        (shown(&first), snapshot(&mut snapshots).await),
        (vec!["2=10.0.0.2:80".to_owned()], shown(&first))
    );
    put(&etcd, "1", A).await;
    let Update::Put(put) = update(&mut updates).await else { panic!("one change is a step") };
    assert_eq!(shown(&[put]), ["1=10.0.0.1:80"]);
    assert_eq!(snapshot(&mut snapshots).await, ["1=10.0.0.1:80", "2=10.0.0.2:80"]);
    delete(&etcd, "2").await;
    assert_eq!(update(&mut updates).await, Update::Remove("2".into()));
    assert_eq!(snapshot(&mut snapshots).await, ["1=10.0.0.1:80"]);
    let state = snapshots.state();
    assert!(matches!(&*state.borrow(), DiscoveryState::Watching { .. }));
}

#[tokio::test]
async fn a_watch_is_shared_with_the_channels_of_the_session() {
    let Some(etcd) = registry::real(registry::METRICS).await else { return };
    let session = session([etcd.endpoint()]);
    put(&etcd, "1", A).await;
    let discovered = View::of(EtcdDiscover::new(&session, SERVICE).unwrap());
    let mut snapshots = session.watch(SERVICE).unwrap().snapshots();
    assert_eq!(snapshot(&mut snapshots).await, ["1=10.0.0.1:80"]);
    discovered.until(&[A], SEEN).await;
    let mut state = snapshots.state();
    let watching = state.wait_for(|state| matches!(state, DiscoveryState::Watching { .. }));
    wait::within("watching", BOUND, watching).await.unwrap();
    assert_eq!(etcd.metric("etcd_debugging_mvcc_watcher_total", "").await, Some(1));
}

#[tokio::test]
async fn a_blocked_consumer_holds_up_nobody_and_then_sees_the_latest_only() {
    const CHANGES: usize = 3_000;
    const IDS: usize = 100;
    let etcd = registry::etcd().await;
    let session = session([etcd.endpoint()]);
    let quick = View::of(EtcdDiscover::new(&session, SERVICE).unwrap());
    let (mut behind, mut snapshots) =
        (session.watch(SERVICE).unwrap(), session.watch(SERVICE).unwrap().snapshots());
    let mut values = session.watch_value::<usize>("config").unwrap();
    assert_eq!(update(&mut behind).await, Update::Reset(vec![]));

    // A callback that does not return: its thread stands still until it is let go.
    let (go, gate) = mpsc::channel();
    let (begins, begun) = oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    let blocked = thread::spawn(move || {
        let first = runtime.block_on(snapshot(&mut snapshots));
        begins.send(first).expect("someone waits");
        gate.recv().expect("it is let go");
        let latest = runtime.block_on(snapshot(&mut snapshots));
        let _context = runtime.enter();
        wait::assert_waits("a backlog", &mut pin!(snapshots.next()));
        latest
    });
    let first = wait::within("it stands", BOUND, begun).await.expect("it has begun");
    assert_eq!(first, [""; 0]);
    changes(&etcd, CHANGES, |number| {
        let address = format!("10.1.{}.{}:80", number / 256, number % 256);
        (format!("{SERVICE}/{:02}", number % IDS), address)
    })
    .await;
    changes(&etcd, CHANGES, |number| ("config".to_owned(), number.to_string())).await;
    etcd.put("config", "1000000").await;
    put(&etcd, "last", A).await;

    wait::until("others see the last change", SEEN, || {
        quick.addresses().iter().any(|address| address == A).then_some(())
    })
    .await;
    let latest = shown(&session.instances(SERVICE).await.unwrap());
    assert_eq!((latest.len(), quick.addresses().len()), (IDS + 1, IDS + 1));
    go.send(()).expect("it waits");
    assert_eq!(blocked.join().expect("no panic"), latest);
    // Who fell behind is told once, not thousands of times.
    assert!(matches!(update(&mut behind).await, Update::Reset(set) if set.len() == IDS + 1));
    wait::assert_waits("a backlog", &mut pin!(behind.next()));
    assert_eq!(wait::within("the value", SEEN, values.next()).await, Some(Ok(Some(1_000_000))));
    wait::assert_waits("a backlog", &mut pin!(values.next()));
}

/// Makes as many puts, some at a time, each numbered
async fn changes(etcd: &EtcdProcess, puts: usize, pair: impl Fn(usize) -> (String, String)) {
    const IN_FLIGHT: usize = 16;
    let client = etcd_client::Client::connect([etcd.endpoint()], None).await.expect("etcd is there");
    let mut workers = JoinSet::new();
    for worker in 0..IN_FLIGHT {
        let mut client = client.clone();
        let pairs: Vec<_> = (worker..puts).step_by(IN_FLIGHT).map(&pair).collect();
        workers.spawn(async move {
            for (key, value) in pairs {
                client.put(key, value, None).await.expect("etcd does as it is told");
            }
        });
    }
    workers.join_all().await;
}
