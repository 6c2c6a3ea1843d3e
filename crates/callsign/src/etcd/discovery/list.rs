//! Reading a whole prefix, a page at a time, at one revision

use etcd_client::{GetOptions, GetResponse, KeyValue};

use crate::etcd::{
    lane::{Lane, REQUEST},
    request::RequestError,
    watching::MAX_MESSAGE,
};

/// Values may have 64 KiB: a page stays well under the largest message.
const PAGE: i64 = 500;

/// All pairs under a prefix, as they were at one revision
pub(super) struct List {
    pub(super) revision: i64,
    pub(super) pairs: Vec<KeyValue>,
}

/// Reads all pairs under `prefix`; linearizable, so no member that is behind answers with an old list
pub(super) async fn list(lane: &Lane, prefix: &str) -> Result<List, RequestError> {
    let mut page = get(lane, prefix.into(), options(prefix).with_limit(PAGE)).await?;
    let revision = revision_of(&page);
    let mut pairs = page.take_kvs();
    while page.more() {
        // Right behind the last key: no key lies between it and itself with a zero byte.
        let Some(from) = pairs.last().map(|last| [last.key(), &[0]].concat()) else { break };
        page = get(lane, from, options(prefix).with_limit(PAGE).with_revision(revision)).await?;
        pairs.extend(page.take_kvs());
    }
    Ok(List { revision, pairs })
}

/// The cluster's revision, linearizable
pub(super) async fn revision(lane: &Lane, prefix: &str) -> Result<i64, RequestError> {
    let answer = get(lane, prefix.into(), options(prefix).with_count_only()).await?;
    Ok(revision_of(&answer))
}

async fn get(lane: &Lane, from: Vec<u8>, options: GetOptions) -> Result<GetResponse, RequestError> {
    lane.request(REQUEST, |client| async move {
        client.kv_client().max_decoding_message_size(MAX_MESSAGE).get(from, Some(options)).await
    })
    .await
}

fn options(prefix: &str) -> GetOptions {
    GetOptions::new().with_range(end(prefix))
}

fn revision_of(answer: &GetResponse) -> i64 {
    answer.header().map_or(0, etcd_client::ResponseHeader::revision)
}

/// The first key behind all that start with `prefix`
fn end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    // A prefix ends with a slash, so there is a last byte and it can grow.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_lies_behind_all_keys_of_the_prefix_and_before_all_others() {
        let end = end("a/");
        assert!(b"a/\xff\xff".as_slice() < end.as_slice() && end.as_slice() <= b"a0".as_slice());
    }
}
