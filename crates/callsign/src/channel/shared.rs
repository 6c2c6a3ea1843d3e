//! What calls, the pool and those who look on share

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use callsign_core::{
    ejection::{Look, Reason},
    slow_start::Freshness,
};
use tokio::{
    sync::{broadcast, watch},
    time::{Instant, timeout_at},
};
use tonic::Status;

use super::{
    options::{Asked, Options},
    ready::{Balancer, Picked, Ready, Target, Unpicked},
    state::{ChannelState, Standpoint, Tally},
    view::{EndpointInfo, EndpointUpdate},
};
use crate::{
    connection::{Sender, Waiters},
    deadline::far,
    endpoint::{Endpoint, EndpointState, Event},
    error,
    instance::{Address, Metadata},
    metrics::ChannelMeters,
};

/// Everything of a channel but its owner
pub(super) struct Shared {
    service: String,
    balancer: Balancer,
    pick_timeout: Duration,
    /// Says why there is no list of instances yet, if there is none.
    missing_list: Box<dyn Fn() -> Option<String> + Send + Sync>,
    /// Who is ready: what calls pick from.
    ready: ArcSwap<Ready>,
    /// Every endpoint with its state: for the pool, for messages and for those who look on.
    book: Mutex<Book>,
    updates: broadcast::Sender<EndpointUpdate>,
    state: watch::Sender<ChannelState>,
    meters: Arc<ChannelMeters>,
    waiters: Arc<Waiters>,
    /// The pool is gone: no endpoint will ever be ready again.
    ended: AtomicBool,
}

/// Every endpoint of the channel, and what is to be told of them
pub(super) struct Book {
    /// By number.
    pub(super) entries: BTreeMap<u64, Entry>,
    /// Why there are none, if discovery lists some.
    pub(super) why_none: Option<String>,
    untold: Vec<EndpointUpdate>,
    /// Something has changed of an endpoint that calls use, or used: what is published is out of date.
    stale: bool,
    tally: Tally,
}

pub(super) struct Entry {
    endpoint: Arc<Endpoint>,
    /// As discovery has told it last.
    metadata: Metadata,
    /// Of those who pick, who get it anew with each change of the set.
    name: Arc<str>,
    zone: Option<Arc<str>>,
    standing: Standing,
    /// As its task sees it, which knows nothing of discovery.
    state: EndpointState,
    /// While the task says that it is ready.
    sender: Option<Sender>,
    cause: Option<Arc<str>>,
    /// Whether the last attempt to connect that has ended has failed.
    failing: bool,
    fresh: Freshness,
    /// Why no call is sent to it although it is ready.
    ejected: Option<Reason>,
}

/// What discovery says of an endpoint, and what the channel makes of that
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    Listed,
    /// Removed, and used for as long as it answers.
    Held,
    /// Removed: no new calls, whether or not its connection is kept a while.
    Leaving,
}

impl Book {
    fn new(tally: Tally) -> Self {
        Self { entries: BTreeMap::new(), why_none: None, untold: Vec::new(), stale: false, tally }
    }

    /// A new endpoint, which discovery lists
    pub(super) fn add(&mut self, endpoint: Arc<Endpoint>, metadata: Metadata) {
        let entry = Entry::new(Arc::clone(&endpoint), metadata);
        self.tally.change(None, Some(entry.standpoint()));
        self.entries.insert(endpoint.number, entry);
    }

    pub(super) fn on_event(&mut self, event: Event, now: std::time::Instant) {
        self.change(event.endpoint, |entry| {
            if event.sender.is_some() {
                entry.fresh.on_connected(now);
            }
            entry.state = event.state;
            entry.sender = event.sender;
            entry.cause = event.cause.or_else(|| entry.cause.take());
            match event.state {
                EndpointState::Backoff => entry.failing = true,
                EndpointState::Ready => entry.failing = false,
                _ => {}
            }
            // Judged anew when it is ready again.
            entry.ejected = None;
        });
        if event.state == EndpointState::Gone
            && let Some(gone) = self.entries.remove(&event.endpoint)
        {
            self.tally.change(Some(gone.standpoint()), None);
        }
    }

    pub(super) fn set_standing(&mut self, endpoint: u64, standing: Standing) {
        // Asked for all removed endpoints whenever one changes: looking is cheap, comparing all that is told is not.
        if self.entries.get(&endpoint).is_some_and(|entry| entry.standing != standing) {
            self.change(endpoint, |entry| entry.standing = standing);
        }
    }

    /// Whether an endpoint answers, as far as its task has told
    pub(super) fn answers(&self, endpoint: u64) -> bool {
        self.entries.get(&endpoint).is_some_and(|entry| entry.sender.is_some())
    }

    /// The server behind an endpoint has registered anew
    pub(super) fn renew(&mut self, endpoint: u64) {
        let Some(entry) = self.entries.get_mut(&endpoint) else { return };
        let before = entry.fresh.since();
        entry.fresh.on_renewed();
        // Mostly it is fresh from its next connection on, which is published anyway.
        self.stale |= entry.fresh.since() != before;
    }

    /// What discovery says of a known endpoint now
    pub(super) fn describe(&mut self, endpoint: u64, metadata: &Metadata) {
        if self.entries.get(&endpoint).is_some_and(|entry| entry.metadata != *metadata) {
            self.change(endpoint, |entry| {
                entry.zone = metadata.zone().map(Arc::from);
                entry.metadata = metadata.clone();
            });
        }
    }

    /// Those that are ready, to be judged
    pub(super) fn looks(&self) -> impl Iterator<Item = Look<'_>> {
        self.entries.values().filter_map(Entry::look)
    }

    /// Whether who may be picked has changed since it was published
    pub(super) fn is_stale(&self) -> bool {
        self.stale
    }

    /// Asks an endpoint that is ready for a sign of life
    pub(super) fn probe(&self, endpoint: u64) {
        if let Some(sender) = self.entries.get(&endpoint).and_then(Entry::in_use) {
            sender.probe();
        }
    }

    /// Leaves out who is ready and `ejected`, and nobody else
    pub(super) fn eject(&mut self, service: &str, ejected: impl Fn(u64) -> Option<Reason>) {
        let changed = |(&number, entry): (&u64, &Entry)| {
            let ejected = entry.in_use().and_then(|_| ejected(number));
            (ejected != entry.ejected).then_some((number, ejected))
        };
        let changed: Vec<_> = self.entries.iter().filter_map(changed).collect();
        for (number, ejected) in changed {
            self.change(number, |entry| {
                let endpoint = &entry.endpoint.address;
                match ejected {
                    Some(reason) => tracing::info!(service, %endpoint, %reason, "endpoint ejected"),
                    None => tracing::info!(service, %endpoint, "endpoint no longer ejected"),
                }
                entry.ejected = ejected;
            });
        }
    }

    /// Who is ready, and who of them may be picked
    fn ready(&self, balancer: &Balancer) -> Ready {
        let near = |entry: &&Entry| {
            entry.standing != Standing::Leaving && balancer.around.is_near(entry.metadata.zone())
        };
        let near = self.entries.values().filter(near).count();
        let (mut usable, mut failing, mut silent) = (Vec::new(), Vec::new(), Vec::new());
        for entry in self.entries.values() {
            let side = match entry.ejected {
                None => &mut usable,
                // A call there would wait for its deadline.
                Some(Reason::Silent) => &mut silent,
                Some(_) => &mut failing,
            };
            side.extend(entry.target());
        }
        Ready::new(balancer, near, usable, failing, silent)
    }

    /// Changes an entry; what others see of that will be told
    fn change(&mut self, endpoint: u64, change: impl FnOnce(&mut Entry)) {
        let Some(entry) = self.entries.get_mut(&endpoint) else { return };
        let (before, was_used, stood) = (entry.update(), entry.in_use().is_some(), entry.standpoint());
        change(entry);
        self.tally.change(Some(stood), Some(entry.standpoint()));
        self.stale |= was_used || entry.in_use().is_some();
        let update = entry.update();
        if update == before {
            return;
        }
        let EndpointUpdate { address, state, held, ejected, cause } = &update;
        tracing::debug!(endpoint = %address, %state, held, ?ejected, ?cause, "endpoint");
        self.untold.push(update);
    }
}

impl Entry {
    fn new(endpoint: Arc<Endpoint>, metadata: Metadata) -> Self {
        let (standing, state) = (Standing::Listed, EndpointState::Idle);
        let (name, zone) = (endpoint.address.authority().into(), metadata.zone().map(Arc::from));
        let (sender, cause, failing, ejected) = (None, None, false, None);
        let fresh = Freshness::default();
        Self { endpoint, metadata, name, zone, standing, state, sender, cause, failing, fresh, ejected }
    }

    fn standpoint(&self) -> Standpoint {
        let (state, held) = (self.state(), self.is_held());
        Standpoint { state, held, ejected: self.ejected, failing: self.failing }
    }

    fn target(&self) -> Option<Target> {
        let sender = self.in_use()?.clone();
        let (endpoint, name) = (Arc::clone(&self.endpoint), Arc::clone(&self.name));
        let (weight, zone, fresh) = (self.metadata.weight(), self.zone.clone(), self.fresh);
        Some(Target { endpoint, sender, name, weight, zone, fresh })
    }

    fn look(&self) -> Option<Look<'_>> {
        let probe = self.in_use()?.probed();
        Some(Look { endpoint: self.endpoint.number, load: &self.endpoint.load, probe })
    }

    /// What calls are sent with, if any are
    fn in_use(&self) -> Option<&Sender> {
        self.sender.as_ref().filter(|_| self.standing != Standing::Leaving)
    }

    fn is_held(&self) -> bool {
        self.standing == Standing::Held && self.sender.is_some()
    }

    /// The state for those who look on: one that is removed and not held drains, whatever its task is at
    fn state(&self) -> EndpointState {
        let drains = self.standing != Standing::Listed && !self.is_held();
        if drains && self.state != EndpointState::Gone { EndpointState::Draining } else { self.state }
    }

    fn update(&self) -> EndpointUpdate {
        let state = self.state();
        let cause = self.cause.as_deref().filter(|_| state != EndpointState::Ready).map(str::to_owned);
        let address = self.endpoint.address.clone();
        EndpointUpdate { address, state, held: self.is_held(), ejected: self.ejected, cause }
    }

    fn is_at(&self, address: &Address) -> bool {
        self.endpoint.address.authority() == address.authority()
    }

    /// Why calls do not go there, for people
    fn describe(&self) -> String {
        let cause = self.cause.as_deref().map(|cause| format!(" ({cause})")).unwrap_or_default();
        // Ready on the books: the connection is lost and not yet published so, or its server allows no streams.
        let state = self.state();
        let full = if state == EndpointState::Ready { ", but takes no calls now" } else { "" };
        let held = if self.is_held() { " and held" } else { "" };
        let ejected = self.ejected.map(|reason| format!(" and ejected ({reason})")).unwrap_or_default();
        format!("{} is {state}{held}{ejected}{full}{cause}", self.endpoint.address)
    }

    fn info(&self, now: std::time::Instant) -> EndpointInfo {
        let load = &self.endpoint.load;
        EndpointInfo {
            address: self.endpoint.address.clone(),
            state: self.state(),
            held: self.is_held(),
            ejected: self.ejected,
            in_flight: load.in_flight(),
            started: load.started(),
            succeeded: load.successes(),
            failed: load.failures(),
            latency: load.latency(now),
            last_error: self.cause.as_deref().map(str::to_owned),
        }
    }
}

/// Calls that may wait for an endpoint at the same time.
const MOST_WAITING: usize = 10_000;
/// Updates kept for a slow reader; one that falls behind further is told the present states again.
const UPDATES: usize = 1024;

impl Shared {
    pub(super) fn new(
        service: String,
        balancer: Balancer,
        pick_timeout: Duration,
        missing_list: Box<dyn Fn() -> Option<String> + Send + Sync>,
        waiters: Arc<Waiters>,
        meters: Arc<ChannelMeters>,
    ) -> Self {
        let tally = Tally::new(&meters);
        Self {
            service,
            balancer,
            pick_timeout,
            missing_list,
            ready: ArcSwap::from_pointee(Ready::empty()),
            state: watch::Sender::new(tally.state()),
            book: Mutex::new(Book::new(tally)),
            updates: broadcast::Sender::new(UPDATES),
            meters,
            waiters,
            ended: AtomicBool::new(false),
        }
    }

    pub(super) fn service(&self) -> &str {
        &self.service
    }

    pub(super) fn meters(&self) -> &ChannelMeters {
        &self.meters
    }

    /// Where the channel stands, now and from now on
    pub(super) fn state(&self) -> watch::Receiver<ChannelState> {
        self.state.subscribe()
    }

    pub(super) fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes who is ready, wakes those who wait, then tells those who listen
    ///
    /// In this order: once a listener knows that an endpoint is lost, no call picks it any more.
    pub(super) fn publish(&self, mut book: MutexGuard<'_, Book>) {
        // Of thousands of endpoints some always try to connect, which is no news to calls.
        if std::mem::take(&mut book.stale) {
            self.ready.store(Arc::new(book.ready(&self.balancer)));
            self.waiters.wake_all();
        }
        self.show(book.tally.state());
        for update in std::mem::take(&mut book.untold) {
            // Nobody listens: fine.
            let _ = self.updates.send(update);
        }
    }

    /// There may be room where there was none
    pub(super) fn wake_all(&self) {
        self.waiters.wake_all();
    }

    /// Nothing will be published any more
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.ready.store(Arc::new(Ready::empty()));
        self.waiters.wake_all();
        self.show(ChannelState::Shutdown);
    }

    /// Only the pool says where the channel stands
    fn show(&self, state: ChannelState) {
        self.state.send_if_modified(|shown| std::mem::replace(shown, state) != state);
    }

    /// The present state of each endpoint, and all changes from then on
    pub(super) fn watch(&self) -> (Vec<EndpointUpdate>, broadcast::Receiver<EndpointUpdate>) {
        let book = self.book();
        (book.entries.values().map(Entry::update).collect(), self.updates.subscribe())
    }

    pub(super) fn endpoints(&self) -> Vec<EndpointInfo> {
        let now = Instant::now().into_std();
        self.book().entries.values().map(|entry| entry.info(now)).collect()
    }

    /// Picks an endpoint, waiting for one if need be
    pub(super) async fn pick(&self, asked: Asked<'_>) -> Result<Picked, Status> {
        let picked = self.ready.load().pick(asked);
        match picked {
            Ok(picked) => Ok(picked),
            Err(Unpicked::NoneReady) if self.pick_timeout.is_zero() && !asked.options.wait_for_ready => {
                Err(self.unavailable(asked.options))
            }
            // By the time that there is news, who has handed the call back may take it.
            // Boxed for its size: most calls need not wait.
            Err(_) => Box::pin(self.wait_and_pick(Asked { avoid: None, ..asked })).await,
        }
    }

    async fn wait_and_pick(&self, asked: Asked<'_>) -> Result<Picked, Status> {
        let place = self.waiters.enter(MOST_WAITING).ok_or_else(|| error::too_many_waiting(&self.service))?;
        let _waiting = self.meters.wait();
        let mut give_up = None;
        loop {
            // Asked for before looking: what happens from here on is not missed.
            let mut notified = std::pin::pin!(place.notified());
            notified.as_mut().enable();
            match self.ready.load().pick(asked) {
                Ok(picked) => return Ok(picked),
                Err(_) if self.ended.load(Ordering::SeqCst) => {
                    return Err(error::channel_ended(&self.service));
                }
                Err(Unpicked::NoneReady) if !asked.options.wait_for_ready => {
                    let at = *give_up.get_or_insert_with(|| far(Instant::now(), self.pick_timeout));
                    if timeout_at(at, notified).await.is_err() {
                        return Err(self.unavailable(asked.options));
                    }
                }
                // Full endpoints are a matter of the caller's deadline, as in grpc-go.
                Err(Unpicked::AllFull) => {
                    give_up = None;
                    notified.await;
                }
                Err(Unpicked::NoneReady) => notified.await,
            }
        }
    }

    /// Waits until an endpoint is ready, or none ever will be
    pub(super) async fn until_ready(&self) {
        loop {
            let mut notified = std::pin::pin!(self.waiters.news());
            notified.as_mut().enable();
            if !self.ready.load().is_empty() || self.ended.load(Ordering::SeqCst) {
                return;
            }
            notified.await;
        }
    }

    fn unavailable(&self, options: &Options) -> Status {
        error::none_ready(match options.pinned() {
            Some(pinned) => self.why_not_pinned(pinned, options),
            None => self.why_none(options.excluded()),
        })
    }

    /// Why a call did not get the endpoint that it is pinned to, for people
    fn why_not_pinned(&self, pinned: &Address, options: &Options) -> String {
        let service = &self.service;
        if !options.permit(pinned) {
            return format!("{service}: the call is pinned to {pinned} and excludes it");
        }
        let book = self.book();
        // Of two with one address the later one is what discovery says now.
        match book.entries.values().rev().find(|entry| entry.is_at(pinned)) {
            Some(entry) => format!("{service}: the call is pinned, and {}", entry.describe()),
            None => {
                format!("{service}: the call is pinned to {pinned}, which is no endpoint of this channel")
            }
        }
    }

    /// Why no endpoint is ready, for people
    #[cfg(feature = "etcd")]
    pub(super) fn why_unready(&self) -> String {
        self.why_none(None)
    }

    /// Why no endpoint but `excluded` is ready, for people
    fn why_none(&self, excluded: Option<&Address>) -> String {
        let service = &self.service;
        let book = self.book();
        let others = book.entries.values().filter(|entry| !excluded.is_some_and(|at| entry.is_at(at)));
        let excluded = excluded.map(|address| format!(" (the call excludes {address})")).unwrap_or_default();
        let count = others.clone().count();
        if count == 0 {
            return match ((self.missing_list)(), &book.why_none) {
                (Some(cause), _) => format!("{service}: no list of instances yet: {cause}"),
                (None, Some(cause)) => format!("{service}: {cause}"),
                (None, None) => format!("{service}: no instances{excluded}"),
            };
        }
        let more =
            if count > DESCRIBED { format!(", and {} more", count - DESCRIBED) } else { String::new() };
        let described = others.take(DESCRIBED).map(Entry::describe).collect::<Vec<_>>().join(", ");
        format!("{service}: none of {count} endpoints is ready{excluded}: {described}{more}")
    }
}

/// Endpoints named in a message.
const DESCRIBED: usize = 5;
