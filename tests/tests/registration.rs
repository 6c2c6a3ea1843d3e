//! Registrations against an etcd: what is lost comes back, what is taken over is given up

#![cfg(unix)]

use std::time::Duration;

use callsign::{
    Etcd, EtcdOptions, PauseError, Registration, RegistrationState,
    etcd::registration::{LossCause, RegistrationBuilder},
};
use callsign_tests::{
    etcd::EtcdProcess,
    greeter,
    peers::Peer,
    proxy::Proxy,
    registry,
    relay::{
        Relay,
        Treatment::{Hold, Lose, Pass, Refuse},
    },
    wait,
};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tonic::Status;

const SERVICE: &str = "hello.rpc";
const NO_LEASES: [i64; 0] = [];
const ADDRESS: &str = "127.0.0.1:9090";
/// What is lost has to be back within this time
const BACK: Duration = Duration::from_secs(2);
/// What waits for nobody is done within this time
const SOON: Duration = Duration::from_secs(1);
/// For what starts etcd or waits for a backoff
const BOUND: Duration = Duration::from_secs(15);

fn session(etcd: &EtcdProcess) -> Etcd {
    Etcd::connect_lazy(EtcdOptions::new([etcd.endpoint()])).expect("a valid host")
}

async fn registered(etcd: &EtcdProcess, ttl: u64) -> Registration {
    let builder = Registration::builder(&session(etcd), SERVICE, ADDRESS.parse().expect("an address"));
    builder.id(7).ttl(Duration::from_secs(ttl)).register().await.expect("etcd is there")
}

/// What etcd says of a lease that has ended
fn lease_gone() -> Status {
    Status::not_found("etcdserver: requested lease not found")
}

/// A registration over a relay, behind a proxy whose reset ends the streams that are open
async fn relayed(etcd: &EtcdProcess) -> (RegistrationBuilder, Relay, Proxy) {
    let relay = Relay::to(etcd.endpoint()).await;
    let proxy = Proxy::to(relay.endpoint()).await;
    let session = Etcd::connect_lazy(EtcdOptions::new([proxy.endpoint()])).expect("a valid host");
    let builder = Registration::builder(&session, SERVICE, ADDRESS.parse().expect("an address"));
    (builder.id(7), relay, proxy)
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

fn is_registered(state: &RegistrationState) -> bool {
    matches!(state, RegistrationState::Registered { .. })
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
    assert_eq!(etcd.leases().await, NO_LEASES);
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
    // The TTL has begun before, and what is being tried just then is not waited for.
    until_state(&registration, Duration::from_millis(2500), |state| *state == unconfirmed).await;
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
    assert!(took < Duration::from_millis(1900), "{took:?}");
    assert_eq!(etcd.leases().await, NO_LEASES);
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
    assert_eq!(etcd.leases_as_root().await, NO_LEASES);
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
    assert_eq!(etcd.leases().await, NO_LEASES);
    proxy.heal();
    proxy.until_made(3).await;
    let (failed, took) = registering.await.unwrap();
    failed.unwrap_err();
    assert!(took < Duration::from_millis(6500), "{took:?}");
    assert_eq!(etcd.leases().await, NO_LEASES);
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

/// A way to an etcd on which everything gets there and nothing comes back until that is wanted
struct Mute {
    endpoint: String,
    speaks: watch::Sender<bool>,
    _connections: JoinSet<()>,
}

impl Mute {
    async fn to(etcd: &EtcdProcess) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let endpoint = listener.local_addr().expect("it is bound").to_string();
        let (speaks, seen) = watch::channel(true);
        let (target, mut connections) = (etcd.endpoint(), JoinSet::new());
        connections.spawn(async move {
            let mut passing = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let server = TcpStream::connect(&target).await.expect("etcd listens");
                passing.spawn(Self::pass(client, server, seen.clone()));
            }
        });
        Self { endpoint, speaks, _connections: connections }
    }

    async fn pass(client: TcpStream, server: TcpStream, mut speaks: watch::Receiver<bool>) {
        let ((mut from_client, mut to_client), (from_server, mut to_server)) =
            (client.into_split(), server.into_split());
        let up = async {
            let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
            let _ = to_server.shutdown().await;
        };
        let down = async {
            let mut bytes = [0; 4096];
            loop {
                if speaks.wait_for(|speaks| *speaks).await.is_err() || from_server.readable().await.is_err() {
                    return;
                }
                // Told to be mute meanwhile, it does not even read.
                if !*speaks.borrow() {
                    continue;
                }
                match from_server.try_read(&mut bytes) {
                    Ok(read @ 1..) if to_client.write_all(&bytes[..read]).await.is_ok() => {}
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    _ => return,
                }
            }
        };
        tokio::join!(up, down);
    }
}

/// A session whose lanes are connected, over a way that is mute from now on
async fn mute_session(etcd: &EtcdProcess) -> (Etcd, Mute) {
    let way = Mute::to(etcd).await;
    let session = Etcd::connect(EtcdOptions::new([&way.endpoint])).await.expect("etcd is there");
    let first = Registration::builder(&session, SERVICE, ADDRESS.parse().expect("an address"));
    let first = first.register().await.expect("etcd is there");
    first.deregister().await.expect("etcd is there");
    way.speaks.send_replace(false);
    (session, way)
}

#[tokio::test]
async fn a_grant_in_flight_when_it_is_told_to_stop_leaves_no_lease() {
    let etcd = registry::etcd().await;
    let (session, _way) = mute_session(&etcd).await;
    let registration = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap()).start().unwrap();
    until_leases(&etcd, 1, BACK).await;
    let (left, took) = wait::timed(registration.deregister()).await;
    left.expect("there was no key");
    assert!(took < Duration::from_millis(3500), "{took:?}");
    until_leases(&etcd, 0, BACK).await;
}

#[tokio::test]
async fn a_grant_whose_answer_is_lost_is_found_again_and_not_repeated() {
    let etcd = registry::etcd().await;
    let (session, way) = mute_session(&etcd).await;
    let registration = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap()).start().unwrap();
    until_leases(&etcd, 1, BACK).await;
    let granted = etcd.leases().await;
    let failed = |state: &RegistrationState| matches!(state, RegistrationState::Granting { cause: Some(_) });
    until_state(&registration, BOUND, failed).await;
    way.speaks.send_replace(true);
    let state = until_state(&registration, BOUND, is_registered).await;
    let RegistrationState::Registered { lease, ttl } = state else { panic!("{state:?}") };
    assert_eq!((granted, ttl), (vec![lease], Duration::from_secs(15)));
    assert_eq!(etcd.leases().await, [lease]);
}

#[tokio::test]
async fn paused_it_keeps_its_lease_and_nothing_else() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 2).await;
    let first = lease(&registration.state().borrow().clone());
    for _ in 0..2 {
        // Twice is once.
        for _ in 0..2 {
            wait::within("it is paused", BACK, registration.pause()).await.unwrap();
            assert_eq!(*registration.state().borrow(), RegistrationState::Paused);
            assert_eq!(pairs(&etcd).await, []);
            assert_eq!(etcd.leases().await, [first]);
        }
        for _ in 0..2 {
            wait::within("it is resumed", BACK, registration.resume()).await.unwrap();
            assert_eq!(lease(&registration.state().borrow().clone()), first);
            assert_eq!(pairs(&etcd).await, seven(ADDRESS));
        }
    }
    registration.pause().await.unwrap();
    let mut state = registration.state();
    state.borrow_and_update();
    // Two and a half TTLs. Nothing takes its own deletion for someone else's.
    let changed = tokio::time::timeout(Duration::from_secs(5), state.changed()).await;
    assert!(changed.is_err(), "{:?}", *state.borrow());
    assert_eq!(pairs(&etcd).await, []);
    assert_eq!(etcd.leases().await, [first]);
}

#[tokio::test]
async fn a_lease_lost_while_paused_is_replaced_and_the_key_stays_away() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 2).await;
    let first = lease(&registration.state().borrow().clone());
    registration.pause().await.unwrap();
    let mut state = registration.state();
    state.borrow_and_update();
    etcd.revoke(first).await;
    until_leases(&etcd, 1, BOUND).await;
    assert!(!state.has_changed().unwrap(), "{:?}", *state.borrow());
    assert_eq!(pairs(&etcd).await, []);
    registration.resume().await.unwrap();
    assert_ne!(lease(&registration.state().borrow().clone()), first);
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
}

#[tokio::test]
async fn a_key_that_appears_while_paused_is_deleted_if_it_is_ones_own() {
    let etcd = registry::etcd().await;
    if !registry::has_etcdctl() {
        return;
    }
    let registration = registered(&etcd, 15).await;
    let own = format!("--lease={:x}", lease(&registration.state().borrow().clone()));
    registration.pause().await.unwrap();
    // As a put that was given up and comes through late.
    etcd.etcdctl(["put", "hello.rpc/7", ADDRESS, &own]).await;
    registry::until_registered(&etcd, SERVICE, BACK, |all| all.is_empty()).await;
    etcd.put("hello.rpc/7", "10.9.9.9:1").await;
    let resumed = registration.resume().await;
    assert!(matches!(resumed, Err(PauseError::Overwritten { .. })), "{resumed:?}");
    assert_eq!(*registration.state().borrow(), RegistrationState::Lost { cause: LossCause::Overwritten });
    assert_eq!(pairs(&etcd).await, seven("10.9.9.9:1"));
    // And so whatever is asked for then.
    assert!(matches!(registration.pause().await, Err(PauseError::Overwritten { .. })));
    until_leases(&etcd, 0, BACK).await;
}

#[tokio::test]
async fn who_has_taken_the_key_and_left_while_one_was_paused_is_no_matter() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 15).await;
    registration.pause().await.unwrap();
    let other = registered(&etcd, 15).await;
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
    other.deregister().await.unwrap();
    registration.resume().await.unwrap();
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
}

#[tokio::test]
async fn paused_it_leaves_nothing_when_it_goes() {
    let etcd = registry::etcd().await;
    for dropped in [true, false] {
        let registration = registered(&etcd, 15).await;
        registration.pause().await.unwrap();
        if dropped {
            drop(registration);
        } else {
            registration.deregister().await.unwrap();
        }
        until_leases(&etcd, 0, BACK).await;
        assert_eq!(pairs(&etcd).await, []);
    }
    // Nor does one that goes before etcd has confirmed.
    let registration = registered(&etcd, 15).await;
    let pausing = tokio::time::timeout(Duration::ZERO, registration.pause()).await;
    assert!(pausing.is_err(), "{pausing:?}");
    registration.deregister().await.unwrap();
    assert_eq!((pairs(&etcd).await, etcd.leases().await), (Vec::new(), Vec::new()));
}

#[tokio::test]
async fn pausing_without_etcd_is_bounded_and_goes_on_by_itself() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 15).await;
    etcd.stop().await;
    let (paused, took) = wait::timed(registration.pause()).await;
    let error = paused.unwrap_err();
    assert!(matches!(error, PauseError::Unconfirmed { .. }), "{error}");
    assert!(error.to_string().contains(&format!("etcd {}: ", etcd.endpoint())), "the cause: {error}");
    assert!((Duration::from_millis(4900)..Duration::from_secs(6)).contains(&took), "{took:?}");
    assert!(is_registered(&registration.state().borrow()), "nobody knows better");
    etcd.cont();
    until_state(&registration, BOUND, |state| *state == RegistrationState::Paused).await;
    assert_eq!(pairs(&etcd).await, []);

    etcd.stop().await;
    let resumed = registration.resume().await;
    assert!(matches!(resumed, Err(PauseError::Unconfirmed { .. })), "{resumed:?}");
    etcd.cont();
    until_state(&registration, BOUND, is_registered).await;
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
}

#[tokio::test]
async fn paused_while_cut_off_for_longer_than_its_ttl_it_does_not_come_back() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    let session = Etcd::connect(EtcdOptions::new([proxy.endpoint()])).await.unwrap();
    let builder = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap());
    let registration = builder.id(7).ttl(Duration::from_secs(2)).register().await.unwrap();
    proxy.cut().await;
    // Its lease ends meanwhile, and it is told so before it has said what it wants.
    assert!(matches!(registration.pause().await, Err(PauseError::Unconfirmed { .. })));
    assert_eq!(*registration.state().borrow(), RegistrationState::Lost { cause: LossCause::Unconfirmed });
    until_leases(&etcd, 0, BACK).await;
    proxy.heal();
    until_state(&registration, BOUND, |state| *state == RegistrationState::Paused).await;
    until_leases(&etcd, 1, BOUND).await;
    assert_eq!(pairs(&etcd).await, []);
    registration.resume().await.unwrap();
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
    registration.deregister().await.unwrap();
    assert_eq!((pairs(&etcd).await, etcd.leases().await), (Vec::new(), Vec::new()));
}

#[tokio::test]
async fn paused_before_it_ever_was_registered_it_waits_to_be_resumed() {
    let mut etcd = registry::etcd().await;
    etcd.kill9();
    let builder = Registration::builder(&session(&etcd), SERVICE, ADDRESS.parse().unwrap());
    let registration = builder.id(7).start().unwrap();
    // There is nothing that etcd would have to confirm.
    wait::within("it is paused", BACK, registration.pause()).await.unwrap();
    etcd.restart().await;
    until_leases(&etcd, 1, BOUND).await;
    assert_eq!(*registration.state().borrow(), RegistrationState::Paused);
    assert_eq!(pairs(&etcd).await, []);
    registration.resume().await.unwrap();
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
}

#[tokio::test]
async fn of_two_opposite_wishes_the_later_holds_and_the_earlier_hears_of_it() {
    let etcd = registry::etcd().await;
    let registration = registered(&etcd, 15).await;
    for _ in 0..20 {
        let (paused, resumed) = tokio::join!(registration.pause(), registration.resume());
        assert!(matches!(paused, Err(PauseError::Overruled { .. })), "{paused:?}");
        resumed.unwrap();
        assert_eq!(pairs(&etcd).await, seven(ADDRESS));
    }
}

#[tokio::test]
async fn a_key_that_was_put_unheard_and_outlives_its_lease_is_still_ones_own() {
    let etcd = registry::etcd().await;
    let (builder, relay, proxy) = relayed(&etcd).await;
    let registration = builder.ttl(Duration::from_secs(5)).register().await.unwrap();
    let first = lease(&registration.state().borrow().clone());
    relay.treat("Txn", Lose);
    etcd.revoke(first).await;
    registry::until_registered(&etcd, SERVICE, BACK, |all| all.is_empty()).await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all == [ADDRESS]).await;
    // etcd's word: a lease whose time is over is not found, although its keys are deleted a little later.
    let [second] = etcd.leases().await[..] else { panic!("one lease") };
    relay.treat("LeaseKeepAlive", Refuse(lease_gone()));
    proxy.reset().await;
    proxy.heal();
    while etcd.leases().await.len() < 2 {}
    relay.treat("LeaseKeepAlive", Pass);
    relay.treat("Txn", Pass);
    let state = until_state(&registration, BOUND, |state| {
        is_registered(state) || *state == RegistrationState::Lost { cause: LossCause::Overwritten }
    });
    let third = lease(&state.await);
    assert!(third != first && third != second);
    etcd.revoke(second).await;
    assert_eq!(pairs(&etcd).await, seven(ADDRESS));
    registration.deregister().await.unwrap();
    assert_eq!(pairs(&etcd).await, []);
}

#[tokio::test]
async fn a_key_that_outlives_its_lease_is_taken_along_when_it_leaves_or_pauses() {
    let etcd = registry::etcd().await;
    for pauses in [false, true] {
        let (builder, relay, proxy) = relayed(&etcd).await;
        let registration = builder.register().await.unwrap();
        relay.treat("LeaseGrant", Hold);
        relay.treat("LeaseKeepAlive", Refuse(lease_gone()));
        proxy.reset().await;
        proxy.heal();
        let ended = RegistrationState::Lost { cause: LossCause::LeaseEnded };
        until_state(&registration, BOUND, |state| *state == ended).await;
        assert_eq!(pairs(&etcd).await, seven(ADDRESS));
        if pauses {
            let pausing = tokio::time::timeout(Duration::from_millis(200), registration.pause()).await;
            assert!(pausing.is_err(), "{pausing:?}, with the key in etcd");
            relay.treat("LeaseKeepAlive", Pass);
            relay.treat("LeaseGrant", Pass);
            registration.pause().await.unwrap();
        } else {
            registration.deregister().await.unwrap();
        }
        assert_eq!(pairs(&etcd).await, []);
    }
}

#[tokio::test]
async fn leaving_is_not_confirmed_while_a_claim_that_was_given_up_may_put_the_key_again() {
    let etcd = registry::etcd().await;
    for revoked in [false, true] {
        let (builder, relay, _proxy) = relayed(&etcd).await;
        relay.treat("Txn", Lose);
        let registration = builder.start().unwrap();
        let given_up =
            |state: &RegistrationState| matches!(state, RegistrationState::Granting { cause: Some(_) });
        until_state(&registration, BOUND, given_up).await;
        relay.treat("Txn", Pass);
        until_state(&registration, BOUND, is_registered).await;
        relay.treat("LeaseRevoke", Hold);
        let leaving = tokio::spawn(registration.deregister());
        registry::until_registered(&etcd, SERVICE, BACK, |all| all.is_empty()).await;
        if revoked {
            // Later than one would wait for it after a deletion that settles everything.
            tokio::time::sleep(Duration::from_millis(700)).await;
            relay.treat("LeaseRevoke", Pass);
        }
        let left = leaving.await.unwrap();
        assert_eq!(left.is_ok(), revoked, "{left:?}");
    }
}

#[tokio::test]
async fn a_wish_interrupts_what_only_waits_or_reads() {
    let etcd = registry::etcd().await;
    let (builder, relay, proxy) = relayed(&etcd).await;
    let registration = builder.register().await.unwrap();
    // A watch that is not confirmed.
    relay.treat("Watch", Hold);
    for _ in 0..3 {
        wait::within("it is paused", SOON, registration.pause()).await.unwrap();
        wait::within("it is resumed", SOON, registration.resume()).await.unwrap();
    }
    // Leases that are lost as soon as they are granted, and taken back more and more slowly.
    registration.pause().await.unwrap();
    relay.treat("LeaseKeepAlive", Refuse(lease_gone()));
    proxy.reset().await;
    proxy.heal();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let mut leases = etcd.leases().await;
    for wished in [true, false].repeat(5) {
        let wish = async { if wished { registration.resume().await } else { registration.pause().await } };
        let _ = tokio::time::timeout(SOON, wish).await;
        let now = etcd.leases().await;
        assert_ne!(now, leases, "another one was asked for at once");
        leases = now;
    }
}

#[tokio::test]
async fn a_registration_that_never_was_in_etcd_was_not_lost() {
    let etcd = registry::etcd().await;
    let (builder, relay, _proxy) = relayed(&etcd).await;
    relay.treat("Txn", Hold);
    relay.treat("LeaseKeepAlive", Refuse(lease_gone()));
    let registration = builder.start().unwrap();
    let mut state = registration.state();
    let shown = async {
        loop {
            state.changed().await.expect("the task lives");
            let shown = state.borrow_and_update().clone();
            assert!(matches!(shown, RegistrationState::Granting { .. }), "{shown:?}");
        }
    };
    tokio::select! {
        never = shown => never,
        () = until_leases(&etcd, 3, BOUND) => {}
    }
    relay.treat("LeaseKeepAlive", Pass);
    relay.treat("Txn", Pass);
    until_state(&registration, BOUND, is_registered).await;
}

#[tokio::test]
async fn leases_outlive_a_third_of_their_time_without_any_way_and_not_by_luck() {
    let Some(etcd) = registry::real("its clock is the one that counts").await else { return };
    let proxies = [Proxy::to(etcd.endpoint()).await, Proxy::to(etcd.endpoint()).await];
    let session = Etcd::connect(EtcdOptions::new(proxies.each_ref().map(Proxy::endpoint))).await.unwrap();
    // Each waits at random between its attempts: many are as many throws.
    let builders = (1..=30).map(|id| {
        let builder = Registration::builder(&session, SERVICE, ADDRESS.parse().unwrap());
        builder.id(id).ttl(Duration::from_secs(5))
    });
    let mut registrations = Vec::new();
    for builder in builders {
        registrations.push(builder.register().await.unwrap());
    }
    let granted: Vec<_> = registrations.iter().map(|held| held.state().borrow().clone()).collect();
    let mut states: Vec<_> = registrations.iter().map(Registration::state).collect();
    for state in &mut states {
        state.borrow_and_update();
    }
    for _ in 0..4 {
        for proxy in &proxies {
            proxy.refuse().await;
        }
        tokio::time::sleep(Duration::from_millis(1900)).await;
        for proxy in &proxies {
            proxy.heal();
        }
        // Until each has been kept alive once more.
        tokio::time::sleep(Duration::from_millis(3500)).await;
        for (state, granted) in states.iter().zip(&granted) {
            assert!(!state.has_changed().unwrap(), "{:?} was {granted:?}", *state.borrow());
        }
    }
}

#[tokio::test]
async fn a_process_that_stood_still_for_longer_than_its_ttl_is_back_at_once() {
    let etcd = registry::etcd().await;
    let server = greeter!().register(SERVICE, &etcd.endpoint()).ttl(Duration::from_secs(2)).start().await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 1).await;
    server.sigstop().await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.is_empty()).await;
    server.sigcont();
    registry::until_registered(&etcd, SERVICE, BACK, |all| all.len() == 1).await;
}

#[tokio::test]
async fn a_server_that_crashed_and_starts_again_takes_its_key_over_at_once() {
    let etcd = registry::etcd().await;
    let start = |listen| greeter!().register(SERVICE, &etcd.endpoint()).id(7).listen(&listen).start();
    let any = callsign::Address::from(std::net::SocketAddr::from(([127, 0, 0, 1], 0)));
    let mut first = start(any.clone()).await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| *all == [first.address().to_string()]).await;
    first.kill9();
    let second = start(any).await;
    // Long before the TTL of 15 s has passed.
    registry::until_registered(&etcd, SERVICE, BACK, |all| *all == [second.address().to_string()]).await;
    let [abandoned, own] = etcd.leases().await[..] else { panic!("two leases") };
    // What the end of the abandoned lease leaves behind.
    for lease in [abandoned, own] {
        let kept = pairs(&etcd).await;
        etcd.revoke(lease).await;
        registry::until_registered(&etcd, SERVICE, BACK, |all| *all == [second.address().to_string()]).await;
        assert_eq!(pairs(&etcd).await, kept);
    }
}
