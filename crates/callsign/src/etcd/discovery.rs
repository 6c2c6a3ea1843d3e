//! The instances of a service, now and from now on
//!
//! `listing -> watching -> (watching | listing)*`: a list at revision R, then a watch from R+1. A stream that fails is
//! resumed where it was, on the next host; the set stays as it is. See ARCHITECTURE.md, "Life of a discovery".

mod coalesce;
mod list;
mod warned;

use std::{
    collections::HashMap,
    convert::Infallible,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use etcd_client::{Event, EventType, WatchOptions};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use self::{coalesce::Coalesce, warned::Warned};
use super::{
    ServiceName, entry,
    entry::Entry,
    feed::{Feed, Source, Subscription},
    lane::Lane,
    pace::Pace,
    request::RequestError,
    watching::Watch,
};

/// Where a discovery stands; the last known instances stay in use in every state
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

/// The discoveries of one session: one for a service, however many follow it
#[derive(Debug, Default)]
pub(super) struct Shared {
    sources: Mutex<HashMap<ServiceName, Weak<Source>>>,
}

impl Shared {
    pub(super) fn follow(&self, service: &ServiceName, lane: &Lane) -> Subscription {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = sources.get(service).and_then(Weak::upgrade) {
            return Subscription::new(source);
        }
        let source = Arc::new(source(service.clone(), lane.clone()));
        sources.retain(|_, source| source.strong_count() > 0);
        sources.insert(service.clone(), Arc::downgrade(&source));
        Subscription::new(source)
    }
}

fn source(service: ServiceName, lane: Lane) -> Source {
    let (state, seen) = watch::channel(DiscoveryState::Listing { cause: None });
    Source::new(Arc::default(), seen, move |feed, mut producing| {
        let discovery = Discovery::new(&service, lane.clone(), feed, state.clone());
        // Ends when the last consumer drops the source, whatever etcd is doing.
        tokio::spawn(async move {
            tokio::select! {
                never = discovery.run() => match never {},
                () = producing.abandoned() => {}
            }
        });
    })
}

struct Discovery {
    lane: Lane,
    service: ServiceName,
    prefix: String,
    feed: Arc<Feed>,
    state: watch::Sender<DiscoveryState>,
    pace: Pace,
    coalesce: Coalesce,
    warned: Warned,
    relist_at: Instant,
}

enum Phase {
    /// Nothing is known, or what is known cannot be trusted
    Listing,
    /// All before `next` is known
    Resuming { next: i64 },
    /// The same, and a watch tells the rest
    Watching { next: i64, watch: Box<Watch> },
}

impl Discovery {
    fn new(service: &ServiceName, lane: Lane, feed: Arc<Feed>, state: watch::Sender<DiscoveryState>) -> Self {
        Self {
            lane,
            service: service.clone(),
            prefix: service.prefix(),
            feed,
            state,
            pace: Pace::new(),
            coalesce: Coalesce::default(),
            warned: Warned::default(),
            relist_at: Instant::now(),
        }
    }

    async fn run(mut self) -> Infallible {
        let mut phase = Phase::Listing;
        loop {
            phase = match phase {
                Phase::Listing => self.list().await,
                Phase::Resuming { next } => self.resume(next).await,
                Phase::Watching { next, watch } => self.watch(next, watch).await,
            };
        }
    }

    async fn list(&mut self) -> Phase {
        self.pace.on_attempt();
        let mut reading = self.warned.reading(&self.prefix);
        match list::list(&self.lane, &self.prefix, |pair| reading.on_pair(pair)).await {
            Ok(revision) => {
                let set = reading.finish();
                // The list is newer than any change that still waits.
                self.coalesce.clear();
                self.feed.replace(set);
                tracing::debug!(service = %self.service, revision, instances = self.feed.len(), "listed");
                self.relist_at = Instant::now() + self.pace.vary(RELIST);
                Phase::Resuming { next: revision + 1 }
            }
            Err(error) => {
                let cause = error.to_string();
                self.report(if self.feed.is_listed() {
                    DiscoveryState::Resuming { cause }
                } else {
                    DiscoveryState::Listing { cause: Some(cause) }
                });
                self.pace.after(&error).await;
                Phase::Listing
            }
        }
    }

    async fn resume(&mut self, next: i64) -> Phase {
        self.pace.on_attempt();
        match self.open(next).await {
            Ok(phase) => phase,
            Err(error) => self.interrupted(next, &error).await,
        }
    }

    async fn open(&mut self, next: i64) -> Result<Phase, RequestError> {
        let options = WatchOptions::new().with_prefix().with_start_revision(next);
        let (watch, revision) = Watch::open(&self.lane, &self.prefix, options).await?;
        // A member that is behind will catch up. A store that was wiped or restored, which looks the same, is silent
        // until its revisions reach `next`: only a linearizable read tells one from the other.
        if revision < next - 1 && list::revision(&self.lane, &self.prefix).await? < next - 1 {
            tracing::warn!(service = %self.service, next, revision, "etcd's revision went backwards: listing again");
            return Ok(Phase::Listing);
        }
        self.report(DiscoveryState::Watching { revision: next - 1 });
        Ok(Phase::Watching { next, watch: Box::new(watch) })
    }

    /// One message, one publication or the slow list, whatever comes first
    async fn watch(&mut self, next: i64, mut watch: Box<Watch>) -> Phase {
        tokio::select! {
            message = watch.next() => match message {
                Ok(message) => Phase::Watching { next: self.on_events(next, message.events()), watch },
                Err(error) => self.interrupted(next, &error).await,
            },
            () = self.coalesce.due() => {
                self.publish();
                Phase::Watching { next, watch }
            }
            () = sleep_until(self.relist_at) => {
                self.publish();
                Phase::Listing
            }
        }
    }

    /// The watch has failed: what it told is published, and where to go on is decided
    async fn interrupted(&mut self, next: i64, error: &RequestError) -> Phase {
        self.publish();
        self.report(DiscoveryState::Resuming { cause: error.to_string() });
        // After a compaction etcd is well, and the list paces itself.
        if !error.is_compacted() {
            self.pace.after(error).await;
        }
        // What etcd refuses in band it would refuse again; a list says why, or finds where to go on.
        if error.is_of_host() { Phase::Resuming { next } } else { Phase::Listing }
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
            self.on_event(event, pair);
        }
        if next > known {
            self.report(DiscoveryState::Watching { revision: next - 1 });
        }
        next
    }

    fn on_event(&mut self, event: &Event, pair: &etcd_client::KeyValue) {
        let instance = match event.event_type() {
            EventType::Delete => {
                self.warned.forget(pair.key());
                None
            }
            EventType::Put => match Entry::read(&self.prefix, pair) {
                Entry::Instance(instance) => Some(instance),
                Entry::Foreign => return,
                // As in a list: what cannot be read is not there.
                Entry::Garbage(garbage) => {
                    self.warned.warn(pair.key(), &garbage);
                    None
                }
            },
        };
        if let Some(id) = entry::id_of(&self.prefix, pair.key()) {
            self.coalesce.add(id, instance);
        }
    }

    fn publish(&mut self) {
        let changes = self.coalesce.take();
        if changes.is_empty() {
            return;
        }
        tracing::debug!(service = %self.service, changes = changes.len(), "publishing");
        self.feed.apply(changes);
    }

    /// Makes the state visible; logs when the kind of state changes, not when a failure is repeated
    fn report(&self, state: DiscoveryState) {
        use DiscoveryState::{Listing, Resuming, Watching};
        let service = &self.service;
        match (&*self.state.borrow(), &state) {
            (Watching { .. }, Watching { .. }) => {}
            (_, Watching { revision }) => {
                tracing::info!(%service, revision, instances = self.feed.len(), "watching");
            }
            (
                Watching { .. } | Listing { cause: None },
                Listing { cause: Some(cause) } | Resuming { cause },
            ) => {
                tracing::warn!(%service, %cause, "discovery is interrupted; the last known instances stay in use");
            }
            (_, Listing { cause: Some(cause) } | Resuming { cause }) => {
                tracing::debug!(%service, %cause, "trying again");
            }
            (_, Listing { cause: None }) => {}
        }
        self.state.send_replace(state);
    }
}

impl fmt::Debug for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Discovery").field("service", &self.service).finish_non_exhaustive()
    }
}
