//! One session with an etcd cluster: hosts, rotation, deadlines
//!
//! ```no_run
//! use callsign::etcd::{Etcd, EtcdOptions};
//!
//! # async fn example() -> Result<(), callsign::etcd::EtcdError> {
//! let etcd = Etcd::connect(EtcdOptions::new(["10.0.0.1:2379", "10.0.0.2:2379"])).await?;
//! # Ok(())
//! # }
//! ```

pub mod registration;

pub mod discovery;

mod entry;
mod feed;
mod lane;
mod name;
mod pace;
mod request;
mod watching;

use std::{ffi::OsString, fmt, sync::Arc, time::Duration};

use tokio::time::{Instant, timeout_at};

pub use self::name::ServiceError;
pub(crate) use self::{
    feed::{Subscription, Update},
    name::ServiceName,
};
use self::{lane::Lane, pace::Pace, request::RequestError};
use crate::{
    connection::Transport,
    instance::{Address, AddressError},
};

/// A session with an etcd cluster
///
/// What is built from one session shares its connections and, for the same service, its watch; two sessions share
/// nothing. Cheap to clone. The connections close when the last clone and all that was built from it are gone.
#[derive(Clone)]
pub struct Etcd {
    session: Arc<Session>,
}

struct Session {
    /// Reads, writes and watches
    kv: Lane,
    /// Leases: a big list must not delay a keepalive
    leases: Lane,
    discoveries: discovery::Shared,
}

impl Etcd {
    /// A session with a cluster of which one host has answered
    ///
    /// # Errors
    ///
    /// Bad input at once; [`EtcdError::Unreachable`], which names the hosts and the last cause, when none has answered
    /// within [`connect_timeout`](EtcdOptions::connect_timeout).
    pub async fn connect(options: EtcdOptions) -> Result<Self, EtcdError> {
        let deadline = Instant::now() + options.connect_timeout.min(LONGEST);
        let etcd = Self::connect_lazy(options)?;
        match etcd.until_answered(deadline).await {
            Ok(()) => Ok(etcd),
            Err(error) => Err(EtcdError::Unreachable {
                hosts: Hosts(etcd.hosts()).to_string(),
                cause: error.to_string(),
            }),
        }
    }

    /// A session that connects when it is needed
    ///
    /// # Errors
    ///
    /// Only bad input: see [`EtcdError`].
    pub fn connect_lazy(options: EtcdOptions) -> Result<Self, EtcdError> {
        let hosts: Arc<[Address]> = options.hosts?.into();
        let session = Session {
            kv: Lane::new(Arc::clone(&hosts), Transport::Plain),
            leases: Lane::new(hosts, Transport::Plain),
            discoveries: discovery::Shared::default(),
        };
        Ok(Self { session: Arc::new(session) })
    }

    /// The hosts of the cluster, as given
    pub fn hosts(&self) -> &[Address] {
        self.session.kv.hosts()
    }

    /// The instances of `service`, now and from now on; all who follow one service share one watch
    pub(crate) fn follow(&self, service: &ServiceName) -> Subscription {
        self.session.discoveries.follow(service, self.kv())
    }

    pub(crate) fn kv(&self) -> &Lane {
        &self.session.kv
    }

    pub(crate) fn leases(&self) -> &Lane {
        &self.session.leases
    }

    async fn until_answered(&self, deadline: Instant) -> Result<(), RequestError> {
        let mut pace = Pace::new();
        let mut last = None;
        loop {
            pace.on_attempt();
            let left = deadline.saturating_duration_since(Instant::now()).min(lane::REQUEST);
            let status =
                |client: etcd_client::Client| async move { client.maintenance_client().status().await };
            let Err(error) = self.kv().request(left, status).await else { return Ok(()) };
            // An attempt that the deadline has cut short knows less than the one before.
            let cause = if Instant::now() < deadline { error } else { last.unwrap_or(error) };
            // Waiting changes nothing about a refusal.
            if cause.is_refusal() || timeout_at(deadline, pace.after(&cause)).await.is_err() {
                return Err(cause);
            }
            last = Some(cause);
        }
    }
}

impl fmt::Debug for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Etcd").field("hosts", &self.hosts()).finish_non_exhaustive()
    }
}

/// etcd's own default.
const DEFAULT_HOST: &str = "127.0.0.1:2379";

/// 30 years, which is for ever to tokio; the clock would overflow with what a `Duration` can hold.
const LONGEST: Duration = Duration::from_secs(30 * 365 * 86_400);

/// Which cluster, and how long to try
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    hosts: Result<Vec<Address>, EtcdError>,
    connect_timeout: Duration,
}

impl EtcdOptions {
    /// A cluster by its hosts, each `host:port` or `http://host:port`
    ///
    /// Bad hosts are reported by [`Etcd::connect`] and [`Etcd::connect_lazy`].
    pub fn new<S: AsRef<str>>(hosts: impl IntoIterator<Item = S>) -> Self {
        Self { hosts: parse(hosts), connect_timeout: Duration::from_secs(5) }
    }

    /// The cluster named by the environment: `CALLSIGN_ETCD`, hosts with commas between, else `127.0.0.1:2379`
    ///
    /// Empty is as good as unset. A value that is not UTF-8 is reported as bad hosts are.
    pub fn from_env() -> Self {
        Self::from_variable(std::env::var_os("CALLSIGN_ETCD"))
    }

    fn from_variable(hosts: Option<OsString>) -> Self {
        let Ok(hosts) = hosts.unwrap_or_default().into_string() else {
            return Self { hosts: Err(EtcdError::NotUnicode), ..Self::new([DEFAULT_HOST]) };
        };
        match hosts.trim() {
            "" => Self::new([DEFAULT_HOST]),
            hosts => Self::new(hosts.split(',').map(str::trim).filter(|host| !host.is_empty())),
        }
    }

    /// How long [`Etcd::connect`] tries in all, 5 s by default
    ///
    /// A host that accepts and does not answer costs 2 s of it.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
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

/// Why there is no session with etcd
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EtcdError {
    /// The list of hosts is empty: name one
    #[error("no etcd hosts were given")]
    NoHosts,
    /// A host is no address: correct it
    #[error("bad etcd host: {0}")]
    BadHost(AddressError),
    /// `CALLSIGN_ETCD` is not text: correct it
    #[error("CALLSIGN_ETCD is not UTF-8")]
    NotUnicode,
    /// A host asks for TLS, which is not supported yet: use `http://`
    #[error("etcd host {host} asks for https, which is not supported yet")]
    Https {
        /// The host
        host: Address,
    },
    /// No host answered in time: see the cause, then check the hosts
    #[error("no etcd host of {hosts} answered: {cause}")]
    Unreachable {
        /// The hosts, with commas between
        hosts: String,
        /// What went wrong with the last one tried
        cause: String,
    },
}

/// Hosts as a person writes them
pub(crate) struct Hosts<'a>(pub(crate) &'a [Address]);

impl fmt::Display for Hosts<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, host) in self.0.iter().enumerate() {
            write!(f, "{}{host}", if position > 0 { ", " } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_hosts_are_refused_before_any_network_call() {
        let refused = |hosts: &[&str]| Etcd::connect_lazy(EtcdOptions::new(hosts)).unwrap_err();
        assert!(matches!(refused(&[]), EtcdError::NoHosts));
        assert!(refused(&["127.0.0.1"]).to_string().contains("etcd host: bad address \"127.0.0.1\""));
        assert!(matches!(refused(&["a:1", "https://b:2"]), EtcdError::Https { .. }));
    }

    #[test]
    fn an_empty_variable_is_none_and_so_is_an_empty_host() {
        let hosts = |value: &str| EtcdOptions::from_variable(Some(value.into())).hosts.unwrap();
        let hosts = |value: &str| Hosts(&hosts(value)).to_string();
        for unset in ["", " "] {
            assert_eq!(hosts(unset), DEFAULT_HOST);
        }
        assert_eq!(hosts("a:1,"), "a:1");
        assert_eq!(hosts(" a:1 , ,b:2"), "a:1, b:2");
        assert!(matches!(EtcdOptions::from_variable(Some(",".into())).hosts, Err(EtcdError::NoHosts)));
        assert_eq!(Hosts(&EtcdOptions::from_variable(None).hosts.unwrap()).to_string(), DEFAULT_HOST);
    }

    #[test]
    #[cfg(unix)]
    fn a_variable_that_is_no_text_is_an_error() {
        let value = std::os::unix::ffi::OsStringExt::from_vec(vec![0xff]);
        assert!(matches!(EtcdOptions::from_variable(Some(value)).hosts, Err(EtcdError::NotUnicode)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_connect_timeout_is_none() {
        let options = EtcdOptions::new(["127.0.0.1:1"]).connect_timeout(Duration::MAX);
        let connecting = tokio::time::timeout(Duration::from_secs(3600), Etcd::connect(options));
        assert!(connecting.await.is_err(), "it goes on trying");
    }

    #[tokio::test(start_paused = true)]
    async fn an_unreachable_cluster_is_named_with_its_last_cause() {
        // Port 1 of the loopback refuses; the clock runs on by itself while the backoff waits.
        let error =
            Etcd::connect(EtcdOptions::new(["127.0.0.1:1", "localhost:1"])).await.unwrap_err().to_string();
        assert!(error.contains("127.0.0.1:1, localhost:1") && error.contains("refused"), "{error}");
    }
}
