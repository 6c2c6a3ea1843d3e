//! An instance in etcd, kept alive under a lease
//!
//! `granting -> registered -> (lost -> granting)* -> deregistered`, and `paused` for as long as is asked for. See
//! ARCHITECTURE.md, "Life of a registration".
//!
//! ```no_run
//! use callsign::{etcd::{Etcd, EtcdOptions, registration::Registration}, instance::Address};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let etcd = Etcd::connect(EtcdOptions::from_env()).await?;
//! let address: Address = "10.0.0.1:9090".parse()?;
//! let registration = Registration::builder(&etcd, "hello.rpc", address).register().await?;
//! // ... serve ...
//! registration.deregister().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Whatever is to happen when the instance comes and goes hangs on its state:
//!
//! ```no_run
//! # use callsign::{Registration, RegistrationState};
//! # async fn example(registration: Registration) {
//! use tokio_stream::{StreamExt, wrappers::WatchStream};
//!
//! let mut states = WatchStream::new(registration.state());
//! tokio::spawn(async move {
//!     while let Some(state) = states.next().await {
//!         match state {
//!             RegistrationState::Registered { .. } => println!("clients find this server"),
//!             RegistrationState::Deregistered => println!("clients are told to go elsewhere"),
//!             other => println!("{other}"),
//!         }
//!     }
//! });
//! # }
//! ```

mod claims;
mod error;
mod form;
mod id;
mod key;
mod lease;
mod machine;
mod report;
mod terms;
mod wish;

use std::{convert::Infallible, fmt, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

pub use self::{error::RegisterError, wish::PauseError};
pub(crate) use self::{
    form::Form,
    terms::{Terms, published},
};
use self::{report::Progress, wish::Wisher};
use super::{Etcd, request::RequestError};
use crate::instance::{Address, Layout};

/// Where a registration stands
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum RegistrationState {
    /// Not in etcd yet, or not any more, and trying
    Granting {
        /// Why the last attempt failed; `None` during the first one
        cause: Option<String>,
    },
    /// In etcd
    Registered {
        /// The lease that holds the key
        lease: i64,
        /// How long the key outlives this process, as etcd granted it
        ttl: Duration,
    },
    /// It was in etcd; the attempt to get it back is under way, unless it was overwritten
    Lost {
        /// What happened
        cause: LossCause,
    },
    /// Taken out of etcd for a while, by [`Registration::pause`] or by a server's health
    Paused,
    /// Taken out of etcd on request; the last state
    Deregistered,
}

/// How a registration was lost
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LossCause {
    /// etcd no longer knows the lease; a new one will be asked for
    LeaseEnded,
    /// Someone deleted the key; it will be put again
    KeyDeleted,
    /// The key was put by someone else: there are two instances with one id. The later one wins, and this one does not
    /// try again. Give one of them another id, or register anew to take the key over
    Overwritten,
    /// etcd has not answered for the whole TTL: the key is there or it is not. Goes back to registered when etcd says so
    Unconfirmed,
}

impl fmt::Display for RegistrationState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Granting { cause: None } => f.write_str("registering"),
            Self::Granting { cause: Some(cause) } => write!(f, "not registered yet: {cause}"),
            // As etcdctl shows leases.
            Self::Registered { lease, ttl } => write!(f, "registered under lease {lease:x} for {ttl:?}"),
            Self::Lost { cause } => write!(f, "lost: {cause}"),
            Self::Paused => f.write_str("paused"),
            Self::Deregistered => f.write_str("deregistered"),
        }
    }
}

impl fmt::Display for LossCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LeaseEnded => "its lease has ended",
            Self::KeyDeleted => "its key was deleted",
            Self::Overwritten => "another instance has its id",
            Self::Unconfirmed => "etcd has not answered for the whole TTL",
        })
    }
}

/// Outlives a leader's pause of 9 s.
pub(crate) const DEFAULT_TTL: Duration = Duration::from_secs(15);

/// A registered instance; see [`builder`](Self::builder)
///
/// One task keeps it alive. [`deregister`](Self::deregister) takes it out of etcd and waits for that; dropping it does
/// the same in the background. If the process dies instead, etcd removes the key when the TTL has passed.
#[derive(Debug)]
pub struct Registration {
    key: String,
    state: watch::Receiver<RegistrationState>,
    progress: watch::Receiver<Progress>,
    wisher: Wisher,
    /// Dropped to end the task
    stop: oneshot::Sender<Infallible>,
    task: JoinHandle<Result<(), RequestError>>,
}

impl Registration {
    /// A registration of `address` as an instance of `service`
    pub fn builder(etcd: &Etcd, service: impl Into<String>, address: Address) -> RegistrationBuilder {
        RegistrationBuilder {
            etcd: etcd.clone(),
            service: service.into(),
            address,
            id: None,
            ttl: DEFAULT_TTL,
            form: Form::default(),
        }
    }

    /// Where it stands now, and each change
    pub fn state(&self) -> watch::Receiver<RegistrationState> {
        self.state.clone()
    }

    /// Its key in etcd: `<service>/<id>`, or `<service>/<address>` in the grpc layout
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Takes the instance out of etcd for a while: its key is deleted, its lease kept
    ///
    /// Clients send it no more calls; those that have begun go on. But when all instances are paused within a short time, the
    /// only one included, or more than a third of them, a channel takes that for a failing registry and goes on to call
    /// them for a while: see [`hold_window`](crate::channel::EtcdChannelBuilder::hold_window).
    ///
    /// Returns when etcd has confirmed. It stays paused, through whatever befalls etcd or the lease, until
    /// [`resume`](Self::resume). Pausing twice is pausing once. Dropping the future takes nothing back.
    ///
    /// # Errors
    ///
    /// [`PauseError::Unconfirmed`] after 5 s without etcd's word: it goes on in the background, and the
    /// [state](Self::state) becomes [`Paused`](RegistrationState::Paused) once that is so. Another [`PauseError`] if there is
    /// nothing to pause.
    pub async fn pause(&self) -> Result<(), PauseError> {
        self.wish(false).await
    }

    /// Puts the instance back after [`pause`](Self::pause)
    ///
    /// Returns when etcd has confirmed; at once if it was not paused and is registered.
    ///
    /// # Errors
    ///
    /// [`PauseError::Overwritten`] if another instance has taken the id meanwhile. [`PauseError::Unconfirmed`] after 5 s
    /// without etcd's word: it goes on in the background.
    pub async fn resume(&self) -> Result<(), PauseError> {
        self.wish(true).await
    }

    async fn wish(&self, present: bool) -> Result<(), PauseError> {
        let fulfilled = self.wisher.fulfil(present, self.state(), self.progress.clone()).await;
        fulfilled.map_err(|why| PauseError::new(&self.key, present, why))
    }

    /// For those who pause and resume without waiting
    #[cfg(feature = "server")]
    pub(crate) fn wisher(&self) -> Wisher {
        self.wisher.clone()
    }

    /// Takes the instance out of etcd: deletes the key if it is still its own, revokes the lease
    ///
    /// Returns when etcd has confirmed, within 3 s. Dropping the future does not interrupt it.
    ///
    /// # Errors
    ///
    /// [`RegisterError::Unconfirmed`] when etcd did not answer, or not to all that matters: the key then ends with its TTL.
    pub async fn deregister(mut self) -> Result<(), RegisterError> {
        drop(self.stop);
        let ended = ended(&mut self.task).await;
        ended.map_err(|cause| RegisterError::Unconfirmed { key: self.key, cause })
    }

    /// Waits until the first attempt of [`Terms::attempt`] has failed and was taken back: for ever if it has not
    pub(crate) async fn failed(&mut self) -> RegisterError {
        let cause = ended(&mut self.task).await.expect_err("it ends well only after `stop` was dropped");
        RegisterError::Failed { key: self.key.clone(), cause }
    }
}

async fn ended(task: &mut JoinHandle<Result<(), RequestError>>) -> Result<(), String> {
    match task.await {
        Ok(ended) => ended.map_err(|error| error.to_string()),
        // The runtime is going down.
        Err(error) => Err(error.to_string()),
    }
}

/// Options of a [`Registration`]
#[derive(Clone, Debug)]
#[must_use = "nothing is registered before `register` or `start`"]
pub struct RegistrationBuilder {
    etcd: Etcd,
    service: String,
    address: Address,
    id: Option<i64>,
    ttl: Duration,
    form: Form,
}

impl RegistrationBuilder {
    /// The instance's id, a positive number; by default a random one
    ///
    /// A fixed id lets a restarted server take its own key over. Of two instances with one id the later wins, and the
    /// earlier is [lost](LossCause::Overwritten).
    pub fn id(mut self, id: i64) -> Self {
        self.id = Some(id);
        self
    }

    /// How long the key outlives a dead process; 15 s by default, 2 s at least, rounded up to seconds
    ///
    /// A short TTL removes dead servers sooner, and living ones too: when etcd's leader pauses for two thirds of it.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = ttl;
        self
    }

    /// How the instance is written; [`Layout::GoZero`] by default
    ///
    /// In [`Layout::Grpc`] the address is the id: a restarted server takes its own key over.
    pub fn layout(mut self, layout: Layout) -> Self {
        self.form.layout = layout;
        self
    }

    /// How much of the load the instance wants, in proportion to the others: see [`Metadata`](crate::Metadata); 1 by default
    pub fn weight(mut self, weight: u32) -> Self {
        self.form.weight(weight);
        self
    }

    /// Where the instance runs, for clients that prefer what is near; in the grpc layout only, as all metadata
    pub fn zone(mut self, zone: impl AsRef<str>) -> Self {
        self.form.zone(zone.as_ref());
        self
    }

    /// Which version of the program the instance is
    pub fn version(mut self, version: impl AsRef<str>) -> Self {
        self.form.version(version.as_ref());
        self
    }

    /// A free pair for those who read the instance; for the bounds see [`Metadata`](crate::Metadata)
    pub fn metadata(mut self, key: impl AsRef<str>, value: impl AsRef<str>) -> Self {
        self.form.pair(key.as_ref(), value.as_ref());
        self
    }

    /// Registers, and returns when the key is in etcd
    ///
    /// Dropping the future deregisters in the background, as dropping the registration does.
    ///
    /// # Errors
    ///
    /// Bad input at once; [`RegisterError::Failed`] when etcd could not be reached within 5 s or refused. What it may have
    /// left in etcd is taken back first, within another 3 s.
    pub async fn register(self) -> Result<Registration, RegisterError> {
        use RegistrationState::{Deregistered, Granting};
        let mut registration = self.terms()?.attempt(&self.etcd, &self.address)?;
        // What was lost was registered before, even if it was for too short a time to be seen here.
        let registered = |state: &RegistrationState| !matches!(state, Granting { .. } | Deregistered);
        let registered = registration.state().wait_for(registered).await.is_ok();
        if registered { Ok(registration) } else { Err(registration.failed().await) }
    }

    /// Registers in the background, as soon as etcd can be reached
    ///
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// Bad input only.
    pub fn start(self) -> Result<Registration, RegisterError> {
        self.terms()?.start(&self.etcd, &self.address)
    }

    fn terms(&self) -> Result<Terms, RegisterError> {
        Terms::new(self.service.as_str(), self.id, self.ttl, self.form.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{etcd::EtcdOptions, instance::MetadataError};

    fn builder(service: &str) -> RegistrationBuilder {
        let etcd = Etcd::connect_lazy(EtcdOptions::new(["127.0.0.1:1"])).unwrap();
        Registration::builder(&etcd, service, "10.0.0.1:80".parse().unwrap())
    }

    #[test]
    fn bad_input_is_refused_before_any_network_call() {
        assert!(matches!(builder("a/").start(), Err(RegisterError::Service(_))));
        assert!(matches!(builder("a").id(0).start(), Err(RegisterError::Id { id: 0 })));
        assert!(matches!(
            builder("a").ttl(Duration::from_millis(1999)).start(),
            Err(RegisterError::Ttl { .. })
        ));
        for nowhere in [([127, 0, 0, 1], 0), ([0, 0, 0, 0], 80)] {
            let address = Address::from(std::net::SocketAddr::from(nowhere));
            let builder = RegistrationBuilder { address, ..builder("a") };
            assert!(matches!(builder.start(), Err(RegisterError::Address { .. })));
        }
    }

    #[test]
    fn metadata_needs_the_grpc_layout_which_has_no_ids() {
        let refused = |builder: RegistrationBuilder| builder.start().unwrap_err();
        for said in [
            builder("a").weight(2),
            builder("a").zone("z"),
            builder("a").version("v"),
            builder("a").metadata("k", "v"),
        ] {
            assert!(matches!(refused(said), RegisterError::NoMetadata));
        }
        let grpc = || builder("a").layout(Layout::Grpc);
        assert!(matches!(refused(grpc().id(7)), RegisterError::NoId { id: 7 }));
        assert!(matches!(
            refused(grpc().zone("a\nb").metadata("k", "v")),
            RegisterError::Metadata(MetadataError::Value { .. })
        ));
        assert!(matches!(
            refused(grpc().metadata("weight", "2")),
            RegisterError::Metadata(MetadataError::Key { .. })
        ));
        let many = (0..65).fold(grpc(), |builder, number| builder.metadata(number.to_string(), ""));
        assert!(matches!(refused(many), RegisterError::Metadata(MetadataError::TooMany)));
    }

    #[tokio::test]
    async fn the_layout_decides_the_key() {
        assert_eq!(builder("a").id(7).weight(1).start().unwrap().key(), "a/7");
        assert_eq!(builder("a").layout(Layout::Grpc).zone("z").start().unwrap().key(), "a/10.0.0.1:80");
    }

    #[tokio::test]
    async fn an_address_that_asks_for_tls_is_not_published_as_one_without() {
        let builder = || RegistrationBuilder { address: "https://h:443".parse().unwrap(), ..builder("a") };
        assert!(matches!(builder().start(), Err(RegisterError::Https { .. })));
        assert!(matches!(builder().register().await, Err(RegisterError::Https { .. })));
    }

    #[test]
    fn a_state_is_shown_as_a_person_would_say_it() {
        let shown = |state: RegistrationState| state.to_string();
        let ttl = Duration::from_secs(15);
        assert_eq!(
            shown(RegistrationState::Registered { lease: 0x7b, ttl }),
            "registered under lease 7b for 15s"
        );
        assert_eq!(
            shown(RegistrationState::Granting { cause: Some("etcd a:1: gone".to_owned()) }),
            "not registered yet: etcd a:1: gone"
        );
        let cause = LossCause::Overwritten;
        assert_eq!(shown(RegistrationState::Lost { cause }), "lost: another instance has its id");
    }

    #[tokio::test]
    async fn a_first_attempt_that_fails_names_key_and_cause() {
        let error = builder("a").id(7).register().await.unwrap_err().to_string();
        assert!(error.starts_with("a/7 was not registered") && error.contains("refused"), "{error}");
    }
}
