//! Rows 9, 10, 13, 18 and 20: what is in etcd is compacted, wiped, deleted, too much or garbage

use std::{collections::BTreeSet, time::Instant};

use callsign::{Registration, RegistrationState, discover::EtcdDiscover};
use callsign_tests::{checker::Observed, cluster::Cluster, fleet::session, wait};
use etcd_client::{Client, Txn, TxnOp};
use tokio::time::sleep;

use crate::row::{MORE, Row, SECOND, Setup, TTL};

async fn revision(cluster: &Cluster) -> i64 {
    let status = cluster.running().etcdctl(["endpoint", "status", "-w", "json"]).await;
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON, as asked for");
    status[0]["Status"]["header"]["revision"].as_i64().expect("every answer has a revision")
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_09_a_compaction_while_disconnected_costs_one_list_and_nothing_but_the_difference_is_told() {
    let Some(mut row) = Row::start("row 09, compaction while disconnected").await else { return };
    let (lists, views) = (row.lists(), 2);
    let told: Vec<_> = row.fleet.views().map(Observed::changes).collect();
    for proxy in row.cluster.proxies() {
        proxy.refuse().await;
    }
    // Nobody sees these, and then they are forgotten. The second view of an address is a difference that shows.
    let twin = row.fleet.address(0);
    for number in 0..50 {
        row.cluster.running().put("other/key", number.to_string()).await;
    }
    row.cluster.running().put("hello.rpc/777", twin.as_str()).await;
    row.cluster.running().put("other/key", "last").await;
    let now = revision(&row.cluster).await.to_string();
    row.cluster.running().etcdctl(["compact", &now]).await;
    sleep(SECOND).await;
    row.cluster.heal().await;
    let seen = || row.fleet.views().map(Observed::changes).zip(&told).all(|(now, then)| now > *then);
    wait::until("the difference is told", 5 * SECOND + MORE, || seen().then_some(())).await;
    sleep(SECOND).await;
    let differences = row.fleet.views().map(Observed::changes).zip(&told).map(|(now, then)| now - then);
    assert_eq!(differences.collect::<Vec<_>>(), vec![1; views], "the twin, and nothing else");
    assert_eq!(row.lists() - lists, views, "one list for each discovery");
    row.cluster.running().delete("hello.rpc/777").await;
    row.healed().await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_10_a_cluster_that_comes_back_empty_is_found_out_and_filled_again() {
    let Some(mut row) = Row::start("row 10, all data wiped").await else { return };
    // So that the new store's revisions are far behind.
    for number in 0..200 {
        row.cluster.running().put("other/key", number.to_string()).await;
    }
    sleep(SECOND).await;
    row.excuse();
    row.cluster.kill_all().await;
    row.cluster.wipe_all();
    sleep(5 * SECOND).await;
    row.cluster.heal().await;
    row.healed().await;
    let registered = |state: &RegistrationState| matches!(state, RegistrationState::Registered { .. });
    row.until_state("the registration is back", MORE, registered).await;
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_13_keys_that_an_operator_deletes_are_back_within_a_second() {
    let Some(mut row) = Row::start("row 13, an operator deletes").await else { return };
    row.excuse();
    let leases = row.cluster.traces().await.leases;
    let one = row.cluster.pairs("hello.rpc/").await.remove(0).0;
    row.cluster.running().etcdctl(["del", &one]).await;
    row.until_well(SECOND + MORE).await;
    for _ in 0..3 {
        row.cluster.running().etcdctl(["del", "--prefix", "hello.rpc/"]).await;
        let deleted = Instant::now();
        row.until_well(SECOND + MORE).await;
        row.note(format!("back after {} ms", deleted.elapsed().as_millis()));
    }
    assert_eq!(row.cluster.traces().await.leases, leases, "under the same leases");
    row.end().await;
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_18_without_space_leases_are_kept_and_who_is_new_registers_when_there_is_space_again() {
    let setup = Setup::new().etcd(&["--quota-backend-bytes", "16777216"]);
    let Some(mut row) = setup.start("row 18, no space").await else { return };
    fill(&row.cluster).await;
    let late = session(&row.cluster.hosts());
    let address = "127.0.0.1:9".parse().expect("an address");
    let late = Registration::builder(&late, "late.rpc", address).ttl(TTL).start().expect("valid");
    let refused = |state: &RegistrationState| matches!(state, RegistrationState::Granting { cause: Some(cause) } if cause.contains("space"));
    let mut state = late.state();
    drop(wait::within("it is told why", 5 * SECOND, state.wait_for(refused)).await.expect("it lives"));
    sleep(2 * TTL).await;
    row.until_well(SECOND).await;
    assert!(row.cluster.traces().await.leases.is_superset(&row.before.leases), "leases are kept");
    let now = revision(&row.cluster).await.to_string();
    row.cluster.running().etcdctl(["compact", &now]).await;
    for member in 0..row.cluster.len() {
        row.cluster.etcd(member).etcdctl(["defrag"]).await;
    }
    row.cluster.running().etcdctl(["alarm", "disarm"]).await;
    let registered = |state: &RegistrationState| matches!(state, RegistrationState::Registered { .. });
    let back = wait::within("it is registered", 5 * SECOND + MORE, state.wait_for(registered));
    drop(back.await.expect("it lives"));
    late.deregister().await.expect("there is space");
    row.healed().await;
    row.end().await;
}

/// Puts one large value after the other, until etcd refuses
async fn fill(cluster: &Cluster) {
    let mut client = Client::connect([cluster.running().endpoint()], None).await.expect("etcd is there");
    let large = vec![b'x'; 1 << 20];
    for _ in 0..64 {
        if let Err(error) = client.put("large", large.clone(), None).await {
            assert!(error.to_string().contains("space"), "{error}");
            return;
        }
    }
    panic!("64 MB in 16 MB");
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_20_ten_thousand_instances_and_garbage_among_them_are_listed() {
    const MANY: usize = 10_000;
    let Some(mut row) = Row::start("row 20, 10 000 instances").await else { return };
    let put = put_many(&row.cluster, MANY).await;
    let garbage = [
        ("garbage", "not an address".to_owned()),
        ("big", "x".repeat(1 << 20)),
        ("json", "{\"Op\":".to_owned()),
    ];
    for (id, value) in garbage {
        row.cluster.running().put(&format!("large.rpc/{id}"), value).await;
    }
    let late = session(&row.cluster.hosts());
    let since = Instant::now();
    let view = Observed::of("large", EtcdDiscover::new(&late, "large.rpc").expect("a valid name"));
    let all = || (view.addresses().len() == MANY).then(|| view.addresses());
    assert_eq!(wait::until("all are listed", 10 * SECOND, all).await, put);
    row.note(format!("listed in {} ms", since.elapsed().as_millis()));
    row.cluster.running().put("large.rpc/one-more", "10.9.9.9:9").await;
    wait::until("a change is seen", 2 * SECOND, || (view.addresses().len() == MANY + 1).then_some(())).await;
    drop((view, late));
    row.cluster.running().delete_all("large.rpc/").await;
    row.healed().await;
    row.end().await;
}

/// Instances in the layout of etcd's own naming, half a kilobyte each
async fn put_many(cluster: &Cluster, many: usize) -> BTreeSet<String> {
    let mut client = Client::connect([cluster.running().endpoint()], None).await.expect("etcd is there");
    let address = |number: usize| format!("10.0.{}.{}:80", number / 256, number % 256);
    let pad = "x".repeat(450);
    let numbers: Vec<_> = (0..many).collect();
    for numbers in numbers.chunks(128) {
        let puts = numbers.iter().map(|&number| {
            let address = address(number);
            let value = format!("{{\"Op\":0,\"Addr\":\"{address}\",\"Metadata\":{{\"pad\":\"{pad}\"}}}}");
            TxnOp::put(format!("large.rpc/{address}"), value, None)
        });
        client.txn(Txn::new().and_then(puts.collect::<Vec<_>>())).await.expect("there is space");
    }
    numbers.into_iter().map(address).collect()
}
