//! Reading a list, and one warning for each key that cannot be read

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use super::list::List;
use crate::{
    etcd::entry::{Entry, Garbage, Shown},
    etcd::feed::MAX_INSTANCES,
    instance::Instance,
};

/// Which keys were warned of
///
/// Keys are kept as hashes, whose number is bounded: garbage in etcd must not become garbage here.
#[derive(Debug, Default)]
pub(super) struct Warned {
    keys: HashSet<u64>,
    hasher: RandomState,
}

impl Warned {
    /// The instances in `list`; warns of the rest and forgets the keys that are no longer there
    pub(super) fn read(&mut self, prefix: &str, list: List) -> HashMap<Arc<str>, Instance> {
        let mut garbage = HashSet::new();
        let mut instances = HashMap::new();
        for pair in list.pairs {
            match Entry::read(prefix, &pair) {
                Entry::Instance(instance) if instances.len() < MAX_INSTANCES => {
                    instances.insert(Arc::clone(&instance.id), instance);
                }
                Entry::Instance(_) | Entry::Foreign => {}
                Entry::Garbage(reason) => {
                    self.warn(pair.key(), &reason);
                    garbage.insert(self.hasher.hash_one(pair.key()));
                }
            }
        }
        self.keys.retain(|key| garbage.contains(key));
        instances
    }

    pub(super) fn warn(&mut self, key: &[u8], garbage: &Garbage) {
        let full = self.keys.len() >= MAX_INSTANCES;
        if !full && self.keys.insert(self.hasher.hash_one(key)) {
            tracing::warn!(key = %Shown(key), reason = %garbage, "skipping a key that is no instance");
        }
    }

    /// The key is gone: should it come back as garbage, that is news
    pub(super) fn forget(&mut self, key: &[u8]) {
        self.keys.remove(&self.hasher.hash_one(key));
    }
}
