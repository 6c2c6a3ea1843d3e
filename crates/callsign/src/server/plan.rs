//! A server's life, from binding to the end of the drain

use std::{error::Error as _, future::Future, net::SocketAddr, pin::Pin, time::Duration};

use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    time::sleep,
};
use tonic_health::server::HealthReporter;

use super::{
    AdvertiseError, Incoming, ListenError, ServeError, ServeRegistered, Switch, advertise::found, advertised,
    health::Health, signal::Signals,
};
use crate::{
    etcd::{
        Etcd, EtcdOptions,
        registration::{DEFAULT_TTL, Form, Registration, RegistrationState, Terms, published},
    },
    instance::Address,
};

/// What [`Serve`](super::Serve) was told
pub(super) struct Plan {
    pub(super) service: String,
    pub(super) advertise: Option<Address>,
    pub(super) etcd: Option<Etcd>,
    pub(super) id: Option<i64>,
    pub(super) ttl: Option<Duration>,
    pub(super) form: Form,
    pub(super) notice: Duration,
    pub(super) drain: Duration,
    pub(super) fail_fast: bool,
    pub(super) health: Option<HealthReporter>,
    pub(super) health_services: Vec<String>,
    pub(super) state: watch::Sender<RegistrationState>,
}

/// Where to listen
pub(super) enum Listen {
    Address(String),
    Bound(TcpListener),
}

/// The caller's own signal
type Shutdown = Pin<Box<dyn Future<Output = ()> + Send>>;

impl Plan {
    pub(super) async fn run<R: ServeRegistered>(
        self,
        router: R,
        listen: Listen,
        shutdown: Option<Shutdown>,
    ) -> Result<(), ServeError> {
        // What is wrong with the input is said before anything is bound.
        let terms = Terms::new(&self.service, self.id, self.ttl.unwrap_or(DEFAULT_TTL), self.form.clone())?;
        let terms = terms.shown_in(self.state.clone());
        self.advertise.as_ref().map(published).transpose()?;
        let etcd = match &self.etcd {
            Some(etcd) => etcd.clone(),
            None => Etcd::connect_lazy(EtcdOptions::from_env())?,
        };
        let mut stop = Stop::new(shutdown)?;

        let (listener, bound) = listener(listen).await?;
        let health = Health::new(self.health.clone(), &self.health_services);
        let register = async {
            let address = self.address(&etcd, bound).await?;
            let terms = terms.present(health.is_serving().await);
            Ok(match self.fail_fast {
                true => terms.attempt(&etcd, &address),
                false => terms.start(&etcd, &address),
            }?)
        };
        let (incoming, switch) = Incoming::new(listener);
        // tonic's tasks outlive its future: they end with their sockets.
        let cut = Cut(switch);
        let (go_away, told) = oneshot::channel();
        let going_away = async {
            // Told or dropped, either way it is time to go.
            let _ = told.await;
        };
        tokio::select! {
            biased;
            // Serving ends when it was told to go away and has drained.
            served = router.serve_incoming(incoming, going_away) => Ok(served?),
            ended = self.conduct(register, &health, &mut stop, go_away, &cut) => ended,
        }
    }

    /// The address to publish, however long that takes to find
    async fn address(&self, etcd: &Etcd, bound: SocketAddr) -> Result<Address, ServeError> {
        let address = match &self.advertise {
            Some(address) => address.clone(),
            None if self.fail_fast => advertised(bound, etcd).await?,
            None => found(|| advertised(bound, etcd), |error| self.on_no_address(error)).await?,
        };
        tracing::info!(service = %self.service, listen = %bound, %address, "serving");
        Ok(address)
    }

    fn on_no_address(&self, error: &AdvertiseError) {
        let cause = match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        let told = RegistrationState::Granting { cause: Some(cause.clone()) };
        match self.state.send_replace(told) {
            RegistrationState::Granting { cause: Some(_) } => {
                tracing::debug!(service = %self.service, cause, "still no address to publish");
            }
            _ => {
                tracing::warn!(service = %self.service, cause, "serving, but there is no address to publish yet");
            }
        }
    }

    /// Registers, as healthy as it is, waits for the signal, leaves; a second signal cuts the leaving short
    async fn conduct(
        &self,
        register: impl Future<Output = Result<Registration, ServeError>>,
        health: &Health,
        stop: &mut Stop,
        go_away: oneshot::Sender<Never>,
        cut: &Cut,
    ) -> Result<(), ServeError> {
        let mut registration = tokio::select! {
            registration = register => Some(registration?),
            // Nothing was asked of etcd yet.
            () = stop.requested() => None,
        };
        if let Some(registration) = &mut registration {
            let wisher = registration.wisher();
            tokio::select! {
                never = health.follow(|serving| wisher.wish(serving)) => match never {},
                error = registration.failed() => return Err(error.into()),
                // Registered or not yet: what is under way has to be taken back.
                () = stop.requested() => {}
            }
        }
        tokio::select! {
            () = self.leave(registration, health, go_away, cut) => {}
            () = stop.requested() => tracing::info!(service = %self.service, "told to stop again: stopping at once"),
        }
        Ok(())
    }

    /// Each step after the one before; ended from outside as soon as everything has drained
    async fn leave(
        &self,
        registration: Option<Registration>,
        health: &Health,
        go_away: oneshot::Sender<Never>,
        cut: &Cut,
    ) {
        tracing::info!(service = %self.service, "stopping: deregistering");
        // Both at once: an etcd that does not answer delays nobody who asks for the health. What went wrong was logged, and
        // is no reason not to stop.
        match registration {
            Some(registration) => {
                let _ = tokio::join!(registration.deregister(), health.stop_serving());
            }
            None => {
                health.stop_serving().await;
                self.state.send_replace(RegistrationState::Deregistered);
            }
        }
        sleep(self.notice).await;
        tracing::info!(service = %self.service, "stopping: draining");
        drop(go_away);
        sleep(self.drain).await;
        tracing::warn!(service = %self.service, drain = ?self.drain, "calls are still in flight: cutting them");
        cut.0.throw();
        sleep(CUT).await;
    }
}

async fn listener(listen: Listen) -> Result<(TcpListener, SocketAddr), ListenError> {
    match listen {
        Listen::Address(address) => super::listen(&address).await,
        Listen::Bound(listener) => {
            let bound = listener.local_addr();
            let failed = |source| ListenError::Bind { address: "the listener given".to_owned(), source };
            Ok((listener, bound.map_err(failed)?))
        }
    }
}

/// Time for tonic to notice that its sockets are gone
const CUT: Duration = Duration::from_secs(1);

/// Cuts what is left of the connections, at the latest when the server's future is dropped
struct Cut(Switch);

impl Drop for Cut {
    fn drop(&mut self) {
        self.0.throw();
    }
}

/// Nothing is sent: the sender's drop is the message
enum Never {}

/// What tells a server to stop
enum Stop {
    Signals(Signals),
    Caller(Shutdown),
    /// The caller's future has completed; it does not do so again
    Told,
}

impl Stop {
    fn new(caller: Option<Shutdown>) -> Result<Self, ServeError> {
        match caller {
            Some(future) => Ok(Self::Caller(future)),
            None => Ok(Self::Signals(Signals::new().map_err(ServeError::Signals)?)),
        }
    }

    async fn requested(&mut self) {
        match self {
            Self::Signals(signals) => signals.next().await,
            Self::Caller(future) => {
                future.await;
                *self = Self::Told;
            }
            Self::Told => std::future::pending().await,
        }
    }
}
