//! A tonic server that registers itself, and leaves without losing a call
//!
//! [`ServeRegistered`] is the one line for everybody, [`Serve`] the same with options. For those who bind and serve
//! themselves the parts are public: [`listen`], [`Incoming`], [`advertised`], [`stop_signal`] and
//! [`Registration`](crate::Registration).
//!
//! The order is: bind, serve, register ... signal, deregister, wait until clients have noticed, GOAWAY, drain, close what
//! is left. A rolling restart under load loses no call.
//!
//! # Health
//!
//! A server that says by gRPC's health protocol that it does not serve should get no calls from those who do not ask. The
//! health service is yours to add; [`Serve::health`] couples its reporter to the registration:
//!
//! ```no_run
//! # use tonic::transport::Server;
//! # async fn example(mut server: Server) -> Result<(), callsign::ServeError> {
//! let (reporter, health) = tonic_health::server::health_reporter();
//! let router = server.add_service(health); // .add_service(GreeterServer::new(Hello))
//! callsign::Serve::new("hello.rpc").health(reporter).run(router).await
//! # }
//! ```

mod advertise;
mod health;
mod incoming;
mod plan;
mod signal;

use std::{fmt, future::Future, io, pin::Pin, time::Duration};

use http::{Request, Response};
use tokio::{net::TcpListener, sync::watch};
use tonic::{body::Body, service::Routes, transport::server::Router};
use tonic_health::server::HealthReporter;
use tower::{BoxError, Layer};
use tower_service::Service;

use self::plan::{Listen, Plan};
pub use self::{
    advertise::{AdvertiseError, advertised},
    incoming::{Incoming, Io, ListenError, Switch, listen},
    signal::stop_signal,
};
use crate::{
    etcd::{
        Etcd, EtcdError,
        registration::{Form, RegisterError, RegistrationState},
    },
    instance::{Address, Layout},
};

/// Serves a tonic `Router` as an instance of a service
///
/// ```no_run
/// use callsign::ServeRegistered;
/// # async fn example(router: tonic::transport::server::Router) -> Result<(), callsign::ServeError> {
/// // let router = Server::builder().add_service(GreeterServer::new(Hello));
/// router.serve_registered("hello.rpc", "127.0.0.1:9090").await
/// # }
/// ```
pub trait ServeRegistered: Sized + Send {
    /// Binds `listen`, serves, registers as an instance of `service`; ends after ctrl-c or SIGTERM
    ///
    /// etcd is the one in `CALLSIGN_ETCD`, else `127.0.0.1:2379`. For other options see [`Serve`].
    ///
    /// # Errors
    ///
    /// See [`ServeError`].
    fn serve_registered(
        self,
        service: impl Into<String>,
        listen: impl Into<String>,
    ) -> impl Future<Output = Result<(), ServeError>> + Send {
        Serve::new(service).listen(listen).run(self)
    }

    /// Serves the connections that come in until `stop`, then lets those that are open end
    ///
    /// What [`Serve`] does between registering and draining.
    ///
    /// # Errors
    ///
    /// What tonic reports.
    fn serve_incoming(
        self,
        incoming: Incoming,
        stop: impl Future<Output = ()> + Send,
    ) -> impl Future<Output = Result<(), tonic::transport::Error>> + Send;
}

impl<L, B> ServeRegistered for Router<L>
where
    L: Layer<Routes> + Send,
    L::Service: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
    <L::Service as Service<Request<Body>>>::Future: Send,
    <L::Service as Service<Request<Body>>>::Error: Into<BoxError> + Send,
    B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    fn serve_incoming(
        self,
        incoming: Incoming,
        stop: impl Future<Output = ()> + Send,
    ) -> impl Future<Output = Result<(), tonic::transport::Error>> + Send {
        self.serve_with_incoming_shutdown(incoming, stop)
    }
}

/// How a server serves and registers
///
/// ```no_run
/// use std::time::Duration;
/// use callsign::Serve;
///
/// # async fn example(router: tonic::transport::server::Router) -> Result<(), callsign::ServeError> {
/// Serve::new("hello.rpc").listen("0.0.0.0:9090").drain(Duration::from_secs(10)).run(router).await
/// # }
/// ```
#[must_use = "nothing is served before `run`"]
pub struct Serve {
    plan: Plan,
    listen: Listen,
    shutdown: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

impl Serve {
    /// A server of `service`, on a port that the system picks unless [`listen`](Self::listen) says another
    pub fn new(service: impl Into<String>) -> Self {
        let plan = Plan {
            service: service.into(),
            advertise: None,
            etcd: None,
            id: None,
            ttl: None,
            form: Form::default(),
            notice: Duration::from_secs(1),
            drain: Duration::from_secs(5),
            fail_fast: false,
            health: None,
            health_services: Vec::new(),
            state: watch::Sender::new(RegistrationState::Granting { cause: None }),
        };
        Self { plan, listen: Listen::Address("0.0.0.0:0".to_owned()), shutdown: None }
    }

    /// Where to listen: `host:port`; port 0 lets the system pick, and what it picked is published
    pub fn listen(mut self, listen: impl Into<String>) -> Self {
        self.listen = Listen::Address(listen.into());
        self
    }

    /// A listener that was bound already, instead of an address
    pub fn listener(mut self, listener: TcpListener) -> Self {
        self.listen = Listen::Bound(listener);
        self
    }

    /// The address to publish, for servers behind a translation of addresses
    ///
    /// By default the one that was bound; for `0.0.0.0` and `[::]` see [`advertised`].
    pub fn advertise(mut self, address: Address) -> Self {
        self.plan.advertise = Some(address);
        self
    }

    /// The session to register with; by default one of its own, to the cluster in `CALLSIGN_ETCD`
    pub fn etcd(mut self, etcd: &Etcd) -> Self {
        self.plan.etcd = Some(etcd.clone());
        self
    }

    /// The instance id; see [`RegistrationBuilder::id`](crate::etcd::registration::RegistrationBuilder::id)
    pub fn id(mut self, id: i64) -> Self {
        self.plan.id = Some(id);
        self
    }

    /// The lease's TTL; see [`RegistrationBuilder::ttl`](crate::etcd::registration::RegistrationBuilder::ttl)
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.plan.ttl = Some(ttl);
        self
    }

    /// How the instance is written in etcd; see
    /// [`RegistrationBuilder::layout`](crate::etcd::registration::RegistrationBuilder::layout)
    pub fn layout(mut self, layout: Layout) -> Self {
        self.plan.form.layout = layout;
        self
    }

    /// How much of the load it wants, in proportion to the others; 1 by default. Metadata needs [`Layout::Grpc`]
    pub fn weight(mut self, weight: u32) -> Self {
        self.plan.form.weight(weight);
        self
    }

    /// Where it runs, for clients that prefer what is near
    pub fn zone(mut self, zone: impl AsRef<str>) -> Self {
        self.plan.form.zone(zone.as_ref());
        self
    }

    /// Which version of the program it is
    pub fn version(mut self, version: impl AsRef<str>) -> Self {
        self.plan.form.version(version.as_ref());
        self
    }

    /// A free pair for those who read the instance; for the bounds see [`Metadata`](crate::Metadata)
    pub fn metadata(mut self, key: impl AsRef<str>, value: impl AsRef<str>) -> Self {
        self.plan.form.pair(key.as_ref(), value.as_ref());
        self
    }

    /// How long clients have to notice that the server has left, before it tells them itself; 1 s by default
    pub fn notice(mut self, notice: Duration) -> Self {
        self.plan.notice = notice;
        self
    }

    /// How long calls in flight may take after that before they are cut; 5 s by default
    pub fn drain(mut self, drain: Duration) -> Self {
        self.plan.drain = drain;
        self
    }

    /// Whether to end with an error when etcd cannot be reached at the start
    ///
    /// By default the server serves anyway, and registers when it can: also where it has bound all addresses, and which of
    /// them to publish is not known before there is a way to etcd.
    pub fn fail_fast(mut self, fail_fast: bool) -> Self {
        self.plan.fail_fast = fail_fast;
        self
    }

    /// Registered only while `reporter` says that the server serves
    ///
    /// What counts is the overall service `""` and each [`health_service`](Self::health_service): while one of them is not
    /// `SERVING` the registration is [paused](RegistrationState::Paused), from the start if it is so at the start. At the end
    /// all of them are set to `NOT_SERVING`, as the server deregisters. A service without a status, cleared or never set,
    /// has no say.
    ///
    /// Calls from clients that have not noticed yet are served all the same, and so are those of clients that
    /// [hold](crate::channel::EtcdChannelBuilder::hold_window) a server that was the last one. The health service itself is added to the
    /// router by you: see the [module's](self#health) example.
    pub fn health(mut self, reporter: HealthReporter) -> Self {
        self.plan.health = Some(reporter);
        self
    }

    /// Another service by whose [`health`](Self::health) the registration goes, `pb.Greeter` for example
    ///
    /// Generated code has the name as `greeter_server::SERVICE_NAME`. Can be given several times.
    pub fn health_service(mut self, name: impl Into<String>) -> Self {
        self.plan.health_services.push(name.into());
        self
    }

    /// Where the registration stands, and each change, while and after the server runs
    ///
    /// What is to happen when the server has registered and when it leaves hangs on this:
    ///
    /// ```no_run
    /// # use callsign::{RegistrationState, Serve, ServeError};
    /// # async fn example(router: tonic::transport::server::Router) -> Result<(), ServeError> {
    /// let serve = Serve::new("hello.rpc").listen("0.0.0.0:9090");
    /// let mut state = serve.state();
    /// tokio::spawn(async move {
    ///     let registered = |state: &RegistrationState| matches!(state, RegistrationState::Registered { .. });
    ///     if state.wait_for(registered).await.is_ok() {
    ///         println!("clients find this server");
    ///     }
    ///     if state.wait_for(|state| *state == RegistrationState::Deregistered).await.is_ok() {
    ///         println!("clients are told to go elsewhere");
    ///     }
    /// });
    /// serve.run(router).await
    /// # }
    /// ```
    pub fn state(&self) -> watch::Receiver<RegistrationState> {
        self.plan.state.subscribe()
    }

    /// Stops when `shutdown` completes, instead of on ctrl-c and SIGTERM, which are then left alone
    pub fn shutdown(mut self, shutdown: impl Future<Output = ()> + Send + 'static) -> Self {
        self.shutdown = Some(Box::pin(shutdown));
        self
    }

    /// Serves until it is told to stop, and has drained
    ///
    /// A second signal while it drains ends it at once. Dropping the future instead closes all connections and deregisters
    /// in the background.
    ///
    /// # Errors
    ///
    /// See [`ServeError`].
    pub async fn run<R: ServeRegistered>(self, router: R) -> Result<(), ServeError> {
        self.plan.run(router, self.listen, self.shutdown).await
    }
}

impl fmt::Debug for Serve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serve").field("service", &self.plan.service).finish_non_exhaustive()
    }
}

/// Why a server did not start, or failed
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The listen address is none, or cannot be bound: correct it, or free it
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// `POD_IP` is wrong: correct it; with [`Serve::fail_fast`] also: there is no address to publish, so give one with
    /// [`Serve::advertise`]
    #[error(transparent)]
    Advertise(#[from] AdvertiseError),
    /// The hosts of etcd are wrong: correct them
    #[error(transparent)]
    Etcd(#[from] EtcdError),
    /// Name, id or TTL are wrong; with [`Serve::fail_fast`] also: etcd could not be reached
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The handlers for ctrl-c and SIGTERM cannot be installed: give a future with [`Serve::shutdown`]
    #[error("cannot listen for signals")]
    Signals(#[source] io::Error),
    /// tonic failed
    #[error(transparent)]
    Serve(#[from] tonic::transport::Error),
}
