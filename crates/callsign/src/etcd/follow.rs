//! A list, then a watch, for ever: what a discovery and a followed value have in common
//!
//! `listing -> resuming -> watching -> (resuming | listing)*`: a list at revision R, then a watch from R+1. A stream that
//! fails is resumed where it was, on the next host; what is known stays as it is. See ARCHITECTURE.md, "Life of a
//! discovery". What is done with lists and events is a [`Sink`]'s.

use std::{convert::Infallible, future::Future, sync::Arc, time::Duration};

use etcd_client::{Event, EventType, KeyValue};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use super::{
    feed::{Feed, Source, View},
    lane::Lane,
    list::{self, Keys},
    pace::Pace,
    request::RequestError,
    watching::Watch,
    witness::Witness,
};
use crate::metrics::DiscoveryMeters;

/// Where a discovery stands, or the watch of a value; what was last known stays in use in every state
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiscoveryState {
    /// There is no list yet
    Listing {
        /// Why the last attempt failed; `None` during the first one
        cause: Option<String>,
    },
    /// All changes up to this revision are known
    Watching {
        /// etcd's revision of the last change, or of the list
        revision: i64,
    },
    /// etcd is away, or has forgotten where the changes were interrupted; they, or a new list, will be read when they can
    Resuming {
        /// Why the watch ended, or why what comes after it has failed
        cause: String,
    },
}

impl DiscoveryState {
    /// Why there is no list of instances, if there is none
    pub(crate) fn missing_list(&self) -> Option<String> {
        match self {
            Self::Listing { cause: Some(cause) } => Some(cause.clone()),
            Self::Listing { cause: None } => Some("etcd has not answered yet".to_owned()),
            Self::Watching { .. } | Self::Resuming { .. } => None,
        }
    }
}

/// A list repairs what a lost event broke: servers before 3.4.42 have several bugs that lose one.
const RELIST: Duration = Duration::from_secs(600);

/// Takes in what is listed and what happens
pub(super) trait Sink: Send + Sync + 'static {
    /// What consumers see
    type View: View + Sync;
    /// A list on its way in; dropped if its rest cannot be read
    type Listing: Default + Send;

    /// What is followed, as logs name it
    fn name(&self) -> &str;

    /// How many keys have a meaning now, for logs
    fn entries(&self) -> usize;

    /// One more pair of a list
    fn on_listed(&mut self, listing: &mut Self::Listing, pair: &KeyValue);

    /// The list is complete, and newer than anything that was taken in before: publishes it
    fn on_list(&mut self, listing: Self::Listing);

    /// A key has a new value
    fn on_put(&mut self, pair: &KeyValue);

    /// A key is gone
    fn on_delete(&mut self, pair: &KeyValue);

    /// Waits until what was taken in is to be published: for ever if that is nothing
    fn due(&self) -> impl Future<Output = ()> + Send;

    /// Publishes what was taken in
    fn publish(&mut self);
}

/// A source of what `sink` makes of `keys`
///
/// Its producer is one task, which ends when the last consumer drops the source, whatever etcd is doing.
pub(super) fn source<S: Sink>(
    lane: &Lane,
    keys: Keys,
    sink: impl Fn(Arc<Feed<S::View>>) -> S + Send + Sync + 'static,
) -> Source<S::View> {
    let (state, seen) = watch::channel(DiscoveryState::Listing { cause: None });
    let lane = lane.clone();
    Source::new(Arc::default(), seen, move |feed, mut producing| {
        let is_listed = feed.is_listed();
        let follow = Follow::new(lane.clone(), keys.clone(), sink(feed), is_listed, state.clone());
        tokio::spawn(async move {
            tokio::select! {
                never = follow.run() => match never {},
                () = producing.abandoned() => {}
            }
        });
    })
}

struct Follow<S> {
    lane: Lane,
    keys: Keys,
    sink: S,
    /// Whether there was a list ever
    is_listed: bool,
    state: watch::Sender<DiscoveryState>,
    pace: Pace,
    /// Of watches that end with a compaction
    compactions: Pace,
    relist_at: Instant,
    /// What a resumed watch is believed by
    witness: Option<Witness>,
    meters: DiscoveryMeters,
}

enum Phase {
    /// Nothing is known, or what is known cannot be trusted
    Listing,
    /// All before `next` is known, `fresh` from a list
    Resuming { next: i64, fresh: bool },
    /// The same, and a watch tells the rest
    Watching { next: i64, watch: Box<Watch> },
}

impl<S: Sink> Follow<S> {
    fn new(lane: Lane, keys: Keys, sink: S, is_listed: bool, state: watch::Sender<DiscoveryState>) -> Self {
        let mut meters = DiscoveryMeters::new(sink.name());
        meters.on_state(&state.borrow());
        let (pace, compactions, relist_at) = (Pace::new(), Pace::new(), Instant::now());
        Self { lane, keys, sink, is_listed, state, pace, compactions, relist_at, witness: None, meters }
    }

    async fn run(mut self) -> Infallible {
        let mut phase = Phase::Listing;
        loop {
            phase = match phase {
                Phase::Listing => self.list().await,
                Phase::Resuming { next, fresh } => self.resume(next, fresh).await,
                Phase::Watching { next, watch } => self.watch(next, watch).await,
            };
        }
    }

    async fn list(&mut self) -> Phase {
        self.pace.on_attempt();
        let (mut listing, mut witness) = (S::Listing::default(), None);
        let listed = list::list(&self.lane, &self.keys, |pair| {
            Witness::on_pair(&mut witness, pair);
            self.sink.on_listed(&mut listing, pair);
        });
        match listed.await {
            Ok(revision) => {
                self.sink.on_list(listing);
                self.meters.on_listed();
                tracing::debug!(name = self.sink.name(), revision, entries = self.sink.entries(), "listed");
                self.is_listed = true;
                self.witness = witness;
                self.relist_at = Instant::now() + self.pace.vary(RELIST);
                Phase::Resuming { next: revision + 1, fresh: true }
            }
            Err(error) => {
                let cause = error.to_string();
                self.report(if self.is_listed {
                    DiscoveryState::Resuming { cause }
                } else {
                    DiscoveryState::Listing { cause: Some(cause) }
                });
                self.pace.after(&error).await;
                Phase::Listing
            }
        }
    }

    async fn resume(&mut self, next: i64, fresh: bool) -> Phase {
        self.pace.on_attempt();
        self.compactions.on_attempt();
        match self.open(next, fresh).await {
            Ok(phase) => phase,
            Err(error) => self.interrupted(next, &error).await,
        }
    }

    async fn open(&mut self, next: i64, fresh: bool) -> Result<Phase, RequestError> {
        let options = self.keys.watch().with_start_revision(next);
        let watch = Watch::open(&self.lane, self.keys.first(), options).await?;
        // After the watch was opened: what is replaced from here on ends it.
        if !fresh && !self.is_same_store(next).await? {
            tracing::debug!(
                name = self.sink.name(),
                next,
                "what was learned last has changed: listing again"
            );
            return Ok(Phase::Listing);
        }
        if !fresh {
            self.meters.on_resumed();
        }
        self.report(DiscoveryState::Watching { revision: next - 1 });
        Ok(Phase::Watching { next, watch: Box::new(watch) })
    }

    /// Whether etcd is surely the one that all before `next` was learned from
    ///
    /// One that was wiped or restored would be silent until its revisions reach `next`, or say nothing of what it lacks.
    async fn is_same_store(&self, next: i64) -> Result<bool, RequestError> {
        match &self.witness {
            Some(witness) => {
                Ok(witness.revision(&self.lane).await?.is_some_and(|revision| revision >= next - 1))
            }
            None => Ok(false),
        }
    }

    /// One message, one publication or the slow list, whatever comes first
    async fn watch(&mut self, next: i64, mut watch: Box<Watch>) -> Phase {
        tokio::select! {
            message = watch.next() => match message {
                Ok(message) => Phase::Watching { next: self.on_events(next, message.events()), watch },
                Err(error) => self.interrupted(next, &error).await,
            },
            () = self.sink.due() => {
                self.sink.publish();
                Phase::Watching { next, watch }
            }
            () = sleep_until(self.relist_at) => {
                self.sink.publish();
                Phase::Listing
            }
        }
    }

    /// The watch has failed: what it told is published, and where to go on is decided
    async fn interrupted(&mut self, next: i64, error: &RequestError) -> Phase {
        self.sink.publish();
        self.report(DiscoveryState::Resuming { cause: error.to_string() });
        // After a compaction etcd is well; should it say the same again and again, it is not.
        if error.is_compacted() {
            self.compactions.after_loss().await;
        } else {
            self.pace.after(error).await;
        }
        // What etcd refuses in band it would refuse again; a list says why, or finds where to go on.
        if error.is_of_host() { Phase::Resuming { next, fresh: false } } else { Phase::Listing }
    }

    /// Takes the changes in and returns the revision that comes next
    ///
    /// Only events advance it: the header of a batch may be ahead of what was delivered.
    fn on_events(&mut self, mut next: i64, events: &[Event]) -> i64 {
        // Old servers repeat events, or go back in time after a snapshot.
        let known = next;
        for (event, pair) in events.iter().filter_map(|event| Some((event, event.kv()?))) {
            if pair.mod_revision() < known {
                continue;
            }
            next = pair.mod_revision() + 1;
            match event.event_type() {
                EventType::Put => {
                    Witness::on_pair(&mut self.witness, pair);
                    self.sink.on_put(pair);
                }
                // If the witness's key is gone, etcd will say so.
                EventType::Delete => self.sink.on_delete(pair),
            }
        }
        if next > known {
            self.report(DiscoveryState::Watching { revision: next - 1 });
        }
        next
    }

    /// Makes the state visible; logs when the kind of state changes, not when a failure is repeated
    fn report(&mut self, state: DiscoveryState) {
        use DiscoveryState::{Listing, Resuming, Watching};
        let name = self.sink.name();
        match (&*self.state.borrow(), &state) {
            (Watching { .. }, Watching { .. }) => {}
            (_, Watching { revision }) => {
                tracing::info!(name, revision, entries = self.sink.entries(), "watching");
            }
            (
                Watching { .. } | Listing { cause: None },
                Listing { cause: Some(cause) } | Resuming { cause },
            ) => {
                tracing::warn!(name, %cause, "discovery is interrupted; what was last known stays in use");
            }
            (_, Listing { cause: Some(cause) } | Resuming { cause }) => {
                tracing::debug!(name, %cause, "trying again");
            }
            (_, Listing { cause: None }) => {}
        }
        self.meters.on_state(&state);
        self.state.send_replace(state);
    }
}
