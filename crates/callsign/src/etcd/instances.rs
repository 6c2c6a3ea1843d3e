//! Watching a service for one's own purposes

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use tokio::sync::watch;

use super::{Etcd, InstanceSet, ServiceError, Subscription, Update, discovery::DiscoveryState};
use crate::instance::Instance;

impl Etcd {
    /// The instances of `service`, now and from now on, whatever becomes of etcd
    ///
    /// ```no_run
    /// # async fn example(etcd: callsign::Etcd) -> Result<(), Box<dyn std::error::Error>> {
    /// use tokio_stream::StreamExt;
    ///
    /// let mut snapshots = etcd.watch("hello.rpc")?.snapshots();
    /// while let Some(instances) = snapshots.next().await {
    ///     println!("{} instances", instances.len());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Nothing is held here: an instance whose key ends is gone, also if it would still answer calls. Must be called within
    /// a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if the name cannot be a service's; never because of the network.
    pub fn watch(&self, service: impl Into<String>) -> Result<Instances, ServiceError> {
        let service = self.service(service)?;
        Ok(Instances { subscription: self.follow(&service) })
    }
}

/// The instances of a service, as a stream of what changes; see [`Etcd::watch`]
///
/// The first update is a [`Reset`](Update::Reset), as soon as there is a list. The stream never ends and never fails: while
/// etcd is away the last known set stays. A consumer that cannot keep up gets one `Reset` with the latest set in place of
/// the steps that it missed, and holds up nobody. Dozens of changes at once are a `Reset`, too. All who follow one service
/// over one [`Etcd`], channels included, share one watch, which ends with the last of them: dropping the stream is all there
/// is to stopping it. Must be polled within a tokio runtime: when the one that the watch ran in has ended, it goes on in the
/// next.
#[derive(Debug)]
#[must_use = "streams do nothing unless polled"]
pub struct Instances {
    subscription: Subscription<InstanceSet>,
}

impl Instances {
    /// Where the discovery stands, and each change of that
    pub fn state(&self) -> watch::Receiver<DiscoveryState> {
        self.subscription.state()
    }

    /// The whole list instead, sorted by id: now and after each change
    ///
    /// A consumer that cannot keep up sees the latest list only. Each list is a copy: with thousands of instances that
    /// change often the updates are cheaper.
    pub fn snapshots(self) -> Snapshots {
        Snapshots { updates: self, set: BTreeMap::new() }
    }
}

impl Stream for Instances {
    type Item = Update;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Update>> {
        self.get_mut().subscription.poll_update(cx).map(Some)
    }
}

/// The instances of a service, as a stream of whole lists; see [`Instances::snapshots`]
#[derive(Debug)]
#[must_use = "streams do nothing unless polled"]
pub struct Snapshots {
    updates: Instances,
    set: BTreeMap<Arc<str>, Instance>,
}

impl Snapshots {
    /// Where the discovery stands, and each change of that
    pub fn state(&self) -> watch::Receiver<DiscoveryState> {
        self.updates.state()
    }

    fn apply(&mut self, update: Update) {
        match update {
            Update::Reset(set) => {
                self.set = set.into_iter().map(|instance| (Arc::clone(&instance.id), instance)).collect();
            }
            Update::Put(instance) => drop(self.set.insert(Arc::clone(&instance.id), instance)),
            Update::Remove(id) => drop(self.set.remove(&id)),
        }
    }
}

impl Stream for Snapshots {
    type Item = Vec<Instance>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Vec<Instance>>> {
        let this = self.get_mut();
        let first = ready!(this.updates.subscription.poll_update(cx));
        this.apply(first);
        // Whoever was away for several changes wants to know what came of them.
        while let Poll::Ready(update) = this.updates.subscription.poll_update(cx) {
            this.apply(update);
        }
        Poll::Ready(Some(this.set.values().cloned().collect()))
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;

    use super::*;
    use crate::etcd::feed::Feed;

    fn instance(id: &str) -> Instance {
        Instance { id: id.into(), ..Instance::new("h:1".parse().unwrap()) }
    }

    fn ids(list: &[Instance]) -> Vec<&str> {
        list.iter().map(|instance| &*instance.id).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_snapshot_is_sorted_and_has_all_that_happened_since_the_last_one() {
        let feed = Arc::new(Feed::<InstanceSet>::default());
        let changed = |id: &str, there: bool| {
            let instance = there.then(|| instance(id));
            feed.apply(|view| view.apply([(id.into(), instance)].into()));
        };
        let mut snapshots = Instances { subscription: Subscription::alone(&feed) }.snapshots();
        let listed = ["c", "a"].map(|id| (Arc::from(id), instance(id)));
        feed.replace(|view| view.replace(listed.into()));
        assert_eq!(ids(&snapshots.next().await.unwrap()), ["a", "c"]);
        for (id, there) in [("b", true), ("d", true), ("a", false)] {
            changed(id, there);
        }
        assert_eq!(ids(&snapshots.next().await.unwrap()), ["b", "c", "d"]);
        let more = tokio::time::timeout(std::time::Duration::from_secs(1), snapshots.next());
        assert!(more.await.is_err(), "what it has shown is not shown again");
    }
}
