//! Keys of values

use std::{fmt, sync::Arc};

use crate::etcd::Namespace;

/// A key that a value can be under: not empty, no control characters
///
/// It knows the namespace that it is in; shown is what the user calls it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(in crate::etcd) struct ValueKey {
    name: Arc<str>,
    /// With the namespace
    key: Arc<str>,
}

impl ValueKey {
    pub(in crate::etcd) fn parse(name: impl Into<String>, namespace: &Namespace) -> Result<Self, KeyError> {
        let name = name.into();
        let error = |reason| KeyError { key: name.escape_debug().to_string(), reason };
        if name.is_empty() {
            return Err(error("it is empty"));
        }
        if name.chars().any(char::is_control) {
            return Err(error("it contains control characters"));
        }
        Ok(Self { key: namespace.key(&name).into(), name: name.into() })
    }

    /// As etcd knows it
    pub(in crate::etcd) fn key(&self) -> &str {
        &self.key
    }
}

impl fmt::Display for ValueKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Why a text is no key of a value
///
/// The key was refused before anything was sent; use another one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad key \"{key}\": {reason}")]
pub struct KeyError {
    key: String,
    reason: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_in_its_namespace_and_shown_without_it() {
        let namespace = Namespace::parse("/service").unwrap();
        let key = ValueKey::parse("config/hello", &namespace).unwrap();
        assert_eq!((key.key(), key.to_string().as_str()), ("/service/config/hello", "config/hello"));
    }

    #[test]
    fn what_can_be_no_key_says_why() {
        for (key, reason) in [("", "empty"), ("a\u{1b}[2J", "control")] {
            let error = ValueKey::parse(key, &Namespace::default()).unwrap_err().to_string();
            assert!(error.contains(reason), "{key:?}: {error}");
            assert!(!error.contains('\u{1b}'), "control characters are escaped");
        }
    }
}
