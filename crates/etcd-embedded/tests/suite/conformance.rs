//! What etcd does, one sentence a test, each run against the embedded server and against a real one

mod auth;
mod kv;
mod lease;
mod member;
mod txn;
mod watch;

use etcd_embedded::EmbeddedEtcd;
use tonic::{Code, Status};

use crate::{
    client::{Client, all},
    proto::etcdserverpb::{DeleteRangeRequest, LeaseLeasesRequest, LeaseRevokeRequest},
    real::Etcd,
};

/// Makes two tests of one: `name::embedded` and `name::real`
///
/// The real etcd may have served other tests: it is empty, but not at revision 1. With `fresh` it is new, and dropped
/// afterwards.
macro_rules! both {
    ($($(#[$fresh:ident])? async fn $name:ident($client:ident: Client) $body:block)*) => {$(
        mod $name {
            use super::*;

            async fn test(#[allow(unused_mut)] mut $client: Client) $body

            #[tokio::test]
            async fn embedded() {
                let etcd = crate::conformance::embedded().await;
                test(Client::connect(etcd.endpoint())).await;
                etcd.shutdown().await;
            }

            #[tokio::test]
            async fn real() {
                let fresh = stringify!($($fresh)?) == "fresh";
                let Some(etcd) = crate::conformance::real(fresh).await else { return };
                test(Client::connect(&etcd.endpoint())).await;
                if !fresh {
                    crate::conformance::clean(&etcd).await;
                    etcd.give_back();
                }
            }
        }
    )*};
}
use both;

async fn embedded() -> EmbeddedEtcd {
    EmbeddedEtcd::start("127.0.0.1:0").await.unwrap()
}

async fn real(fresh: bool) -> Option<Etcd> {
    if fresh { Etcd::start().await } else { Etcd::take().await }
}

/// Leaves no keys and no leases
async fn clean(etcd: &Etcd) {
    let client = Client::connect(&etcd.endpoint());
    let all = all();
    let delete = DeleteRangeRequest { key: all.key, range_end: all.range_end, prev_kv: false };
    client.send(delete).await.unwrap();
    for lease in client.send(LeaseLeasesRequest {}).await.unwrap().leases {
        // It may expire at this very moment.
        let _ = client.send(LeaseRevokeRequest { id: lease.id }).await;
    }
}

/// Code and text of a refusal
fn refusal<T: std::fmt::Debug>(answer: Result<T, Status>) -> (Code, String) {
    let status = answer.expect_err("a refusal");
    (status.code(), status.message().to_owned())
}

fn refused(code: Code, text: &str) -> (Code, String) {
    (code, text.to_owned())
}
