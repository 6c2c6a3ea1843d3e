//! The task behind a channel: follows discovery, keeps endpoints, publishes who is ready

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    future::{Future, poll_fn},
    hash::Hash,
    pin::Pin,
    sync::Arc,
    task::Poll,
};

use callsign_core::load::Load;
use http::uri::Authority;
use tokio::sync::{mpsc, oneshot};
use tower::{
    BoxError,
    discover::{Change, Discover},
};

use super::shared::{Entry, Shared};
use crate::{
    connection,
    endpoint::{self, Endpoint, EndpointState, Event, Handle},
    instance::Instance,
};

/// What the pool needs to make endpoints
#[derive(Debug)]
pub(super) struct EndpointConfig {
    pub(super) connection: connection::Config,
    /// Instead of each endpoint's address.
    pub(super) authority: Option<Authority>,
}

/// The one writer of a channel's set of endpoints
pub(super) struct Pool<D: Discover> {
    discover: Option<D>,
    /// Each with the instance that was told last.
    handles: HashMap<D::Key, (Instance, Handle)>,
    config: EndpointConfig,
    shared: Arc<Shared>,
    events: mpsc::UnboundedReceiver<Event>,
    /// For new endpoints.
    reporter: mpsc::UnboundedSender<Event>,
    next_number: u64,
}

/// One thing that happened
enum News<K> {
    Changed(Change<K, Instance>),
    /// Discovery has ended: the set is frozen.
    Frozen,
    Failed(BoxError),
    Endpoint(Event),
}

impl<D> Pool<D>
where
    D: Discover<Service = Instance> + Unpin,
    D::Key: Hash + Eq,
    D::Error: Into<BoxError>,
{
    pub(super) fn new(discover: D, config: EndpointConfig, shared: Arc<Shared>) -> Self {
        let (reporter, events) = mpsc::unbounded_channel();
        Self {
            discover: Some(discover),
            handles: HashMap::new(),
            config,
            shared,
            events,
            reporter,
            next_number: 0,
        }
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

    fn poll_news(&mut self, cx: &mut std::task::Context<'_>) -> Poll<News<D::Key>> {
        // Endpoints first: calls wait for them.
        if let Poll::Ready(Some(event)) = self.events.poll_recv(cx) {
            return Poll::Ready(News::Endpoint(event));
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
        let shared = Arc::clone(&self.shared);
        let mut book = shared.book();
        for news in batch.drain(..) {
            match news {
                News::Changed(Change::Insert(key, instance)) => self.insert(key, instance, &mut book.entries),
                News::Changed(Change::Remove(key)) => drop(self.handles.remove(&key)),
                News::Frozen => {
                    tracing::info!(
                        service = shared.service(),
                        "discovery has ended: the set of endpoints is frozen"
                    );
                }
                News::Failed(error) => {
                    tracing::warn!(service = shared.service(), %error, "discovery reports an error; the set stays");
                }
                News::Endpoint(event) => book.on_event(event),
            }
        }
        shared.publish(book);
    }

    fn insert(&mut self, key: D::Key, instance: Instance, entries: &mut BTreeMap<u64, Entry>) {
        if instance.address.is_https() {
            // Going on in plaintext would be a silent downgrade.
            return tracing::warn!(address = %instance.address, "TLS is not supported yet: instance skipped");
        }
        match self.handles.get_mut(&key) {
            Some((known, handle)) if known.address == instance.address => {
                if is_anew(known, &instance) {
                    handle.renew();
                }
                *known = instance;
                return;
            }
            // Another address under the same key is another endpoint; the old one drains when its handle is replaced.
            _ => {}
        }
        let authority = match &self.config.authority {
            Some(authority) => authority.clone(),
            None => match Authority::try_from(instance.address.authority()) {
                Ok(authority) => authority,
                Err(error) => {
                    let address = instance.address;
                    return tracing::warn!(%address, %error, "not a valid authority: instance skipped");
                }
            },
        };
        let number = self.next_number;
        self.next_number += 1;
        let address = instance.address.clone();
        let endpoint = Arc::new(Endpoint { number, address, authority, load: Arc::new(Load::default()) });
        entries.insert(number, Entry::new(Arc::clone(&endpoint)));
        let handle = endpoint::spawn(endpoint, self.config.connection.clone(), self.reporter.clone());
        self.handles.insert(key, (instance, handle));
    }
}

impl<D: Discover> Drop for Pool<D> {
    fn drop(&mut self) {
        // Its runtime may have ended before the channel did: nobody may wait for endpoints any more.
        self.shared.end();
    }
}

/// Whether the server behind a known key has registered anew
///
/// An older instance that is shown since a newer one has left is no news of the server. The same id at a lower revision is:
/// etcd was wiped. Where there are no revisions every insert is news.
fn is_anew(known: &Instance, instance: &Instance) -> bool {
    let (before, now) = (known.mod_revision, instance.mod_revision);
    now == 0 || now > before || (known.id == instance.id && now != before)
}

/// News applied at once: bounds the time in which nothing is published.
const BATCH: usize = 4096;

impl Entry {
    fn new(endpoint: Arc<Endpoint>) -> Self {
        Self { endpoint, state: EndpointState::Idle, sender: None, cause: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Address;

    #[test]
    fn an_older_instance_that_is_left_is_no_news_of_the_server() {
        let instance = |id: &str, mod_revision| {
            let address = Address::new("h", 1).unwrap();
            Instance { id: id.into(), mod_revision, ..Instance::new(address) }
        };
        let is_anew = |before, now| super::is_anew(&before, &now);
        assert!(is_anew(instance("a", 5), instance("a", 6)) && is_anew(instance("a", 5), instance("b", 6)));
        assert!(!is_anew(instance("b", 6), instance("a", 5)), "b has left");
        assert!(!is_anew(instance("a", 5), instance("a", 5)), "only the metadata is another");
        assert!(is_anew(instance("a", 5000), instance("a", 3)), "etcd was wiped");
        assert!(is_anew(instance("a", 0), instance("a", 0)), "a list of one's own has no revisions");
    }
}
