//! The task behind a channel: follows discovery, keeps endpoints, publishes who is ready

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    hash::Hash,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use callsign_core::ejection::{Ejection, INTERVAL};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, Sleep, sleep_until},
};
use tower::{
    BoxError,
    discover::{Change, Discover},
};

use super::{
    book::Book,
    members::Members,
    selection::{Selection, Step},
    shared::Shared,
};
use crate::{
    attention::Attention,
    endpoint::{EndpointState, Event},
    instance::Instance,
};

/// The one writer of a channel's set of endpoints
pub(super) struct Pool<D: Discover> {
    discover: Option<D>,
    selection: Selection<D::Key>,
    members: Members<Arc<D::Key>>,
    shared: Arc<Shared>,
    events: mpsc::UnboundedReceiver<Event>,
    /// For new endpoints.
    reporter: mpsc::UnboundedSender<Event>,
    /// Set while removed endpoints keep their connections: one for all of them.
    timer: Option<Pin<Box<Sleep>>>,
    ejection: Ejection,
    /// Set while there is something to judge.
    look: Option<Pin<Box<Sleep>>>,
    /// Wakes us when there is again.
    attention: Arc<Attention>,
}

/// One thing that happened
enum News<K> {
    Changed(Change<K, Instance>),
    /// Discovery has ended: the set is frozen.
    Frozen,
    Failed(BoxError),
    Endpoint(Event),
    /// The time of a removed endpoint is over.
    Due,
    /// The endpoints are to be judged.
    Look,
}

impl<D> Pool<D>
where
    D: Discover<Service = Instance> + Unpin,
    D::Key: Hash + Eq,
    D::Error: Into<BoxError>,
{
    pub(super) fn new(
        discover: D,
        selection: Selection<D::Key>,
        members: Members<Arc<D::Key>>,
        shared: Arc<Shared>,
        attention: Arc<Attention>,
    ) -> Self {
        let (reporter, events) = mpsc::unbounded_channel();
        let (discover, ejection) = (Some(discover), Ejection::new());
        let (timer, look) = (None, None);
        Self { discover, selection, members, shared, events, reporter, timer, ejection, look, attention }
    }

    /// Runs until the channel's last handle is gone; then every endpoint drains by itself
    pub(super) async fn run(mut self, mut unused: oneshot::Receiver<Infallible>) {
        let mut batch = Vec::new();
        loop {
            let open = poll_fn(|cx| {
                if Pin::new(&mut unused).poll(cx).is_ready() {
                    return Poll::Ready(false);
                }
                while let Poll::Ready(news) = self.poll_news(cx) {
                    batch.push(news);
                    if batch.len() == BATCH {
                        break;
                    }
                }
                if batch.is_empty() { Poll::Pending } else { Poll::Ready(true) }
            });
            if !open.await {
                return;
            }
            self.apply(&mut batch);
            // One round may have found the whole budget's worth of news; others want to run, too.
            tokio::task::coop::consume_budget().await;
        }
    }

    fn poll_news(&mut self, cx: &mut Context<'_>) -> Poll<News<D::Key>> {
        // Endpoints first: calls wait for them.
        if let Poll::Ready(Some(event)) = self.events.poll_recv(cx) {
            return Poll::Ready(News::Endpoint(event));
        }
        if is_over(&mut self.timer, cx) {
            return Poll::Ready(News::Due);
        }
        if self.attention.poll_called(cx).is_ready() || is_over(&mut self.look, cx) {
            return Poll::Ready(News::Look);
        }
        let Some(discover) = &mut self.discover else { return Poll::Pending };
        Pin::new(discover).poll_discover(cx).map(|change| match change {
            Some(Ok(change)) => News::Changed(change),
            Some(Err(error)) => News::Failed(error.into()),
            None => {
                self.discover = None;
                News::Frozen
            }
        })
    }

    /// Applies everything, publishes once, and only then tells those who listen
    fn apply(&mut self, batch: &mut Vec<News<D::Key>>) {
        let Self { selection, members, shared, reporter, ejection, attention, .. } = self;
        let service = shared.service();
        let now = Instant::now().into_std();
        let (mut events, mut is_due) = (Vec::new(), false);
        // Before the book is opened: a rule of the user's may take its time, or look at the endpoints.
        for news in batch.drain(..) {
            match news {
                News::Changed(Change::Insert(key, instance)) => selection.insert(key, instance),
                News::Changed(Change::Remove(key)) => selection.remove(&key),
                News::Frozen => {
                    tracing::info!(service, "discovery has ended: the set of endpoints is frozen");
                }
                News::Failed(error) => {
                    tracing::warn!(service, %error, "discovery reports an error; the set stays");
                }
                News::Endpoint(event) => {
                    if event.state == EndpointState::Gone {
                        ejection.forget(event.endpoint);
                    }
                    events.push(event);
                }
                // That is for `settle`.
                News::Due => {}
                News::Look => is_due = true,
            }
        }
        let mut book = shared.book();
        for event in events {
            book.on_event(event, now);
        }
        for step in selection.settle() {
            match step {
                Step::Connect(key, instance) => members.insert(key, instance, &mut book, reporter, now),
                Step::Removed(key) => members.remove(&key, &mut book, now),
                Step::Unwanted(key) => members.forgo(&key, &mut book),
            }
        }
        book.why_none = selection.why_none();
        members.settle(service, &mut book, now);
        // Also of who is left when others go.
        if is_due || book.is_stale() {
            arm(&mut self.look, judge(ejection, attention, shared, &mut book, now));
        }
        shared.publish(book);
        arm(&mut self.timer, members.due());
    }
}

/// Ejects endpoints and lets them in again, as far as the book goes; when to do so again
fn judge(
    ejection: &mut Ejection,
    attention: &Attention,
    shared: &Shared,
    book: &mut Book,
    now: std::time::Instant,
) -> Option<std::time::Instant> {
    let service = shared.service();
    let judgement = ejection.judge(now, book.looks());
    for endpoint in judgement.probes {
        book.probe(endpoint);
    }
    if judgement.spared > 0 {
        let spared = judgement.spared;
        tracing::warn!(
            service,
            spared,
            "too few endpoints would be left: some that should be ejected are used"
        );
    }
    if judgement.is_news || book.is_stale() {
        book.eject(service, |endpoint| ejection.ejected(endpoint));
    }
    if judgement.on_trial || judgement.lets_all_in {
        // Perhaps the one call that is let in has ended, or more are.
        shared.wake_all();
    }
    if let Some(due) = ejection.due() {
        attention.wake_up();
        return Some(due);
    }
    // One more look: a call that began in between may have woken nobody.
    attention.sleep().then(|| now + INTERVAL)
}

/// Whether the time of `timer` has come, which is its end
fn is_over(timer: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>) -> bool {
    let is_over = timer.as_mut().is_some_and(|timer| timer.as_mut().poll(cx).is_ready());
    if is_over {
        *timer = None;
    }
    is_over
}

fn arm(timer: &mut Option<Pin<Box<Sleep>>>, due: Option<std::time::Instant>) {
    let Some(due) = due.map(Instant::from_std) else {
        *timer = None;
        return;
    };
    match timer {
        Some(timer) if timer.deadline() == due => {}
        Some(timer) => timer.as_mut().reset(due),
        None => *timer = Some(Box::pin(sleep_until(due))),
    }
}

impl<D: Discover> Drop for Pool<D> {
    fn drop(&mut self) {
        // Its runtime may have ended before the channel did: nobody may wait for endpoints any more.
        self.shared.end();
    }
}

/// News applied at once: bounds the time in which nothing is published.
const BATCH: usize = 4096;
