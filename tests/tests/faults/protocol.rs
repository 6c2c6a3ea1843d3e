//! Row 22: what no real etcd does on demand, from the embedded one

use std::time::Instant;

use callsign_tests::{
    checker::{CONVERGED, Observed, failed_calls, listed},
    fleet::{Fleet, Plan},
    greeter,
};
use etcd_client::{Client, GetOptions};
use etcd_embedded::EmbeddedEtcd;
use tokio::time::sleep;

use crate::row::{SECOND, say};

struct Fake {
    etcd: EmbeddedEtcd,
    client: Client,
    fleet: Fleet,
}

impl Fake {
    async fn start() -> Self {
        let etcd = EmbeddedEtcd::start("127.0.0.1:0").await.expect("a port is free");
        let client = Client::connect([etcd.endpoint()], None).await.expect("it listens");
        let fleet = Fleet::start(vec![etcd.endpoint().to_owned()], Plan::new(greeter!())).await;
        Self { etcd, client, fleet }
    }

    fn changes(&self) -> Vec<usize> {
        self.fleet.views().map(Observed::changes).collect()
    }

    async fn truth(&mut self) -> Vec<(String, String)> {
        let all = Some(GetOptions::new().with_prefix());
        let got = self.client.get("hello.rpc/", all).await.expect("it answers");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        got.kvs().iter().map(|pair| (text(pair.key()), text(pair.value()))).collect()
    }

    async fn until_well(&mut self, after: &str) {
        let since = Instant::now();
        loop {
            let truth = self.truth().await;
            let wrong = self.fleet.beside(truth).violations();
            if wrong.is_empty() {
                return;
            }
            assert!(since.elapsed() < CONVERGED, "after {after}:{}", listed(&wrong));
            sleep(SECOND / 50).await;
        }
    }

    /// A second key of an address that is known already comes or goes: nobody's endpoint, but an event
    async fn twin(&mut self, there: bool) {
        let address = self.fleet.address(0);
        if there {
            self.client.put("hello.rpc/777", address, None).await.expect("it answers");
        } else {
            self.client.delete("hello.rpc/777", None).await.expect("it answers");
        }
    }

    async fn lease(&mut self) -> i64 {
        let got = self.client.get("hello.rpc/", Some(GetOptions::new().with_prefix())).await;
        got.expect("it answers").kvs()[0].lease()
    }
}

#[tokio::test]
#[ignore = "cargo xtask faults"]
async fn row_22_repeated_events_deletions_of_nothing_and_progress_ahead_change_nothing() {
    let mut fake = Fake::start().await;
    sleep(SECOND).await;
    let before = fake.changes();
    for _ in 0..20 {
        fake.etcd.resend_events();
        sleep(SECOND / 20).await;
    }
    assert_eq!(fake.changes(), before, "what was told again was known");
    // Had the progress been believed, what comes after the cut would be missed.
    for _ in 0..5 {
        fake.etcd.progress_ahead();
        fake.twin(true).await;
        fake.etcd.drop_connections();
        fake.twin(false).await;
        fake.until_well("progress ahead of events").await;
    }
    fake.etcd.compact_now();
    fake.etcd.drop_connections();
    fake.until_well("a compaction").await;
    let removed = |fake: &Fake| fake.fleet.views().map(|view| view.removals().len()).sum::<usize>();
    assert_eq!(removed(&fake), 0, "nobody has left until now");
    let lease = fake.lease().await;
    assert!(fake.etcd.expire_lease(lease));
    fake.until_well("the end of a lease").await;
    fake.etcd.forget_everything();
    fake.until_well("all was forgotten").await;
    let Fake { etcd, fleet, .. } = fake;
    let (tally, servers) = fleet.end_clients().await;
    servers.terminate().await;
    etcd.shutdown().await;
    let failed: Vec<_> = failed_calls(&tally).into_iter().collect();
    assert!(failed.is_empty(), "row 22:{}", listed(&failed));
    say(&format!("row 22, corner cases of the protocol: {} calls, 0 failed", tally.calls));
}
