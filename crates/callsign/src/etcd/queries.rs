//! One question, one answer: lists of instances and services, writing a value

use std::{collections::BTreeSet, time::Duration};

use etcd_client::KeyValue;
use serde::Serialize;

use super::{
    Etcd, ServiceError, ServiceName,
    discovery::MAX_INSTANCES,
    entry::Entry,
    lane::REQUEST,
    list::{self, Keys},
    request::RequestError,
    value::{KeyError, MAX_VALUE, ValueKey},
};
use crate::instance::Instance;

/// For one answer, all hosts that are asked for it together. A frozen host costs 3 s of it.
const LIMIT: Duration = Duration::from_secs(10);

impl Etcd {
    /// The instances of `service`, sorted by id
    ///
    /// One linearizable list: what etcd shows at this moment. To be told of changes, [`watch`](Self::watch).
    ///
    /// # Errors
    ///
    /// [`ReadError`]: a bad name at once; else within 10 s, when no host has answered or etcd refused.
    pub async fn instances(&self, service: impl Into<String>) -> Result<Vec<Instance>, ReadError> {
        let service = self.service(service)?;
        let prefix = service.prefix();
        let listed = self.kv().insist(LIMIT, async || {
            let mut instances = Vec::new();
            let on_pair = |pair: &KeyValue| match Entry::read(&prefix, pair) {
                Entry::Instance(instance) if instances.len() < MAX_INSTANCES => instances.push(instance),
                // As everywhere: what cannot be read is not there.
                _ => {}
            };
            list::list(self.kv(), &Keys::under(prefix.as_str()), on_pair).await?;
            Ok(instances)
        });
        let mut instances = listed.await.map_err(|cause| ReadError::of(&service.to_string(), &cause))?;
        instances.sort_unstable_by(|one, other| one.id.cmp(&other.id));
        Ok(instances)
    }

    /// The names of all services that have an instance, sorted
    ///
    /// Reads every key under the session's namespace, a page at a time: for people and tools, not for every call. What
    /// cannot be read as an instance names no service. At most 100 000 names.
    ///
    /// # Errors
    ///
    /// [`ReadError::Failed`] within 10 s, when no host has answered or etcd refused.
    pub async fn services(&self) -> Result<Vec<String>, ReadError> {
        let root = self.namespace().prefix();
        let listed = self.kv().insist(LIMIT, async || {
            let mut services = BTreeSet::new();
            let on_pair = |pair: &KeyValue| {
                if services.len() < MAX_INSTANCES {
                    services.extend(service_of(&root, pair, &services));
                }
            };
            list::list(self.kv(), &Keys::under(root.as_str()), on_pair).await?;
            Ok(services)
        });
        let services = listed.await.map_err(|cause| ReadError::of("all services", &cause))?;
        Ok(services.into_iter().collect())
    }

    /// Puts `value` under `key`, as JSON
    ///
    /// Returns when etcd has confirmed. Everyone who [watches](Self::watch_value) the key sees it. When a host does not
    /// answer, the next one is asked to put the same value.
    ///
    /// # Errors
    ///
    /// [`WriteError`]: bad input at once; else within 10 s, when no host has answered or etcd refused. Of a put that was not
    /// confirmed nobody knows whether it was, or will be, done.
    pub async fn put_value<T: Serialize + ?Sized>(
        &self,
        key: impl Into<String>,
        value: &T,
    ) -> Result<(), WriteError> {
        let key = ValueKey::parse(key, self.namespace())?;
        let json = encode(value).map_err(|cause| WriteError::Value { key: key.to_string(), cause })?;
        let put = self.kv().insist(LIMIT, || {
            let (key, json) = (key.key(), json.clone());
            self.kv()
                .request(REQUEST, move |client| async move { client.kv_client().put(key, json, None).await })
        });
        put.await.map(drop).map_err(|cause| WriteError::of(&key, &cause))
    }

    /// Deletes `key`, if it is there
    ///
    /// # Errors
    ///
    /// As [`put_value`](Self::put_value).
    pub async fn delete_value(&self, key: impl Into<String>) -> Result<(), WriteError> {
        let key = ValueKey::parse(key, self.namespace())?;
        let delete = self.kv().insist(LIMIT, || {
            let key = key.key();
            self.kv()
                .request(REQUEST, move |client| async move { client.kv_client().delete(key, None).await })
        });
        delete.await.map(drop).map_err(|cause| WriteError::of(&key, &cause))
    }
}

/// The service that `pair`, whose key starts with `root`, is an instance of, unless it is `known`
fn service_of(root: &str, pair: &KeyValue, known: &BTreeSet<String>) -> Option<String> {
    let key = std::str::from_utf8(pair.key()).ok()?;
    let (name, _) = key.strip_prefix(root)?.rsplit_once('/')?;
    if known.contains(name) || ServiceName::parse(name).is_err() {
        return None;
    }
    let is_instance = matches!(Entry::read(&format!("{root}{name}/"), pair), Entry::Instance(_));
    is_instance.then(|| name.to_owned())
}

fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, String> {
    let json = serde_json::to_vec(value).map_err(|error| error.to_string())?;
    match json.len() {
        size if size > MAX_VALUE => Err(format!("it has {size} bytes, more than {MAX_VALUE}")),
        _ => Ok(json),
    }
}

/// Why etcd could not be asked
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The service's name cannot be a key: use another one
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// etcd could not be reached or refused: see the cause
    #[error("{what} could not be listed: {cause}")]
    Failed {
        /// What was asked for
        what: String,
        /// What went wrong last
        cause: String,
    },
}

impl ReadError {
    fn of(what: &str, cause: &RequestError) -> Self {
        Self::Failed { what: what.to_owned(), cause: cause.to_string() }
    }
}

/// Why a value could not be written
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// Nothing can be under such a key: use another one
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The value cannot be JSON, or is larger than 1 MiB: correct it
    #[error("the value for {key} cannot be written: {cause}")]
    Value {
        /// The key
        key: String,
        /// Why
        cause: String,
    },
    /// etcd did not confirm, or refused: see the cause
    #[error("{key} was not written: {cause}")]
    Failed {
        /// The key
        key: String,
        /// What went wrong last
        cause: String,
    },
}

impl WriteError {
    fn of(key: &ValueKey, cause: &RequestError) -> Self {
        Self::Failed { key: key.to_string(), cause: cause.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::etcd::EtcdOptions;

    #[tokio::test]
    async fn bad_input_is_refused_before_any_network_call() {
        let etcd = Etcd::connect_lazy(EtcdOptions::new(["127.0.0.1:1"])).unwrap();
        assert!(matches!(etcd.instances("a/").await, Err(ReadError::Service(_))));
        assert!(matches!(etcd.put_value("", &1).await, Err(WriteError::Key(_))));
        assert!(matches!(etcd.delete_value("\n").await, Err(WriteError::Key(_))));
        let no_json = HashMap::from([((1, 2), 3)]);
        assert!(matches!(etcd.put_value("k", &no_json).await, Err(WriteError::Value { .. })));
        let large = "x".repeat(MAX_VALUE);
        let error = etcd.put_value("k", &large).await.unwrap_err().to_string();
        assert!(error.contains("1048578 bytes"), "{error}");
    }

    #[tokio::test]
    async fn who_cannot_be_asked_is_named() {
        let etcd = Etcd::connect_lazy(EtcdOptions::new(["127.0.0.1:1"])).unwrap();
        let read = etcd.instances("hello.rpc").await.unwrap_err().to_string();
        assert!(read.starts_with("hello.rpc could not be listed") && read.contains("refused"), "{read}");
        let write = etcd.put_value("config", &1).await.unwrap_err().to_string();
        assert!(write.starts_with("config was not written") && write.contains("refused"), "{write}");
    }
}
