//! Reading a list, and one warning for each key that cannot be read

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

use etcd_client::KeyValue;

use super::set::MAX_INSTANCES;
use crate::{
    etcd::entry::{Entry, Garbage, Shown},
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
    pub(super) fn warn(&mut self, key: &[u8], garbage: &Garbage) {
        if self.is_news(key) {
            tracing::warn!(key = %Shown(key), reason = %garbage, "skipping a key that is no instance");
        }
    }

    fn is_news(&mut self, key: &[u8]) -> bool {
        self.keys.len() < MAX_INSTANCES && self.keys.insert(self.hasher.hash_one(key))
    }

    /// The key is gone: should it come back as garbage, that is news
    pub(super) fn forget(&mut self, key: &[u8]) {
        self.keys.remove(&self.hasher.hash_one(key));
    }
}

/// A list on its way in
#[derive(Debug, Default)]
pub(super) struct Reading {
    instances: HashMap<Arc<str>, Instance>,
    garbage: HashSet<u64>,
}

impl Reading {
    /// Takes in a pair, whose key starts with `prefix`
    pub(super) fn on_pair(&mut self, prefix: &str, pair: &KeyValue, warned: &mut Warned) {
        match Entry::read(prefix, pair) {
            Entry::Instance(instance) if self.instances.len() < MAX_INSTANCES => {
                self.instances.insert(Arc::clone(&instance.id), instance);
            }
            Entry::Instance(_) | Entry::Foreign => {}
            Entry::Garbage(reason) => self.on_garbage(pair.key(), &reason, warned),
        }
    }

    fn on_garbage(&mut self, key: &[u8], reason: &Garbage, warned: &mut Warned) {
        warned.warn(key, reason);
        if self.garbage.len() < MAX_INSTANCES {
            self.garbage.insert(warned.hasher.hash_one(key));
        }
    }

    /// The instances; forgets the warnings of keys that are no longer there
    pub(super) fn finish(self, warned: &mut Warned) -> HashMap<Arc<str>, Instance> {
        warned.keys.retain(|key| self.garbage.contains(key));
        self.instances
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_warned_of_once_until_it_is_gone() {
        let mut warned = Warned::default();
        warned.warn(b"a/1", &Garbage::NotText);
        assert!(!warned.is_news(b"a/1") && warned.is_news(b"a/2"));
        warned.forget(b"a/1");
        assert!(warned.is_news(b"a/1"));
    }

    #[test]
    fn a_list_warns_of_what_is_new_and_forgets_what_is_not_in_it() {
        let mut warned = Warned::default();
        let mut reading = Reading::default();
        for key in [b"a/1", b"a/2"] {
            reading.on_garbage(key, &Garbage::NotText, &mut warned);
        }
        reading.finish(&mut warned);
        assert!(!warned.is_news(b"a/1") && !warned.is_news(b"a/2"));
        let mut reading = Reading::default();
        reading.on_garbage(b"a/2", &Garbage::NotText, &mut warned);
        reading.finish(&mut warned);
        assert!(warned.is_news(b"a/1") && !warned.is_news(b"a/2"));
    }
}
