//! What a channel connects to, as a text

use std::str::FromStr;

use crate::instance::{Address, AddressError};

/// A service to look up in etcd, or a list of addresses
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// `hello.rpc`, or `etcd:///h1:2379,h2:2379?key=hello.rpc` with its own hosts
    Etcd { hosts: Vec<String>, service: String },
    /// `direct:///h1:9090,h2:9091`
    Direct(Vec<Address>),
}

/// Why a text is no target of a channel
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TargetError {
    /// There is no service name: give one, or `?key=` in an `etcd:///` target
    #[error("the service name is missing in target {0:?}")]
    NoService(String),
    /// There is not a single host
    #[error("no hosts in target {0:?}")]
    NoHosts(String),
    /// The scheme is neither `etcd` nor `direct`
    #[error("target {0:?} is neither a service name, etcd:///hosts?key=name nor direct:///addresses")]
    Scheme(String),
    /// One of the addresses is none: correct it
    #[error("target {target:?}: {cause}")]
    Address {
        /// The whole target
        target: String,
        /// What is wrong with the address
        cause: AddressError,
    },
    /// An address asks for TLS, which is not supported yet: use `http://` or no scheme
    #[error("target {0:?} asks for https, which is not supported yet")]
    Https(String),
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(target: &str) -> Result<Self, TargetError> {
        let shown = || redacted(target);
        match target.split_once(":///") {
            None if target.contains("://") => Err(TargetError::Scheme(shown())),
            None if target.trim().is_empty() => Err(TargetError::NoService(shown())),
            None => Ok(Self::Etcd { hosts: Vec::new(), service: target.to_owned() }),
            Some(("direct", hosts)) => {
                let parse = |host: &str| {
                    host.parse().map_err(|cause| TargetError::Address { target: shown(), cause })
                };
                let addresses: Vec<_> = listed(hosts).map(parse).collect::<Result<_, _>>()?;
                if addresses.is_empty() {
                    return Err(TargetError::NoHosts(shown()));
                }
                // Going on in plaintext would be a silent downgrade.
                if addresses.iter().any(Address::is_https) {
                    return Err(TargetError::Https(shown()));
                }
                Ok(Self::Direct(addresses))
            }
            Some(("etcd", rest)) => {
                let (hosts, query) = rest.split_once('?').unwrap_or((rest, ""));
                let key = query.split('&').find_map(|pair| pair.strip_prefix("key="));
                let service = key.map(unescape).filter(|key| !key.is_empty());
                let service = service.ok_or_else(|| TargetError::NoService(shown()))?;
                let hosts: Vec<_> = listed(hosts).map(str::to_owned).collect();
                if hosts.is_empty() {
                    Err(TargetError::NoHosts(shown()))
                } else {
                    Ok(Self::Etcd { hosts, service })
                }
            }
            Some(_) => Err(TargetError::Scheme(shown())),
        }
    }
}

fn listed(hosts: &str) -> impl Iterator<Item = &str> {
    hosts.split(',').map(str::trim).filter(|host| !host.is_empty())
}

/// The target without what stands before an `@`: user and password
fn redacted(target: &str) -> String {
    match (target.find("://"), target.rfind('@')) {
        (Some(start), Some(at)) if start < at => format!("{}***{}", &target[..start + 3], &target[at..]),
        _ => target.to_owned(),
    }
}

/// `%2F` and the like as go-zero writes them; what is no escape stays as it is
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match (first, tail) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)).map(|(high, low)| high << 4 | low),
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etcd(hosts: &[&str], service: &str) -> Target {
        Target::Etcd { hosts: hosts.iter().map(ToString::to_string).collect(), service: service.into() }
    }

    #[test]
    fn three_forms_of_target() {
        assert_eq!("hello.rpc".parse(), Ok(etcd(&[], "hello.rpc")));
        assert_eq!("etcd:///a:1,b:2?key=hello.rpc".parse(), Ok(etcd(&["a:1", "b:2"], "hello.rpc")));
        assert_eq!("etcd:///a:1?x=1&key=%2Fsvc%2fhello".parse(), Ok(etcd(&["a:1"], "/svc/hello")));
        let direct = ["h1:9090".parse().unwrap(), "[::1]:9091".parse().unwrap()];
        assert_eq!("direct:///h1:9090, [::1]:9091".parse(), Ok(Target::Direct(direct.into())));
    }

    #[test]
    fn what_is_no_target_says_why_without_secrets() {
        let error = |target: &str| target.parse::<Target>().unwrap_err().to_string();
        assert!(error("").contains("service name is missing"));
        assert!(error("etcd:///a:1").contains("service name is missing"));
        assert!(error("etcd:///?key=x").contains("no hosts"));
        assert!(error("direct:///").contains("no hosts"));
        assert!(error("direct:///h1").contains("port is missing"));
        assert!(error("direct:///https://h1:1").contains("https"));
        assert!(error("k8s://ns/svc:80").contains("neither"));
        let error = error("direct:///root:secret@h1");
        assert!(!error.contains("secret"), "{error}");
    }
}
