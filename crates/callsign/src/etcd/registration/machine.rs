//! The registration's task: which phase comes after which

use std::{convert::Infallible, time::Duration};

use tokio::sync::{oneshot, watch};

use super::{
    LossCause, Registration, RegistrationState,
    key::{Ended, Key},
    lease::{self, Lease},
    report::Report,
};
use crate::etcd::{Etcd, lane::REQUEST, pace::Pace, request::RequestError};

/// The longest that leaving may take
const LEAVE: Duration = Duration::from_secs(3);

/// While leaving no host gets more, so that the next one still has its turn.
const LEAVE_REQUEST: Duration = Duration::from_secs(1);

pub(super) struct Machine {
    etcd: Etcd,
    key: Key,
    ttl: i64,
    report: Report,
    /// The living lease; kept here so that leaving finds it whatever was interrupted
    lease: Option<Lease>,
    pace: Pace,
}

pub(super) enum Phase {
    /// No lease
    Granting,
    /// A lease, and the key under it or about to be
    Leased(Lease),
    /// Someone else has the key
    Overwritten,
}

impl Machine {
    pub(super) fn new(
        etcd: Etcd,
        key: String,
        value: String,
        ttl: i64,
    ) -> (Self, watch::Receiver<RegistrationState>) {
        let (report, state) = Report::new(key.clone());
        (Self { etcd, key: Key::new(key, value), ttl, report, lease: None, pace: Pace::new() }, state)
    }

    pub(super) fn key(&self) -> &str {
        self.report.key()
    }

    /// The first attempt, for those who want to hear of its failure
    pub(super) async fn first(&mut self, limit: Duration) -> Result<Phase, RequestError> {
        let lease = self.etcd.leases().insist(limit, || lease::grant(self.etcd.leases(), self.ttl)).await?;
        self.lease = Some(lease);
        let claimed = self.etcd.kv().insist(limit, || self.key.claim(self.etcd.kv(), lease.id)).await;
        self.key.on_claimed(&claimed?);
        self.report.on_registered(lease);
        Ok(Phase::Leased(lease))
    }

    /// Starts the task, which ends after `stop` was dropped
    pub(super) fn spawn(self, phase: Phase, state: watch::Receiver<RegistrationState>) -> Registration {
        let key = self.key().to_owned();
        let (stop, stopped) = oneshot::channel();
        Registration { key, state, stop, task: tokio::spawn(self.run(phase, stopped)) }
    }

    async fn run(mut self, phase: Phase, stopped: oneshot::Receiver<Infallible>) -> Result<(), RequestError> {
        tokio::select! {
            never = self.live(phase) => match never {},
            _ = stopped => {}
        }
        let left = self.leave().await;
        self.report.on_deregistered(&left);
        left
    }

    async fn live(&mut self, mut phase: Phase) -> Infallible {
        loop {
            phase = match phase {
                Phase::Granting => self.grant().await,
                Phase::Leased(lease) => self.hold(lease).await,
                Phase::Overwritten => {
                    self.let_go().await;
                    std::future::pending().await
                }
            };
        }
    }

    async fn grant(&mut self) -> Phase {
        self.pace.on_attempt();
        match lease::grant(self.etcd.leases(), self.ttl).await {
            Ok(lease) => {
                self.lease = Some(lease);
                Phase::Leased(lease)
            }
            Err(error) => {
                self.report.on_failed(&error);
                self.pace.after(&error).await;
                Phase::Granting
            }
        }
    }

    /// Keeps lease and key until one of them is lost
    async fn hold(&mut self, lease: Lease) -> Phase {
        self.pace.on_attempt();
        let ended = tokio::select! {
            () = lease::keep(self.etcd.leases(), lease, &self.report) => Ended::LeaseGone,
            ended = self.key.tend(self.etcd.kv(), lease, &self.report) => ended,
        };
        match ended {
            Ended::Overwritten => {
                self.report.on_lost(LossCause::Overwritten);
                Phase::Overwritten
            }
            Ended::LeaseGone => {
                self.report.on_lost(LossCause::LeaseEnded);
                self.lease = None;
                self.pace.after_loss().await;
                Phase::Granting
            }
        }
    }

    /// Gives the lease back while the handle lives on
    async fn let_go(&mut self) {
        if let Some(lease) = self.lease.take() {
            // Nothing hangs on it any more: if etcd does not answer it ends by itself.
            let _ = lease::revoke(self.etcd.leases(), lease, REQUEST).await;
        }
    }

    /// Takes the key away; either of two ways will do
    async fn leave(&mut self) -> Result<(), RequestError> {
        let Some(lease) = self.lease else { return Ok(()) };
        let (kv, leases) = (self.etcd.kv(), self.etcd.leases());
        // Revoking deletes the key too, if it is still under this lease; it goes over another connection, though.
        let deleted = kv.insist(LEAVE, || self.key.delete(kv, lease.id, LEAVE_REQUEST));
        let revoked = leases.insist(LEAVE, || lease::revoke(leases, lease, LEAVE_REQUEST));
        let (deleted, revoked) = tokio::join!(deleted, revoked);
        revoked.or(deleted)
    }
}
