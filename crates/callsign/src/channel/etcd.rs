//! The channel that finds its endpoints in etcd

use std::{
    fmt,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::{Request, Response};
use tokio::sync::watch;
use tonic::{Status, body::Body};
use tower_service::Service;

use super::{
    Channel, ChannelState, EndpointInfo, Settings, SettingsError, Updates, call_settings,
    connecting::connecting_settings,
    target::{Target, TargetError, redacted},
};
use crate::{
    discover::{EtcdDiscover, ServiceError, fixed},
    etcd::{Etcd, EtcdError, EtcdOptions, Hosts},
};

/// A balanced, self-healing channel to a service, found in etcd by its name
///
/// Every tonic-generated client takes it, also inside `tokio::spawn` and with interceptors. Clones are cheap and share
/// everything; the last clone's drop ends it, as with [`Channel`].
///
/// An etcd that forgets its instances does not take the servers away: see
/// [`hold_window`](EtcdChannelBuilder::hold_window).
///
/// ```no_run
/// use callsign::EtcdChannel;
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let channel = EtcdChannel::connect("hello.rpc").await?; // etcd from CALLSIGN_ETCD, else 127.0.0.1:2379
/// // let mut greeter = GreeterClient::new(channel);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct EtcdChannel {
    channel: Channel,
}

/// Why there is no channel
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The target is neither a service name nor a list of addresses; the source says what it should be
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The name cannot be a service's
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// A setting cannot be
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The options of the etcd session are wrong
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// No endpoint was ready in time; the message names the service, where it was looked for and the last cause
    #[error("{0}")]
    NotReady(String),
}

impl EtcdChannel {
    /// Connects to a service: by its name (`hello.rpc`, etcd from the environment), by
    /// `etcd:///h1:2379,h2:2379?key=hello.rpc` (with more options if need be, as in [`EtcdOptions`]), or to fixed
    /// addresses by `direct:///h1:9090,h2:9091`, over TLS if they are `https://h1:9090`
    ///
    /// # Errors
    ///
    /// [`ConnectError`], within 5 s, if there is no list of instances, or none of them is ready.
    pub async fn connect(target: impl AsRef<str>) -> Result<Self, ConnectError> {
        Self::builder(target).connect().await
    }

    /// The same without waiting: calls wait for the first endpoint instead, as far as the pick timeout lets them
    ///
    /// # Errors
    ///
    /// [`ConnectError`] if the target is wrong; never because of the network.
    pub fn connect_lazy(target: impl AsRef<str>) -> Result<Self, ConnectError> {
        Self::builder(target).connect_lazy()
    }

    /// Settings for a channel to `target`
    pub fn builder(target: impl AsRef<str>) -> EtcdChannelBuilder {
        EtcdChannelBuilder {
            target: target.as_ref().to_owned(),
            etcd: None,
            connect_timeout: CONNECT_TIMEOUT,
            settings: Settings { hold_window: HOLD_WINDOW, ..Settings::default() },
        }
    }

    /// Every endpoint with its state and statistics
    pub fn endpoints(&self) -> Vec<EndpointInfo> {
        self.channel.endpoints()
    }

    /// The changes of endpoints' states, beginning with what they are now
    pub fn updates(&self) -> Updates {
        self.channel.updates()
    }

    /// Where the channel stands as a whole, now and from now on; ends with [`ChannelState::Shutdown`]
    pub fn state(&self) -> watch::Receiver<ChannelState> {
        self.channel.state()
    }

    /// Waits until an endpoint is ready; of use after [`connect_lazy`](Self::connect_lazy)
    pub async fn until_ready(&self) {
        self.channel.until_ready().await;
    }
}

impl fmt::Debug for EtcdChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.channel.fmt(f)
    }
}

impl Service<Request<Body>> for EtcdChannel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Status>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.channel.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        self.channel.call(request)
    }
}

/// Time for [`EtcdChannel::connect`] in all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The default TTL of a registration: leases that end for one reason have all ended by then.
const HOLD_WINDOW: Duration = Duration::from_secs(15);

/// Settings of an [`EtcdChannel`]
#[must_use = "a builder does nothing until it connects"]
pub struct EtcdChannelBuilder {
    target: String,
    etcd: Option<Etcd>,
    connect_timeout: Duration,
    settings: Settings,
}

impl EtcdChannelBuilder {
    call_settings!();
    connecting_settings!();

    /// The session to look the service up with
    ///
    /// Default: one of the channel's own, to the hosts in `CALLSIGN_ETCD`, else to 127.0.0.1:2379. An `etcd:///` target
    /// names its own hosts and has no use for it.
    pub fn etcd(mut self, etcd: &Etcd) -> Self {
        self.etcd = Some(etcd.clone());
        self
    }

    /// Time for [`connect`](Self::connect) in all: first list and first endpoint
    ///
    /// Default: 5 s.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Connects, and waits until the first endpoint is ready
    ///
    /// # Errors
    ///
    /// [`ConnectError`], within the connect timeout.
    pub async fn connect(self) -> Result<EtcdChannel, ConnectError> {
        let timeout = self.connect_timeout;
        let (channel, place) = self.build()?;
        match tokio::time::timeout(timeout, channel.until_ready()).await {
            Ok(()) => Ok(channel),
            Err(_) => {
                let cause = channel.channel.inner.shared.why_unready();
                Err(ConnectError::NotReady(format!("{cause} (waited {timeout:?}{place})")))
            }
        }
    }

    /// Connects in the background
    ///
    /// Must be called within a tokio runtime, which then runs the channel's tasks.
    ///
    /// # Errors
    ///
    /// [`ConnectError`] if the target or a setting is wrong; never because of the network.
    pub fn connect_lazy(self) -> Result<EtcdChannel, ConnectError> {
        self.build().map(|(channel, _)| channel)
    }

    /// The channel, and where its endpoints are looked for, as part of a message
    fn build(self) -> Result<(EtcdChannel, String), ConnectError> {
        let Self { target, etcd, mut settings, .. } = self;
        let (options, service) = match target.parse()? {
            Target::Etcd { options, service } => (options, service),
            Target::Direct(addresses) => {
                settings.connecting.take_configured(&addresses, &target)?;
                settings.service = target;
                let channel = settings.build(fixed(addresses))?;
                return Ok((EtcdChannel { channel }, String::new()));
            }
        };
        let etcd = match (options, etcd) {
            (Some(options), _) => Etcd::connect_lazy(*options)?,
            (None, Some(etcd)) => etcd,
            (None, None) => Etcd::connect_lazy(EtcdOptions::from_env())?,
        };
        let place = format!(", etcd at {}", Hosts(etcd.hosts()));
        let discover = EtcdDiscover::new(&etcd, service.as_str())?;
        let state = discover.state();
        settings.missing_list = Box::new(move || state.borrow().missing_list());
        settings.service = service;
        let channel = settings.build(discover)?;
        Ok((EtcdChannel { channel }, place))
    }
}

impl fmt::Debug for EtcdChannelBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdChannelBuilder").field("target", &redacted(&self.target)).finish_non_exhaustive()
    }
}
