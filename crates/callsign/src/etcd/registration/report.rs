//! What a registration shows and logs

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering::Relaxed},
};

use tokio::sync::watch;

use super::{
    LossCause, RegistrationState,
    lease::Lease,
    wish::{Fulfilled, Wish},
};
use crate::{etcd::request::RequestError, metrics::RegistrationMeters};

/// The visible state; logs its changes, once each
#[derive(Debug)]
pub(super) struct Report {
    key: String,
    state: watch::Sender<RegistrationState>,
    progress: watch::Sender<Progress>,
    /// Whether it ever was in etcd
    was_registered: AtomicBool,
    meters: Mutex<RegistrationMeters>,
}

/// What those need to know, beside the state, who wait for a wish
#[derive(Clone, Debug, Default)]
pub(super) struct Progress {
    pub(super) fulfilled: Fulfilled,
    /// What went wrong last
    pub(super) failure: Option<String>,
}

impl Report {
    pub(super) fn new(key: String, state: watch::Sender<RegistrationState>) -> Self {
        let mut meters = RegistrationMeters::new(&key);
        meters.on_state(&state.borrow());
        let (progress, was_registered) = (watch::Sender::default(), AtomicBool::new(false));
        Self { key, state, progress, was_registered, meters: Mutex::new(meters) }
    }

    pub(super) fn state(&self) -> watch::Receiver<RegistrationState> {
        self.state.subscribe()
    }

    pub(super) fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.subscribe()
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// etcd has granted a lease
    pub(super) fn on_granted(&self) {
        self.meters().on_granted();
    }

    pub(super) fn on_registered(&self, lease: Lease) {
        self.was_registered.store(true, Relaxed);
        let state = RegistrationState::Registered { lease: lease.id, ttl: lease.ttl };
        if self.set(state) {
            tracing::info!(key = %self.key, lease = format_args!("{:x}", lease.id), ttl = ?lease.ttl, "registered");
        }
    }

    /// The key is not in etcd, on request
    pub(super) fn on_paused(&self, wish: Wish) {
        if self.set(RegistrationState::Paused) {
            tracing::info!(key = %self.key, "paused");
        }
        self.on_followed(wish);
    }

    /// The key is to be in etcd, again perhaps
    pub(super) fn on_wanted(&self) {
        if self.is_paused() {
            self.set(RegistrationState::Granting { cause: None });
        }
    }

    /// What was wished for is so in etcd
    pub(super) fn on_followed(&self, wish: Wish) {
        self.progress.send_replace(Progress { fulfilled: Fulfilled::up_to(wish), failure: None });
    }

    /// An attempt failed; what is registered stays so until etcd says otherwise or the TTL has passed
    pub(super) fn on_failed(&self, error: &RequestError) {
        let (key, cause) = (&self.key, error.to_string());
        self.progress.send_modify(|progress| progress.failure = Some(cause.clone()));
        let first = match &*self.state.borrow() {
            RegistrationState::Granting { cause: None }
            | RegistrationState::Lost { cause: LossCause::LeaseEnded | LossCause::KeyDeleted } => true,
            RegistrationState::Granting { .. } => false,
            _ => {
                tracing::debug!(%key, %cause, "etcd failed; trying again");
                return;
            }
        };
        if first {
            tracing::warn!(%key, %cause, "not registered; trying again");
        } else {
            tracing::debug!(%key, %cause, "not registered; trying again");
        }
        self.set(RegistrationState::Granting { cause: Some(cause) });
    }

    pub(super) fn on_lost(&self, cause: LossCause) {
        // Nothing was there to be lost.
        if self.is_paused() {
            tracing::debug!(key = %self.key, ?cause, "lost while paused");
            return;
        }
        if !self.was_registered.load(Relaxed) {
            tracing::debug!(key = %self.key, ?cause, "lost before it was registered; trying again");
            return;
        }
        if self.set(RegistrationState::Lost { cause }) {
            self.meters().on_lost(cause);
            match cause {
                LossCause::Overwritten => {
                    tracing::warn!(key = %self.key, "another instance with this id has registered; giving way to it");
                }
                LossCause::Unconfirmed => {
                    tracing::warn!(key = %self.key, "etcd has not answered for the whole TTL");
                }
                LossCause::LeaseEnded | LossCause::KeyDeleted => {
                    tracing::warn!(key = %self.key, ?cause, "registration lost; taking it back");
                }
            }
        }
    }

    /// etcd has kept the lease alive: the key under it is where it was
    pub(super) fn on_confirmed(&self, lease: Lease) {
        let doubted = RegistrationState::Lost { cause: LossCause::Unconfirmed };
        let was_doubted = *self.state.borrow() == doubted;
        if was_doubted {
            self.on_registered(lease);
        }
    }

    /// No keepalive was answered for the TTL
    pub(super) fn on_unconfirmed(&self) {
        let registered = matches!(*self.state.borrow(), RegistrationState::Registered { .. });
        if registered {
            self.on_lost(LossCause::Unconfirmed);
        }
    }

    pub(super) fn on_deregistered(&self, left: &Result<(), RequestError>) {
        match left {
            Ok(()) => tracing::info!(key = %self.key, "deregistered"),
            Err(cause) => {
                tracing::warn!(key = %self.key, %cause, "etcd did not confirm; the key ends with its TTL");
            }
        }
        self.set(RegistrationState::Deregistered);
    }

    fn is_paused(&self) -> bool {
        *self.state.borrow() == RegistrationState::Paused
    }

    /// Whether that is a change
    fn set(&self, state: RegistrationState) -> bool {
        self.state.send_if_modified(|current| {
            let changes = *current != state;
            self.meters().on_state(&state);
            *current = state;
            changes
        })
    }

    fn meters(&self) -> MutexGuard<'_, RegistrationMeters> {
        self.meters.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
