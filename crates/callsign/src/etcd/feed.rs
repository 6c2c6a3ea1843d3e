//! One producer, many consumers
//!
//! A feed keeps what is known now, and each consumer asks for what is new to it: the producer never waits for one, and one
//! that is slow costs nothing but its own delay. What is known, and how a consumer is told of it, is the [`View`]'s.

use std::{
    collections::HashMap,
    convert::Infallible,
    fmt,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    task::{Context, Poll, Waker},
};

use tokio::sync::{oneshot, watch};

use super::follow::DiscoveryState;

/// What is known now
pub(crate) trait View: fmt::Debug + Default + Send + 'static {
    /// What a consumer is told
    type Update;

    /// What comes after the version `seen`, which is older than `version`, and the version that a consumer has seen then
    fn after(&self, seen: u64, version: u64) -> (Self::Update, u64);
}

/// A view, its version and who waits for more
#[derive(Debug, Default)]
pub(crate) struct Feed<V> {
    inner: Mutex<Inner<V>>,
}

#[derive(Debug, Default)]
struct Inner<V> {
    /// Grows by one with each step; 0 means that nothing was listed yet
    version: u64,
    view: V,
    waiting: HashMap<u64, Waker>,
    next_reader: u64,
}

impl<V> Feed<V> {
    fn lock(&self) -> MutexGuard<'_, Inner<V>> {
        // Nothing here panics halfway through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies changes, and tells the consumers if `change` says that there were any: how many steps they are, or just
    /// `true` for one
    pub(crate) fn apply<N: Into<u64>>(&self, change: impl FnOnce(&mut V) -> N) {
        let mut inner = self.lock();
        let steps = change(&mut inner.view).into();
        if steps > 0 {
            inner.version += steps;
            wake(inner);
        }
    }

    /// The same for a list, which is news the first time in any case
    pub(crate) fn replace(&self, change: impl FnOnce(&mut V) -> bool) {
        let mut inner = self.lock();
        let is_first = inner.version == 0;
        if change(&mut inner.view) || is_first {
            inner.version += 1;
            wake(inner);
        }
    }

    /// Whether there was a list ever
    pub(crate) fn is_listed(&self) -> bool {
        self.lock().version > 0
    }

    /// Looks at the view
    pub(crate) fn look<T>(&self, look: impl FnOnce(&V) -> T) -> T {
        look(&self.lock().view)
    }
}

/// Wakes whoever waits, outside of the lock
fn wake<V>(mut inner: MutexGuard<'_, Inner<V>>) {
    let waiting = std::mem::take(&mut inner.waiting);
    drop(inner);
    waiting.into_values().for_each(Waker::wake);
}

/// The sources of one session: one for a key, however many consume it
#[derive(Debug)]
pub(super) struct Sources<K, V> {
    sources: Mutex<HashMap<K, Weak<Source<V>>>>,
}

impl<K: Clone + Eq + Hash, V: View> Sources<K, V> {
    /// One more consumer of the source of `key`, which is made by `source` if there is none
    pub(super) fn subscribe(&self, key: &K, source: impl FnOnce() -> Source<V>) -> Subscription<V> {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = sources.get(key).and_then(Weak::upgrade) {
            return Subscription::new(source);
        }
        let source = Arc::new(source());
        sources.retain(|_, source| source.strong_count() > 0);
        sources.insert(key.clone(), Arc::downgrade(&source));
        Subscription::new(source)
    }
}

impl<K, V> Default for Sources<K, V> {
    fn default() -> Self {
        Self { sources: Mutex::default() }
    }
}

/// Keeps a feed's producer alive, which ends with it
///
/// A producer is a task, and ends also with the runtime that it was started in. Consumers in another runtime then start it
/// again in theirs.
pub(crate) struct Source<V> {
    feed: Arc<Feed<V>>,
    state: watch::Receiver<DiscoveryState>,
    start: Box<Start<V>>,
    /// Closed when the producer has ended; dropped with the source, which is what the producer waits for
    producer: Mutex<oneshot::Sender<Infallible>>,
}

type Start<V> = dyn Fn(Arc<Feed<V>>, Producing<V>) + Send + Sync;

impl<V: View> Source<V> {
    /// Calls `start` for a producer, now and whenever that has ended before the source
    pub(crate) fn new(
        feed: Arc<Feed<V>>,
        state: watch::Receiver<DiscoveryState>,
        start: impl Fn(Arc<Feed<V>>, Producing<V>) + Send + Sync + 'static,
    ) -> Self {
        let producer = Mutex::new(produce(&feed, &start));
        Self { feed, state, start: Box::new(start), producer }
    }

    fn ensure_produced(&self) {
        let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        if producer.is_closed() {
            *producer = produce(&self.feed, &self.start);
        }
    }
}

impl<V> fmt::Debug for Source<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("state", &*self.state.borrow()).finish_non_exhaustive()
    }
}

fn produce<V>(
    feed: &Arc<Feed<V>>,
    start: impl Fn(Arc<Feed<V>>, Producing<V>),
) -> oneshot::Sender<Infallible> {
    let (producer, abandoned) = oneshot::channel();
    start(Arc::clone(feed), Producing { feed: Arc::clone(feed), abandoned });
    producer
}

/// What a producer holds: its drop tells the consumers that there is none any more
#[derive(Debug)]
pub(crate) struct Producing<V> {
    feed: Arc<Feed<V>>,
    abandoned: oneshot::Receiver<Infallible>,
}

impl<V> Producing<V> {
    /// Waits until the source is dropped
    pub(crate) async fn abandoned(&mut self) {
        // Nothing is sent: the drop is the message.
        let _ = (&mut self.abandoned).await;
    }
}

impl<V> Drop for Producing<V> {
    fn drop(&mut self) {
        // Before they are woken, so that they see it.
        self.abandoned.close();
        wake(self.feed.lock());
    }
}

/// One consumer of a feed
#[derive(Debug)]
pub(crate) struct Subscription<V> {
    source: Arc<Source<V>>,
    reader: u64,
    seen: u64,
}

impl<V: View> Subscription<V> {
    pub(crate) fn new(source: Arc<Source<V>>) -> Self {
        let mut inner = source.feed.lock();
        let reader = inner.next_reader;
        inner.next_reader += 1;
        drop(inner);
        Self { source, reader, seen: 0 }
    }

    /// The next update; the first one tells all there is, as soon as there is a list
    ///
    /// Must be called within a runtime, which may have to take the producer over.
    pub(crate) fn poll_update(&mut self, cx: &mut Context<'_>) -> Poll<V::Update> {
        let mut inner = self.source.feed.lock();
        if inner.version == self.seen {
            inner.waiting.insert(self.reader, cx.waker().clone());
            drop(inner);
            self.source.ensure_produced();
            return Poll::Pending;
        }
        let (update, seen) = inner.view.after(self.seen, inner.version);
        self.seen = seen;
        Poll::Ready(update)
    }

    pub(crate) fn state(&self) -> watch::Receiver<DiscoveryState> {
        self.source.state.clone()
    }
}

impl<V> Drop for Subscription<V> {
    fn drop(&mut self) {
        self.source.feed.lock().waiting.remove(&self.reader);
    }
}

#[cfg(test)]
impl<V: View> Subscription<V> {
    /// A consumer of a feed that nothing produces
    pub(crate) fn alone(feed: &Arc<Feed<V>>) -> Self {
        Self::new(Arc::new(tests::source(feed, Arc::default())))
    }

    /// The next update, if there is one now
    pub(crate) fn now(&mut self) -> Option<V::Update> {
        match self.poll_update(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(update) => Some(update),
            Poll::Pending => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A source whose producers do nothing, and end when they are taken out
    pub(super) fn source<V: View>(
        feed: &Arc<Feed<V>>,
        producers: Arc<Mutex<Vec<Producing<V>>>>,
    ) -> Source<V> {
        let state = watch::channel(DiscoveryState::Listing { cause: None }).1;
        Source::new(Arc::clone(feed), state, move |_, producing| producers.lock().unwrap().push(producing))
    }

    /// What is known is a number
    impl View for u32 {
        type Update = Self;

        fn after(&self, _: u64, version: u64) -> (Self, u64) {
            (*self, version)
        }
    }

    fn set(feed: &Feed<u32>, number: u32) {
        feed.apply(|view| std::mem::replace(view, number) != number);
    }

    #[test]
    fn nothing_is_told_before_the_first_list_and_an_equal_list_is_no_news() {
        let feed = Arc::new(Feed::<u32>::default());
        let mut subscription = Subscription::alone(&feed);
        assert_eq!(subscription.now(), None);
        feed.replace(|_| false);
        assert_eq!(subscription.now(), Some(0), "the first list is news, also if it is empty");
        feed.replace(|_| false);
        assert_eq!(subscription.now(), None);
        set(&feed, 5);
        set(&feed, 5);
        assert_eq!((subscription.now(), subscription.now()), (Some(5), None));
    }

    #[test]
    fn a_producer_that_has_ended_is_started_again_by_who_waits() {
        let feed = Arc::new(Feed::<u32>::default());
        let producers = Arc::default();
        let mut subscription = Subscription::new(Arc::new(source(&feed, Arc::clone(&producers))));
        subscription.now();
        subscription.now();
        assert_eq!((producers.lock().unwrap().len(), feed.lock().waiting.len()), (1, 1));
        producers.lock().unwrap().clear();
        assert_eq!(feed.lock().waiting.len(), 0, "who waits is woken");
        subscription.now();
        assert_eq!((producers.lock().unwrap().len(), feed.lock().waiting.len()), (1, 1));
    }

    #[test]
    fn a_dropped_consumer_leaves_no_waker_behind() {
        let feed = Arc::new(Feed::<u32>::default());
        let mut subscription = Subscription::alone(&feed);
        subscription.now();
        assert_eq!(feed.lock().waiting.len(), 1);
        drop(subscription);
        assert_eq!(feed.lock().waiting.len(), 0);
    }

    #[test]
    fn one_key_has_one_source_for_as_long_as_it_is_consumed() {
        let sources = Sources::<&str, u32>::default();
        let made = std::cell::Cell::new(0);
        let subscribe = |key| {
            sources.subscribe(&key, || {
                made.set(made.get() + 1);
                source(&Arc::default(), Arc::default())
            })
        };
        let (one, other, third) = (subscribe("a"), subscribe("a"), subscribe("b"));
        assert_eq!(made.get(), 2);
        drop((one, other, third));
        let _again = subscribe("a");
        assert_eq!(
            (made.get(), sources.sources.lock().unwrap().len()),
            (3, 1),
            "what is not consumed is let go"
        );
    }
}
