//! What a channel connects to, as a text

use std::str::FromStr;

use crate::{
    etcd::{EtcdError, EtcdOptions, text},
    instance::{Address, AddressError},
};

/// A service to look up in etcd, or a list of addresses
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// `hello.rpc`, or `etcd:///h1:2379,h2:2379?key=hello.rpc` with the options of its own session
    Etcd { options: Option<Box<EtcdOptions>>, service: String },
    /// `direct:///h1:9090,h2:9091`, with schemes or without
    Direct(Vec<Address>),
}

/// Why a text is no target of a channel
#[derive(Clone, Debug, thiserror::Error)]
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
    /// The hosts or options of an `etcd:///` target are wrong: correct them
    #[error("target {target:?}: {cause}")]
    Etcd {
        /// The whole target
        target: String,
        /// What is wrong
        cause: EtcdError,
    },
    /// An address asks for TLS, and callsign was built without it: enable its feature `tls`
    #[error("target {0:?} asks for https: callsign has to be built with the feature `tls`")]
    Https(String),
    /// Some addresses ask for plaintext, others or the settings for TLS: say the same of all
    #[error("target {0:?} asks for http, and some of it or the settings for TLS")]
    Mixed(String),
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(target: &str) -> Result<Self, TargetError> {
        let shown = || redacted(target);
        match target.split_once(":///") {
            None if target.contains("://") => Err(TargetError::Scheme(shown())),
            None if target.trim().is_empty() => Err(TargetError::NoService(shown())),
            None => Ok(Self::Etcd { options: None, service: target.to_owned() }),
            Some(("direct", hosts)) => {
                let parse = |host: &str| {
                    host.parse().map_err(|cause| TargetError::Address { target: shown(), cause })
                };
                let addresses: Vec<_> = text::listed(hosts).map(parse).collect::<Result<_, _>>()?;
                if addresses.is_empty() {
                    return Err(TargetError::NoHosts(shown()));
                }
                Ok(Self::Direct(addresses))
            }
            Some(("etcd", rest)) => {
                let (options, key) = text::parse(rest).map_err(|cause| match cause {
                    EtcdError::NoHosts => TargetError::NoHosts(shown()),
                    cause => TargetError::Etcd { target: shown(), cause },
                })?;
                let service = key.filter(|key| !key.is_empty());
                let service = service.ok_or_else(|| TargetError::NoService(shown()))?;
                Ok(Self::Etcd { options: Some(Box::new(options)), service })
            }
            Some(_) => Err(TargetError::Scheme(shown())),
        }
    }
}

/// The target without what stands before an `@`: user and password
pub(super) fn redacted(target: &str) -> String {
    let start = target.find("://").map_or(0, |scheme| scheme + "://".len());
    match target.rfind('@') {
        Some(at) if start <= at => format!("{}***{}", &target[..start], &target[at..]),
        _ => target.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How the options are shown, and the service
    fn etcd(target: &str) -> (Option<String>, String) {
        match target.parse() {
            Ok(Target::Etcd { options, service }) => (options.map(|options| format!("{options:?}")), service),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn three_forms_of_target() {
        assert_eq!(etcd("hello.rpc"), (None, "hello.rpc".to_owned()));
        let options = format!("{:?}", "a:1,b:2?namespace=/n".parse::<EtcdOptions>().unwrap());
        let hello = |name: &str| (Some(options.clone()), name.to_owned());
        assert_eq!(etcd("etcd:///a:1,b:2?namespace=/n&key=%2Fsvc%2fhello"), hello("/svc/hello"));
        let Ok(Target::Direct(direct)) = "direct:///h1:9090, [::1]:9091".parse() else { panic!() };
        assert_eq!(direct, ["h1:9090".parse().unwrap(), "[::1]:9091".parse().unwrap()]);
    }

    #[test]
    fn what_is_no_target_says_why_without_secrets() {
        let error = |target: &str| target.parse::<Target>().unwrap_err().to_string();
        assert!(error("").contains("service name is missing"));
        assert!(error("etcd:///a:1").contains("service name is missing"));
        assert!(error("etcd:///a:1?key=").contains("service name is missing"));
        assert!(error("etcd:///?key=x").contains("no hosts"));
        assert!(error("etcd:///a?key=x").contains("port is missing"));
        assert!(error("etcd:///a:1?x=1&key=x").contains("no option"));
        assert!(error("direct:///").contains("no hosts"));
        assert!(error("direct:///h1").contains("port is missing"));
        assert!(error("k8s://ns/svc:80").contains("neither"));
        for target in
            ["direct:///root:s3cret@h1", "etcd:///root:s3?cret@a:1?key=x", "etcd:///root:s3cret@a?key=x"]
        {
            let error = error(target);
            assert!(!error.contains("s3") && !error.contains("root"), "{error}");
        }
    }
}
