//! Reading a list, and one warning for each key that cannot be read

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use etcd_client::KeyValue;
use metrics::Counter;
use tokio::time::Instant;

use super::set::MAX_INSTANCES;
use crate::{
    etcd::entry::{Entry, Garbage, Shown},
    instance::Instance,
};

/// A key that comes and goes is warned of once in this time.
const AGAIN: Duration = Duration::from_secs(60);

/// Which keys were warned of
///
/// Keys are kept as hashes, whose number is bounded: garbage in etcd must not become garbage here.
#[derive(Debug)]
pub(super) struct Warned {
    keys: HashMap<u64, Warning>,
    hasher: RandomState,
    skipped: Counter,
}

#[derive(Debug)]
struct Warning {
    at: Instant,
    /// Whether the key has gone since: should it come back as garbage, that is news, if not too soon
    is_gone: bool,
}

impl Warning {
    fn is_recent(&self) -> bool {
        self.at.elapsed() < AGAIN
    }
}

impl Warned {
    pub(super) fn new(skipped: Counter) -> Self {
        Self { keys: HashMap::new(), hasher: RandomState::new(), skipped }
    }

    pub(super) fn warn(&mut self, key: &[u8], garbage: &Garbage) {
        if self.is_news(key) {
            self.skipped.increment(1);
            tracing::warn!(key = %Shown(key), reason = %garbage, "skipping a key that is no instance");
        }
    }

    fn is_news(&mut self, key: &[u8]) -> bool {
        let hash = self.hasher.hash_one(key);
        let known = self.keys.get(&hash);
        let is_news =
            known.map_or(self.keys.len() < MAX_INSTANCES, |known| known.is_gone && !known.is_recent());
        if is_news {
            self.keys.insert(hash, Warning { at: Instant::now(), is_gone: false });
        }
        is_news
    }

    /// The key is gone
    pub(super) fn forget(&mut self, key: &[u8]) {
        if let Some(warning) = self.keys.get_mut(&self.hasher.hash_one(key)) {
            warning.is_gone = true;
        }
    }

    /// All but these are gone
    fn retain(&mut self, present: &HashSet<u64>) {
        self.keys.retain(|key, warning| {
            warning.is_gone |= !present.contains(key);
            !warning.is_gone || warning.is_recent()
        });
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
        warned.retain(&self.garbage);
        self.instances
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_key_is_warned_of_once_until_it_is_gone() {
        let mut warned = Warned::new(Counter::noop());
        warned.warn(b"a/1", &Garbage::NotText);
        assert!(!warned.is_news(b"a/1") && warned.is_news(b"a/2"));
        warned.forget(b"a/1");
        advance(AGAIN).await;
        assert!(warned.is_news(b"a/1") && !warned.is_news(b"a/2"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_that_comes_and_goes_is_warned_of_once_a_minute() {
        let mut warned = Warned::new(Counter::noop());
        let mut warnings = 0;
        for _ in 0..300 {
            warnings += u32::from(warned.is_news(b"a/1"));
            warned.forget(b"a/1");
            advance(Duration::from_secs(1)).await;
        }
        assert_eq!(warnings, 5);
        for _ in 0..300 {
            warnings += u32::from(warned.is_news(b"a/1"));
            Reading::default().finish(&mut warned);
            advance(Duration::from_secs(1)).await;
        }
        assert_eq!(warnings, 10, "lists in which it is not are no way around");
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_warns_of_what_is_new_and_forgets_what_is_not_in_it() {
        let mut warned = Warned::new(Counter::noop());
        let mut reading = Reading::default();
        for key in [b"a/1", b"a/2"] {
            reading.on_garbage(key, &Garbage::NotText, &mut warned);
        }
        reading.finish(&mut warned);
        assert!(!warned.is_news(b"a/1") && !warned.is_news(b"a/2"));
        advance(AGAIN).await;
        let mut reading = Reading::default();
        reading.on_garbage(b"a/2", &Garbage::NotText, &mut warned);
        reading.finish(&mut warned);
        assert_eq!(warned.keys.len(), 1, "what is gone for long is not kept");
        assert!(warned.is_news(b"a/1") && !warned.is_news(b"a/2"));
    }
}
