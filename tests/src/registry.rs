//! The etcd that the suites run on, and what is in it
//!
//! `CALLSIGN_TEST_ETCD` chooses: `real` or `embedded`. Without it, it is the `etcd` on PATH, or else the embedded one.

use std::{
    env,
    io::{self, Write as _},
    sync::Once,
    time::Duration,
};

use crate::{
    etcd::{EtcdProcess, Program},
    wait,
};

/// Why a test needs a real etcd: keys and leases are to outlive the process
pub const PERSISTENCE: &str = "the embedded etcd keeps nothing when its process ends";

/// Why a test needs a real etcd: what it asserts is counted by etcd
pub const METRICS: &str = "the embedded etcd has no metrics";

/// Starts an etcd
///
/// # Panics
///
/// If there is no real one and `CALLSIGN_TEST_ETCD` is `real` or `CALLSIGN_REQUIRE_ETCD` is `1`.
pub async fn etcd() -> EtcdProcess {
    EtcdProcess::start(program()).await
}

/// The same for a test that only a real one can serve; `None`, with the reason on stderr, where the embedded one is used
pub async fn real(why: &str) -> Option<EtcdProcess> {
    if is_real(why) { Some(EtcdProcess::start(Program::Real).await) } else { None }
}

/// The same with more options
pub async fn real_with(options: &[&str]) -> Option<EtcdProcess> {
    let with_options = is_real("the embedded etcd has no options");
    if with_options { Some(EtcdProcess::start_with(Program::Real, options).await) } else { None }
}

/// The same, speaking TLS as these options tell it
pub async fn tls(options: &[String]) -> Option<EtcdProcess> {
    let speaks_tls = is_real("the embedded etcd does not speak TLS");
    if speaks_tls { Some(EtcdProcess::start_tls(options).await) } else { None }
}

/// The same, as a cluster of three members
pub async fn three_members() -> Option<[EtcdProcess; 3]> {
    three_members_with(&[]).await
}

/// The same with more options for each
pub async fn three_members_with(options: &[&str]) -> Option<[EtcdProcess; 3]> {
    let members = is_real("the embedded etcd is a single member");
    if members { Some(EtcdProcess::start_three_with(options).await) } else { None }
}

/// `None`, with the reason on stderr, where the embedded one is used
///
/// # Panics
///
/// As [`etcd`].
pub fn needs_real(why: &str) -> Option<()> {
    is_real(why).then_some(())
}

/// Whether `etcdctl` can be run; says so if not
///
/// # Panics
///
/// If it cannot and `CALLSIGN_REQUIRE_ETCD` is `1`: then a test must not be skipped.
pub fn has_etcdctl() -> bool {
    let there = on_path("etcdctl");
    assert!(there || !is_required(), "no etcdctl on PATH, and CALLSIGN_REQUIRE_ETCD=1");
    if !there {
        skip("no etcdctl on PATH");
    }
    there
}

fn is_real(why: &str) -> bool {
    let real = program() == Program::Real;
    if !real {
        skip(why);
    }
    real
}

fn program() -> Program {
    let chosen = env::var("CALLSIGN_TEST_ETCD").unwrap_or_default();
    let there = on_path("etcd");
    match chosen.as_str() {
        "embedded" => Program::Embedded,
        "real" | "" if there => Program::Real,
        "real" => panic!("no etcd on PATH, and CALLSIGN_TEST_ETCD=real"),
        "" => instead(),
        other => panic!("CALLSIGN_TEST_ETCD is real or embedded, not {other}"),
    }
}

/// The embedded one, for want of a real one
fn instead() -> Program {
    static SAID: Once = Once::new();
    assert!(!is_required(), "no etcd on PATH, and CALLSIGN_REQUIRE_ETCD=1");
    SAID.call_once(|| say("no etcd on PATH: using the embedded one"));
    Program::Embedded
}

fn is_required() -> bool {
    env::var_os("CALLSIGN_REQUIRE_ETCD").is_some_and(|value| value == "1")
}

pub(crate) fn on_path(name: &str) -> bool {
    env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|dir| dir.join(name).is_file())
}

pub(crate) fn skip(why: &str) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    say(&format!("skipped: {test}: {why}"));
}

fn say(line: &str) {
    // Not `eprintln!`, which the test harness swallows when a test passes. A stderr that is gone is no failure.
    let _ = writeln!(io::stderr(), "{line}");
}

/// Addresses under `<service>/`, in order
pub async fn registered(etcd: &EtcdProcess, service: &str) -> Vec<String> {
    let pairs = etcd.pairs(&format!("{service}/")).await;
    let mut addresses: Vec<_> = pairs.into_iter().map(|(_, address)| address).collect();
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
