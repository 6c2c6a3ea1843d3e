//! Names of services, and the keys under them

use std::{fmt, sync::Arc};

use super::EtcdError;

/// What stands before every key of a session; by default nothing
///
/// Cheap to clone. `/service` makes `/service/hello.rpc/7` of the key `hello.rpc/7`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Namespace(Arc<str>);

impl Namespace {
    /// A namespace; an empty one is none
    pub(crate) fn parse(namespace: &str) -> Result<Self, EtcdError> {
        let error = |reason| EtcdError::Namespace { namespace: namespace.escape_debug().to_string(), reason };
        if namespace.ends_with('/') {
            return Err(error("it ends with a slash, which is put behind it anyway"));
        }
        if namespace.chars().any(char::is_control) {
            return Err(error("it contains control characters"));
        }
        Ok(Self(namespace.into()))
    }

    /// `key` in this namespace
    pub(crate) fn key(&self, key: &str) -> String {
        if self.0.is_empty() { key.to_owned() } else { format!("{}/{key}", self.0) }
    }
}

/// A service's name that can be a key prefix: not empty, no `/` at either end, no control characters
///
/// Inner slashes are part of the name (`team/hello.rpc`). It knows the namespace that its keys are in; shown is the name
/// alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ServiceName {
    namespace: Namespace,
    name: Arc<str>,
}

impl ServiceName {
    /// A name in no namespace; `Etcd::service` gives one in the session's
    pub(crate) fn parse(name: impl Into<String>) -> Result<Self, ServiceError> {
        let name = name.into();
        let error = |reason| ServiceError { name: name.escape_debug().to_string(), reason };
        if name.is_empty() {
            return Err(error("it is empty"));
        }
        if name.starts_with('/') || name.ends_with('/') {
            return Err(error("it starts or ends with a slash"));
        }
        if name.chars().any(char::is_control) {
            return Err(error("it contains control characters"));
        }
        Ok(Self { namespace: Namespace::default(), name: name.into() })
    }

    /// The same name in a namespace
    pub(crate) fn within(self, namespace: &Namespace) -> Self {
        Self { namespace: namespace.clone(), ..self }
    }

    /// The key of one instance
    pub(crate) fn key(&self, id: i64) -> String {
        format!("{}{id}", self.prefix())
    }

    /// What the keys of all instances start with
    ///
    /// The slash at its end keeps `hello` and `hello_other` apart.
    pub(crate) fn prefix(&self) -> String {
        format!("{}/", self.namespace.key(&self.name))
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Why a text is no name of a service
///
/// The name was refused before anything was sent; use another one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad service name \"{name}\": {reason}")]
pub struct ServiceError {
    name: String,
    reason: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_prefix_of_its_keys_only() {
        let name = ServiceName::parse("team/hello.rpc").unwrap();
        assert_eq!((name.prefix().as_str(), name.key(7).as_str()), ("team/hello.rpc/", "team/hello.rpc/7"));
    }

    #[test]
    fn a_namespace_stands_before_every_key() {
        let namespace = Namespace::parse("/service").unwrap();
        let name = ServiceName::parse("hello.rpc").unwrap().within(&namespace);
        assert_eq!(
            (name.prefix().as_str(), name.key(7).as_str()),
            ("/service/hello.rpc/", "/service/hello.rpc/7")
        );
        assert_eq!(namespace.key("config/hello"), "/service/config/hello");
        assert_eq!(Namespace::parse("").unwrap().key("a"), "a", "an empty namespace is none");
        assert_ne!(name, ServiceName::parse("hello.rpc").unwrap(), "two namespaces share no watch");
    }

    #[test]
    fn what_cannot_be_a_prefix_says_why() {
        for (name, reason) in [
            ("", "empty"),
            ("/a", "slash"),
            ("a/", "slash"),
            ("/", "slash"),
            ("a\nb", "control"),
            ("\0", "control"),
        ] {
            let error = ServiceName::parse(name).unwrap_err().to_string();
            assert!(error.contains(reason), "{name:?}: {error}");
            assert!(!error.contains('\n'), "control characters are escaped");
        }
        for (namespace, reason) in [("/", "slash"), ("/a/", "slash"), ("a\nb", "control")] {
            let error = Namespace::parse(namespace).unwrap_err().to_string();
            assert!(error.contains(reason) && !error.contains('\n'), "{namespace:?}: {error}");
        }
    }
}
