//! A real etcd, where there is one, and what is in it

use std::{
    env,
    io::{self, Write as _},
    time::Duration,
};

use crate::{etcd::EtcdProcess, wait};

/// Starts an etcd; `None`, with a word on stderr, if `etcd` and `etcdctl` are not on PATH
///
/// # Panics
///
/// If they are not and `CALLSIGN_REQUIRE_ETCD` is `1`: then a suite must not be skipped.
pub async fn etcd() -> Option<EtcdProcess> {
    if is_there() { Some(EtcdProcess::start().await) } else { None }
}

/// The same with more options
pub async fn etcd_with(options: &[&str]) -> Option<EtcdProcess> {
    if is_there() { Some(EtcdProcess::start_with(options).await) } else { None }
}

/// The same, as a cluster of three members
pub async fn three_etcds() -> Option<[EtcdProcess; 3]> {
    if is_there() { Some(EtcdProcess::start_three().await) } else { None }
}

fn is_there() -> bool {
    let paths = env::var_os("PATH").unwrap_or_default();
    let on_path = |name: &str| env::split_paths(&paths).any(|dir| dir.join(name).is_file());
    if on_path("etcd") && on_path("etcdctl") {
        return true;
    }
    let required = env::var_os("CALLSIGN_REQUIRE_ETCD").is_some_and(|value| value == "1");
    assert!(!required, "no etcd and etcdctl on PATH, and CALLSIGN_REQUIRE_ETCD=1");
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    // Not `eprintln!`, which the test harness swallows when a test passes. A stderr that is gone is no failure.
    let _ = writeln!(io::stderr(), "skipped: {test}: it needs etcd and etcdctl on PATH");
    false
}

/// Addresses under `<service>/`, in order, as `etcdctl get --prefix` shows them
pub async fn registered(etcd: &EtcdProcess, service: &str) -> Vec<String> {
    let prefix = format!("{service}/");
    let mut addresses: Vec<_> = etcd
        .etcdctl(["get", "--prefix", &prefix, "--print-value-only"])
        .await
        .lines()
        .map(str::to_owned)
        .collect();
    addresses.sort();
    addresses
}

/// Waits until the sorted addresses under `<service>/` meet `condition`
///
/// # Panics
///
/// If they do not within `bound`.
pub async fn until_registered(
    etcd: &EtcdProcess,
    service: &str,
    bound: Duration,
    condition: impl Fn(&[String]) -> bool,
) -> Vec<String> {
    wait::within("etcd shows other instances", bound, async {
        loop {
            let addresses = registered(etcd, service).await;
            if condition(&addresses) {
                return addresses;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
}
