//! What etcd shows is what lives

#![cfg(unix)]

use std::time::Duration;

use callsign::{Etcd, EtcdOptions, Registration};
use callsign_tests::{etcd::EtcdProcess, greeter, process::Process, registry};

const SERVICE: &str = "hello.rpc";
const BOUND: Duration = Duration::from_secs(5);
/// The shortest that brings no warning
const TTL: Duration = Duration::from_secs(5);

/// Servers in order of their addresses, all registered
async fn servers<const N: usize>(etcd: &EtcdProcess) -> [Process; N] {
    let mut servers = Vec::new();
    for _ in 0..N {
        servers.push(greeter!().register(SERVICE, &etcd.endpoint()).ttl(TTL).start().await);
    }
    servers.sort_by_key(|server| server.address().to_string());
    let servers: [Process; N] = servers.try_into().expect("N were started");
    let all = servers.each_ref().map(|server| server.address().to_string());
    registry::until_registered(etcd, SERVICE, BOUND, |shown| shown == all).await;
    servers
}

fn addresses(servers: &[Process]) -> Vec<String> {
    servers.iter().map(|server| server.address().to_string()).collect()
}

#[tokio::test]
async fn after_deregister_only_the_living_are_shown() {
    let etcd = registry::etcd().await;
    let living: [Process; 2] = servers(&etcd).await;
    let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.unwrap();
    let address = "127.0.0.1:1".parse().unwrap();
    let registration = Registration::builder(&session, SERVICE, address).register().await.unwrap();
    assert_eq!(registry::registered(&etcd, SERVICE).await.len(), 3, "registered when register() returns");
    registration.deregister().await.unwrap();
    assert_eq!(
        registry::registered(&etcd, SERVICE).await,
        addresses(&living),
        "gone when deregister() returns"
    );
}

#[tokio::test]
async fn etcdctl_shows_what_is_registered() {
    if !registry::has_etcdctl() {
        return;
    }
    let etcd = registry::etcd().await;
    let [one, other]: [Process; 2] = servers(&etcd).await;
    let shown = etcd.etcdctl(["get", "--prefix", "hello.rpc/", "--print-value-only"]).await;
    let mut shown: Vec<_> = shown.lines().collect();
    shown.sort_unstable();
    assert_eq!(shown, [one.address().to_string(), other.address().to_string()]);
}

#[tokio::test]
async fn after_ctrl_c_only_the_living_are_shown() {
    let etcd = registry::etcd().await;
    let [mut stopped, living @ ..]: [Process; 3] = servers(&etcd).await;
    stopped.sigint();
    let status = stopped.exited(2 * BOUND).await;
    assert!(status.success(), "{status}");
    assert_eq!(registry::registered(&etcd, SERVICE).await, addresses(&living));
}

#[tokio::test]
async fn after_sigterm_only_the_living_are_shown() {
    let etcd = registry::etcd().await;
    let [mut stopped, living @ ..]: [Process; 3] = servers(&etcd).await;
    stopped.sigterm();
    let status = stopped.exited(2 * BOUND).await;
    assert!(status.success(), "{status}");
    assert_eq!(registry::registered(&etcd, SERVICE).await, addresses(&living));
}

#[tokio::test]
async fn two_seconds_after_the_ttl_of_a_killed_server_only_the_living_are_shown() {
    let etcd = registry::etcd().await;
    let [mut killed, living @ ..]: [Process; 3] = servers(&etcd).await;
    let all = registry::registered(&etcd, SERVICE).await;
    killed.kill9();
    assert_eq!(
        registry::registered(&etcd, SERVICE).await,
        all,
        "a dead process lapses, it does not deregister"
    );
    let shown =
        registry::until_registered(&etcd, SERVICE, TTL + Duration::from_secs(2), |shown| shown.len() < 3)
            .await;
    assert_eq!(shown, addresses(&living));
}
