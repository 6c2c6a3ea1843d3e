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

/// More changes at once are a reset. A consumer that keeps up finds a few publications in the log.
const STEPS: usize = LOG / 4;

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
    /// Applies what really changes; how many steps that is: many changes are one, a reset
    ///
    /// What goes makes room for what comes, and is told after it: an instance that moves leaves no gap.
    pub(in crate::etcd) fn apply(&mut self, changes: Changes) -> u64 {
        let (puts, removes): (Vec<_>, Vec<_>) =
            changes.into_iter().partition(|(_, instance)| instance.is_some());
        let removed: Vec<_> = removes.into_iter().filter_map(|(id, _)| self.remove(id)).collect();
        let mut steps: Vec<_> =
            puts.into_iter().filter_map(|(id, instance)| self.put(id, instance?)).collect();
        steps.extend(removed);
        if steps.len() > STEPS {
            // An empty log sends every consumer to the set.
            self.log.clear();
            return 1;
        }
        let count = steps.len() as u64;
        steps.into_iter().for_each(|step| self.log(step));
        count
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

    fn remove(&mut self, id: Arc<str>) -> Option<Change> {
        self.set.remove(&id).map(|_| Change::Remove(id))
    }

    fn put(&mut self, id: Arc<str>, instance: Instance) -> Option<Change> {
        match self.set.get(&id) {
            Some(known) if *known == instance => return None,
            None if self.set.len() >= MAX_INSTANCES => {
                if !std::mem::replace(&mut self.warned_full, true) {
                    tracing::warn!(limit = MAX_INSTANCES, %id, "too many instances: the rest is skipped");
                }
                return None;
            }
            _ => {}
        }
        self.set.insert(id, instance.clone());
        Some(Change::Put(instance))
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

    /// All that there is to tell now
    fn told(subscription: &mut Subscription<InstanceSet>) -> Vec<Update> {
        std::iter::from_fn(|| subscription.now()).collect()
    }

    /// So many new instances and so many removals of `old-` ones
    fn mixed(puts: usize, removes: usize) -> Changes {
        let puts = (0..puts).map(|number| {
            let instance = instance(&format!("new-{number}"), 1);
            (Arc::clone(&instance.id), Some(instance))
        });
        puts.chain((0..removes).map(|number| (format!("old-{number}").into(), None))).collect()
    }

    fn olds(count: usize) -> impl Iterator<Item = Instance> {
        (0..count).map(|number| instance(&format!("old-{number}"), 1))
    }

    #[test]
    fn changes_are_steps_and_what_changes_nothing_is_not_told() {
        let feed = feed([instance("a", 1)]);
        let mut subscription = Subscription::alone(&feed);
        subscription.now();
        put(&feed, instance("b", 2));
        put(&feed, instance("b", 2));
        apply(&feed, [("a".into(), None)]);
        apply(&feed, [("unknown".into(), None)]);
        assert_eq!(told(&mut subscription), [Update::Put(instance("b", 2)), Update::Remove("a".into())]);
        apply(&feed, [("b".into(), Some(instance("b", 2))), ("unknown".into(), None)]);
        assert_eq!(told(&mut subscription), []);
    }

    #[test]
    fn what_changes_together_is_told_as_steps_and_what_comes_before_what_goes() {
        let feed = feed(olds(STEPS / 2));
        let (mut quick, mut slow) = (Subscription::alone(&feed), Subscription::alone(&feed));
        quick.now();
        slow.now();
        apply(&feed, mixed(STEPS / 2, STEPS / 2));
        let steps = told(&mut quick);
        assert_eq!(steps.len(), STEPS);
        let (puts, removes) = steps.split_at(STEPS / 2);
        assert!(puts.iter().all(|step| matches!(step, Update::Put(_))), "{puts:?}");
        assert!(removes.iter().all(|step| matches!(step, Update::Remove(_))), "{removes:?}");
        put(&feed, instance("last", 1));
        assert_eq!(told(&mut quick), [Update::Put(instance("last", 1))]);
        assert_eq!(told(&mut slow).len(), STEPS + 1, "who reads later reads the same");
    }

    #[test]
    fn many_changes_at_once_are_a_reset() {
        let feed = feed(olds(STEPS));
        let mut subscription = Subscription::alone(&feed);
        subscription.now();
        apply(&feed, mixed(1, STEPS));
        assert_eq!(told(&mut subscription), [Update::Reset(vec![instance("new-0", 1)])]);
        put(&feed, instance("b", 2));
        assert_eq!(told(&mut subscription), [Update::Put(instance("b", 2))], "and then steps again");
    }

    #[test]
    fn what_goes_makes_room_for_what_comes_with_it() {
        let feed = feed(olds(MAX_INSTANCES));
        let mut subscription = Subscription::alone(&feed);
        subscription.now();
        put(&feed, instance("one-too-many", 1));
        assert_eq!(told(&mut subscription), []);
        apply(&feed, mixed(10, 10));
        assert_eq!(told(&mut subscription).len(), 20);
        assert_eq!(feed.look(InstanceSet::len), MAX_INSTANCES);
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
