//! Rows 1 to 8 and 25: members that die, freeze and vanish

use std::time::{Duration, Instant};

use callsign::{
    Etcd, EtcdChannel, EtcdOptions, Registration, RegistrationState, discover::EtcdDiscover,
    etcd::registration::LossCause,
};
use callsign_tests::{
    checker::Observed,
    cluster::{Cluster, Condition},
    fleet::session,
    load::greet,
    pb::greeter_client::GreeterClient,
    proxy::Proxy,
    wait,
};
use tokio::time::{sleep, timeout};

use crate::row::{Connected, MORE, OUTAGE, Row, SECOND, Setup, TTL, is_long};

fn is_registered(state: &RegistrationState) -> bool {
    matches!(state, RegistrationState::Registered { .. })
}

/// Nothing was registered anew: the leases are those of before
async fn assert_same_leases(row: &Row) {
    assert_eq!(row.cluster.traces().await.leases, row.before.leases, "leases that were kept");
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_01_the_connected_member_is_killed_and_comes_back_after_3_s() {
    let setup = Setup::new().connected(Connected::ToFollower);
    let Some(mut row) = setup.start("row 01, kill -9 of the connected member").await else { return };
    let lists = row.lists();
    row.cluster.kill(row.member).await;
    sleep(3 * SECOND).await;
    row.cluster.heal().await;
    row.healed().await;
    assert_same_leases(&row).await;
    assert_eq!(row.lists(), lists, "resumed, not listed again");
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_02_all_members_are_restarted_one_after_the_other() {
    let Some(mut row) = Row::start("row 02, rolling restart").await else { return };
    let lists = row.lists();
    for member in 0..row.cluster.len() {
        row.cluster.kill(member).await;
        row.cluster.revive([member]).await;
        row.until_well(Duration::from_secs(20)).await;
    }
    row.healed().await;
    assert_same_leases(&row).await;
    assert_eq!(row.lists(), lists, "resumed, not listed again");
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_03_the_connected_follower_freezes_for_30_s() {
    let setup = Setup::new().connected(Connected::ToFollower);
    let Some(mut row) = setup.start("row 03, SIGSTOP of the connected follower").await else { return };
    row.cluster.freeze(row.member).await;
    let frozen = Instant::now();
    sleep(15 * SECOND + MORE).await;
    row.until_well(SECOND).await;
    sleep((if is_long() { 30 * SECOND } else { OUTAGE }).saturating_sub(frozen.elapsed())).await;
    row.cluster.heal().await;
    row.healed().await;
    assert_same_leases(&row).await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_04_the_leader_freezes_for_9_s_and_whatever_it_revokes_no_call_fails() {
    let setup = Setup::new().connected(Connected::ToLeader);
    let Some(mut row) = setup.start("row 04, SIGSTOP of the leader").await else { return };
    // An old leader that wakes revokes leases that were kept meanwhile: etcd before 3.4.31 and 3.5.13.
    row.excuse();
    row.cluster.freeze(row.member).await;
    sleep(9 * SECOND).await;
    row.cluster.heal().await;
    row.healed().await;
    // The revocations of the old leader come up to 7 s after it woke.
    sleep(8 * SECOND).await;
    row.until_well(SECOND + MORE).await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_05_all_members_vanish_in_a_black_hole_and_what_lapsed_registers_again() {
    let Some(mut row) = Row::start("row 05, black hole").await else { return };
    let views = |row: &Row| row.fleet.views().map(Observed::changes).collect::<Vec<_>>();
    let before = views(&row);
    row.cluster.proxies().for_each(Proxy::hold);
    let lost = RegistrationState::Lost { cause: LossCause::Unconfirmed };
    row.until_state("the registration is unconfirmed", TTL + 2 * SECOND + MORE, |state| *state == lost).await;
    sleep(if is_long() { 60 * SECOND } else { OUTAGE } - TTL).await;
    assert_eq!(views(&row), before, "the last known view is served");
    // The leases have lapsed while nobody could see it.
    row.excuse();
    row.cluster.heal().await;
    row.healed().await;
    row.until_state("the registration is back", 2 * SECOND + MORE, is_registered).await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_06_the_quorum_is_lost_for_four_ttls() {
    let setup = Setup::new().connected(Connected::ToFollower);
    let Some(mut row) = setup.start("row 06, quorum loss").await else { return };
    let leader = row.cluster.leader().await;
    let others = (0..row.cluster.len()).filter(|&member| member != row.member && member != leader);
    for member in others.chain([leader]).collect::<Vec<_>>() {
        row.cluster.kill(member).await;
    }
    sleep(OUTAGE).await;
    row.cluster.heal().await;
    row.healed().await;
    assert_same_leases(&row).await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_07_who_comes_while_all_of_etcd_is_down_fails_soon_or_waits_as_it_chooses() {
    let Some(mut row) = Row::start("row 07, start without etcd").await else { return };
    let hosts = row.cluster.hosts();
    let options = || EtcdOptions::new(&hosts);
    row.cluster.kill_all().await;

    let (failed, took) = wait::timed(Etcd::connect(options())).await;
    let message = failed.expect_err("nobody answers").to_string();
    assert!(took < 5 * SECOND + MORE, "{took:?}");
    assert!(hosts.iter().all(|host| message.contains(host)), "{message}");
    let late = session(&hosts);
    let (failed, took) = wait::timed(EtcdChannel::builder("hello.rpc").etcd(&late).connect()).await;
    let message = failed.map(drop).expect_err("there is no list").to_string();
    assert!(took < 5 * SECOND + MORE && message.contains("hello.rpc"), "{took:?}: {message}");
    let builder = || Registration::builder(&late, "late.rpc", "127.0.0.1:9".parse().expect("an address"));
    let (failed, took) = wait::timed(builder().register()).await;
    failed.map(drop).expect_err("nobody grants");
    assert!(took < 8 * SECOND + MORE, "{took:?}");

    let channel = EtcdChannel::builder("hello.rpc").etcd(&late).connect_lazy().expect("a valid name");
    let registration = builder().ttl(TTL).start().expect("valid");
    timeout(SECOND, channel.until_ready()).await.expect_err("not ready");
    row.cluster.heal().await;
    let since = Instant::now();
    wait::within("the channel is ready", 5 * SECOND + MORE, channel.until_ready()).await;
    let left = (5 * SECOND + MORE).saturating_sub(since.elapsed());
    let mut state = registration.state();
    drop(wait::within("it is registered", left, state.wait_for(is_registered)).await.expect("it lives"));
    greet(GreeterClient::new(channel), 2 * SECOND).await.expect("it is ready");
    registration.deregister().await.expect("etcd is there");
    drop(late);
    row.healed().await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_08_after_a_long_outage_all_registrars_are_back_at_once_and_do_not_rush() {
    let (many, outage) = if is_long() { (500, 600 * SECOND) } else { (50, OUTAGE) };
    let Some(mut row) = Row::start("row 08, long outage, many registrars").await else { return };
    let registrars = register_many(&row.cluster, many).await;
    // Down for half of the time, and out of reach for the rest of it: so their leases end before they can do anything.
    row.cluster.kill_all().await;
    sleep(outage / 2).await;
    row.excuse();
    row.cluster.revive(0..3).await;
    for proxy in row.cluster.proxies() {
        proxy.refuse().await;
    }
    sleep((outage / 2).max(3 * TTL)).await;
    assert_eq!(row.cluster.traces().await.leases.len(), 0, "all leases have ended");
    let grants = row.cluster.requests("LeaseGrant").await;
    row.cluster.heal().await;
    let most = all_back(&row.cluster, many, grants).await;
    assert!(most < 1000, "{most} grants in a second");
    row.note(format!("{many} registrars, at most {most} grants a second"));
    row.healed().await;
    drop(registrars);
    let gone = async { while !row.cluster.pairs("many.rpc/").await.is_empty() {} };
    wait::within("the registrars are gone", 20 * SECOND, gone).await;
    row.end().await;
}

/// Each over a session of its own, as so many processes would
async fn register_many(cluster: &Cluster, many: u16) -> Vec<Registration> {
    let hosts = cluster.hosts();
    let builders = (1..=many).map(|port| {
        let address = std::net::SocketAddr::from(([10, 0, 0, 1], port)).into();
        Registration::builder(&session(&hosts), "many.rpc", address).ttl(TTL).start().expect("valid")
    });
    let registrations: Vec<_> = builders.collect();
    for registration in &registrations {
        let mut state = registration.state();
        let registered = wait::within("it is registered", 30 * SECOND, state.wait_for(is_registered));
        drop(registered.await.expect("its task lives"));
    }
    registrations
}

/// Waits until as many have a key again; the most grants that were asked for in any second of that
async fn all_back(cluster: &Cluster, many: u16, before: u64) -> u64 {
    let since = Instant::now();
    let mut seen = vec![(since, before)];
    let mut most = 0;
    wait::within("all are back", 5 * SECOND + MORE, async {
        while cluster.pairs("many.rpc/").await.len() < many.into() {
            let now = (Instant::now(), cluster.requests("LeaseGrant").await);
            seen.push(now);
            let second = seen.iter().filter(|(at, _)| now.0 - *at <= SECOND);
            most = most.max(second.map(|(_, grants)| now.1 - grants).max().unwrap_or_default());
        }
    })
    .await;
    most
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_25_a_member_that_is_dead_for_good_is_noticed_once_and_costs_nothing() {
    let Some(mut row) = Row::start("row 25, one member dead for good").await else { return };
    let dead = row.cluster.follower().await;
    row.cluster.kill(dead).await;
    row.until_well(20 * SECOND).await;
    // Those that come now find it dead from the start.
    let mut sessions = Vec::new();
    for number in 0..6 {
        let session = session(&row.cluster.hosts());
        let discover = EtcdDiscover::new(&session, "hello.rpc").expect("a valid name");
        let view = Observed::of(format!("late {number}"), discover);
        let address = "127.0.0.1:9".parse().expect("an address");
        let registration = Registration::builder(&session, "late.rpc", address).ttl(TTL).register().await;
        sessions.push((registration.expect("two members live"), view, session));
    }
    sleep(3 * SECOND).await;
    let dials = row.cluster.proxies().map(Proxy::made).sum::<usize>();
    let logged = row.lines.at(tracing::Level::DEBUG).len();
    sleep(3 * TTL).await;
    assert_eq!(row.cluster.those(Condition::Dead), [dead]);
    let lines = row.lines.at(tracing::Level::DEBUG);
    assert_eq!(lines[logged..].iter().map(|line| &line.text).collect::<Vec<_>>(), [""; 0], "all is quiet");
    assert_eq!(row.cluster.proxies().map(Proxy::made).sum::<usize>(), dials, "nobody connects anew");
    for (registration, view, _) in sessions {
        assert_eq!(view.addresses(), row.fleet.living());
        registration.deregister().await.expect("two members live");
    }
    row.cluster.heal().await;
    row.healed().await;
    row.end().await;
}
