//! Which cluster, as whom, and how long to try

use std::{ffi::OsString, time::Duration};

use super::{EtcdError, name::Namespace};
use crate::instance::Address;

/// etcd's own default.
const DEFAULT_HOST: &str = "127.0.0.1:2379";

/// Which cluster, and how long to try
///
/// What is wrong is reported by [`Etcd::connect`](super::Etcd::connect) and
/// [`Etcd::connect_lazy`](super::Etcd::connect_lazy).
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    hosts: Vec<Address>,
    namespace: Namespace,
    pub(super) connect_timeout: Duration,
    /// The first mistake that was made
    mistake: Option<EtcdError>,
}

/// Options without a mistake
pub(super) struct Checked {
    pub(super) hosts: Vec<Address>,
    pub(super) namespace: Namespace,
}

impl EtcdOptions {
    /// A cluster by its hosts, each `host:port` or `http://host:port`
    pub fn new<S: AsRef<str>>(hosts: impl IntoIterator<Item = S>) -> Self {
        let mut options = Self {
            hosts: Vec::new(),
            namespace: Namespace::default(),
            connect_timeout: Duration::from_secs(5),
            mistake: None,
        };
        match parse(hosts) {
            Ok(hosts) => options.hosts = hosts,
            Err(mistake) => options.mistake = Some(mistake),
        }
        options
    }

    /// The cluster named by the environment: `CALLSIGN_ETCD`, hosts with commas between, else `127.0.0.1:2379`
    ///
    /// Empty is as good as unset. A value that is not UTF-8 is reported as bad hosts are.
    pub fn from_env() -> Self {
        Self::from_variable(std::env::var_os("CALLSIGN_ETCD"))
    }

    fn from_variable(hosts: Option<OsString>) -> Self {
        let Ok(hosts) = hosts.unwrap_or_default().into_string() else {
            return Self { mistake: Some(EtcdError::NotUnicode), ..Self::new([DEFAULT_HOST]) };
        };
        match hosts.trim() {
            "" => Self::new([DEFAULT_HOST]),
            hosts => Self::new(hosts.split(',').map(str::trim).filter(|host| !host.is_empty())),
        }
    }

    /// What stands before every key that is read or written, with a slash between; by default nothing
    ///
    /// `/service` makes `/service/hello.rpc/7` of the key `hello.rpc/7`. Two namespaces do not see each other. It must not
    /// end with a slash; an empty one is none.
    pub fn namespace(mut self, namespace: impl AsRef<str>) -> Self {
        match Namespace::parse(namespace.as_ref()) {
            Ok(namespace) => self.namespace = namespace,
            Err(mistake) => self.mistake = self.mistake.or(Some(mistake)),
        }
        self
    }

    /// How long [`Etcd::connect`](super::Etcd::connect) tries in all, 5 s by default
    ///
    /// A host that accepts and does not answer costs 2 s of it.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    pub(super) fn check(self) -> Result<Checked, EtcdError> {
        match self.mistake {
            Some(mistake) => Err(mistake),
            None => Ok(Checked { hosts: self.hosts, namespace: self.namespace }),
        }
    }
}

fn parse<S: AsRef<str>>(hosts: impl IntoIterator<Item = S>) -> Result<Vec<Address>, EtcdError> {
    let mut addresses = Vec::new();
    for host in hosts {
        let address: Address = host.as_ref().parse().map_err(EtcdError::BadHost)?;
        // Going on in plaintext would be a silent downgrade.
        if address.is_https() {
            return Err(EtcdError::Https { host: address });
        }
        addresses.push(address);
    }
    if addresses.is_empty() { Err(EtcdError::NoHosts) } else { Ok(addresses) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::Hosts;

    fn refused(options: EtcdOptions) -> EtcdError {
        options.check().err().unwrap()
    }

    #[test]
    fn bad_hosts_are_refused_before_any_network_call() {
        let refused = |hosts: &[&str]| refused(EtcdOptions::new(hosts));
        assert!(matches!(refused(&[]), EtcdError::NoHosts));
        assert!(refused(&["127.0.0.1"]).to_string().contains("etcd host: bad address \"127.0.0.1\""));
        assert!(matches!(refused(&["a:1", "https://b:2"]), EtcdError::Https { .. }));
    }

    #[test]
    fn a_bad_namespace_is_refused_and_the_first_mistake_is_told() {
        let options = || EtcdOptions::new(["a:1"]).namespace("/service/");
        assert!(matches!(refused(options()), EtcdError::Namespace { .. }));
        assert!(matches!(refused(EtcdOptions::new([""; 0]).namespace("/")), EtcdError::NoHosts));
    }

    #[test]
    fn an_empty_variable_is_none_and_so_is_an_empty_host() {
        let hosts = |value: &str| EtcdOptions::from_variable(Some(value.into())).hosts;
        let hosts = |value: &str| Hosts(&hosts(value)).to_string();
        for unset in ["", " "] {
            assert_eq!(hosts(unset), DEFAULT_HOST);
        }
        assert_eq!(hosts("a:1,"), "a:1");
        assert_eq!(hosts(" a:1 , ,b:2"), "a:1, b:2");
        assert!(matches!(refused(EtcdOptions::from_variable(Some(",".into()))), EtcdError::NoHosts));
        assert_eq!(Hosts(&EtcdOptions::from_variable(None).hosts).to_string(), DEFAULT_HOST);
    }

    #[test]
    #[cfg(unix)]
    fn a_variable_that_is_no_text_is_an_error() {
        let value = std::os::unix::ffi::OsStringExt::from_vec(vec![0xff]);
        assert!(matches!(refused(EtcdOptions::from_variable(Some(value))), EtcdError::NotUnicode));
    }
}
