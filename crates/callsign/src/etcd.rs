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
//!
//! Each call of the older Go helpers has its line here; the examples `registry` and `live_config` run them:
//!
//! | the helper's | here | |
//! | --- | --- | --- |
//! | register | `let registration = Registration::builder(&etcd, "hello.rpc", address).register().await?` | [docs](registration) |
//! | deregister | `registration.deregister().await?` | [docs](registration::Registration::deregister) |
//! | on start, on stop | `let mut states = WatchStream::new(registration.state())`, and `states.next().await` | [docs](registration::RegistrationState) |
//! | get service | `etcd.instances("hello.rpc").await?` | [docs](Etcd::instances) |
//! | list services | `etcd.services().await?` | [docs](Etcd::services) |
//! | watch: next | `let mut lists = etcd.watch("hello.rpc")?.snapshots()`, and `lists.next().await` | [docs](Etcd::watch) |
//! | watch: stop | `drop(lists)` | [docs](Snapshots) |
//! | live value | `let mut live = etcd.watch_value::<T>("config/hello")?`, and `live.next().await` | [docs](Etcd::watch_value) |
//! | put that value | `etcd.put_value("config/hello", &value).await?` | [docs](Etcd::put_value) |

pub mod registration;

pub mod discovery;

mod entry;
mod feed;
mod follow;
mod instances;
mod lane;
mod list;
mod login;
mod name;
mod options;
mod pace;
mod queries;
mod request;
mod state;
mod value;
mod watching;
mod wire;
mod witness;

#[cfg(test)]
mod fuzz;

use std::{fmt, sync::Arc};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

pub(crate) use self::options::text;
pub(crate) use self::{
    discovery::InstanceSet,
    feed::Subscription,
    name::{Namespace, ServiceName},
};
pub use self::{
    discovery::Update,
    instances::{Instances, Snapshots},
    name::ServiceError,
    options::EtcdOptions,
    queries::{ReadError, WriteError},
    state::SessionState,
    value::{KeyError, ValueError, Values},
};
use self::{
    feed::Sources,
    lane::{Cluster, Lane},
    login::Login,
    options::Checked,
    pace::Pace,
    request::RequestError,
    state::Report,
    value::{Latest, ValueKey},
};
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
    discoveries: Sources<ServiceName, InstanceSet>,
    values: Sources<ValueKey, Latest>,
}

impl Etcd {
    /// A session with a cluster of which one host has answered
    ///
    /// # Errors
    ///
    /// Bad input at once; [`EtcdError::Refused`] as soon as etcd refuses the login; [`EtcdError::Unreachable`], which names
    /// the hosts and the last cause, when none has answered within [`connect_timeout`](EtcdOptions::connect_timeout).
    pub async fn connect(options: EtcdOptions) -> Result<Self, EtcdError> {
        let deadline = far(Instant::now(), options.connect_timeout);
        let etcd = Self::connect_lazy(options)?;
        match etcd.until_answered(deadline).await {
            Ok(()) => Ok(etcd),
            Err(error) if error.is_refusal() => {
                let (host, cause) = error.into_parts();
                Err(EtcdError::Refused { host, cause })
            }
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
        let Checked { hosts, user, namespace, transport } = options.check()?;
        let report = Arc::new(Report::new());
        if user.is_some() && transport.is_plain() {
            tracing::warn!(hosts = %Hosts(&hosts), "the password will be sent to etcd in plaintext");
        }
        let login = user.map(|user| Arc::new(Login::new(user, Arc::clone(&report))));
        let cluster = Arc::new(Cluster { hosts, login, transport });
        let session = Session {
            kv: Lane::new(Arc::clone(&cluster), Some(Arc::clone(&report))),
            leases: Lane::new(cluster, None),
            namespace,
            report,
            discoveries: Sources::default(),
            values: Sources::default(),
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
    pub(crate) fn follow(&self, service: &ServiceName) -> Subscription<InstanceSet> {
        self.session.discoveries.subscribe(service, || discovery::source(service, self.kv()))
    }

    /// The value of `key`, now and from now on; all who follow one key share one watch
    fn follow_value(&self, key: &ValueKey) -> Subscription<Latest> {
        self.session.values.subscribe(key, || value::source(key, self.kv()))
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
    /// A host asks for TLS, and callsign was built without it: enable its feature `tls`
    #[error("etcd host {host} asks for https: callsign has to be built with the feature `tls`")]
    Https {
        /// The host
        host: Address,
    },
    /// A host asks for plaintext where the rest, or the settings, ask for TLS: say the same of all
    #[error("etcd host {host} asks for http, others or the settings for TLS")]
    Mixed {
        /// The host
        host: Address,
    },
    /// The settings for TLS make no sense, or a file in them cannot be used: correct them
    #[cfg(feature = "tls")]
    #[error("bad TLS settings for etcd: {0}")]
    Tls(#[from] crate::tls::TlsError),
    /// User and password cannot be those: correct them. They are not shown
    #[error("bad user and password for etcd: {reason}")]
    Login {
        /// What is wrong with them
        reason: &'static str,
    },
    /// Nothing is called so: see [`EtcdOptions`] for what is
    #[error("etcd has no option \"{option}\" here")]
    UnknownOption {
        /// The option, escaped
        option: String,
    },
    /// An option has a value that it cannot have: correct it
    #[error("bad value of the etcd option \"{option}\": {reason}")]
    BadOption {
        /// The option
        option: String,
        /// What is wrong with its value
        reason: &'static str,
    },
    /// TLS is required and not asked for: use `https://` hosts, or settings for TLS
    #[error("etcd would be used in plaintext, and TLS is required")]
    Plaintext,
    /// The namespace cannot stand before a key: correct it
    #[error("bad namespace \"{namespace}\": {reason}")]
    Namespace {
        /// The namespace, escaped
        namespace: String,
        /// What is wrong with it
        reason: &'static str,
    },
    /// etcd answered and refused: user or password are wrong, or may not do what is asked
    #[error("etcd {host} refused: {cause}")]
    Refused {
        /// The host
        host: Address,
        /// What etcd said
        cause: String,
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
