//! One connection to one host of a cluster at a time
//!
//! With several hosts in one etcd client a share of all calls goes to the dead one for as long as it is dead. So a lane
//! uses one host, and moves to the next when that one fails.

use std::{
    fmt,
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use callsign_core::keepalive::KeepAlive;
use etcd_client::{Channel, Client, ConnectOptions};
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use tokio::{sync::OnceCell, time::timeout};
use tonic::{Status, body::Body};
use tower::{BoxError, util::BoxCloneSyncService};

use super::{request::RequestError, state::Report};
use crate::{
    connection::{self, Connection},
    instance::Address,
};

/// The longest any request may take. etcd answers in milliseconds; 7 s is its own limit for what it forwards to a frozen
/// leader, and another host is asked long before.
pub(crate) const REQUEST: Duration = Duration::from_secs(3);

/// A frozen host accepts and a black hole does not answer; either costs this much.
const CONNECT: Duration = Duration::from_secs(2);

/// A paused host is noticed within 13 s. etcd answers pings closer than 5 s with GOAWAY.
const KEEP_ALIVE: KeepAlive =
    KeepAlive::Periodic { interval: Duration::from_secs(10), timeout: Duration::from_secs(3) };

/// The host in use, and the way to the next one
///
/// Cheap to clone; clones move together. The connection closes with the last clone, or when the lane has moved on and
/// the streams that were open have ended.
#[derive(Clone)]
pub(crate) struct Lane {
    hosts: Arc<[Address]>,
    current: Arc<Mutex<Current>>,
    /// Who is told how the hosts are
    report: Option<Arc<Report>>,
}

struct Current {
    link: Link,
    /// Hosts that were left since one has answered, and why the last of them was
    left: usize,
    last: Option<RequestError>,
}

impl Lane {
    /// A lane over `hosts`, of which there must be one; nothing is dialled yet
    pub(crate) fn new(hosts: Arc<[Address]>, report: Option<Arc<Report>>) -> Self {
        // A random first host spreads the clients of a cluster over its members.
        let first = fastrand::usize(..hosts.len());
        let link = Link::new(0, first, &hosts[first]);
        let current = Current { link, left: 0, last: None };
        Self { hosts, current: Arc::new(Mutex::new(current)), report }
    }

    pub(crate) fn hosts(&self) -> &[Address] {
        &self.hosts
    }

    /// The connection to use now; the next host's if the current one has closed
    pub(crate) fn link(&self) -> Link {
        let mut current = self.lock();
        if current.link.wire.is_closed() {
            self.advance(&mut current.link);
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
        self.advance(&mut current.link);
        (current.left, current.last) = (current.left + 1, Some(cause.clone()));
        // Under the lock, so that states are shown in the order in which they came.
        if let Some(report) = &self.report
            && current.left >= self.hosts.len()
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

    fn advance(&self, current: &mut Link) {
        let next = (current.position + 1) % self.hosts.len();
        tracing::debug!(from = %current.wire.host, to = %self.hosts[next], "moving to the next etcd host");
        *current = Link::new(current.generation + 1, next, &self.hosts[next]);
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
            for _ in 0..self.hosts.len() {
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
            _ => self.stay(link),
        }
        answer
    }
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("hosts", &self.hosts).finish_non_exhaustive()
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
    fn new(generation: u64, position: usize, host: &Address) -> Self {
        let authority = host.authority().parse().expect("an address is an authority");
        let wire = Arc::new(Wire { host: host.clone(), authority, dialled: OnceCell::new() });
        Self { generation, position, client: client_over(Arc::clone(&wire)), wire }
    }

    pub(crate) fn host(&self) -> &Address {
        &self.wire.host
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

/// etcd-client's stub over our own connection
fn client_over(wire: Arc<Wire>) -> Client {
    let service = tower::service_fn(move |request| {
        let wire = Arc::clone(&wire);
        async move { wire.call(request).await.map_err(BoxError::from) }
    });
    let channel = Channel::Custom(BoxCloneSyncService::new(service));
    // Without a leader a watch on a cut-off member is stale for ever.
    let options = ConnectOptions::new().with_require_leader(true);
    let connecting = pin!(Client::from_channel(channel, Some(options)));
    match connecting.poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(client)) => client,
        // It is a future for the sake of a login; without a user it asks nobody.
        _ => unreachable!("a client without a user waits for nothing"),
    }
}

/// The connection under a [`Link`]
struct Wire {
    host: Address,
    authority: Authority,
    dialled: OnceCell<Result<Connection, Status>>,
}

impl Wire {
    async fn call(&self, mut request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        // Those who wait for the dial share its failure; dialling again is the next link's.
        let connection =
            self.dialled.get_or_init(|| dial(&self.host)).await.as_ref().map_err(Clone::clone)?;
        let sender = connection.sender().clone();
        *request.uri_mut() = self.uri(request.uri());
        sender.call(request).await
    }

    fn uri(&self, path: &Uri) -> Uri {
        let path = path.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let uri = Uri::builder().scheme(Scheme::HTTP).authority(self.authority.clone()).path_and_query(path);
        uri.build().expect("all three parts are valid")
    }

    fn is_closed(&self) -> bool {
        match self.dialled.get() {
            None => false,
            Some(Ok(connection)) => !connection.sender().is_open(),
            Some(Err(_)) => true,
        }
    }
}

async fn dial(host: &Address) -> Result<Connection, Status> {
    let config =
        connection::Config { connect_timeout: CONNECT, keep_alive: KEEP_ALIVE, waiters: Arc::default() };
    let dialled = connection::connect(host, &config).await;
    let (connection, driver) = dialled.map_err(|error| Status::unavailable(error.to_string()))?;
    // Ends when the connection is dropped with its link and the open streams have ended, or when the peer is dead.
    tokio::spawn(driver);
    Ok(connection)
}
