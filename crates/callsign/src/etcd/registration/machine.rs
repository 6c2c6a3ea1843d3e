//! The registration's task: which phase comes after which

use std::{convert::Infallible, pin::pin, time::Duration};

use tokio::{
    sync::{oneshot, watch},
    time::{Instant, timeout},
};

use super::{
    LossCause, Registration, RegistrationState,
    key::{Ended, Key},
    lease::{self, Lease},
    report::Report,
};
use crate::etcd::{Etcd, lane::REQUEST, pace::Pace, request::RequestError};

/// The longest that a first attempt takes
const FIRST: Duration = Duration::from_secs(5);

/// The longest that leaving may take
const LEAVE: Duration = Duration::from_secs(3);

/// While leaving no host gets more, so that the next one still has its turn.
const LEAVE_REQUEST: Duration = Duration::from_secs(1);

/// Once the key is gone nobody waits longer for its lease, which ends by itself.
const LEAVE_LEASE: Duration = Duration::from_millis(500);

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
    /// Nothing was tried yet, and a failure is the end
    First,
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

    /// Starts the task, which ends after `stop` was dropped, or when a first attempt has failed
    pub(super) fn spawn(self, phase: Phase, state: watch::Receiver<RegistrationState>) -> Registration {
        let key = self.key().to_owned();
        let (stop, stopped) = oneshot::channel();
        Registration { key, state, stop, task: tokio::spawn(self.run(phase, stopped)) }
    }

    async fn run(mut self, phase: Phase, stopped: oneshot::Receiver<Infallible>) -> Result<(), RequestError> {
        let failed = tokio::select! {
            error = self.live(phase) => Some(error),
            _ = stopped => None,
        };
        let left = self.leave().await;
        self.report.on_deregistered(&left);
        failed.map_or(left, Err)
    }

    /// Registers and stays registered; returns why the first attempt has failed
    async fn live(&mut self, mut phase: Phase) -> RequestError {
        loop {
            phase = match phase {
                Phase::First => match self.first().await {
                    Ok(lease) => Phase::Leased(lease),
                    Err(error) => return error,
                },
                Phase::Granting => self.grant().await,
                Phase::Leased(lease) => self.hold(lease).await,
                Phase::Overwritten => {
                    self.let_go().await;
                    std::future::pending().await
                }
            };
        }
    }

    /// Tries each host, for those who want to hear of a failure
    async fn first(&mut self) -> Result<Lease, RequestError> {
        let deadline = Instant::now() + FIRST;
        let left = || deadline.saturating_duration_since(Instant::now());
        let (kv, leases) = (self.etcd.kv(), self.etcd.leases());
        let lease = leases.insist(left(), || lease::grant(leases, self.ttl)).await?;
        self.lease = Some(lease);
        let claim = kv.insist(left(), || self.key.claim(kv, lease.id)).await?;
        self.key.on_claimed(&claim);
        self.report.on_registered(lease);
        Ok(lease)
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
        if let Some(lease) = self.lease {
            // Nothing hangs on it any more: if etcd does not answer it ends by itself.
            let _ = lease::revoke(self.etcd.leases(), lease, REQUEST).await;
            // Not before: who is told to leave meanwhile drops this future, and then has to revoke it.
            self.lease = None;
        }
    }

    /// Takes the key away; either of two ways will do
    async fn leave(&mut self) -> Result<(), RequestError> {
        let Some(lease) = self.lease else { return Ok(()) };
        let (kv, leases) = (self.etcd.kv(), self.etcd.leases());
        // Revoking deletes the key too, if it is still under this lease; it goes over another connection, though.
        let deleted = kv.insist(LEAVE, || self.key.delete(kv, lease.id, LEAVE_REQUEST));
        let revoked = leases.insist(LEAVE, || lease::revoke(leases, lease, LEAVE_REQUEST));
        let (mut deleted, mut revoked) = (pin!(deleted), pin!(revoked));
        tokio::select! {
            result = &mut revoked => match result {
                Ok(()) => Ok(()),
                Err(error) => deleted.await.map_err(|_| error),
            },
            result = &mut deleted => match result {
                Ok(()) => {
                    // Whatever comes of it: the key is gone.
                    let _ = timeout(LEAVE_LEASE, revoked).await;
                    Ok(())
                }
                Err(_) => revoked.await,
            },
        }
    }
}
