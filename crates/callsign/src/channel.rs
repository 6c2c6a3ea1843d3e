//! The channel: a `tower::Service` that balances calls over the endpoints of a service
//!
//! [`EtcdChannel`] finds its endpoints by the service's name, [`Channel`] takes them from any
//! [`Discover`]. Both are handed to tonic-generated clients as they are.

#[cfg(feature = "etcd")]
mod etcd;
#[cfg(feature = "etcd")]
mod target;

#[cfg(all(test, feature = "etcd"))]
mod fuzz;

mod connecting;

mod call;
mod options;
mod pool;

mod members;
mod selection;

mod around;
mod book;
mod ready;

mod shared;
mod state;
mod view;

use std::{
    collections::HashMap,
    convert::Infallible,
    fmt,
    future::Future,
    hash::Hash,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use callsign_core::policy::P2cEwma;
use http::{HeaderValue, Request, Response, uri::Authority};
use tokio::sync::{oneshot, watch};
use tonic::{Status, body::Body};
use tower::{BoxError, discover::Discover};
use tower_service::Service;

#[cfg(feature = "etcd")]
pub use self::{
    etcd::{ConnectError, EtcdChannel, EtcdChannelBuilder},
    target::TargetError,
};
pub use self::{
    options::{ExcludedEndpoint, HashKey, PinnedEndpoint, WaitForReady},
    state::ChannelState,
    view::{EndpointInfo, EndpointUpdate, Updates},
};
pub use crate::endpoint::EndpointState;
pub use callsign_core::ejection::Reason as EjectionReason;

use self::{
    connecting::{Connecting, connecting_settings},
    members::{EndpointConfig, Members},
    pool::Pool,
    ready::Balancer,
    selection::{Rules, Selection},
    shared::Shared,
};
use crate::{
    attention::Attention,
    connection::{self, Waiters},
    instance::{Address, Instance},
    metrics::ChannelMeters,
};

/// A balanced, self-healing channel over the endpoints that a `Discover` names
///
/// Every tonic-generated client takes it. Clones are cheap and share everything: endpoints, statistics, settings. The
/// last clone's drop ends it: connections close as soon as the response streams that are still read have ended.
///
/// ```
/// use callsign::{Channel, discover::fixed};
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let channel = Channel::builder(fixed(["127.0.0.1:9090".parse()?, "127.0.0.1:9091".parse()?])).build()?;
/// // let greeter = GreeterClient::new(channel);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Channel {
    inner: Arc<Inner>,
}

/// What the clones of a channel share; each call holds it, so calls on their way finish
struct Inner {
    shared: Arc<Shared>,
    options: CallOptions,
    /// Dropped with the last clone, which ends the pool.
    _used: oneshot::Sender<Infallible>,
}

impl Channel {
    /// Settings for a channel over `discover`
    pub fn builder<D>(discover: D) -> ChannelBuilder<D>
    where
        D: Discover<Service = Instance> + Unpin + Send + 'static,
        D::Key: Hash + Eq + Send + Sync + 'static,
        D::Error: Into<BoxError>,
    {
        ChannelBuilder { discover, settings: Settings::default() }
    }

    /// Every endpoint with its state and statistics
    pub fn endpoints(&self) -> Vec<EndpointInfo> {
        self.inner.shared.endpoints()
    }

    /// The changes of endpoints' states, beginning with what they are now
    pub fn updates(&self) -> Updates {
        Updates::new(&self.inner.shared)
    }

    /// Where the channel stands as a whole, now and from now on; ends with [`ChannelState::Shutdown`]
    pub fn state(&self) -> watch::Receiver<ChannelState> {
        self.inner.shared.state()
    }

    /// Waits until an endpoint is ready
    ///
    /// No call needs it: calls wait by themselves. It is for those who want to start with a channel that works. Returns
    /// also when the runtime that the channel was made in has ended; calls then fail.
    pub async fn until_ready(&self) {
        self.inner.shared.until_ready().await;
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("service", &self.inner.shared.service()).finish_non_exhaustive()
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Status>> + Send>>;

    /// Always ready: a call waits for its endpoint itself, so that its deadline covers the wait
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(call::call(Arc::clone(&self.inner), request))
    }
}

/// A response extension: the endpoint that answered
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct EndpointAddress(pub Address);

/// What calls need to know of the channel's settings
#[derive(Debug)]
struct CallOptions {
    timeout: Option<Duration>,
    method_timeouts: HashMap<String, Duration>,
    user_agent: HeaderValue,
}

impl CallOptions {
    fn timeout(&self, path: &str) -> Option<Duration> {
        if self.method_timeouts.is_empty() {
            self.timeout
        } else {
            self.method_timeouts.get(path).copied().or(self.timeout)
        }
    }
}

/// Settings of a [`Channel`]
#[must_use = "a builder does nothing until it is built"]
pub struct ChannelBuilder<D> {
    discover: D,
    settings: Settings,
}

/// A setting that cannot be
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// The user agent has characters that no header can hold: printable ASCII is safe
    #[error("the user agent {0:?} cannot be a header value")]
    UserAgent(String),
    /// The authority is not `host` or `host:port`
    #[error("the authority {0:?} is not host or host:port")]
    Authority(String),
    /// The path of a method begins with a slash, as in `/pb.Greeter/SayHello`; no call has this one
    #[error("the method {0:?} is no path: it has to be like /pb.Greeter/SayHello")]
    Method(String),
    /// The subset has no members: leave it out to connect to all instances
    #[error("a subset of 0 instances is nobody")]
    Subset,
    /// Servers would take such pings for an attack: let there be 10 s between two at least
    #[error("a keepalive interval of {0:?} is less than 10s")]
    Keepalive(Duration),
    /// The settings for TLS make no sense, or a file in them cannot be used: correct them
    #[cfg(feature = "tls")]
    #[error("bad TLS settings: {0}")]
    Tls(#[from] crate::tls::TlsError),
    /// The names to verify would come from discovery, and the system's roots vouch for any name: name a CA by
    /// [`Tls::ca_file`](crate::Tls::ca_file) or the one name to verify by [`Tls::server_name`](crate::Tls::server_name), or
    /// allow it by `trust_system_roots_for_discovered_names` of the builder
    #[cfg(feature = "tls")]
    #[error(
        "the system's roots would vouch for any name that discovery gives: name a CA, or the name to verify"
    )]
    DiscoveredNames,
}

struct Settings {
    service: String,
    balancer: Balancer,
    timeout: Option<Duration>,
    method_timeouts: HashMap<String, Duration>,
    pick_timeout: Duration,
    hold_window: Duration,
    user_agent: Option<String>,
    authority: Option<String>,
    connecting: Connecting,
    missing_list: Box<dyn Fn() -> Option<String> + Send + Sync>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            service: "channel".into(),
            balancer: Balancer::new(P2cEwma::new()),
            timeout: None,
            method_timeouts: HashMap::new(),
            pick_timeout: Duration::from_secs(1),
            hold_window: Duration::ZERO,
            user_agent: None,
            authority: None,
            connecting: Connecting::default(),
            missing_list: Box::new(|| None),
        }
    }
}

/// gRPC's minimal connect timeout, which covers the time up to SETTINGS: a server that wakes late is still taken.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

impl Settings {
    fn build<D>(self, discover: D) -> Result<Channel, SettingsError>
    where
        D: Discover<Service = Instance> + Unpin + Send + 'static,
        D::Key: Hash + Eq + Send + Sync + 'static,
        D::Error: Into<BoxError>,
    {
        if let Some(method) = self.method_timeouts.keys().find(|path| !path.starts_with('/')) {
            return Err(SettingsError::Method(method.clone()));
        }
        let options = CallOptions {
            timeout: self.timeout,
            method_timeouts: self.method_timeouts,
            user_agent: user_agent(self.user_agent)?,
        };
        let parse =
            |text: String| Authority::try_from(text.as_str()).map_err(|_| SettingsError::Authority(text));
        let authority = self.authority.map(parse).transpose()?;
        let waiters = Arc::<Waiters>::default();
        let connecting = self.connecting;
        let connection = connection::Config {
            connect_timeout: CONNECT_TIMEOUT,
            transport: connecting.transport()?,
            keep_alive: connecting.keep_alive()?,
            waiters: Arc::clone(&waiters),
        };
        let encrypted = !connection.transport.is_plain();
        let subset = connecting.subset()?;
        let selection = Selection::new(Rules { encrypted, accept: connecting.accept, authority }, subset);
        let meters = Arc::new(ChannelMeters::new(&self.service));
        let attention = Arc::<Attention>::default();
        let config =
            EndpointConfig { connection, attention: Arc::clone(&attention), meters: Arc::clone(&meters) };
        let shared = Arc::new(Shared::new(
            self.service,
            self.balancer.within(connecting.around),
            self.pick_timeout,
            self.missing_list,
            waiters,
            meters,
        ));
        let (used, unused) = oneshot::channel();
        let members = Members::new(config, self.hold_window);
        let pool = Pool::new(discover, selection, members, Arc::clone(&shared), attention);
        tokio::spawn(pool.run(unused));
        Ok(Channel { inner: Arc::new(Inner { shared, options, _used: used }) })
    }
}

fn user_agent(own: Option<String>) -> Result<HeaderValue, SettingsError> {
    const OURS: &str = concat!("callsign/", env!("CARGO_PKG_VERSION"));
    let Some(own) = own else { return Ok(HeaderValue::from_static(OURS)) };
    HeaderValue::try_from(format!("{own} {OURS}")).map_err(|_| SettingsError::UserAgent(own))
}

/// The setters that both builders have.
macro_rules! call_settings {
    () => {
        /// The rule that picks an endpoint for each call
        ///
        /// Default: [`P2cEwma`](callsign_core::policy::P2cEwma), of two drawn at random the one that promises the faster answer.
        pub fn policy(mut self, policy: impl callsign_core::policy::Policy) -> Self {
            self.settings.balancer = $crate::channel::ready::Balancer::new(policy);
            self
        }

        /// Time for a call up to its response headers
        ///
        /// Default: none, as in gRPC. A caller's own timeout (`Request::set_timeout`) covers the whole call and is told to
        /// the server; this one is neither, since a channel cannot tell a stream, which may live long, from a unary call.
        pub fn timeout(mut self, timeout: std::time::Duration) -> Self {
            self.settings.timeout = Some(timeout);
            self
        }

        /// The same for one method, given by its path: `/pb.Greeter/SayHello`, with the slash at its beginning
        pub fn method_timeout(mut self, path: impl Into<String>, timeout: std::time::Duration) -> Self {
            self.settings.method_timeouts.insert(path.into(), timeout);
            self
        }

        /// Time a call waits for an endpoint to be ready, before it fails with UNAVAILABLE
        ///
        /// Default: 1 s, which bridges a reconnect. Zero fails at once. [`WaitForReady`](crate::WaitForReady) on a
        /// request waits up to the deadline instead.
        pub fn pick_timeout(mut self, timeout: std::time::Duration) -> Self {
            self.settings.pick_timeout = timeout;
            self
        }

        /// Time within which removals of endpoints are judged together
        ///
        /// If all endpoints are removed within it, or more than a third of them and three at least, and no new ones make
        /// up for them, then those that still answer are *held*: calls go on to be sent to them, with one warning. A hold
        /// ends when the endpoint comes back, with its connection (GOAWAY or loss), or three windows after the removal.
        /// Any other removed endpoint gets no new calls, and its idle connection is kept for one window, in case more
        /// removals follow.
        ///
        /// Default: 15 s for an [`EtcdChannel`](crate::EtcdChannel), zero for a [`Channel`](crate::Channel). Zero is off:
        /// what is removed is gone. Longer protects against a registry that forgets more slowly; but a server that was
        /// taken out of the registry with all the others, and neither stops nor says GOAWAY, is called for longer. An
        /// hour at most: what is longer counts as an hour.
        pub fn hold_window(mut self, window: std::time::Duration) -> Self {
            self.settings.hold_window = window;
            self
        }

        /// Put before `callsign/x.y.z` in the `user-agent` header
        pub fn user_agent(mut self, user_agent: impl Into<String>) -> Self {
            self.settings.user_agent = Some(user_agent.into());
            self
        }

        /// The `:authority` of all calls
        ///
        /// Default: each endpoint's address.
        pub fn authority(mut self, authority: impl Into<String>) -> Self {
            self.settings.authority = Some(authority.into());
            self
        }
    };
}
#[cfg(feature = "etcd")]
use call_settings;

impl<D> ChannelBuilder<D>
where
    D: Discover<Service = Instance> + Unpin + Send + 'static,
    D::Key: Hash + Eq + Send + Sync + 'static,
    D::Error: Into<BoxError>,
{
    call_settings!();
    connecting_settings!();

    /// How messages call what is behind this channel
    ///
    /// Default: "channel".
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.settings.service = name.into();
        self
    }

    /// The channel; it begins to connect at once
    ///
    /// Must be called within a tokio runtime, which then runs the channel's tasks.
    ///
    /// # Errors
    ///
    /// [`SettingsError`] if a setting cannot be.
    pub fn build(self) -> Result<Channel, SettingsError> {
        self.settings.build(self.discover)
    }
}

impl<D> fmt::Debug for ChannelBuilder<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChannelBuilder").field("name", &self.settings.service).finish_non_exhaustive()
    }
}
