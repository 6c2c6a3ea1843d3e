//! What a registration shows and logs

use tokio::sync::watch;

use super::{LossCause, RegistrationState, lease::Lease};
use crate::etcd::request::RequestError;

/// The visible state; logs its changes, once each
#[derive(Debug)]
pub(super) struct Report {
    key: String,
    state: watch::Sender<RegistrationState>,
}

impl Report {
    pub(super) fn new(key: String) -> (Self, watch::Receiver<RegistrationState>) {
        let (state, seen) = watch::channel(RegistrationState::Granting { cause: None });
        (Self { key, state }, seen)
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    pub(super) fn on_registered(&self, lease: Lease) {
        let state = RegistrationState::Registered { lease: lease.id, ttl: lease.ttl };
        if self.set(state) {
            tracing::info!(key = %self.key, lease = format_args!("{:x}", lease.id), ttl = ?lease.ttl, "registered");
        }
    }

    /// An attempt failed; what is registered stays so until etcd says otherwise or the TTL has passed
    pub(super) fn on_failed(&self, error: &RequestError) {
        let (key, cause) = (&self.key, error.to_string());
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
        if self.set(RegistrationState::Lost { cause }) {
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

    /// Whether that is a change
    fn set(&self, state: RegistrationState) -> bool {
        self.state.send_if_modified(|current| {
            let changes = *current != state;
            *current = state;
            changes
        })
    }
}
