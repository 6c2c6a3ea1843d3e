//! Reading a range of keys, a page at a time, at one revision

use etcd_client::{GetOptions, GetResponse, KeyValue, WatchOptions};

use super::{
    lane::{Lane, REQUEST},
    request::RequestError,
    watching::MAX_MESSAGE,
};

/// Values are small: a page is a few dozen kilobytes
const PAGE: i64 = 500;

/// Which keys are read or watched
#[derive(Clone, Debug)]
pub(super) struct Keys {
    first: String,
    /// Right behind the last one; `None` for a single key
    end: Option<Vec<u8>>,
}

impl Keys {
    /// One key
    pub(super) fn one(key: impl Into<String>) -> Self {
        Self { first: key.into(), end: None }
    }

    /// All that start with `prefix`: with an empty one, all there are
    pub(super) fn under(prefix: impl Into<String>) -> Self {
        let prefix = prefix.into();
        if prefix.is_empty() {
            // How etcd spells "from the first to the last".
            return Self { first: "\0".to_owned(), end: Some(vec![0]) };
        }
        let mut end = prefix.as_bytes().to_vec();
        // No text has a byte of 0xff, so there is a last byte and it can grow.
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        Self { first: prefix, end: Some(end) }
    }

    pub(super) fn first(&self) -> &str {
        &self.first
    }

    /// To read them
    fn get(&self) -> GetOptions {
        self.end.iter().fold(GetOptions::new(), |options, end| options.with_range(end.clone()))
    }

    /// To watch them
    pub(super) fn watch(&self) -> WatchOptions {
        self.end.iter().fold(WatchOptions::new(), |options, end| options.with_range(end.clone()))
    }
}

/// Hands all pairs of `keys` to `on_pair`, as they were at one revision, and returns that
///
/// Linearizable, so no member that is behind answers with an old list. Only a page at a time is kept: what is there may be
/// anything.
pub(super) async fn list(
    lane: &Lane,
    keys: &Keys,
    mut on_pair: impl FnMut(&KeyValue),
) -> Result<i64, RequestError> {
    let (mut from, mut revision, mut limit) = (keys.first.as_bytes().to_vec(), 0, PAGE);
    loop {
        // Revision 0 is the latest one.
        let options = keys.get().with_limit(limit).with_revision(revision);
        let page = match get(lane, from.clone(), options).await {
            // Someone keeps large values here, which are skipped, but have to come in first. Or the link is slow; a host
            // that is dead refuses the connection that comes next, which is another failure.
            Err(error) if (error.is_too_large() || error.is_timeout()) && limit > 1 => {
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

async fn get(lane: &Lane, from: Vec<u8>, options: GetOptions) -> Result<GetResponse, RequestError> {
    lane.request(REQUEST, |client| async move {
        client.kv_client().max_decoding_message_size(MAX_MESSAGE).get(from, Some(options)).await
    })
    .await
}

fn revision_of(answer: &GetResponse) -> i64 {
    answer.header().map_or(0, etcd_client::ResponseHeader::revision)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_lies_behind_all_keys_of_the_prefix_and_before_all_others() {
        let end = Keys::under("a/").end.unwrap();
        assert!(b"a/\xff\xff".as_slice() < end.as_slice() && end.as_slice() <= b"a0".as_slice());
    }

    #[test]
    fn one_key_is_no_range_and_an_empty_prefix_is_all_keys() {
        assert_eq!(Keys::one("a").end, None);
        let all = Keys::under("");
        assert_eq!((all.first.as_bytes(), all.end.as_deref()), (&b"\0"[..], Some(&b"\0"[..])));
    }
}
