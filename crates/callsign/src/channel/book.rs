//! Every endpoint of a channel: what the pool writes down of them, and what others are told

use std::{collections::BTreeMap, sync::Arc};

use callsign_core::{
    ejection::{Look, Reason},
    slow_start::Freshness,
};

use super::{
    around::Around,
    ready::{Sorted, Target},
    state::{ChannelState, Standpoint, Tally},
    view::{EndpointInfo, EndpointUpdate},
};
use crate::{
    connection::Sender,
    endpoint::{Endpoint, EndpointState, Event},
    instance::{Address, Metadata},
};

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
    /// Why no call is sent to it, as judged when it was ready last: another connection is not another ejection.
    judged: Option<Reason>,
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

/// What has changed since it was asked for last
pub(super) struct News {
    /// Who is ready now, if that has changed.
    pub(super) ready: Option<Sorted>,
    pub(super) state: ChannelState,
    pub(super) updates: Vec<EndpointUpdate>,
}

impl Book {
    pub(super) fn new(tally: Tally) -> Self {
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
            // Silence was that of the connection, failures are the server's.
            entry.judged = entry.judged.filter(|reason| *reason != Reason::Silent);
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
            let ejected = entry.in_use().map(|_| ejected(number))?;
            (ejected != entry.judged).then_some((number, ejected))
        };
        let changed: Vec<_> = self.entries.iter().filter_map(changed).collect();
        for (number, ejected) in changed {
            if let Some(reason) = ejected {
                self.tally.count_ejection(reason);
            }
            self.change(number, |entry| {
                let endpoint = &entry.endpoint.address;
                match ejected {
                    Some(reason) => tracing::info!(service, %endpoint, %reason, "endpoint ejected"),
                    None => tracing::info!(service, %endpoint, "endpoint no longer ejected"),
                }
                entry.judged = ejected;
            });
        }
    }

    /// What is to be published and told; asked again, nothing of it is
    pub(super) fn take_news(&mut self, around: &Around) -> News {
        // Of thousands of endpoints some always try to connect, which is no news to calls.
        let ready = std::mem::take(&mut self.stale).then(|| self.sorted(around));
        News { ready, state: self.tally.state(), updates: std::mem::take(&mut self.untold) }
    }

    /// Who is ready, and who of them may be picked
    fn sorted(&self, around: &Around) -> Sorted {
        let near =
            |entry: &&Entry| entry.standing != Standing::Leaving && around.is_near(entry.metadata.zone());
        let near = self.entries.values().filter(near).count();
        let mut sorted = Sorted { near, ..Sorted::default() };
        for entry in self.entries.values() {
            let side = match entry.ejected() {
                None => &mut sorted.usable,
                // A call there would wait for its deadline.
                Some(Reason::Silent) => &mut sorted.silent,
                Some(_) => &mut sorted.failing,
            };
            side.extend(entry.target());
        }
        sorted
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
        let (sender, cause, failing, judged) = (None, None, false, None);
        let fresh = Freshness::default();
        Self { endpoint, metadata, name, zone, standing, state, sender, cause, failing, fresh, judged }
    }

    fn standpoint(&self) -> Standpoint {
        let (state, held) = (self.state(), self.is_held());
        Standpoint { state, held, ejected: self.ejected().is_some(), failing: self.failing }
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

    /// Why no call is sent to it although it is ready
    fn ejected(&self) -> Option<Reason> {
        self.judged.filter(|_| self.in_use().is_some())
    }

    fn is_held(&self) -> bool {
        self.standing == Standing::Held && self.sender.is_some()
    }

    /// The state for those who look on: one that is removed and not held drains, whatever its task is at
    fn state(&self) -> EndpointState {
        let drains = self.standing != Standing::Listed && !self.is_held();
        if drains && self.state != EndpointState::Gone { EndpointState::Draining } else { self.state }
    }

    pub(super) fn update(&self) -> EndpointUpdate {
        let state = self.state();
        let cause = self.cause.as_deref().filter(|_| state != EndpointState::Ready).map(str::to_owned);
        let address = self.endpoint.address.clone();
        EndpointUpdate { address, state, held: self.is_held(), ejected: self.ejected(), cause }
    }

    pub(super) fn is_at(&self, address: &Address) -> bool {
        self.endpoint.address.is_where(address)
    }

    /// Why calls do not go there, for people
    pub(super) fn describe(&self) -> String {
        let cause = self.cause.as_deref().map(|cause| format!(" ({cause})")).unwrap_or_default();
        // Ready on the books: the connection is lost and not yet published so, or its server allows no streams.
        let state = self.state();
        let full = if state == EndpointState::Ready { ", but takes no calls now" } else { "" };
        let held = if self.is_held() { " and held" } else { "" };
        let ejected = self.ejected().map(|reason| format!(" and ejected ({reason})")).unwrap_or_default();
        format!("{} is {state}{held}{ejected}{full}{cause}", self.endpoint.address)
    }

    pub(super) fn info(&self, now: std::time::Instant) -> EndpointInfo {
        let load = &self.endpoint.load;
        EndpointInfo {
            address: self.endpoint.address.clone(),
            state: self.state(),
            held: self.is_held(),
            ejected: self.ejected(),
            in_flight: load.in_flight(),
            started: load.started(),
            succeeded: load.successes(),
            failed: load.failures(),
            latency: load.latency(now),
            last_error: self.cause.as_deref().map(str::to_owned),
        }
    }
}
