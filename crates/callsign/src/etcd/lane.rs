//! One connection to one host of a cluster at a time
//!
//! With several hosts in one etcd client a share of all calls goes to the dead one for as long as it is dead. So a lane
//! uses one host, and moves to the next when that one fails.

use std::{
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use etcd_client::Client;
use tokio::time::timeout;

use super::{
    login::Login,
    request::RequestError,
    state::Report,
    wire::{self, Wire},
};
use crate::{connection::Transport, instance::Address};

/// The longest any request may take. etcd answers in milliseconds; 7 s is its own limit for what it forwards to a frozen
/// leader, and another host is asked long before.
pub(crate) const REQUEST: Duration = Duration::from_secs(3);

/// The host in use, and the way to the next one
///
/// Cheap to clone; clones move together. The connection closes with the last clone, or when the lane has moved on and
/// the streams that were open have ended.
#[derive(Clone)]
pub(crate) struct Lane {
    cluster: Arc<Cluster>,
    current: Arc<Mutex<Current>>,
    /// Who is told how the hosts are
    report: Option<Arc<Report>>,
}

/// What all links of a session have in common
pub(crate) struct Cluster {
    /// At least one
    pub(super) hosts: Vec<Address>,
    pub(super) login: Option<Arc<Login>>,
    pub(super) transport: Transport,
}

struct Current {
    link: Link,
    /// Hosts that were left since one has answered, and why the last of them was
    left: usize,
    last: Option<RequestError>,
}

impl Lane {
    /// A lane over the hosts of `cluster`; nothing is dialled yet
    pub(super) fn new(cluster: Arc<Cluster>, report: Option<Arc<Report>>) -> Self {
        // A random first host spreads the clients of a cluster over its members.
        let link = Link::new(0, fastrand::usize(..cluster.hosts.len()), &cluster);
        let current = Current { link, left: 0, last: None };
        Self { cluster, current: Arc::new(Mutex::new(current)), report }
    }

    pub(crate) fn hosts(&self) -> &[Address] {
        &self.cluster.hosts
    }

    /// The connection to use now; the next host's if the current one has closed
    pub(crate) fn link(&self) -> Link {
        let mut current = self.lock();
        if current.link.wire.is_closed() {
            // Its loss was nobody's request to tell. That no host answers is said by the next one that fails.
            let lost = RequestError::host(current.link.host(), "the connection was lost");
            self.advance(&mut current, lost);
        }
        current.link.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host of `link` has failed: what comes next goes to the next one
    ///
    /// Ten calls that fail together move the lane once.
    fn leave(&self, link: &Link, cause: &RequestError) {
        let mut current = self.lock();
        if current.link.generation != link.generation {
            return;
        }
        self.advance(&mut current, cause.clone());
        // Under the lock, so that states are shown in the order in which they came.
        if let Some(report) = &self.report
            && current.left >= self.hosts().len()
        {
            report.on_disconnected(cause);
        }
    }

    /// The host of `link` has answered
    fn stay(&self, link: &Link) {
        let mut current = self.lock();
        if current.link.generation != link.generation {
            return;
        }
        current.left = 0;
        let last = current.last.take();
        if let Some(report) = &self.report {
            report.on_answered(link.host(), last.as_ref());
        }
    }

    fn advance(&self, current: &mut Current, cause: RequestError) {
        let Current { link, left, last } = current;
        let next = (link.position + 1) % self.hosts().len();
        tracing::debug!(from = %link.host(), to = %self.hosts()[next], %cause, "moving to the next etcd host");
        *link = Link::new(link.generation + 1, next, &self.cluster);
        (*left, *last) = (*left + 1, Some(cause));
    }

    /// Asks the current host once; a failure that is the host's moves the lane
    pub(crate) async fn request<T, F>(
        &self,
        limit: Duration,
        ask: impl FnOnce(Client) -> F,
    ) -> Result<T, RequestError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let link = self.link();
        let answer = link.ask(limit, ask).await;
        self.settle(&link, answer)
    }

    /// Repeats `attempt` while a host is to blame: each host once and one of them twice, within `limit`
    pub(crate) async fn insist<T, F>(
        &self,
        limit: Duration,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, RequestError>
    where
        F: Future<Output = Result<T, RequestError>>,
    {
        let mut last = None;
        let attempts = async {
            // One more than there are hosts: the connection in use may have died unnoticed while its host came back.
            for _ in 0..self.hosts().len() {
                match attempt().await {
                    Err(error) if error.is_of_host() => last = Some(error),
                    settled => return settled,
                }
            }
            attempt().await
        };
        let settled = timeout(limit, attempts).await;
        settled.unwrap_or_else(|_| {
            Err(last.unwrap_or_else(|| RequestError::timeout(self.link().host(), "the request")))
        })
    }

    /// Moves on if `answer` blames the host of `link`; every answer and every message of a stream has to come by here
    pub(crate) fn settle<T>(&self, link: &Link, answer: Result<T, RequestError>) -> Result<T, RequestError> {
        match &answer {
            Err(error) if error.is_of_host() => self.leave(link, error),
            // The host is well, but the session is not, which the login has reported.
            Err(error) if error.is_of_login() => {}
            _ => self.stay(link),
        }
        answer
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("hosts", &self.hosts()).finish_non_exhaustive()
    }
}

/// One host, one connection: dialled by the first call, never again
#[derive(Clone)]
pub(crate) struct Link {
    generation: u64,
    position: usize,
    wire: Arc<Wire>,
    client: Client,
}

impl Link {
    fn new(generation: u64, position: usize, cluster: &Cluster) -> Self {
        let wire = Arc::new(Wire::new(&cluster.hosts[position], cluster.login.clone(), &cluster.transport));
        Self { generation, position, client: wire::client(Arc::clone(&wire)), wire }
    }

    pub(crate) fn host(&self) -> &Address {
        self.wire.host()
    }

    /// The number of the token in use, if there is a login
    pub(super) fn token(&self) -> Option<u64> {
        Some(self.wire.present_token()?.number)
    }

    /// Has the token of this number replaced if `error` may be its fault; whether it was
    ///
    /// For a watch, whose refusal comes in band. Servers before 3.4.22 say "permission denied" there of a token that has
    /// expired: only a fresh one is beyond doubt.
    pub(super) fn doubt(&self, token: Option<u64>, error: &RequestError) -> bool {
        let present = self.wire.present_token();
        let fresh = present.as_ref().is_some_and(|present| present.is_fresh());
        let doubted = error.is_of_token() || error.is_denial() && !fresh;
        if let (true, Some(number)) = (doubted, token) {
            self.wire.refuse(number);
        }
        doubted && token.is_some()
    }

    /// Asks this host, for at most `limit`
    pub(crate) async fn ask<T, F>(
        &self,
        limit: Duration,
        ask: impl FnOnce(Client) -> F,
    ) -> Result<T, RequestError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        match timeout(limit, ask(self.client.clone())).await {
            Ok(answer) => answer.map_err(|error| self.error(&error)),
            Err(_) => Err(RequestError::timeout(self.host(), "the request")),
        }
    }

    /// What etcd-client reports about a stream over this link
    pub(crate) fn error(&self, error: &etcd_client::Error) -> RequestError {
        RequestError::new(self.host(), error)
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;
    use crate::etcd::state::SessionState;

    /// One that takes a single connection and closes it as soon as it is up, and one that refuses all
    #[tokio::test]
    async fn a_host_whose_connection_was_lost_counts_among_those_that_were_left() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let closing = Address::from(listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let h2 = h2::server::handshake(listener.accept().await.unwrap().0);
            let mut h2 = h2.await.unwrap();
            let _asked = h2.accept().await.unwrap().unwrap();
        });
        let hosts = vec![closing, "127.0.0.1:1".parse().unwrap()];
        let report = Arc::new(Report::new());
        let cluster = Arc::new(Cluster { hosts, login: None, transport: Transport::Plain });
        let lane = Lane::new(Arc::clone(&cluster), Some(Arc::clone(&report)));
        // The first host is a random one.
        lane.lock().link = Link::new(0, 0, &cluster);
        let link = lane.link();
        let status = |client: Client| async move { client.maintenance_client().status().await };
        // As a request whose caller has gone before its answer: nobody tells the lane.
        link.ask(REQUEST, status).await.unwrap_err();
        server.await.unwrap();
        assert!(link.wire.is_closed());
        let error = lane.request(REQUEST, status).await.unwrap_err();
        assert!(error.to_string().contains("127.0.0.1:1:"), "{error}");
        assert!(matches!(&*report.subscribe().borrow(), SessionState::Disconnected { .. }));
    }
}
