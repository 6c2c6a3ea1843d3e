//! Rows 14 to 17: servers that die, leave and freeze, beside an etcd that is well

use std::time::{Duration, Instant};

use callsign_tests::{
    checker::{Violation, listed, outstayed},
    fleet::Fleet,
};
use tokio::time::sleep;

use crate::row::{MORE, Row, SECOND, TTL};

/// A dead server's calls in flight are lost; what comes after its connection broke goes elsewhere.
const IN_FLIGHT: Duration = Duration::from_millis(500);

/// Views that show a dead server later than it may
fn overdue(fleet: &Fleet, bound: Duration) -> Vec<Violation> {
    let (lives, now) = (fleet.lives(), Instant::now());
    let of = |view: &callsign_tests::checker::Observed| {
        outstayed(view.name(), &view.addresses(), &lives, None, now, bound)
    };
    fleet.views().flat_map(of).collect()
}

/// Waits until etcd and all views show only those that live; the dead have to be gone by their TTL
async fn until_gone(row: &Row) {
    loop {
        let late = overdue(&row.fleet, TTL + MORE);
        assert!(late.is_empty(), "{}", listed(&late));
        if row.fleet.evidence(&row.cluster).await.violations().is_empty() {
            return;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_14_a_server_that_crashes_and_restarts_at_its_address_is_one_endpoint() {
    let Some(mut row) = Row::start("row 14, crash and restart").await else { return };
    let address = row.fleet.address(0);
    let crashed = Instant::now();
    row.fleet.kill(0);
    row.fleet.restart(0).await;
    // A random id: the key of before and the key of now, until the former's TTL, and one address in every view.
    let evidence = async || row.fleet.evidence(&row.cluster).await;
    let keys = async || evidence().await.truth.iter().filter(|(_, value)| *value == address).count();
    while keys().await < 2 {
        assert!(crashed.elapsed() < TTL, "the second key came too late to see the first");
    }
    while keys().await > 1 {
        assert!(crashed.elapsed() < TTL + MORE, "the first key has outlived its TTL");
    }
    row.until_well(MORE).await;
    assert!(row.fleet.views().all(|view| view.removals().is_empty()), "the address was always there");
    row.end_with(|at, _| at < crashed + IN_FLIGHT).await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_15_a_server_that_crashes_is_gone_when_its_ttl_has_passed() {
    let Some(mut row) = Row::start("row 15, crash").await else { return };
    let crashed = Instant::now();
    row.fleet.kill(0);
    until_gone(&row).await;
    row.note(format!("gone after {:.1} s", crashed.elapsed().as_secs_f64()));
    row.before = row.cluster.traces().await;
    row.end_with(|at, _| at < crashed + IN_FLIGHT).await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_16_a_server_that_is_told_to_leave_is_gone_at_once_and_loses_no_call() {
    let Some(mut row) = Row::start("row 16, graceful stop").await else { return };
    let address = row.fleet.address(0);
    let told = Instant::now();
    let leaving = row.fleet.terminate(0);
    leaving.await;
    let key_gone = row.cluster.pairs("hello.rpc/").await.iter().all(|(_, value)| *value != address);
    assert!(key_gone, "its key is there when it has ended");
    for view in row.fleet.views() {
        let removals = view.removals();
        let [(at, gone)] = &removals[..] else { panic!("{}: {removals:?}", view.name()) };
        assert_eq!(*gone, address);
        assert!(*at - told < SECOND / 10 + MORE, "{:?} in view {}", *at - told, view.name());
    }
    row.until_well(MORE).await;
    row.before = row.cluster.traces().await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_17_a_server_that_freezes_for_longer_than_its_ttl_leaves_and_returns() {
    let Some(mut row) = Row::start("row 17, frozen server").await else { return };
    let frozen = Instant::now();
    row.fleet.freeze(0).await;
    until_gone(&row).await;
    sleep((2 * TTL).saturating_sub(frozen.elapsed())).await;
    row.fleet.thaw(0);
    let thawed = Instant::now();
    row.healed().await;
    row.end_with(|at, _| at > frozen - 2 * SECOND && at < thawed + IN_FLIGHT).await;
}
