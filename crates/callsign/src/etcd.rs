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
mod options;
mod pace;
mod request;
mod state;
mod watching;

use std::{fmt, sync::Arc};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

pub(crate) use self::{
    feed::{Subscription, Update},
    name::{Namespace, ServiceName},
};
use self::{lane::Lane, options::Checked, pace::Pace, request::RequestError, state::Report};
pub use self::{name::ServiceError, options::EtcdOptions, state::SessionState};
use crate::{
    deadline::far,
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
    namespace: Namespace,
    report: Arc<Report>,
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
        let deadline = far(Instant::now(), options.connect_timeout);
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
        let Checked { hosts, namespace } = options.check()?;
        let hosts: Arc<[Address]> = hosts.into();
        let report = Arc::new(Report::new());
        let session = Session {
            kv: Lane::new(Arc::clone(&hosts), Some(Arc::clone(&report))),
            leases: Lane::new(hosts, None),
            namespace,
            report,
            discoveries: discovery::Shared::default(),
        };
        Ok(Self { session: Arc::new(session) })
    }

    /// The hosts of the cluster, as given
    pub fn hosts(&self) -> &[Address] {
        self.session.kv.hosts()
    }

    /// Which host the session uses, or why none, and each change of that
    pub fn state(&self) -> watch::Receiver<SessionState> {
        self.session.report.subscribe()
    }

    /// What stands before every key of this session
    pub(crate) fn namespace(&self) -> &Namespace {
        &self.session.namespace
    }

    /// A service in this session's namespace
    pub(crate) fn service(&self, name: impl Into<String>) -> Result<ServiceName, ServiceError> {
        Ok(ServiceName::parse(name)?.within(self.namespace()))
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
    /// The namespace cannot stand before a key: correct it
    #[error("bad namespace \"{namespace}\": {reason}")]
    Namespace {
        /// The namespace, escaped
        namespace: String,
        /// What is wrong with it
        reason: &'static str,
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
    use std::time::Duration;

    use super::*;

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
