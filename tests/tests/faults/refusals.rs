//! Rows 11, 12 and 24: tokens, passwords, permissions and certificates that are no longer good

use std::{
    fs,
    time::{Duration, Instant},
};

use callsign::{Etcd, EtcdOptions, RegistrationState, Tls, discover::DiscoveryState, discover::EtcdDiscover};
use callsign_tests::wait;
use tokio::time::sleep;
use tracing::Level;

use crate::row::{MORE, PASSWORD, Row, SECOND, Setup, TTL, USER};

/// What is refused is asked for again every half minute
const SLOW: Duration = Duration::from_secs(30);

/// How often the sessions of this process (client, observer, registration) have logged in
fn logins(row: &Row) -> usize {
    row.lines.beginning("logged in to etcd")
}

/// Cuts every connection once, so that all have to open what they had
async fn cut_all(row: &Row) {
    for proxy in row.cluster.proxies() {
        proxy.cut().await;
        proxy.heal();
    }
}

/// Tokens expire while all is quiet, and then every member forgets them as it restarts
async fn outlive_tokens(row: &mut Row) {
    sleep(2 * TTL).await;
    let before = logins(row);
    row.excuse();
    row.cluster.as_root(&["del", "--prefix", "hello.rpc/"]).await;
    row.until_well(SECOND + MORE).await;
    cut_all(row).await;
    row.until_well(TTL).await;
    let expired = logins(row) - before;
    assert!(expired <= 6, "{expired} logins of three sessions with two lanes at most");
    for member in 0..row.cluster.len() {
        row.cluster.kill(member).await;
        row.cluster.revive([member]).await;
        row.until_well(20 * SECOND).await;
    }
    row.note(format!("{} logins of three sessions", logins(row)));
    assert!(logins(row) <= 24, "{} logins", logins(row));
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_11_expired_tokens_and_members_that_know_none_cost_one_login_each() {
    let setup = Setup::new().etcd(&["--auth-token-ttl", "3"]).login();
    let Some(mut row) = setup.start("row 11, token expiry").await else { return };
    outlive_tokens(&mut row).await;
    row.healed().await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_11_signed_tokens_that_expire_and_are_outdated_by_a_change_of_users_cost_nothing() {
    let secret = std::env::temp_dir().join(format!("callsign-jwt-{}", std::process::id()));
    fs::write(&secret, "a secret of thirty-two characters").expect("the temp dir is writable");
    let token = format!("jwt,priv-key={},sign-method=HS256,ttl=3s", secret.display());
    let setup = Setup::new().etcd(&["--auth-token", token.as_str()]).login();
    let Some(mut row) = setup.start("row 11, signed tokens").await else { return };
    row.cluster.as_root(&["user", "add", "another:password"]).await;
    outlive_tokens(&mut row).await;
    row.healed().await;
    row.end().await;
    // Left behind by a test that fails, it harms nobody.
    let _ = fs::remove_file(secret);
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_11_a_changed_password_is_told_once_tried_slowly_and_forgiven() {
    let setup = Setup::new().login();
    let Some(mut row) = setup.start("row 11, changed password").await else { return };
    // With a password that is no longer good nobody can take back what lapses.
    row.excuse();
    let before = row.lines.at(Level::INFO).len();
    row.cluster.as_root(&["user", "delete", USER]).await;
    row.cluster.as_root(&["user", "add", &format!("{USER}:another")]).await;
    row.cluster.as_root(&["user", "grant-role", USER, USER]).await;
    cut_all(&row).await;
    sleep(3 * TTL).await;
    let told = row.lines.at(Level::INFO).split_off(before);
    let refused = told.iter().filter(|line| line.text.contains("refuses the login")).count();
    assert_eq!(refused, 3, "once by each session of this process: {told:?}");
    assert!(told.iter().all(|line| !line.text.contains(PASSWORD)), "{told:?}");
    assert!(told.len() <= 15, "no flood: {told:?}");
    row.cluster.as_root(&["user", "delete", USER]).await;
    row.cluster.as_root(&["user", "add", &format!("{USER}:{PASSWORD}")]).await;
    row.cluster.as_root(&["user", "grant-role", USER, USER]).await;
    row.until_well(SLOW + 2 * SECOND + MORE).await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_12_a_revoked_permission_is_told_and_asked_for_slowly() {
    let setup = Setup::new().login();
    let Some(mut row) = setup.start("row 12, permission revoked").await else { return };
    let permission = ["hello.rpc/", "probe.rpc/"];
    let discover = EtcdDiscover::new(&row.fleet.clients()[0].session, "hello.rpc").expect("a valid name");
    for prefix in permission {
        row.cluster.as_root(&["role", "revoke-permission", USER, prefix, "--prefix=true"]).await;
    }
    row.excuse();
    let lines = row.lines.at(Level::DEBUG).len();
    cut_all(&row).await;
    let mut state = discover.state();
    let denied = |state: &DiscoveryState| matches!(state, DiscoveryState::Resuming { cause } if cause.contains("permission denied"));
    drop(wait::within("it is told why", 5 * SECOND, state.wait_for(denied)).await.expect("it lives"));
    sleep(3 * TTL).await;
    let asked = row.lines.at(Level::DEBUG).split_off(lines);
    let told = asked.iter().filter(|line| line.text.contains("permission denied")).count();
    assert!(told <= 12, "asked for slowly by each of three sessions: {asked:?}");
    for prefix in permission {
        row.cluster.as_root(&["role", "grant-permission", USER, "readwrite", "--prefix=true", prefix]).await;
    }
    let registered = |state: &RegistrationState| matches!(state, RegistrationState::Registered { .. });
    row.until_well(SLOW + 2 * SECOND + MORE).await;
    row.until_state("the registration is back", SLOW, registered).await;
    drop(discover);
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_24_a_ca_that_is_replaced_by_a_rolling_restart_costs_nothing_and_who_missed_it_is_told() {
    let Some(mut row) = Setup::new().tls().start("row 24, TLS rotation").await else { return };
    let certificates = row.certificates.take().expect("TLS was asked for");
    let read = |path| fs::read(path).expect("it was written");
    let [certificate, key] = certificates.client();
    let former = Tls::new().ca_pem(read(certificates.ca())).identity_pem(read(certificate), read(key));
    certificates.rotate();
    for member in 0..row.cluster.len() {
        row.cluster.kill(member).await;
        row.cluster.revive([member]).await;
        row.until_well(20 * SECOND).await;
    }
    let since = Instant::now();
    let error = Etcd::connect(EtcdOptions::new(row.cluster.hosts()).tls(former)).await;
    let error = error.map(drop).expect_err("the former CA is worth nothing").to_string();
    assert!(error.contains("is not trusted") && since.elapsed() < 5 * SECOND + MORE, "{error}");
    row.healed().await;
    row.end().await;
}
