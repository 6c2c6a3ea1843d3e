//! The instances of a service, now and from now on
//!
//! What discovery makes of lists and events; how those come is the business of the machine that it shares with the watch of
//! a value.

mod coalesce;
mod set;
mod warned;

use std::{future::Future, sync::Arc};

use etcd_client::KeyValue;

pub use self::set::Update;
pub(crate) use self::set::{InstanceSet, MAX_INSTANCES};
use self::{
    coalesce::Coalesce,
    warned::{Reading, Warned},
};
pub use super::follow::DiscoveryState;
use super::{
    ServiceName,
    entry::{self, Entry},
    feed::{Feed, Source},
    follow::{self, Sink},
    lane::Lane,
    list::Keys,
};
use crate::metrics::{self, Share};

/// The instances of `service`
pub(super) fn source(service: &ServiceName, lane: &Lane) -> Source<InstanceSet> {
    let keys = Keys::under(service.prefix());
    let service = service.clone();
    follow::source(lane, keys, move |feed| Discovery::new(&service, feed))
}

/// The sink of a service's keys
#[derive(Debug)]
struct Discovery {
    name: String,
    prefix: String,
    feed: Arc<Feed<InstanceSet>>,
    coalesce: Coalesce,
    warned: Warned,
    known: Share,
}

impl Discovery {
    fn new(service: &ServiceName, feed: Arc<Feed<InstanceSet>>) -> Self {
        let name = service.to_string();
        Self {
            prefix: service.prefix(),
            feed,
            coalesce: Coalesce::default(),
            warned: Warned::new(metrics::skipped_keys(&name)),
            known: metrics::instances(&name),
            name,
        }
    }
}

impl Sink for Discovery {
    type View = InstanceSet;
    type Listing = Reading;

    fn name(&self) -> &str {
        &self.name
    }

    fn entries(&self) -> usize {
        self.feed.look(InstanceSet::len)
    }

    fn on_listed(&mut self, reading: &mut Reading, pair: &KeyValue) {
        reading.on_pair(&self.prefix, pair, &mut self.warned);
    }

    fn on_list(&mut self, reading: Reading) {
        let set = reading.finish(&mut self.warned);
        // The list is newer than any change that still waits.
        self.coalesce.clear();
        self.feed.replace(|view| view.replace(set));
        self.known.set(self.entries());
    }

    fn on_put(&mut self, pair: &KeyValue) {
        let instance = match Entry::read(&self.prefix, pair) {
            Entry::Instance(instance) => Some(instance),
            Entry::Foreign => return,
            // As in a list: what cannot be read is not there.
            Entry::Garbage(garbage) => {
                self.warned.warn(pair.key(), &garbage);
                None
            }
        };
        if let Some(id) = entry::id_of(&self.prefix, pair.key()) {
            self.coalesce.add(id, instance);
        }
    }

    fn on_delete(&mut self, pair: &KeyValue) {
        self.warned.forget(pair.key());
        if let Some(id) = entry::id_of(&self.prefix, pair.key()) {
            self.coalesce.add(id, None);
        }
    }

    fn due(&self) -> impl Future<Output = ()> + Send {
        self.coalesce.due()
    }

    fn publish(&mut self) {
        let changes = self.coalesce.take();
        if changes.is_empty() {
            return;
        }
        tracing::debug!(service = self.name, changes = changes.len(), "publishing");
        self.feed.apply(|view| view.apply(changes));
        self.known.set(self.entries());
    }
}
