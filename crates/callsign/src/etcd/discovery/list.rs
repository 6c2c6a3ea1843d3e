//! Reading a whole prefix, a page at a time, at one revision

use etcd_client::{GetOptions, GetResponse, KeyValue};

use crate::etcd::{
    lane::{Lane, REQUEST},
    request::RequestError,
    watching::MAX_MESSAGE,
};

/// Values are small: a page is a few dozen kilobytes
const PAGE: i64 = 500;

/// Hands all pairs under `prefix` to `on_pair`, as they were at one revision, and returns that
///
/// Linearizable, so no member that is behind answers with an old list. Only a page at a time is kept: what is under the
/// prefix may be anything.
pub(super) async fn list(
    lane: &Lane,
    prefix: &str,
    mut on_pair: impl FnMut(&KeyValue),
) -> Result<i64, RequestError> {
    let (mut from, mut revision, mut limit) = (prefix.as_bytes().to_vec(), 0, PAGE);
    loop {
        // Revision 0 is the latest one.
        let options = options(prefix).with_limit(limit).with_revision(revision);
        let page = match get(lane, from.clone(), options).await {
            // Someone keeps large values here. They are skipped, but they have to come in first.
            Err(error) if error.is_too_large() && limit > 1 => {
                limit /= 2;
                continue;
            }
            page => page?,
        };
        if revision == 0 {
            revision = revision_of(&page);
        }
        page.kvs().iter().for_each(&mut on_pair);
        match page.kvs().last() {
            // Right behind the last key: no key lies between it and itself with a zero byte.
            Some(last) if page.more() => from = [last.key(), &[0]].concat(),
            _ => return Ok(revision),
        }
    }
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
