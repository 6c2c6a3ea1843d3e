//! The registration's task: which phase comes after which

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    time::Duration,
};

use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

use super::{
    LossCause, Registration, id,
    key::{Ended, Key},
    lease::{self, Lease},
    report::Report,
    wish::{Followed, Wisher},
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
    wish: Followed,
    /// The lease that lives, or may, from before it is asked for; here, so that leaving finds it whatever was interrupted
    lease: Option<i64>,
    /// The request for it; here for the same reason: what revokes must not overtake what grants
    asking: Option<Asking>,
    pace: Pace,
}

type Asking = Pin<Box<dyn Future<Output = Result<Lease, RequestError>> + Send>>;

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
    /// A machine that begins with the key in etcd, or `present` not
    pub(super) fn new(etcd: Etcd, key: Key, ttl: i64, report: Report, present: bool) -> (Self, Wisher) {
        let (wisher, wish) = Wisher::new(present);
        (Self { etcd, key, ttl, report, wish, lease: None, asking: None, pace: Pace::new() }, wisher)
    }

    /// Starts the task, which ends after `stop` was dropped, or when a first attempt has failed
    pub(super) fn spawn(self, phase: Phase, wisher: Wisher) -> Registration {
        let (key, state) = (self.report.key().to_owned(), self.report.state());
        let progress = self.report.progress();
        let (stop, stopped) = oneshot::channel();
        Registration { key, state, progress, wisher, stop, task: tokio::spawn(self.run(phase, stopped)) }
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
        let left = move || deadline.saturating_duration_since(Instant::now());
        let (leases, ttl) = (self.etcd.leases().clone(), self.ttl);
        let lease = self
            .ask(|id| async move { leases.insist(left(), || lease::grant(&leases, id, ttl)).await })
            .await?;
        let wished = self.wish.current();
        if wished.present {
            let kv = self.etcd.kv();
            kv.insist(left(), || self.key.claim(kv, lease.id)).await?;
            self.report.on_registered(lease);
            self.report.on_followed(wished);
        } else {
            self.report.on_paused(wished);
        }
        Ok(lease)
    }

    async fn grant(&mut self) -> Phase {
        self.pace.on_attempt();
        follow_without_lease(&mut self.wish, &self.key, &self.report);
        let (leases, ttl) = (self.etcd.leases().clone(), self.ttl);
        let granted = self.ask(|id| async move { lease::grant(&leases, id, ttl).await });
        let error = match granted.await {
            Ok(lease) => return Phase::Leased(lease),
            Err(error) => error,
        };
        if error.is_lease_gone() {
            self.lease = None;
        }
        self.report.on_failed(&error);
        tokio::select! {
            () = self.pace.after(&error) => {}
            () = self.wish.changed() => {}
        }
        Phase::Granting
    }

    /// Sends `grant` for a lease of our own naming and waits for the answer
    ///
    /// Asking again after a failure names the same lease: whichever request came through, there is one at most.
    async fn ask<F>(&mut self, grant: impl FnOnce(i64) -> F) -> Result<Lease, RequestError>
    where
        F: Future<Output = Result<Lease, RequestError>> + Send + 'static,
    {
        let id = *self.lease.get_or_insert_with(id::random);
        let mut asking = self.asking.insert(Box::pin(grant(id))).as_mut();
        let answer = loop {
            tokio::select! {
                answer = &mut asking => break answer,
                () = self.wish.changed() => follow_without_lease(&mut self.wish, &self.key, &self.report),
            }
        };
        self.asking = None;
        if answer.is_ok() {
            self.report.on_granted();
        }
        answer
    }

    /// Keeps lease and key until one of them is lost
    async fn hold(&mut self, lease: Lease) -> Phase {
        self.pace.on_attempt();
        let ended = tokio::select! {
            () = lease::keep(self.etcd.leases(), lease, &self.report) => Ended::LeaseGone,
            ended = self.key.tend(self.etcd.kv(), lease, &mut self.wish, &self.report) => ended,
        };
        match ended {
            Ended::Overwritten => {
                self.report.on_lost(LossCause::Overwritten);
                Phase::Overwritten
            }
            Ended::LeaseGone => {
                self.report.on_lost(LossCause::LeaseEnded);
                self.lease = None;
                tokio::select! {
                    () = self.pace.after_loss() => {}
                    () = self.wish.changed() => {}
                }
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

    /// Takes the key away, and the lease
    async fn leave(&mut self) -> Result<(), RequestError> {
        let deadline = Instant::now() + LEAVE;
        if let Some(asking) = self.asking.take() {
            // Granted or not, it is revoked next.
            let _ = timeout(LEAVE_REQUEST, asking).await;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let (leases, kv, key) = (self.etcd.leases(), self.etcd.kv(), &self.key);
        let deleted = kv.insist(left, || key.delete(kv, LEAVE_REQUEST));
        let Some(lease) = self.lease else {
            // What etcd has reported gone may have left its key behind for a moment, which is all that it takes.
            return if key.may_stand() { deleted.await.map(drop) } else { Ok(()) };
        };
        let revoked = leases.insist(left, || lease::revoke(leases, lease, LEAVE_REQUEST));
        if key.may_stand() {
            return vanish(key, lease, deleted, revoked).await;
        }
        // Whatever comes of it: there is no key, and the lease ends by itself.
        let _ = revoked.await;
        Ok(())
    }
}

/// Takes the key away; either of two ways will do, as far as it reaches
///
/// Revoking deletes the key too, if it is still under this `lease`; it goes over another connection, though. Deleting does
/// not stop a claim that was given up: a frozen member that wakes may put the key again, as long as the lease is there.
async fn vanish(
    key: &Key,
    lease: i64,
    deleted: impl Future<Output = Result<i64, RequestError>>,
    revoked: impl Future<Output = Result<(), RequestError>>,
) -> Result<(), RequestError> {
    let revoking_will_do = !key.claims().may_outlive(lease);
    let deleting_will_do = !key.claims().is_open(lease);
    let (mut deleted, mut revoked) = (pin!(deleted), pin!(revoked));
    tokio::select! {
        result = &mut revoked => match result {
            Ok(()) if revoking_will_do => Ok(()),
            Ok(()) => deleted.await.map(drop),
            Err(error) => match deleted.await {
                Ok(_) if deleting_will_do => Ok(()),
                _ => Err(error),
            },
        },
        result = &mut deleted => match result {
            Ok(_) if deleting_will_do => {
                // Whatever comes of it: the key is gone.
                let _ = timeout(LEAVE_LEASE, revoked).await;
                Ok(())
            }
            Ok(_) => revoked.await,
            Err(error) => revoked.await.and(if revoking_will_do { Ok(()) } else { Err(error) }),
        },
    }
}

/// Without a lease nothing is asked of etcd: where no key may be, there is none to be taken away
fn follow_without_lease(wish: &mut Followed, key: &Key, report: &Report) {
    let wished = wish.current();
    if wished.present {
        report.on_wanted();
    } else if !key.may_stand() {
        report.on_paused(wished);
    }
}
