//! One producer of instances, many consumers
//!
//! The feed keeps the latest set and a bounded log of what changed last. A consumer that keeps up reads the log, which
//! costs nothing per instance; one that does not gets the set.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use tokio::sync::{oneshot, watch};

use super::discovery::DiscoveryState;
use crate::instance::Instance;

/// What changed among the instances of a service
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Update {
    /// The whole set, in no order; what is not in it is gone
    Reset(Vec<Instance>),
    /// A new instance, or a known one that changed
    Put(Instance),
    /// The instance with this id is gone
    Remove(Arc<str>),
}

/// What happened to one instance, by its id: `None` means that it is gone
pub(crate) type Changes = HashMap<Arc<str>, Option<Instance>>;

/// More instances than any client can use: what comes beyond is skipped, so that a broken registry cannot fill memory.
pub(crate) const MAX_INSTANCES: usize = 100_000;

/// How far a consumer may be behind before it gets the set instead of the steps
const LOG: usize = 256;

/// The set, its log and who waits for more
#[derive(Debug, Default)]
pub(crate) struct Feed {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Grows by one with each update; 0 means that nothing was listed yet
    version: u64,
    set: HashMap<Arc<str>, Instance>,
    /// The last updates, the newest at the back: versions `version - log.len() + 1 ..= version`
    log: VecDeque<Change>,
    waiting: HashMap<u64, Waker>,
    next_reader: u64,
    warned_full: bool,
}

#[derive(Clone, Debug)]
enum Change {
    Put(Instance),
    Remove(Arc<str>),
}

impl Feed {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing here panics halfway through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies what really changes and tells the consumers: one change as itself, several as one reset
    pub(crate) fn apply(&self, changes: Changes) {
        let mut inner = self.lock();
        let mut log = Vec::new();
        for (id, instance) in changes {
            log.extend(inner.change(id, instance));
        }
        match log.len() {
            0 => return,
            1 => inner.log(log.remove(0)),
            _ => inner.reset(),
        }
        wake(inner);
    }

    /// Replaces the set; consumers are told if that changes anything, and the first time in any case
    pub(crate) fn replace(&self, set: HashMap<Arc<str>, Instance>) {
        let mut inner = self.lock();
        if inner.version > 0 && inner.set == set {
            return;
        }
        inner.set = set;
        inner.reset();
        wake(inner);
    }

    /// Whether there was a list ever
    pub(crate) fn is_listed(&self) -> bool {
        self.lock().version > 0
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().set.len()
    }
}

/// Wakes whoever waits, outside of the lock
fn wake(mut inner: MutexGuard<'_, Inner>) {
    let waiting = std::mem::take(&mut inner.waiting);
    drop(inner);
    waiting.into_values().for_each(Waker::wake);
}

impl Inner {
    fn change(&mut self, id: Arc<str>, instance: Option<Instance>) -> Option<Change> {
        match instance {
            None => self.set.remove(&id).map(|_| Change::Remove(id)),
            Some(instance) if self.set.get(&id) == Some(&instance) => None,
            Some(_) if self.set.len() >= MAX_INSTANCES && !self.set.contains_key(&id) => {
                if !std::mem::replace(&mut self.warned_full, true) {
                    tracing::warn!(limit = MAX_INSTANCES, %id, "too many instances: the rest is skipped");
                }
                None
            }
            Some(instance) => {
                self.set.insert(id, instance.clone());
                Some(Change::Put(instance))
            }
        }
    }

    fn log(&mut self, change: Change) {
        if self.log.len() == LOG {
            self.log.pop_front();
        }
        self.log.push_back(change);
        self.version += 1;
    }

    /// An empty log sends every consumer to the set
    fn reset(&mut self) {
        self.log.clear();
        self.version += 1;
    }

    /// What comes after `version`
    fn after(&self, version: u64) -> (Update, u64) {
        let behind = usize::try_from(self.version - version).unwrap_or(usize::MAX);
        match self.log.len().checked_sub(behind).map(|position| &self.log[position]) {
            // Version 0 has seen nothing: a step alone would not do.
            Some(Change::Put(instance)) if version > 0 => (Update::Put(instance.clone()), version + 1),
            Some(Change::Remove(id)) if version > 0 => (Update::Remove(Arc::clone(id)), version + 1),
            _ => (Update::Reset(self.set.values().cloned().collect()), self.version),
        }
    }
}

/// Keeps a feed's producer alive, which ends with it
///
/// A producer is a task, and ends also with the runtime that it was started in. Consumers in another runtime then start it
/// again in theirs.
pub(crate) struct Source {
    feed: Arc<Feed>,
    state: watch::Receiver<DiscoveryState>,
    start: Box<Start>,
    /// Closed when the producer has ended; dropped with the source, which is what the producer waits for
    producer: Mutex<oneshot::Sender<Infallible>>,
}

type Start = dyn Fn(Arc<Feed>, Producing) + Send + Sync;

impl Source {
    /// Calls `start` for a producer, now and whenever that has ended before the source
    pub(crate) fn new(
        feed: Arc<Feed>,
        state: watch::Receiver<DiscoveryState>,
        start: impl Fn(Arc<Feed>, Producing) + Send + Sync + 'static,
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

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("state", &*self.state.borrow()).finish_non_exhaustive()
    }
}

fn produce(feed: &Arc<Feed>, start: impl Fn(Arc<Feed>, Producing)) -> oneshot::Sender<Infallible> {
    let (producer, abandoned) = oneshot::channel();
    start(Arc::clone(feed), Producing { feed: Arc::clone(feed), abandoned });
    producer
}

/// What a producer holds: its drop tells the consumers that there is none any more
pub(crate) struct Producing {
    feed: Arc<Feed>,
    abandoned: oneshot::Receiver<Infallible>,
}

impl Producing {
    /// Waits until the source is dropped
    pub(crate) async fn abandoned(&mut self) {
        // Nothing is sent: the drop is the message.
        let _ = (&mut self.abandoned).await;
    }
}

impl Drop for Producing {
    fn drop(&mut self) {
        // Before they are woken, so that they see it.
        self.abandoned.close();
        wake(self.feed.lock());
    }
}

/// One consumer of a feed
#[derive(Debug)]
pub(crate) struct Subscription {
    source: Arc<Source>,
    reader: u64,
    seen: u64,
}

impl Subscription {
    pub(crate) fn new(source: Arc<Source>) -> Self {
        let mut inner = source.feed.lock();
        let reader = inner.next_reader;
        inner.next_reader += 1;
        drop(inner);
        Self { source, reader, seen: 0 }
    }

    /// The next update; the first one is a reset, as soon as there is a list
    ///
    /// Must be called within a runtime, which may have to take the producer over.
    pub(crate) fn poll_update(&mut self, cx: &mut Context<'_>) -> Poll<Update> {
        let mut inner = self.source.feed.lock();
        if inner.version == self.seen {
            inner.waiting.insert(self.reader, cx.waker().clone());
            drop(inner);
            self.source.ensure_produced();
            return Poll::Pending;
        }
        let (update, seen) = inner.after(self.seen);
        self.seen = seen;
        Poll::Ready(update)
    }

    pub(crate) fn state(&self) -> watch::Receiver<DiscoveryState> {
        self.source.state.clone()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.source.feed.lock().waiting.remove(&self.reader);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(id: &str, port: u16) -> Instance {
        let address = crate::instance::Address::new("h", port).unwrap();
        Instance { id: id.into(), mod_revision: 1, ..Instance::new(address) }
    }

    fn set(instances: impl IntoIterator<Item = Instance>) -> HashMap<Arc<str>, Instance> {
        instances.into_iter().map(|instance| (Arc::clone(&instance.id), instance)).collect()
    }

    fn put(feed: &Feed, instance: Instance) {
        feed.apply(Changes::from([(Arc::clone(&instance.id), Some(instance))]));
    }

    fn subscribe(feed: &Arc<Feed>) -> Subscription {
        Subscription::new(Arc::new(source(feed, Arc::default())))
    }

    /// A source whose producers do nothing, and end when they are taken out
    fn source(feed: &Arc<Feed>, producers: Arc<Mutex<Vec<Producing>>>) -> Source {
        let state = watch::channel(DiscoveryState::Listing { cause: None }).1;
        Source::new(Arc::clone(feed), state, move |_, producing| producers.lock().unwrap().push(producing))
    }

    fn next(subscription: &mut Subscription) -> Option<Update> {
        match subscription.poll_update(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(update) => Some(update),
            Poll::Pending => None,
        }
    }

    #[test]
    fn nothing_is_told_before_the_first_list_and_an_empty_list_is_a_list() {
        let feed = Arc::new(Feed::default());
        let mut subscription = subscribe(&feed);
        assert_eq!(next(&mut subscription), None);
        feed.replace(HashMap::new());
        assert_eq!(next(&mut subscription), Some(Update::Reset(vec![])));
        assert_eq!(next(&mut subscription), None);
        feed.replace(HashMap::new());
        assert_eq!(next(&mut subscription), None, "an equal list is no news");
    }

    #[test]
    fn one_change_is_a_step_and_several_are_a_reset() {
        let feed = Arc::new(Feed::default());
        feed.replace(set([instance("a", 1)]));
        let mut subscription = subscribe(&feed);
        next(&mut subscription);
        put(&feed, instance("b", 2));
        put(&feed, instance("b", 2));
        feed.apply(Changes::from([("a".into(), None)]));
        feed.apply(Changes::from([("unknown".into(), None)]));
        assert_eq!(next(&mut subscription), Some(Update::Put(instance("b", 2))));
        assert_eq!(next(&mut subscription), Some(Update::Remove("a".into())));
        assert_eq!(next(&mut subscription), None, "what changes nothing is not told");
        feed.apply(Changes::from([("b".into(), None), ("c".into(), Some(instance("c", 3)))]));
        assert_eq!(next(&mut subscription), Some(Update::Reset(vec![instance("c", 3)])));
    }

    #[test]
    fn who_is_too_far_behind_gets_the_latest_set_once() {
        let feed = Arc::new(Feed::default());
        feed.replace(HashMap::new());
        let (mut slow, mut quick) = (subscribe(&feed), subscribe(&feed));
        next(&mut slow);
        next(&mut quick);
        for port in 1..=LOG as u16 {
            put(&feed, instance("a", port));
            assert_eq!(next(&mut quick), Some(Update::Put(instance("a", port))));
        }
        let mut late = subscribe(&feed);
        assert_eq!(next(&mut slow), Some(Update::Put(instance("a", 1))), "as far behind as the log reaches");
        put(&feed, instance("a", 500));
        put(&feed, instance("a", 501));
        put(&feed, instance("a", 502));
        assert_eq!(next(&mut slow), Some(Update::Reset(vec![instance("a", 502)])));
        assert_eq!(
            next(&mut late),
            Some(Update::Reset(vec![instance("a", 502)])),
            "who comes late starts with the set"
        );
        assert_eq!((next(&mut slow), next(&mut late)), (None, None));
    }

    #[test]
    fn a_producer_that_has_ended_is_started_again_by_who_waits() {
        let feed = Arc::new(Feed::default());
        let producers = Arc::default();
        let mut subscription = Subscription::new(Arc::new(source(&feed, Arc::clone(&producers))));
        next(&mut subscription);
        next(&mut subscription);
        assert_eq!((producers.lock().unwrap().len(), feed.lock().waiting.len()), (1, 1));
        producers.lock().unwrap().clear();
        assert_eq!(feed.lock().waiting.len(), 0, "who waits is woken");
        next(&mut subscription);
        assert_eq!((producers.lock().unwrap().len(), feed.lock().waiting.len()), (1, 1));
    }

    #[test]
    fn a_dropped_consumer_leaves_no_waker_behind() {
        let feed = Arc::new(Feed::default());
        let mut subscription = subscribe(&feed);
        next(&mut subscription);
        assert_eq!(feed.lock().waiting.len(), 1);
        drop(subscription);
        assert_eq!(feed.lock().waiting.len(), 0);
    }
}
