//! What calls, the pool and those who look on share

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    sync::{broadcast, watch},
    time::{Instant, timeout_at},
};
use tonic::Status;

use super::{
    book::{Book, Entry, News},
    options::{Asked, Options},
    ready::{Balancer, Picked, Ready, Unpicked},
    state::{ChannelState, Tally},
    view::{EndpointInfo, EndpointUpdate},
};
use crate::{
    connection::{Place, Waiters},
    deadline::far,
    error,
    instance::Address,
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
    /// In this order: once a listener is told that an endpoint is lost, no call picks it any more. Who begins to listen just
    /// now is told where the endpoints stand, and then perhaps once more how that came about.
    pub(super) fn publish(&self, mut book: MutexGuard<'_, Book>) {
        let News { ready, state, updates } = book.take_news(&self.balancer.around);
        // Policies are the user's: a plan may take its time, or look at the endpoints. Nothing overtakes it, since only the
        // pool publishes.
        drop(book);
        if let Some(sorted) = ready {
            self.ready.store(Arc::new(Ready::new(&self.balancer, sorted)));
            self.waiters.wake_all();
        }
        self.show(state);
        for update in updates {
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
        // By itself: in a `match` it would hold on to the set for as long as the call waits.
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
        let place = self.waiters.enter(MOST_WAITING);
        let mut place = place.ok_or_else(|| error::too_many_waiting(&self.service))?;
        if asked.options.are_choosy() {
            place.choose();
        }
        let _waiting = self.meters.wait();
        let mut give_up = None;
        let mut was_woken = false;
        loop {
            // Asked for before looking: what happens from here on is not missed.
            let mut notified = std::pin::pin!(place.notified());
            notified.as_mut().enable();
            let picked = self.ready.load().pick(asked);
            if picked.is_err() && std::mem::replace(&mut was_woken, true) {
                self.pass_on(&mut place);
            }
            match picked {
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

    /// Wakes the others if there is room that the policy does not use for who was woken: it may have been meant for them
    fn pass_on(&self, place: &mut Place<'_>) {
        // Once: from then on all are woken together.
        if !place.is_choosy() && self.ready.load().has_room() {
            place.choose();
            self.waiters.wake_all();
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
