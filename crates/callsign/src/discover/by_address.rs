//! Instances grouped by address: what a channel calls an endpoint

use std::{
    collections::{HashMap, VecDeque, hash_map},
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
/// Instances with one address are one endpoint, shown as the instance with the newest revision. The endpoint goes
/// when its last instance does; a newer revision, which is a server that has registered anew, inserts it again.
#[derive(Debug, Default)]
pub(super) struct ByAddress {
    /// By id
    instances: HashMap<Arc<str>, Instance>,
    endpoints: HashMap<Address, Endpoint>,
}

#[derive(Debug, Default)]
struct Endpoint {
    instances: usize,
    /// Newest revision ever shown
    newest: i64,
}

impl ByAddress {
    /// Applies `update` and adds what it changes to `changes`
    ///
    /// What comes goes in before what leaves, so that a moved instance never leaves a gap.
    pub(super) fn apply(&mut self, update: Update, changes: &mut Changes) {
        match update {
            Update::Put(instance) => {
                let former = self.put(instance, changes);
                self.release(former, changes);
            }
            Update::Remove(id) => {
                let former = self.instances.remove(&id);
                self.release(former, changes);
            }
            Update::Reset(set) => self.reset(set, changes),
        }
    }

    fn reset(&mut self, set: Vec<Instance>, changes: &mut Changes) {
        let mut former = std::mem::take(&mut self.instances);
        let mut moved = Vec::new();
        for instance in set {
            match former.remove(&instance.id) {
                Some(same) if same == instance => drop(self.instances.insert(Arc::clone(&instance.id), same)),
                known => {
                    moved.extend(known);
                    self.put(instance, changes);
                }
            }
        }
        for gone in moved.into_iter().chain(former.into_values()) {
            self.release(Some(gone), changes);
        }
    }

    /// Adds an instance; returns what had its id before, still counted
    fn put(&mut self, instance: Instance, changes: &mut Changes) -> Option<Instance> {
        let endpoint = self.endpoints.entry(instance.address.clone()).or_default();
        let newer = instance.mod_revision > endpoint.newest;
        if endpoint.instances == 0 || newer {
            endpoint.newest = instance.mod_revision;
            changes.push_back(Change::Insert(instance.address.clone(), instance.clone()));
        }
        endpoint.instances += 1;
        self.instances.insert(Arc::clone(&instance.id), instance)
    }

    /// Takes an instance off its endpoint's count
    fn release(&mut self, instance: Option<Instance>, changes: &mut Changes) {
        let Some(Instance { address, .. }) = instance else { return };
        let hash_map::Entry::Occupied(mut endpoint) = self.endpoints.entry(address) else { return };
        endpoint.get_mut().instances -= 1;
        if endpoint.get().instances == 0 {
            changes.push_back(Change::Remove(endpoint.remove_entry().0));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(id: &str, port: u16, mod_revision: i64) -> Instance {
        Instance { id: id.into(), address: Address::new("h", port).unwrap(), mod_revision }
    }

    /// Applies the updates and writes down the changes: `+port@revision`, `-port`
    fn changes(state: &mut ByAddress, updates: impl IntoIterator<Item = Update>) -> Vec<String> {
        let mut changes = Changes::new();
        for update in updates {
            state.apply(update, &mut changes);
        }
        let shown = changes.into_iter().map(|change| match change {
            Change::Insert(key, instance) => format!("+{}@{}", key.port(), instance.mod_revision),
            Change::Remove(key) => format!("-{}", key.port()),
        });
        shown.collect()
    }

    fn put(id: &str, port: u16, revision: i64) -> Update {
        Update::Put(instance(id, port, revision))
    }

    #[test]
    fn an_address_stays_until_its_last_instance_leaves() {
        let mut state = ByAddress::default();
        assert_eq!(
            changes(&mut state, [put("a", 1, 5), put("b", 1, 4)]),
            ["+1@5"],
            "the older one changes nothing"
        );
        assert_eq!(changes(&mut state, [Update::Remove("a".into())]), Vec::<String>::new());
        assert_eq!(changes(&mut state, [Update::Remove("b".into()), Update::Remove("b".into())]), ["-1"]);
        assert!(state.endpoints.is_empty() && state.instances.is_empty());
    }

    #[test]
    fn a_newer_mod_revision_inserts_a_known_address_again() {
        let mut state = ByAddress::default();
        assert_eq!(changes(&mut state, [put("a", 1, 5), put("b", 1, 6), put("a", 1, 5)]), ["+1@5", "+1@6"]);
        assert_eq!(changes(&mut state, [put("a", 1, 7)]), ["+1@7"], "a re-registered instance");
        assert_eq!(state.endpoints[&Address::new("h", 1).unwrap()].instances, 2);
    }

    #[test]
    fn an_instance_that_moves_leaves_its_old_address_after_it_has_the_new_one() {
        let mut state = ByAddress::default();
        changes(&mut state, [put("a", 1, 5)]);
        assert_eq!(changes(&mut state, [put("a", 2, 5)]), ["+2@5", "-1"]);
        assert_eq!(changes(&mut state, [Update::Reset(vec![instance("a", 3, 5)])]), ["+3@5", "-2"]);
    }

    #[test]
    fn a_reset_is_told_as_its_difference() {
        let mut state = ByAddress::default();
        let first = vec![instance("a", 1, 1), instance("b", 2, 2), instance("c", 2, 3)];
        assert_eq!(changes(&mut state, [Update::Reset(first.clone())]).len(), 3);
        assert_eq!(changes(&mut state, [Update::Reset(first)]), Vec::<String>::new());
        let second = vec![instance("c", 2, 3), instance("d", 4, 4)];
        assert_eq!(changes(&mut state, [Update::Reset(second)]), ["+4@4", "-1"]);
        assert_eq!(changes(&mut state, [Update::Reset(vec![])]).len(), 2);
        assert!(state.endpoints.is_empty());
    }

    #[test]
    fn one_address_under_a_new_id_is_the_same_endpoint() {
        let mut state = ByAddress::default();
        changes(&mut state, [put("a", 1, 5)]);
        // A server that restarted before its old key ended.
        assert_eq!(changes(&mut state, [put("b", 1, 9), Update::Remove("a".into())]), ["+1@9"]);
    }
}
