//! Whether etcd still is the one that it was

use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, Txn, TxnOp};

use super::{
    lane::{Lane, REQUEST},
    request::RequestError,
};

/// The pair that was learned last
///
/// While it stands as it was, so does the history that it is part of. A store that was wiped, or restored from before it,
/// may have revisions of any height; but that it has the same key from the same revision, under the same lease, does not
/// happen by chance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Witness {
    key: Vec<u8>,
    mod_revision: i64,
    lease: i64,
    /// Without a lease, which only its owner has: a script that fills a store may do so the same way twice
    value: Option<Vec<u8>>,
}

impl Witness {
    /// Makes `pair` the witness, unless there is a later one
    pub(super) fn on_pair(witness: &mut Option<Self>, pair: &KeyValue) {
        if witness.as_ref().is_none_or(|witness| witness.mod_revision <= pair.mod_revision()) {
            let value = (pair.lease() == 0).then(|| pair.value().to_vec());
            let (mod_revision, lease) = (pair.mod_revision(), pair.lease());
            *witness = Some(Self { key: pair.key().to_vec(), mod_revision, lease, value });
        }
    }

    /// The cluster's revision, linearizable, if the pair stands as it was
    pub(super) async fn revision(&self, lane: &Lane) -> Result<Option<i64>, RequestError> {
        let mod_revision = Compare::mod_revision(self.key.as_slice(), CompareOp::Equal, self.mod_revision);
        let lease = Compare::lease(self.key.as_slice(), CompareOp::Equal, self.lease);
        let value = self
            .value
            .iter()
            .map(|value| Compare::value(self.key.as_slice(), CompareOp::Equal, value.as_slice()));
        let same: Vec<_> = [mod_revision, lease].into_iter().chain(value).collect();
        // A Txn that reads nothing counts as serializable: a member that is behind would answer for itself.
        let read = TxnOp::get(self.key.as_slice(), Some(GetOptions::new().with_count_only()));
        let txn = Txn::new().when(same).and_then([read]);
        let answer = lane.request(REQUEST, |client| async move { client.kv_client().txn(txn).await }).await?;
        let revision = answer.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(answer.succeeded().then_some(revision))
    }
}
