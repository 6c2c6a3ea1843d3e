//! Discovery against an etcd: the view is right, and stays while etcd is away

#![cfg(unix)]

use std::{path::Path, time::Duration};

use callsign::{
    Etcd, EtcdOptions, Registration,
    discover::{DiscoveryState, EtcdDiscover},
};
use callsign_tests::{
    etcd::EtcdProcess,
    pb::{HelloRequest, greeter_client::GreeterClient},
    peers::Peer,
    proxy::Proxy,
    registry,
    scripted::{Scripted, Taken},
    service::{Local, who},
    view::View,
    wait,
};
use tokio::sync::watch;

const SERVICE: &str = "hello.rpc";
/// How soon a change is seen
const SEEN: Duration = Duration::from_secs(2);
/// For what waits for a ping or a backoff
const BOUND: Duration = Duration::from_secs(20);

const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";
const C: &str = "10.0.0.3:80";

struct Following {
    view: View,
    state: watch::Receiver<DiscoveryState>,
    session: Etcd,
}

impl Following {
    async fn of(hosts: impl IntoIterator<Item = String>) -> Self {
        let session = Etcd::connect_lazy(EtcdOptions::new(hosts)).expect("valid hosts");
        let discover = EtcdDiscover::new(&session, SERVICE).expect("a valid name");
        Self { state: discover.state(), view: View::of(discover), session }
    }

    async fn until_state(&mut self, what: &str, condition: impl Fn(&DiscoveryState) -> bool) {
        wait::within(what, BOUND, self.state.wait_for(condition)).await.expect("the task lives");
    }

    async fn until_watching(&mut self) {
        self.until_state("watching", |state| matches!(state, DiscoveryState::Watching { .. })).await;
    }

    async fn until_resuming(&mut self) {
        self.until_state("resuming", |state| matches!(state, DiscoveryState::Resuming { .. })).await;
    }
}

/// Resuming, for a cause that contains this
fn resuming(text: &str) -> impl Fn(&DiscoveryState) -> bool {
    move |state| matches!(state, DiscoveryState::Resuming { cause } if cause.contains(text))
}

async fn put(etcd: &EtcdProcess, id: &str, value: &str) {
    etcd.put(&format!("{SERVICE}/{id}"), value).await;
}

async fn delete(etcd: &EtcdProcess, id: &str) {
    etcd.delete(&format!("{SERVICE}/{id}")).await;
}

/// How many lists etcd was asked for; the embedded one does not count
async fn lists(etcd: &EtcdProcess) -> Option<u64> {
    etcd.metric("grpc_server_started_total", "grpc_method=\"Range\"").await
}

#[tokio::test]
async fn instances_come_and_go() {
    let etcd = registry::etcd().await;
    put(&etcd, "1", A).await;
    let follow = Following::of([etcd.endpoint()]).await;
    follow.view.until(&[A], SEEN).await;
    put(&etcd, "2", B).await;
    follow.view.until(&[A, B], SEEN).await;
    delete(&etcd, "1").await;
    follow.view.until(&[B], SEEN).await;
    put(&etcd, "2", C).await;
    follow.view.until(&[C], SEEN).await;
}

#[tokio::test]
async fn garbage_and_the_keys_of_others_are_skipped() {
    let etcd = registry::etcd().await;
    let large = format!("10.0.0.9:80{}", " ".repeat(100_000));
    let garbage = [("garbage", "not an address"), ("empty", ""), ("", A), ("deeper/1", A), ("a\u{1b}[2J", A)];
    for (id, value) in garbage.into_iter().chain([("large", large.as_str())]) {
        put(&etcd, id, value).await;
    }
    put(&etcd, "1", A).await;
    etcd.put("hello.rpc_other/1", C).await;
    let follow = Following::of([etcd.endpoint()]).await;
    follow.view.until(&[A], SEEN).await;
    for (id, value) in garbage {
        put(&etcd, id, &format!("{value}?")).await;
    }
    put(&etcd, "2", B).await;
    follow.view.until(&[A, B], SEEN).await;
    put(&etcd, "1", "garbage").await;
    follow.view.until(&[B], SEEN).await;
    put(&etcd, "garbage", C).await;
    follow.view.until(&[B, C], SEEN).await;
}

#[tokio::test]
async fn more_large_values_than_a_message_holds_hide_no_instance() {
    let etcd = registry::etcd().await;
    let large = vec![b'x'; 1 << 20];
    for number in 0..66 {
        etcd.put(&format!("{SERVICE}/{number}"), large.clone()).await;
    }
    put(&etcd, "zz", A).await;
    let follow = Following::of([etcd.endpoint()]).await;
    follow.view.until(&[A], BOUND).await;
}

#[tokio::test]
async fn an_address_under_two_ids_is_one_endpoint_and_a_newer_one_inserts_it_again() {
    let etcd = registry::etcd().await;
    put(&etcd, "1", A).await;
    let follow = Following::of([etcd.endpoint()]).await;
    follow.view.until(&[A], SEEN).await;
    put(&etcd, "2", A).await;
    wait::until("the second insert", SEEN, || (follow.view.changes() == 2).then_some(())).await;
    delete(&etcd, "1").await;
    put(&etcd, "3", B).await;
    follow.view.until(&[A, B], SEEN).await;
    assert_eq!(follow.view.removed(), 0, "the address is still there under its second id");
    delete(&etcd, "2").await;
    follow.view.until(&[B], SEEN).await;
}

#[tokio::test]
async fn a_large_service_is_listed_page_by_page_and_all_of_it_is_seen() {
    let etcd = registry::etcd().await;
    const MANY: usize = 1_203;
    let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.unwrap();
    let following = View::of(EtcdDiscover::new(&session, SERVICE).unwrap());
    let mut registrations = Vec::new();
    for number in 0..MANY {
        let address = format!("10.0.{}.{}:80", number / 256, number % 256).parse().unwrap();
        registrations.push(Registration::builder(&session, SERVICE, address).start().unwrap());
    }
    wait::until("the watch tells of all", BOUND, || (following.addresses().len() == MANY).then_some(()))
        .await;
    let other = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.unwrap();
    let listed = View::of(EtcdDiscover::new(&other, SERVICE).unwrap());
    wait::until("the list has all", BOUND, || (listed.addresses().len() == MANY).then_some(())).await;
    assert_eq!((listed.changes(), listed.removed()), (MANY, 0));
    drop(registrations);
    listed.until(&[], BOUND).await;
    following.until(&[], BOUND).await;
}

#[tokio::test]
async fn a_restarted_etcd_changes_nothing_and_the_watch_goes_on_where_it_was() {
    let Some(mut etcd) = registry::real(registry::PERSISTENCE).await else { return };
    put(&etcd, "1", A).await;
    let mut follow = Following::of([etcd.endpoint()]).await;
    follow.view.until(&[A], SEEN).await;
    follow.until_watching().await;
    for _ in 0..2 {
        etcd.kill9();
        follow.until_resuming().await;
        etcd.restart().await;
        follow.until_watching().await;
    }
    assert_eq!(follow.view.changes(), 1, "nothing but the first insert");
    assert_eq!(lists(&etcd).await, Some(0), "resumed, not listed again");
    put(&etcd, "2", B).await;
    follow.view.until(&[A, B], SEEN).await;
}

#[tokio::test]
async fn what_happened_while_away_is_told_when_back() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    put(&etcd, "1", A).await;
    put(&etcd, "2", B).await;
    let mut follow = Following::of([proxy.endpoint()]).await;
    follow.view.until(&[A, B], SEEN).await;
    follow.until_watching().await;
    proxy.cut().await;
    follow.until_resuming().await;
    delete(&etcd, "1").await;
    put(&etcd, "3", C).await;
    assert_eq!(follow.view.addresses(), [A, B]);
    let before = lists(&etcd).await;
    proxy.heal();
    follow.view.until(&[B, C], BOUND).await;
    assert_eq!(follow.view.removed(), 1);
    assert_eq!(lists(&etcd).await, before, "resumed, not listed again");
}

#[tokio::test]
async fn after_a_compaction_while_away_it_lists_once_and_tells_the_difference() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    put(&etcd, "1", A).await;
    put(&etcd, "2", B).await;
    let mut follow = Following::of([proxy.endpoint()]).await;
    follow.view.until(&[A, B], SEEN).await;
    follow.until_watching().await;
    proxy.cut().await;
    follow.until_resuming().await;
    delete(&etcd, "1").await;
    put(&etcd, "3", C).await;
    for round in 0..20 {
        etcd.put("unrelated", round.to_string()).await;
    }
    etcd.compact().await;
    let (before, changes) = (lists(&etcd).await, follow.view.changes());
    proxy.heal();
    follow.view.until(&[B, C], BOUND).await;
    follow.until_watching().await;
    assert_eq!(lists(&etcd).await, before.map(|before| before + 1));
    assert_eq!(follow.view.changes(), changes + 2, "one came and one left");
    put(&etcd, "4", A).await;
    follow.view.until(&[A, B, C], SEEN).await;
}

#[tokio::test]
async fn a_wiped_etcd_is_listed_anew() {
    let mut etcd = registry::etcd().await;
    for _ in 0..10 {
        put(&etcd, "gone", B).await;
    }
    let mut follow = Following::of([etcd.endpoint()]).await;
    follow.view.until(&[B], SEEN).await;
    let builder = Registration::builder(&follow.session, SERVICE, A.parse().unwrap());
    let _living = builder.ttl(Duration::from_secs(5)).register().await.unwrap();
    follow.view.until(&[A, B], SEEN).await;
    etcd.kill9();
    follow.until_resuming().await;
    etcd.wipe();
    etcd.restart().await;
    follow.view.until(&[A], BOUND).await;
    put(&etcd, "new", C).await;
    follow.view.until(&[A, C], SEEN).await;
}

#[tokio::test]
async fn a_wiped_etcd_whose_revisions_have_caught_up_is_listed_anew_too() {
    let mut etcd = registry::etcd().await;
    put(&etcd, "1", A).await;
    put(&etcd, "2", B).await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    let mut follow = Following::of([proxy.endpoint()]).await;
    follow.view.until(&[A, B], SEEN).await;
    proxy.cut().await;
    etcd.kill9();
    etcd.wipe();
    etcd.restart().await;
    // In the past of what was known, and then beyond it.
    put(&etcd, "3", C).await;
    for number in 0..10 {
        etcd.put("other", number.to_string()).await;
    }
    follow.until_resuming().await;
    proxy.heal();
    // A retry is 3 s away at most.
    follow.view.until(&[C], 3 * SEEN).await;
}

#[tokio::test]
async fn an_etcd_that_is_restored_from_a_backup_is_listed_anew_although_what_was_put_last_is_in_it() {
    let Some(mut etcd) = registry::real(registry::PERSISTENCE).await else { return };
    put(&etcd, "1", A).await;
    put(&etcd, "2", B).await;
    etcd.kill9();
    let (data, backup) = (etcd.dir().join("data"), etcd.dir().join("backup"));
    copy(&data, &backup);
    etcd.restart().await;
    let mut follow = Following::of([etcd.endpoint()]).await;
    follow.view.until(&[A, B], SEEN).await;
    delete(&etcd, "1").await;
    follow.view.until(&[B], SEEN).await;
    etcd.kill9();
    follow.until_resuming().await;
    etcd.wipe();
    std::fs::rename(backup, data).unwrap();
    etcd.restart().await;
    follow.view.until(&[A, B], BOUND).await;
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("the temp dir is writable");
    for entry in std::fs::read_dir(from).expect("it is a directory").map_while(Result::ok) {
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).expect("a file");
        }
    }
}

#[tokio::test]
async fn a_frozen_etcd_is_noticed_changes_nothing_and_may_wake() {
    let etcd = registry::etcd().await;
    put(&etcd, "1", A).await;
    let mut follow = Following::of([etcd.endpoint()]).await;
    follow.view.until(&[A], SEEN).await;
    follow.until_watching().await;
    etcd.stop().await;
    // One ping every 10 s, with 3 s to answer.
    follow.until_resuming().await;
    assert_eq!(follow.view.addresses(), [A]);
    etcd.cont();
    follow.until_watching().await;
    put(&etcd, "2", B).await;
    follow.view.until(&[A, B], SEEN).await;
    assert_eq!(follow.view.removed(), 0);
}

#[tokio::test]
async fn what_starts_without_etcd_says_nothing_until_the_first_list() {
    let Some(mut etcd) = registry::real(registry::PERSISTENCE).await else { return };
    put(&etcd, "1", A).await;
    etcd.kill9();
    let mut follow = Following::of([etcd.endpoint()]).await;
    let failed = |state: &DiscoveryState| matches!(state, DiscoveryState::Listing { cause: Some(_) });
    follow.until_state("the first list has failed", failed).await;
    assert_eq!(follow.view.changes(), 0);
    etcd.restart().await;
    follow.view.until(&[A], BOUND).await;
    follow.until_watching().await;
}

#[tokio::test]
async fn dead_and_frozen_hosts_are_left_for_the_one_that_works() {
    let etcd = registry::etcd().await;
    let (dead, mute) = (Peer::deaf(), Peer::mute().await);
    put(&etcd, "1", A).await;
    let hosts = [dead.address().to_string(), mute.address().to_string(), etcd.endpoint()];
    let follow = Following::of(hosts).await;
    follow.view.until(&[A], BOUND).await;
    put(&etcd, "2", B).await;
    follow.view.until(&[A, B], SEEN).await;
}

#[tokio::test]
async fn all_who_follow_a_service_share_one_watch_which_ends_with_the_last() {
    let Some(etcd) = registry::real(registry::METRICS).await else { return };
    put(&etcd, "1", A).await;
    let mut follow = Following::of([etcd.endpoint()]).await;
    follow.until_watching().await;
    let more: Vec<_> =
        (0..10).map(|_| View::of(EtcdDiscover::new(&follow.session, SERVICE).unwrap())).collect();
    for view in &more {
        view.until(&[A], SEEN).await;
    }
    let watchers = async || etcd.metric("etcd_debugging_mvcc_watcher_total", "").await;
    assert_eq!(watchers().await, Some(1));
    drop(more);
    put(&etcd, "2", B).await;
    follow.view.until(&[A, B], SEEN).await;
    drop(follow);
    let none = async {
        while watchers().await > Some(0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    wait::within("the watch ends", SEEN, none).await;
}

#[tokio::test]
async fn a_member_without_a_leader_says_so_and_the_view_stays() {
    let Some([mut a, mut b, c]) = registry::three_members().await else { return };
    put(&c, "1", A).await;
    let mut follow = Following::of([c.endpoint()]).await;
    follow.view.until(&[A], SEEN).await;
    follow.until_watching().await;
    // Frozen is as good as dead to the third; which of them led makes no difference.
    a.stop().await;
    b.kill9();
    follow.until_state("the watch says that there is no leader", resuming("no leader")).await;
    assert_eq!((follow.view.addresses(), follow.view.changes()), (vec![A.to_owned()], 1));
    a.cont();
    follow.until_watching().await;
    put(&a, "2", B).await;
    follow.view.until(&[A, B], SEEN).await;
    assert_eq!(follow.view.removed(), 0);
    a.kill9();
}

#[tokio::test]
async fn a_refused_watch_is_followed_by_a_list_and_what_was_listed_once_is_listed() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    put(&etcd, "1", A).await;
    let mut follow = Following::of([proxy.endpoint()]).await;
    follow.view.until(&[A], SEEN).await;
    follow.until_watching().await;
    etcd.enable_auth().await;
    proxy.cut().await;
    follow.until_resuming().await;
    proxy.heal();
    follow.until_state("the watch is refused", resuming("the watch was canceled")).await;
    // The cause of a list stands alone. A state of listing would say that there never was one.
    follow.until_state("the list is refused", resuming(": etcdserver: user name is empty")).await;
    assert_eq!(follow.view.addresses(), [A]);
}

#[tokio::test]
async fn a_list_is_read_again_after_ten_minutes() {
    let Some(etcd) = registry::real(registry::METRICS).await else { return };
    put(&etcd, "1", A).await;
    let mut follow = Following::of([etcd.endpoint()]).await;
    follow.view.until(&[A], SEEN).await;
    follow.until_watching().await;
    let before = lists(&etcd).await;
    pass(Duration::from_secs(530)).await;
    put(&etcd, "2", B).await;
    follow.view.until(&[A, B], SEEN).await;
    assert_eq!(lists(&etcd).await, before, "not before nine");
    pass(Duration::from_secs(140)).await;
    let again = async {
        while lists(&etcd).await == before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    wait::within("the list is read again", SEEN, again).await;
    follow.until_watching().await;
    put(&etcd, "3", C).await;
    follow.view.until(&[A, B, C], SEEN).await;
    assert_eq!(follow.view.changes(), 3, "an equal list is no news");
}

/// Lets time pass for this process alone
async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

#[tokio::test]
async fn a_watch_that_is_not_confirmed_is_opened_on_the_next_host() {
    // The first connection gets an empty list and a watch of which nothing comes; pings are answered.
    let server = Scripted::start(|_, peer| async move {
        peer.settings(None).await;
        let list = peer.headers(0).await;
        peer.end(list).await;
        peer.respond(list).await;
        let watch = peer.headers(1).await;
        peer.respond_headers(watch).await;
        peer.closed().await;
    })
    .await;
    let mut follow = Following::of([server.address().to_string()]).await;
    let ((), took) =
        wait::timed(follow.until_state("the watch is given up", resuming("opening a watch"))).await;
    assert!((Duration::from_secs(3)..Duration::from_secs(5)).contains(&took), "{took:?}");
    let next = |calls: &[Taken]| calls.iter().any(|call| call.connection == 1).then_some(());
    wait::within("the next host is asked", BOUND, server.record().until(next)).await;
}

#[tokio::test]
async fn tonics_channel_follows_what_comes_and_goes() {
    let etcd = registry::etcd().await;
    let (first, second) = (Local::start().await, Local::start().await);
    let session = Etcd::connect_lazy(EtcdOptions::new([etcd.endpoint()])).unwrap();
    let mut client = GreeterClient::new(EtcdDiscover::new(&session, SERVICE).unwrap().into_tonic_channel());
    put(&etcd, "1", first.address().authority()).await;
    assert_eq!(greeted(&mut client).await, first.address().to_string());
    put(&etcd, "2", second.address().authority()).await;
    let both = async { while greeted(&mut client).await != second.address().to_string() {} };
    wait::within("the one that came is called", SEEN, both).await;
    delete(&etcd, "1").await;
    // Twenty calls in a row do not miss one of two by chance.
    let gone = async {
        let mut in_a_row = 0;
        while in_a_row < 20 {
            let is_second = greeted(&mut client).await == second.address().to_string();
            in_a_row = if is_second { in_a_row + 1 } else { 0 };
        }
    };
    wait::within("the one that went is not called", SEEN, gone).await;
}

async fn greeted(client: &mut GreeterClient<tonic::transport::Channel>) -> String {
    let called = client.say_hello(HelloRequest::default());
    who(wait::within("a call", BOUND, called).await.expect("a server is there").get_ref())
}

#[test]
fn a_watch_outlives_the_runtime_that_it_began_in() {
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (first, second) = (runtime(), runtime());
    let etcd = second.block_on(registry::etcd());
    let session = Etcd::connect_lazy(EtcdOptions::new([etcd.endpoint()])).unwrap();
    second.block_on(put(&etcd, "1", A));
    let follow = || async { View::of(EtcdDiscover::new(&session, SERVICE).unwrap()) };
    let began = first.block_on(follow());
    let view = second.block_on(follow());
    second.block_on(view.until(&[A], SEEN));
    drop(began);
    drop(first);
    second.block_on(async {
        put(&etcd, "2", B).await;
        view.until(&[A, B], SEEN).await;
        assert_eq!(view.changes(), 2, "nothing was told twice");
    });
}
