//! Names of services, and the keys under them

use std::{fmt, sync::Arc};

/// A service's name that can be a key prefix: not empty, no `/` at either end, no control characters
///
/// Inner slashes are part of the name (`team/hello.rpc`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ServiceName(Arc<str>);

impl ServiceName {
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
        Ok(Self(name.into()))
    }

    /// The key of one instance
    pub(crate) fn key(&self, id: i64) -> String {
        format!("{}/{id}", self.0)
    }

    /// What the keys of all instances start with
    ///
    /// The slash at its end keeps `hello` and `hello_other` apart.
    pub(crate) fn prefix(&self) -> String {
        format!("{}/", self.0)
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
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
    }
}
