//! Registrations against an etcd: what is lost comes back, what is taken over is given up

#![cfg(unix)]

use std::time::Duration;

use callsign::{Etcd, EtcdOptions, Registration, RegistrationState, etcd::registration::LossCause};
use callsign_tests::{etcd::EtcdProcess, peers::Peer, proxy::Proxy, registry, wait};

const SERVICE: &str = "hello.rpc";
const ADDRESS: &str = "127.0.0.1:9090";
/// What is lost has to be back within this time
const BACK: Duration = Duration::from_secs(2);
/// For what starts etcd or waits for a backoff
const BOUND: Duration = Duration::from_secs(15);

fn session(etcd: &EtcdProcess) -> Etcd {
    Etcd::connect_lazy(EtcdOptions::new([etcd.endpoint()])).expect("a valid host")
}

async fn registered(etcd: &EtcdProcess, ttl: u64) -> Registration {
    let builder = Registration::builder(&session(etcd), SERVICE, ADDRESS.parse().expect("an address"));
    builder.id(7).ttl(Duration::from_secs(ttl)).register().await.expect("etcd is there")
}

/// Waits until the state meets `condition`
async fn until_state(
    registration: &Registration,
    bound: Duration,
    condition: impl Fn(&RegistrationState) -> bool,
) -> RegistrationState {
    let mut state = registration.state();
    let what = format!("the state is {:?}", *state.borrow());
    wait::within(&what, bound, state.wait_for(condition)).await.expect("the task lives").clone()
}

fn lease(state: &RegistrationState) -> i64 {
    let RegistrationState::Registered { lease, .. } = state else { panic!("{state:?}") };
    *lease
}

/// Keys and values under the service
async fn pairs(etcd: &EtcdProcess) -> Vec<(String, String)> {
    etcd.pairs("hello.rpc/").await
}

/// The pair of id 7 with this address
fn seven(address: &str) -> [(String, String); 1] {
    [("hello.rpc/7".to_owned(), address.to_owned())]
}

/// How many leases there are, once it is `expected`
async fn until_leases(etcd: &EtcdProcess, expected: usize, bound: Duration) {
    let all = async {
        while etcd.leases().await.len() != expected {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    wait::within(&format!("there are {expected} leases"), bound, all).await;
}

#[tokio::test]
async fn a_revoked_lease_brings_the_same_key_back_under_a_new_one() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 15).await;
    let first = lease(&registration.state().borrow().clone());
    etcd.revoke(first).await;
    let back = |state: &RegistrationState| matches!(state, RegistrationState::Registered { lease, .. } if *lease != first);
    until_state(&registration, BACK, back).await;
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
}

#[tokio::test]
async fn a_deleted_key_is_put_again_under_the_living_lease() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 15).await;
    let first = lease(&registration.state().borrow().clone());
    for _ in 0..3 {
        assert_eq!(etcd.delete_all("hello.rpc/").await, 1);
        registry::until_registered(&etcd, SERVICE, BACK, |all| all == [ADDRESS]).await;
    }
    let registered = |state: &RegistrationState| matches!(state, RegistrationState::Registered { .. });
    assert_eq!(lease(&until_state(&registration, BACK, registered).await), first);
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
}

#[tokio::test]
async fn the_later_of_two_with_one_id_wins_and_the_earlier_leaves_it_alone() {
    let etcd = registry::etcd().await;
    let earlier = registered(&etcd, 5).await;
    let later = Registration::builder(&session(&etcd), SERVICE, "127.0.0.1:9091".parse().unwrap());
    let later = later.id(7).register().await.unwrap();
    let overwritten = RegistrationState::Lost { cause: LossCause::Overwritten };
    until_state(&earlier, BACK, |state| *state == overwritten).await;
    assert_eq!(pairs(&etcd).await, seven("127.0.0.1:9091"));
    earlier.deregister().await.unwrap();
    assert_eq!(pairs(&etcd).await, seven("127.0.0.1:9091"), "leaving takes only what is one's own");
    assert!(matches!(*later.state().borrow(), RegistrationState::Registered { .. }));
    later.deregister().await.unwrap();
    assert_eq!(pairs(&etcd).await, []);
    assert_eq!(etcd.leases().await, []);
}

#[tokio::test]
async fn a_key_put_by_hand_stays_what_it_was_put_to() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 15).await;
    etcd.put("hello.rpc/7", "10.9.9.9:1").await;
    let overwritten = RegistrationState::Lost { cause: LossCause::Overwritten };
    until_state(&registration, BACK, |state| *state == overwritten).await;
    // At once: who is told to leave while it gives its lease back has to finish that.
    drop(registration);
    until_leases(&etcd, 0, BACK).await;
    assert_eq!(pairs(&etcd).await, seven("10.9.9.9:1"));
}

#[tokio::test]
async fn who_loses_its_lease_does_not_take_the_key_back_from_its_successor() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    let session = Etcd::connect(EtcdOptions::new([proxy.endpoint()])).await.unwrap();
    let builder = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap());
    let registration = builder.id(7).register().await.unwrap();
    let first = lease(&registration.state().borrow().clone());
    proxy.cut().await;
    etcd.revoke(first).await;
    etcd.put("hello.rpc/7", "10.9.9.9:1").await;
    proxy.heal();
    let overwritten = RegistrationState::Lost { cause: LossCause::Overwritten };
    until_state(&registration, BOUND, |state| *state == overwritten).await;
    assert_eq!(pairs(&etcd).await, seven("10.9.9.9:1"));
}

#[tokio::test]
async fn a_restarted_etcd_has_exactly_one_key_under_the_same_lease() {
    let Some(mut etcd) = registry::real(registry::PERSISTENCE).await else { return };
    let registration = registered(&etcd, 5).await;
    let first = lease(&registration.state().borrow().clone());
    for _ in 0..2 {
        etcd.kill9();
        etcd.restart().await;
    }
    // The next watch and keepalive are open when a deleted key comes back.
    etcd.delete("hello.rpc/7").await;
    registry::until_registered(&etcd, SERVICE, 2 * BACK, |all| all == [ADDRESS]).await;
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
    assert_eq!(lease(&registration.state().borrow().clone()), first);
}

#[tokio::test]
async fn a_wiped_etcd_is_registered_in_again() {
    let mut etcd = registry::etcd().await;
    let registration = registered(&etcd, 5).await;
    etcd.kill9();
    etcd.wipe();
    etcd.restart().await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all == [ADDRESS]).await;
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
    let registered = |state: &RegistrationState| matches!(state, RegistrationState::Registered { .. });
    until_state(&registration, BACK, registered).await;
}

#[tokio::test]
async fn a_frozen_etcd_makes_a_registration_doubtful_and_then_certain_again() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 2).await;
    etcd.stop().await;
    let unconfirmed = RegistrationState::Lost { cause: LossCause::Unconfirmed };
    until_state(&registration, BOUND, |state| *state == unconfirmed).await;
    etcd.cont();
    let registered = |state: &RegistrationState| matches!(state, RegistrationState::Registered { .. });
    until_state(&registration, BOUND, registered).await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all == [ADDRESS]).await;
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
}

#[tokio::test]
async fn a_registration_outlives_its_ttl() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 2).await;
    let first = lease(&registration.state().borrow().clone());
    let kept = async { tokio::time::sleep(Duration::from_secs(5)).await };
    // For two and a half TTLs the state does not change once.
    let mut state = registration.state();
    state.borrow_and_update();
    tokio::select! {
        _ = state.changed() => panic!("{:?}", *state.borrow()),
        () = kept => {}
    }
    assert_eq!(lease(&registration.state().borrow().clone()), first);
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
}

#[tokio::test]
async fn what_starts_without_etcd_registers_when_it_comes() {
    let mut etcd = registry::etcd().await;
    etcd.kill9();
    let builder = Registration::builder(&session(&etcd), SERVICE, ADDRESS.parse().unwrap());
    let error = builder.clone().register().await.unwrap_err().to_string();
    assert!(error.contains(&etcd.endpoint()) && error.contains("refused"), "{error}");
    let registration = builder.id(7).start().unwrap();
    let failed = |state: &RegistrationState| matches!(state, RegistrationState::Granting { cause: Some(_) });
    until_state(&registration, BACK, failed).await;
    etcd.restart().await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all == [ADDRESS]).await;
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
}

#[tokio::test]
async fn hosts_that_are_dead_frozen_or_no_etcd_are_left_for_the_one_that_works() {
    let etcd = registry::etcd().await;
    let (dead, mute, http1) = (Peer::deaf(), Peer::mute().await, Peer::http1().await);
    let hosts = [dead.address(), mute.address(), http1.address(), etcd.endpoint().parse().unwrap()];
    let hosts = hosts.each_ref().map(ToString::to_string);
    let session = Etcd::connect(EtcdOptions::new(&hosts)).await.unwrap();
    let builder = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap());
    let registration = builder.id(7).register().await.unwrap();
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
    let first = lease(&registration.state().borrow().clone());
    etcd.revoke(first).await;
    let back = |state: &RegistrationState| matches!(state, RegistrationState::Registered { lease, .. } if *lease != first);
    until_state(&registration, BOUND, back).await;
    registration.deregister().await.unwrap();
    assert_eq!(pairs(&etcd).await, []);
}

#[tokio::test]
async fn a_host_that_falls_silent_is_left_before_the_lease_ends() {
    let etcd = registry::etcd().await;
    let proxies = [Proxy::to(etcd.endpoint()).await, Proxy::to(etcd.endpoint()).await];
    let hosts = proxies.each_ref().map(Proxy::endpoint);
    let session = Etcd::connect(EtcdOptions::new(&hosts)).await.unwrap();
    let builder = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap());
    let registration = builder.id(7).ttl(Duration::from_secs(4)).register().await.unwrap();
    let mut state = registration.state();
    state.borrow_and_update();
    // One of the two is the one in use. A ping would find it frozen after 13 s, too late for the lease.
    for proxy in &proxies {
        proxy.hold();
        let changed = tokio::time::timeout(Duration::from_secs(8), state.changed()).await;
        assert!(changed.is_err(), "{:?}", *state.borrow());
        proxy.heal();
    }
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
}

#[tokio::test]
async fn what_is_no_etcd_is_named_as_such() {
    let http1 = Peer::http1().await;
    let options = EtcdOptions::new([http1.address().to_string()]).connect_timeout(Duration::from_millis(500));
    let error = Etcd::connect(options.clone()).await.unwrap_err().to_string();
    assert!(error.contains("HTTP/2"), "{error}");
    let server = callsign_tests::service::Local::start().await;
    let options =
        EtcdOptions::new([server.address().to_string()]).connect_timeout(Duration::from_millis(500));
    let error = Etcd::connect(options).await.unwrap_err().to_string();
    assert!(error.contains("not an etcd"), "{error}");
}

#[tokio::test]
async fn leaving_a_frozen_etcd_takes_three_seconds_and_says_so() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 5).await;
    etcd.stop().await;
    let (left, took) = wait::timed(registration.deregister()).await;
    let error = left.unwrap_err().to_string();
    assert!(error.contains("hello.rpc/7") && took < Duration::from_secs(4), "{error}, after {took:?}");
}

#[tokio::test]
async fn leaving_is_confirmed_by_the_lease_alone_when_the_other_way_is_stuck() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    // Leases go first. The key's own way is stuck before it begins, and fails after 2 s or more.
    proxy.admit(1);
    let session = Etcd::connect_lazy(EtcdOptions::new([proxy.endpoint()])).unwrap();
    let registration = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap()).start().unwrap();
    proxy.until_made(2).await;
    let (left, took) = wait::timed(registration.deregister()).await;
    left.unwrap();
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert_eq!(etcd.leases().await, []);
}

#[tokio::test]
async fn a_lease_is_kept_although_reads_and_writes_are_stuck() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    proxy.admit(1);
    let session = Etcd::connect_lazy(EtcdOptions::new([proxy.endpoint()])).unwrap();
    let builder = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap());
    let _registration = builder.ttl(Duration::from_secs(2)).start().unwrap();
    proxy.until_made(2).await;
    let granted = etcd.leases().await;
    // Two and a half TTLs: whatever still lives then was kept alive.
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(etcd.leases().await, granted);
    assert_eq!(pairs(&etcd).await, []);
}

#[tokio::test]
async fn a_refused_registration_gives_its_lease_back() {
    let etcd = registry::etcd().await;
    let session = session(&etcd);
    etcd.enable_auth().await;
    // Anyone may have a lease, but not put a key.
    let builder = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap());
    let refused = wait::within("it is refused at once", BACK, builder.register()).await.unwrap_err();
    assert!(refused.to_string().contains("user name is empty"), "{refused}");
    assert_eq!(etcd.leases_as_root().await, []);
}

#[tokio::test]
async fn registering_has_one_deadline_and_takes_back_what_it_has_begun() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    // For 3 s nothing passes. The first connection is given up after 2 s, the second gets its lease, the third, for the
    // key, would be given up 2 s later.
    proxy.admit(2);
    proxy.hold();
    let session = Etcd::connect_lazy(EtcdOptions::new([proxy.endpoint(), proxy.endpoint()])).unwrap();
    let builder = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap());
    let registering = tokio::spawn(wait::timed(builder.register()));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(etcd.leases().await, []);
    proxy.heal();
    proxy.until_made(3).await;
    let (failed, took) = registering.await.unwrap();
    failed.unwrap_err();
    assert!(took < Duration::from_millis(6500), "{took:?}");
    assert_eq!(etcd.leases().await, []);
}

#[tokio::test]
async fn the_ttl_that_counts_is_the_one_that_was_granted() {
    // This etcd grants no less than one and a half election timeouts.
    let slow = ["--heartbeat-interval=400", "--election-timeout=4000"];
    let Some(etcd) = registry::real_with(&slow).await else { return };
    let builder = Registration::builder(&session(&etcd), SERVICE, ADDRESS.parse().unwrap());
    let registration = builder.id(7).ttl(Duration::from_secs(2)).register().await.unwrap();
    let RegistrationState::Registered { ttl, .. } = *registration.state().borrow() else { panic!() };
    assert_eq!(ttl, Duration::from_secs(6));
}
