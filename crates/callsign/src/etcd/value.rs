//! One key and its value, as a type of one's own

mod key;

use std::{
    fmt,
    future::pending,
    marker::PhantomData,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use etcd_client::KeyValue;
use futures_core::Stream;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

pub use self::key::KeyError;
pub(super) use self::key::ValueKey;
use super::{
    Etcd, Subscription,
    discovery::DiscoveryState,
    feed::{Feed, Source, View},
    follow::{self, Sink},
    lane::Lane,
    list::Keys,
    request::printable,
};

/// etcd itself takes 1.5 MB a request by default: what was written in the usual ways can be read.
pub(super) const MAX_VALUE: usize = 1 << 20;

impl Etcd {
    /// The value of `key`, now and after each change, whatever becomes of etcd
    ///
    /// The value is JSON, as [`put_value`](Self::put_value) writes it.
    ///
    /// ```no_run
    /// # async fn example(etcd: callsign::Etcd) -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_stream::StreamExt;
    ///
    /// let mut limit = etcd.watch_value::<u32>("config/limit")?;
    /// while let Some(value) = limit.next().await {
    ///     match value {
    ///         Ok(Some(limit)) => println!("the limit is {limit}"),
    ///         Ok(None) => println!("there is no limit"),
    ///         Err(error) => println!("{error}; the old limit stays"),
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`KeyError`] if the key is empty or has control characters; never because of the network.
    pub fn watch_value<T: DeserializeOwned>(&self, key: impl Into<String>) -> Result<Values<T>, KeyError> {
        let key = ValueKey::parse(key, self.namespace())?;
        Ok(Values { subscription: self.follow_value(&key), key, last: None, decoded: PhantomData })
    }
}

/// The value of one key, as a stream; see [`Etcd::watch_value`]
///
/// The first item is what the key holds now, as soon as etcd has said so; then comes one after each change. `None` means
/// that there is no such key, an error that its value cannot be read as a `T`: the stream goes on, and who keeps the last
/// good value loses nothing. While etcd is away there is nothing new. Putting an equal value is no change. A consumer that
/// cannot keep up sees the latest value only. All who watch one key over one [`Etcd`] share one watch, which ends with the
/// last of them. Must be polled within a tokio runtime: when the one that the watch ran in has ended, it goes on in the
/// next.
#[must_use = "streams do nothing unless polled"]
pub struct Values<T> {
    key: ValueKey,
    subscription: Subscription<Latest>,
    /// What was told last
    last: Option<Content>,
    decoded: PhantomData<fn() -> T>,
}

impl<T> Values<T> {
    /// Where the watch stands, and each change of that
    pub fn state(&self) -> watch::Receiver<DiscoveryState> {
        self.subscription.state()
    }
}

impl<T: DeserializeOwned> Stream for Values<T> {
    type Item = Result<Option<T>, ValueError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            let content = ready!(this.subscription.poll_update(cx));
            // There and back again while nobody looked.
            if this.last.as_ref() != Some(&content) {
                let value = decode(&content).map_err(|cause| ValueError { key: this.key.to_string(), cause });
                this.last = Some(content);
                return Poll::Ready(Some(value));
            }
        }
    }
}

impl<T> fmt::Debug for Values<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Values").field("key", &self.key.to_string()).finish_non_exhaustive()
    }
}

/// Why a value cannot be read
///
/// Put another one. The stream that said so goes on, and tells when the value has changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad value of {key}: {cause}")]
pub struct ValueError {
    key: String,
    cause: String,
}

pub(super) fn decode<T: DeserializeOwned>(content: &Content) -> Result<Option<T>, String> {
    match content {
        Content::Missing => Ok(None),
        Content::TooLarge(size) => Err(format!("it has {size} bytes, more than {MAX_VALUE}")),
        // What serde says may quote the value.
        Content::Bytes(bytes) => {
            serde_json::from_slice(bytes).map(Some).map_err(|error| printable(&error.to_string()))
        }
    }
}

/// What a key holds
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Content {
    #[default]
    Missing,
    Bytes(Arc<[u8]>),
    TooLarge(usize),
}

impl Content {
    fn read(pair: &KeyValue) -> Self {
        match pair.value() {
            value if value.len() > MAX_VALUE => Self::TooLarge(value.len()),
            value => Self::Bytes(value.into()),
        }
    }
}

/// What a key holds now
#[derive(Debug, Default)]
pub(crate) struct Latest(Content);

impl Latest {
    /// Whether that is news
    fn set(&mut self, content: Content) -> bool {
        let changed = self.0 != content;
        self.0 = content;
        changed
    }
}

impl View for Latest {
    type Update = Content;

    fn after(&self, _: u64, version: u64) -> (Content, u64) {
        (self.0.clone(), version)
    }
}

/// The value of `key`
pub(super) fn source(key: &ValueKey, lane: &Lane) -> Source<Latest> {
    let name = key.to_string();
    follow::source(lane, Keys::one(key.key()), move |feed| Following { name: name.clone(), feed, next: None })
}

/// The sink of one key
struct Following {
    name: String,
    feed: Arc<Feed<Latest>>,
    /// Taken in, not published yet: of the events of one message the last one counts
    next: Option<Content>,
}

impl Sink for Following {
    type View = Latest;
    type Listing = Content;

    fn name(&self) -> &str {
        &self.name
    }

    fn entries(&self) -> usize {
        self.feed.look(|Latest(content)| usize::from(*content != Content::Missing))
    }

    fn on_listed(&mut self, listing: &mut Content, pair: &KeyValue) {
        *listing = Content::read(pair);
    }

    fn on_list(&mut self, content: Content) {
        self.next = None;
        self.feed.replace(|latest| latest.set(content));
    }

    fn on_put(&mut self, pair: &KeyValue) {
        self.next = Some(Content::read(pair));
    }

    fn on_delete(&mut self, _: &KeyValue) {
        self.next = Some(Content::Missing);
    }

    async fn due(&self) {
        if self.next.is_none() {
            pending::<()>().await;
        }
    }

    fn publish(&mut self) {
        if let Some(content) = self.next.take() {
            self.feed.apply(|latest| latest.set(content));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;
    use tokio_stream::StreamExt;

    use super::*;
    use crate::etcd::Namespace;

    fn values(feed: &Arc<Feed<Latest>>) -> Values<u32> {
        let key = ValueKey::parse("config/limit", &Namespace::default()).unwrap();
        Values { key, subscription: Subscription::alone(feed), last: None, decoded: PhantomData }
    }

    fn bytes(text: &str) -> Content {
        Content::Bytes(text.as_bytes().into())
    }

    async fn next(values: &mut Values<u32>) -> Option<Result<Option<u32>, String>> {
        let next = timeout(Duration::from_secs(1), values.next()).await.ok()?;
        next.map(|value| value.map_err(|error| error.to_string()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_value_is_told_once_and_a_bad_one_does_not_end_the_stream() {
        let feed = Arc::new(Feed::<Latest>::default());
        let set = |content| feed.apply(|latest| latest.set(content));
        let mut values = values(&feed);
        assert_eq!(next(&mut values).await, None, "nothing is known before the first list");
        feed.replace(|latest| latest.set(Content::Missing));
        assert_eq!(next(&mut values).await, Some(Ok(None)));
        set(bytes("5"));
        set(bytes("5"));
        assert_eq!((next(&mut values).await, next(&mut values).await), (Some(Ok(Some(5))), None));
        set(bytes(&format!("\"{}\"", "x".repeat(10_000))));
        let error = next(&mut values).await.unwrap().unwrap_err();
        assert!(error.starts_with("bad value of config/limit: invalid type"), "{error}");
        assert!(error.len() < 1100, "a long value is cut");
        set(Content::TooLarge(MAX_VALUE + 1));
        let error = next(&mut values).await.unwrap().unwrap_err();
        assert!(error.contains("1048577 bytes"), "{error}");
        set(bytes("6"));
        assert_eq!(next(&mut values).await, Some(Ok(Some(6))));
    }

    #[tokio::test(start_paused = true)]
    async fn who_looks_away_sees_the_latest_and_nothing_if_that_is_what_was_seen() {
        let feed = Arc::new(Feed::<Latest>::default());
        let set = |content| feed.apply(|latest| latest.set(content));
        let mut values = values(&feed);
        for number in 0..1_000 {
            set(bytes(&number.to_string()));
        }
        assert_eq!((next(&mut values).await, next(&mut values).await), (Some(Ok(Some(999))), None));
        set(Content::Missing);
        set(bytes("999"));
        assert_eq!(next(&mut values).await, None, "there and back again");
    }

    #[tokio::test(start_paused = true)]
    async fn of_what_one_message_tells_the_last_counts() {
        let feed = Arc::new(Feed::<Latest>::default());
        let mut sink = Following { name: "k".to_owned(), feed: Arc::clone(&feed), next: None };
        let mut values = values(&feed);
        sink.on_list(bytes("1"));
        assert_eq!(next(&mut values).await, Some(Ok(Some(1))));
        assert!(timeout(Duration::from_secs(1), sink.due()).await.is_err(), "nothing is never due");
        sink.next = Some(bytes("2"));
        sink.next = Some(bytes("3"));
        sink.due().await;
        sink.publish();
        assert_eq!((next(&mut values).await, next(&mut values).await), (Some(Ok(Some(3))), None));
        sink.next = Some(bytes("4"));
        sink.on_list(bytes("5"));
        sink.publish();
        assert_eq!(next(&mut values).await, Some(Ok(Some(5))), "a list is newer than what still waits");
    }
}
