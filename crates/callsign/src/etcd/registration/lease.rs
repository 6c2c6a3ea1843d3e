//! The lease: granted, kept alive, revoked

use std::{convert::Infallible, future::pending, time::Duration};

use etcd_client::{Client, LeaseGrantOptions, LeaseKeepAliveResponse, LeaseKeepAliveStream, LeaseKeeper};
use tokio::{
    sync::watch,
    time::{Instant, timeout, timeout_at},
};

use super::report::Report;
use crate::etcd::{
    lane::{Lane, Link, REQUEST},
    pace::Pace,
    request::RequestError,
};

/// etcd's answer to a keepalive takes milliseconds; a member whose leader is frozen would take 7 s to fail.
const ANSWER: Duration = Duration::from_secs(2);

/// What a stream on another host may take at least, dial and handshakes included, however short the TTL.
const OPEN: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lease {
    pub(super) id: i64,
    /// As granted, which may be more than was asked for
    pub(super) ttl: Duration,
}

impl Lease {
    fn granted(id: i64, seconds: i64) -> Self {
        // No etcd grants less; without a time of its own a lease would be kept alive without a pause.
        Self { id, ttl: Duration::from_secs(seconds.max(1).unsigned_abs()) }
    }

    /// Two keepalives may fail before the lease is lost
    fn interval(self) -> Duration {
        self.ttl / 3
    }

    /// A way that is back is tried before the lease has ended, also when two thirds of it went by without one
    fn retry(self) -> Duration {
        self.ttl / 6
    }

    fn answer(self) -> Duration {
        self.interval().min(ANSWER)
    }

    /// The lease runs out meanwhile: a host that is no better than the last one is left as soon as that one was
    fn open(self) -> Duration {
        self.answer().max(OPEN)
    }
}

/// Asks for the lease `id`; one that an earlier attempt was granted, unheard, is as good
///
/// The id is ours to choose, so that a lease can be revoked although the answer to its grant never came.
pub(super) async fn grant(lane: &Lane, id: i64, ttl: i64) -> Result<Lease, RequestError> {
    let options = LeaseGrantOptions::new().with_id(id);
    let grant = |client: Client| async move { client.lease_client().grant(ttl, Some(options)).await };
    let ttl = match lane.request(REQUEST, grant).await {
        Ok(granted) => granted.ttl(),
        Err(error) if error.is_lease_present() => granted_ttl(lane, id).await?,
        Err(error) => return Err(error),
    };
    Ok(Lease::granted(id, ttl))
}

async fn granted_ttl(lane: &Lane, id: i64) -> Result<i64, RequestError> {
    let ask = |client: Client| async move { client.lease_client().time_to_live(id, None).await };
    let found = lane.request(REQUEST, ask).await?;
    if found.ttl() > 0 { Ok(found.granted_ttl()) } else { Err(RequestError::lease_gone(lane.link().host())) }
}

/// Revokes the lease `id`; one that is gone already is what was wanted
pub(super) async fn revoke(lane: &Lane, id: i64, limit: Duration) -> Result<(), RequestError> {
    match lane.request(limit, |client| async move { client.lease_client().revoke(id).await }).await {
        Err(error) if !error.is_lease_gone() => Err(error),
        _ => Ok(()),
    }
}

/// Keeps `lease` alive; returns when etcd says that it is gone
///
/// Only etcd's word counts: after a pause of this process, or of etcd, the lease may be alive long after its TTL.
pub(super) async fn keep(lane: &Lane, lease: Lease, report: &Report) {
    let (confirmed, seen) = watch::channel(Instant::now());
    tokio::select! {
        () = keep_confirmed(lane, lease, report, confirmed) => {}
        never = doubt(lease, seen, report) => match never {},
    }
}

async fn keep_confirmed(lane: &Lane, lease: Lease, report: &Report, confirmed: watch::Sender<Instant>) {
    let mut pace = Pace::no_slower_than(lease.retry());
    loop {
        pace.on_attempt();
        let Err(error) = keep_on_one_stream(lane, lease, report, &mut pace, &confirmed).await;
        if error.is_lease_gone() {
            tracing::debug!(key = report.key(), %error, "lease ended");
            return;
        }
        tracing::debug!(key = report.key(), %error, "keepalive failed; trying the next host");
        pace.after(&error).await;
    }
}

/// Says when nothing was confirmed for a TTL, whatever the attempts wait for
async fn doubt(lease: Lease, mut confirmed: watch::Receiver<Instant>, report: &Report) -> Infallible {
    loop {
        let left = lease.ttl.saturating_sub(confirmed.borrow_and_update().elapsed());
        if timeout(left, confirmed.changed()).await.is_err() {
            report.on_unconfirmed();
            if confirmed.changed().await.is_err() {
                return pending().await;
            }
        }
    }
}

async fn keep_on_one_stream(
    lane: &Lane,
    lease: Lease,
    report: &Report,
    pace: &mut Pace,
    confirmed: &watch::Sender<Instant>,
) -> Result<Infallible, RequestError> {
    let mut sent = Instant::now();
    let mut stream = KeepAlive::open(lane, lease).await?;
    loop {
        // The lease counts from the moment of sending: that is no later than etcd counts from.
        confirmed.send_replace(sent);
        report.on_confirmed(lease);
        stream.quiet_for(pace.vary(lease.interval())).await?;
        sent = Instant::now();
        stream.keep().await?;
    }
}

/// One keepalive stream on one host
struct KeepAlive<'a> {
    lane: &'a Lane,
    link: Link,
    lease: Lease,
    keeper: LeaseKeeper,
    answers: LeaseKeepAliveStream,
}

impl<'a> KeepAlive<'a> {
    /// Opens a stream and waits for the answer to its first keepalive
    async fn open(lane: &'a Lane, lease: Lease) -> Result<Self, RequestError> {
        let link = lane.link();
        let keep_alive = |client: Client| async move { client.lease_client().keep_alive(lease.id).await };
        let opened = link.ask(lease.open(), keep_alive).await;
        let (keeper, answers) = lane.settle(&link, opened)?;
        Ok(Self { lane, link, lease, keeper, answers })
    }

    /// Waits for `time`; fails at once if the stream or the lease ends meanwhile
    async fn quiet_for(&mut self, time: Duration) -> Result<(), RequestError> {
        let until = Instant::now() + time;
        loop {
            match timeout_at(until, self.answers.message()).await {
                Err(_) => return Ok(()),
                // Asked or not, an answer says how the lease is.
                Ok(answer) => self.check(answer)?,
            }
        }
    }

    /// Sends a keepalive and requires its answer: sent is not kept
    async fn keep(&mut self) -> Result<(), RequestError> {
        if let Err(error) = self.keeper.keep_alive().await {
            return self.lane.settle(&self.link, Err(self.link.error(&error)));
        }
        match timeout(self.lease.answer(), self.answers.message()).await {
            Ok(answer) => self.check(answer),
            Err(_) => {
                let silent = RequestError::timeout(self.link.host(), "a keepalive");
                self.lane.settle(&self.link, Err(silent))
            }
        }
    }

    fn check(
        &self,
        answer: Result<Option<LeaseKeepAliveResponse>, etcd_client::Error>,
    ) -> Result<(), RequestError> {
        let checked = match answer {
            Ok(Some(answer)) if answer.ttl() <= 0 => Err(RequestError::lease_gone(self.link.host())),
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(RequestError::host(self.link.host(), "the keepalive stream has ended")),
            Err(error) => Err(self.link.error(&error)),
        };
        self.lane.settle(&self.link, checked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_third_of_the_granted_ttl_and_at_most_two_seconds_for_an_answer() {
        let lease = |secs| Lease { id: 1, ttl: Duration::from_secs(secs) };
        assert_eq!(
            (lease(15).interval(), lease(15).answer()),
            (Duration::from_secs(5), Duration::from_secs(2))
        );
        assert_eq!(lease(3).answer(), Duration::from_secs(1));
        assert_eq!((lease(15).open(), lease(2).open()), (Duration::from_secs(2), Duration::from_secs(1)));
    }

    #[test]
    fn a_lease_without_a_time_is_not_kept_alive_without_a_pause() {
        for seconds in [0, -1, i64::MIN] {
            assert_eq!(Lease::granted(1, seconds).ttl, Duration::from_secs(1));
        }
        assert_eq!(Lease::granted(1, 15).ttl, Duration::from_secs(15));
    }
}
