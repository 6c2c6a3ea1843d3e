//! Instances grouped by address: what a channel calls an endpoint

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque, hash_map},
    sync::Arc,
};

use tower::discover::Change;

use crate::{
    etcd::Update,
    instance::{Address, Instance},
};

pub(super) type Changes = VecDeque<Change<Address, Instance>>;

/// Turns updates of instances into changes of endpoints
///
/// Instances with one address are one endpoint, shown as the instance with the newest revision: when that leaves, as the
/// newest of the rest. The endpoint goes when its last instance does. Whenever another instance is shown, or the same with
/// other content, the endpoint is inserted again.
///
/// `h:1` is for whatever its channel speaks, so it stands for `http://h:1` and `https://h:1` as well: a server that registers
/// in two layouts is one endpoint. Without it those two are endpoints of their own, and each channel takes one of them.
#[derive(Debug, Default)]
pub(super) struct ByAddress {
    /// By id
    instances: HashMap<Arc<str>, Instance>,
    endpoints: HashMap<Address, Endpoint>,
}

/// Which of several instances with one address is shown: the greatest. The id makes it certain
type Rank = (i64, Arc<str>);

#[derive(Debug)]
struct Endpoint {
    shown: Rank,
    /// Hardly ever any; an empty set allocates nothing
    others: BTreeSet<Rank>,
}

/// What was shown at the addresses that an update touches
type Before = BTreeMap<Address, Option<Instance>>;

impl ByAddress {
    /// Applies `updates` together and adds what they change to `changes`
    ///
    /// What comes is told before what leaves, so that instances that move, or change places, never leave a gap.
    pub(super) fn apply(&mut self, updates: impl IntoIterator<Item = Update>, changes: &mut Changes) {
        let mut before = Before::new();
        for update in updates {
            match update {
                Update::Put(instance) => self.put(instance, &mut before),
                Update::Remove(id) => self.remove(&id, &mut before),
                Update::Reset(set) => self.reset(set, &mut before),
            }
        }
        self.tell(before, changes);
    }

    fn reset(&mut self, set: Vec<Instance>, before: &mut Before) {
        let mut gone: HashSet<_> = self.instances.keys().cloned().collect();
        for instance in set {
            gone.remove(&instance.id);
            self.put(instance, before);
        }
        gone.iter().for_each(|id| self.remove(id, before));
    }

    /// Each address once, however much happened there
    fn tell(&self, before: Before, changes: &mut Changes) {
        let mut gone = Vec::new();
        for (address, before) in before {
            match self.shown(&address) {
                None if before.is_some() => gone.push(Change::Remove(address)),
                Some(now) if before.as_ref() != Some(now) => {
                    changes.push_back(Change::Insert(address, now.clone()));
                }
                _ => {}
            }
        }
        changes.extend(gone);
    }

    fn shown(&self, address: &Address) -> Option<&Instance> {
        let endpoint = self.endpoints.get(address)?;
        if !address.is_bare() && self.endpoints.contains_key(&address.bare()) {
            return None;
        }
        self.instances.get(&endpoint.shown.1)
    }

    fn put(&mut self, instance: Instance, before: &mut Before) {
        if self.instances.get(&instance.id) == Some(&instance) {
            return;
        }
        self.remove(&instance.id, before);
        self.touch(&instance.address, before);
        let rank = rank(&instance);
        match self.endpoints.entry(instance.address.clone()) {
            hash_map::Entry::Occupied(mut endpoint) => endpoint.get_mut().add(rank),
            hash_map::Entry::Vacant(empty) => {
                empty.insert(Endpoint { shown: rank, others: BTreeSet::new() });
            }
        }
        self.instances.insert(Arc::clone(&instance.id), instance);
    }

    fn remove(&mut self, id: &str, before: &mut Before) {
        let Some(address) = self.instances.get(id).map(|instance| instance.address.clone()) else { return };
        self.touch(&address, before);
        let Some(instance) = self.instances.remove(id) else { return };
        let hash_map::Entry::Occupied(mut endpoint) = self.endpoints.entry(address) else { return };
        if !endpoint.get_mut().remove(&rank(&instance)) {
            endpoint.remove();
        }
    }

    /// Keeps what is shown at `address`, and at those that it may stand for, unless they were touched before
    fn touch(&self, address: &Address, before: &mut Before) {
        self.keep(address, before);
        if address.is_bare() {
            let others =
                address.with_schemes().into_iter().filter(|other| self.endpoints.contains_key(other));
            others.for_each(|other| self.keep(&other, before));
        }
    }

    fn keep(&self, address: &Address, before: &mut Before) {
        if !before.contains_key(address) {
            before.insert(address.clone(), self.shown(address).cloned());
        }
    }
}

fn rank(instance: &Instance) -> Rank {
    (instance.mod_revision, Arc::clone(&instance.id))
}

impl Endpoint {
    fn add(&mut self, rank: Rank) {
        let other = if rank > self.shown { std::mem::replace(&mut self.shown, rank) } else { rank };
        self.others.insert(other);
    }

    /// Whether there is an instance left
    fn remove(&mut self, rank: &Rank) -> bool {
        if *rank != self.shown {
            self.others.remove(rank);
            return true;
        }
        let next = self.others.pop_last();
        let left = next.is_some();
        self.shown = next.unwrap_or_else(|| rank.clone());
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::Metadata;

    fn instance(id: &str, port: u16, mod_revision: i64) -> Instance {
        Instance { id: id.into(), mod_revision, ..Instance::new(Address::new("h", port).unwrap()) }
    }

    /// Applies the updates one by one and writes down the changes: `+port@revision`, `-port`
    fn changes(state: &mut ByAddress, updates: impl IntoIterator<Item = Update>) -> Vec<String> {
        let mut changes = Changes::new();
        for update in updates {
            state.apply([update], &mut changes);
        }
        written(changes)
    }

    /// The same with updates that come together
    fn together(state: &mut ByAddress, updates: impl IntoIterator<Item = Update>) -> Vec<String> {
        let mut changes = Changes::new();
        state.apply(updates, &mut changes);
        written(changes)
    }

    fn written(changes: Changes) -> Vec<String> {
        let shown = changes.into_iter().map(|change| match change {
            Change::Insert(key, instance) => {
                assert_eq!(key, instance.address);
                format!("+{}@{}", key.port(), instance.mod_revision)
            }
            Change::Remove(key) => format!("-{}", key.port()),
        });
        shown.collect()
    }

    fn put(id: &str, port: u16, revision: i64) -> Update {
        Update::Put(instance(id, port, revision))
    }

    fn remove(id: &str) -> Update {
        Update::Remove(id.into())
    }

    const NOTHING: [&str; 0] = [];

    #[test]
    fn an_address_stays_until_its_last_instance_leaves() {
        let mut state = ByAddress::default();
        assert_eq!(
            changes(&mut state, [put("a", 1, 5), put("b", 1, 4)]),
            ["+1@5"],
            "the older one changes nothing"
        );
        assert_eq!(changes(&mut state, [remove("b")]), NOTHING);
        assert_eq!(changes(&mut state, [remove("a"), remove("a")]), ["-1"]);
        assert!(state.endpoints.is_empty() && state.instances.is_empty());
    }

    #[test]
    fn a_newer_mod_revision_inserts_a_known_address_again() {
        let mut state = ByAddress::default();
        assert_eq!(changes(&mut state, [put("a", 1, 5), put("b", 1, 6), put("a", 1, 5)]), ["+1@5", "+1@6"]);
        assert_eq!(changes(&mut state, [put("a", 1, 7)]), ["+1@7"], "a re-registered instance");
        assert_eq!(state.endpoints.len(), 1);
    }

    #[test]
    fn when_the_newest_leaves_the_newest_of_the_rest_is_shown() {
        let mut state = ByAddress::default();
        changes(&mut state, [put("a", 1, 5), put("b", 1, 7), put("c", 1, 6), put("d", 1, 4)]);
        assert_eq!(changes(&mut state, [remove("b")]), ["+1@6"]);
        assert_eq!(changes(&mut state, [remove("a"), remove("c")]), ["+1@4"]);
        assert_eq!(changes(&mut state, [put("d", 2, 8)]), ["+2@8", "-1"]);
        assert_eq!(changes(&mut state, [remove("d")]), ["-2"]);
    }

    #[test]
    fn the_metadata_of_the_one_that_is_shown_is_told_when_it_changes() {
        let mut state = ByAddress::default();
        let heavy = |id, revision, weight| {
            let metadata = Metadata::new().with_weight(weight);
            Update::Put(Instance { metadata, ..instance(id, 1, revision) })
        };
        let mut changes = Changes::new();
        for update in [heavy("a", 5, 2), heavy("b", 6, 3), heavy("a", 5, 9), remove("b"), heavy("a", 5, 4)] {
            state.apply([update], &mut changes);
        }
        let weights = changes.into_iter().map(|change| match change {
            Change::Insert(_, instance) => instance.metadata.weight(),
            Change::Remove(_) => panic!("the endpoint was there all the time"),
        });
        // The last one has the revision of the one before, as after a wiped etcd.
        assert_eq!(weights.collect::<Vec<_>>(), [2, 3, 9, 4]);
    }

    #[test]
    fn an_instance_that_moves_leaves_its_old_address_after_it_has_the_new_one() {
        let mut state = ByAddress::default();
        changes(&mut state, [put("a", 2, 5)]);
        assert_eq!(changes(&mut state, [put("a", 1, 5)]), ["+1@5", "-2"]);
        assert_eq!(changes(&mut state, [put("a", 2, 5)]), ["+2@5", "-1"]);
        assert_eq!(changes(&mut state, [Update::Reset(vec![instance("a", 3, 5)])]), ["+3@5", "-2"]);
    }

    #[test]
    fn instances_that_change_places_together_leave_no_gap() {
        let mut state = ByAddress::default();
        changes(&mut state, [put("a", 1, 1), put("b", 2, 2), put("c", 3, 3)]);
        assert_eq!(together(&mut state, [put("a", 2, 4), put("b", 1, 5)]), ["+1@5", "+2@4"]);
        // Restarted under a new id, the removal being read first.
        assert_eq!(together(&mut state, [remove("c"), put("d", 3, 7)]), ["+3@7"]);
        assert_eq!(together(&mut state, [put("e", 4, 8), remove("e")]), NOTHING);
    }

    #[test]
    fn a_reset_is_told_as_its_difference() {
        let mut state = ByAddress::default();
        let first = vec![instance("a", 1, 1), instance("b", 2, 2), instance("c", 2, 3)];
        assert_eq!(
            changes(&mut state, [Update::Reset(first.clone())]),
            ["+1@1", "+2@3"],
            "each address once"
        );
        assert_eq!(changes(&mut state, [Update::Reset(first)]), NOTHING);
        let second = vec![instance("c", 2, 3), instance("d", 4, 4)];
        assert_eq!(changes(&mut state, [Update::Reset(second)]), ["+4@4", "-1"]);
        assert_eq!(changes(&mut state, [Update::Reset(vec![])]), ["-2", "-4"]);
        assert!(state.endpoints.is_empty());
    }

    /// The changes as `+address` and `-address`, schemes included
    fn schemed(state: &mut ByAddress, updates: impl IntoIterator<Item = Update>) -> Vec<String> {
        let mut changes = Changes::new();
        state.apply(updates, &mut changes);
        let scheme = |address: &Address| match (address.is_http(), address.is_https()) {
            (true, _) => "http://",
            (_, true) => "https://",
            _ => "",
        };
        let written = changes.into_iter().map(|change| match change {
            Change::Insert(key, _) => format!("+{}{key}", scheme(&key)),
            Change::Remove(key) => format!("-{}{key}", scheme(&key)),
        });
        written.collect()
    }

    fn at(id: &str, address: &str, revision: i64) -> Update {
        let address = address.parse().unwrap();
        Update::Put(Instance { id: id.into(), mod_revision: revision, ..Instance::new(address) })
    }

    #[test]
    fn a_server_that_is_registered_with_and_without_a_scheme_is_one_endpoint() {
        let mut state = ByAddress::default();
        let both = [at("a", "http://h:1", 2), at("b", "h:1", 1)];
        assert_eq!(schemed(&mut state, both), ["+h:1"]);
        assert_eq!(schemed(&mut state, [at("a", "http://h:1", 3)]), NOTHING, "registered anew");
        assert_eq!(schemed(&mut state, [remove("b")]), ["+http://h:1", "-h:1"]);
        assert_eq!(schemed(&mut state, [at("b", "h:1", 4)]), ["+h:1", "-http://h:1"]);
        assert_eq!(
            schemed(&mut state, [remove("a"), at("a", "http://h:1", 5), remove("b")]),
            ["+http://h:1", "-h:1"]
        );
        assert_eq!(schemed(&mut state, [remove("a")]), ["-http://h:1"]);
    }

    #[test]
    fn plaintext_and_tls_at_one_port_are_for_the_channel_to_choose_from() {
        let mut state = ByAddress::default();
        let both = [at("a", "http://h:1", 1), at("b", "https://h:1", 2)];
        assert_eq!(schemed(&mut state, both), ["+http://h:1", "+https://h:1"]);
        assert_eq!(schemed(&mut state, [at("c", "h:1", 3)]), ["+h:1", "-http://h:1", "-https://h:1"]);
        assert_eq!(schemed(&mut state, [Update::Reset(Vec::new())]), ["-h:1"]);
    }

    #[test]
    fn revisions_that_went_backwards_are_told_as_they_are() {
        let mut state = ByAddress::default();
        changes(&mut state, [Update::Reset(vec![instance("a", 1, 500), instance("b", 2, 501)])]);
        let wiped = vec![instance("a", 1, 3), instance("c", 2, 4)];
        assert_eq!(changes(&mut state, [Update::Reset(wiped)]), ["+1@3", "+2@4"]);
    }

    #[test]
    fn one_address_under_a_new_id_is_the_same_endpoint() {
        let mut state = ByAddress::default();
        changes(&mut state, [put("a", 1, 5)]);
        // A server that restarted before its old key ended.
        assert_eq!(changes(&mut state, [put("b", 1, 9), remove("a")]), ["+1@9"]);
    }
}
