//! The instances of a service as consumers are told of them
//!
//! The latest set and a bounded log of what changed last. A consumer that keeps up reads the log, which costs nothing per
//! instance; one that does not gets the set.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use crate::{etcd::feed::View, instance::Instance};

/// What changed among the instances of a service
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
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

/// The set and its log
#[derive(Debug, Default)]
pub(crate) struct InstanceSet {
    set: HashMap<Arc<str>, Instance>,
    /// The last updates, the newest at the back: versions `version - log.len() + 1 ..= version`
    log: VecDeque<Change>,
    warned_full: bool,
}

#[derive(Clone, Debug)]
enum Change {
    Put(Instance),
    Remove(Arc<str>),
}

impl InstanceSet {
    /// Applies what really changes, if anything does: one change as itself, several as one reset
    pub(in crate::etcd) fn apply(&mut self, changes: Changes) -> bool {
        let mut log = Vec::new();
        for (id, instance) in changes {
            log.extend(self.change(id, instance));
        }
        match log.len() {
            0 => return false,
            1 => self.log(log.remove(0)),
            // An empty log sends every consumer to the set.
            _ => self.log.clear(),
        }
        true
    }

    /// Replaces the set, if that changes anything
    pub(in crate::etcd) fn replace(&mut self, set: HashMap<Arc<str>, Instance>) -> bool {
        let changed = self.set != set;
        if changed {
            self.set = set;
            self.log.clear();
        }
        changed
    }

    pub(super) fn len(&self) -> usize {
        self.set.len()
    }

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
    }
}

impl View for InstanceSet {
    type Update = Update;

    fn after(&self, seen: u64, version: u64) -> (Update, u64) {
        let behind = usize::try_from(version - seen).unwrap_or(usize::MAX);
        match self.log.len().checked_sub(behind).map(|position| &self.log[position]) {
            // Version 0 has seen nothing: a step alone would not do.
            Some(Change::Put(instance)) if seen > 0 => (Update::Put(instance.clone()), seen + 1),
            Some(Change::Remove(id)) if seen > 0 => (Update::Remove(Arc::clone(id)), seen + 1),
            _ => (Update::Reset(self.set.values().cloned().collect()), version),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::feed::{Feed, Subscription};

    fn instance(id: &str, port: u16) -> Instance {
        let address = crate::instance::Address::new("h", port).unwrap();
        Instance { id: id.into(), mod_revision: 1, ..Instance::new(address) }
    }

    fn set(instances: impl IntoIterator<Item = Instance>) -> HashMap<Arc<str>, Instance> {
        instances.into_iter().map(|instance| (Arc::clone(&instance.id), instance)).collect()
    }

    fn feed(instances: impl IntoIterator<Item = Instance>) -> Arc<Feed<InstanceSet>> {
        let feed = Arc::new(Feed::<InstanceSet>::default());
        feed.replace(|view| view.replace(set(instances)));
        feed
    }

    fn apply(feed: &Feed<InstanceSet>, changes: impl Into<Changes>) {
        feed.apply(|view| view.apply(changes.into()));
    }

    fn put(feed: &Feed<InstanceSet>, instance: Instance) {
        apply(feed, [(Arc::clone(&instance.id), Some(instance))]);
    }

    #[test]
    fn an_empty_list_is_told_once() {
        let feed = feed([]);
        let mut subscription = Subscription::alone(&feed);
        assert_eq!(subscription.now(), Some(Update::Reset(vec![])));
        feed.replace(|view| view.replace(HashMap::new()));
        assert_eq!(subscription.now(), None, "an equal list is no news");
    }

    #[test]
    fn one_change_is_a_step_and_several_are_a_reset() {
        let feed = feed([instance("a", 1)]);
        let mut subscription = Subscription::alone(&feed);
        subscription.now();
        put(&feed, instance("b", 2));
        put(&feed, instance("b", 2));
        apply(&feed, [("a".into(), None)]);
        apply(&feed, [("unknown".into(), None)]);
        assert_eq!(subscription.now(), Some(Update::Put(instance("b", 2))));
        assert_eq!(subscription.now(), Some(Update::Remove("a".into())));
        assert_eq!(subscription.now(), None, "what changes nothing is not told");
        apply(&feed, [("b".into(), None), ("c".into(), Some(instance("c", 3)))]);
        assert_eq!(subscription.now(), Some(Update::Reset(vec![instance("c", 3)])));
    }

    #[test]
    fn who_is_too_far_behind_gets_the_latest_set_once() {
        let feed = feed([]);
        let (mut slow, mut quick) = (Subscription::alone(&feed), Subscription::alone(&feed));
        slow.now();
        quick.now();
        for port in 1..=LOG as u16 {
            put(&feed, instance("a", port));
            assert_eq!(quick.now(), Some(Update::Put(instance("a", port))));
        }
        let mut late = Subscription::alone(&feed);
        assert_eq!(slow.now(), Some(Update::Put(instance("a", 1))), "as far behind as the log reaches");
        put(&feed, instance("a", 500));
        put(&feed, instance("a", 501));
        put(&feed, instance("a", 502));
        assert_eq!(slow.now(), Some(Update::Reset(vec![instance("a", 502)])));
        assert_eq!(
            late.now(),
            Some(Update::Reset(vec![instance("a", 502)])),
            "who comes late starts with the set"
        );
        assert_eq!((slow.now(), late.now()), (None, None));
    }
}
