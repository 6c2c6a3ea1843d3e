//! The connection under a link, and etcd-client's stub over it

use std::{
    future::Future,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::Duration,
};

use callsign_core::keepalive::KeepAlive;
use etcd_client::{Channel, Client, ConnectOptions};
use http::{
    HeaderValue,
    uri::{Authority, PathAndQuery, Scheme, Uri},
};
use tokio::sync::OnceCell;
use tonic::{Status, body::Body};
use tower::{BoxError, util::BoxCloneSyncService};

use super::login::{Login, Token};
use crate::{
    connection::{self, Connection, Sender, Transport},
    instance::Address,
    replay::Outgoing,
};

/// A frozen host accepts and a black hole does not answer; either costs this much.
const CONNECT: Duration = Duration::from_secs(2);

/// A paused host is noticed within 13 s. etcd answers pings closer than 5 s with GOAWAY, so the interval is no option.
const KEEP_ALIVE: KeepAlive =
    KeepAlive::Periodic { interval: Duration::from_secs(10), timeout: Duration::from_secs(3) };

/// One connection to one host, dialled by the first call, never again
pub(super) struct Wire {
    host: Address,
    authority: Authority,
    transport: Transport,
    dialled: OnceCell<Result<(Connection, Bare), Status>>,
    login: Option<Arc<Login>>,
    slot: Mutex<Slot>,
}

/// The token that this connection uses
#[derive(Default)]
struct Slot {
    token: Option<Token>,
    refused: Option<u64>,
}

impl Wire {
    pub(super) fn new(host: &Address, login: Option<Arc<Login>>, transport: &Transport) -> Self {
        Self {
            host: host.clone(),
            authority: host.authority().parse().expect("an address is an authority"),
            transport: transport.clone(),
            dialled: OnceCell::new(),
            login,
            slot: Mutex::default(),
        }
    }

    pub(super) fn host(&self) -> &Address {
        &self.host
    }

    pub(super) fn is_closed(&self) -> bool {
        match self.dialled.get() {
            None => false,
            Some(Ok((connection, _))) => !connection.sender().is_open(),
            Some(Err(_)) => true,
        }
    }

    /// Sends `request`, with a token where there is a login; with a new one if etcd refuses that
    ///
    /// Only a unary call is sent again: of a stream, more was asked for than is kept.
    async fn call(&self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        // Those who wait for the dial share its failure; dialling again is the next link's.
        let dialled = self.dialled.get_or_init(|| self.dial()).await;
        let (_, bare) = dialled.as_ref().map_err(Clone::clone)?;
        let mut call = Outgoing::new(request);
        let Some(login) = &self.login else { return bare.send(&mut call, None).await };
        let token = self.token(login, bare).await?;
        let response = bare.send(&mut call, token.header.as_ref()).await?;
        if !token.is_refused_by(response.headers()) {
            return Ok(response);
        }
        self.refuse(token.number);
        if call.is_empty() || !call.is_replayable() {
            return Ok(response);
        }
        let token = self.token(login, bare).await?;
        bare.send(&mut call, token.header.as_ref()).await
    }

    async fn token(&self, login: &Login, bare: &Bare) -> Result<Token, Status> {
        let refused = match &*self.slot() {
            Slot { token: Some(token), .. } => return Ok(token.clone()),
            Slot { refused, .. } => *refused,
        };
        let token = login.token(bare, refused).await?;
        self.slot().token = Some(token.clone());
        Ok(token)
    }

    /// The token in use
    pub(super) fn present_token(&self) -> Option<Token> {
        self.slot().token.clone()
    }

    /// Has the token of this number replaced before the next call, unless it was already
    pub(super) fn refuse(&self, number: u64) {
        let mut slot = self.slot();
        if slot.token.as_ref().is_some_and(|token| token.number == number) {
            *slot = Slot { token: None, refused: Some(number) };
        }
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn dial(&self) -> Result<(Connection, Bare), Status> {
        let config = connection::Config {
            connect_timeout: CONNECT,
            transport: self.transport.clone(),
            keep_alive: KEEP_ALIVE,
            waiters: Arc::default(),
        };
        let dialled = connection::connect(&self.host, &config).await;
        let (connection, driver) = dialled.map_err(|error| Status::unavailable(error.to_string()))?;
        // Ends when the connection is dropped with its link and the open streams have ended, or when the peer is dead.
        tokio::spawn(driver);
        let sender = connection.sender().clone();
        let (host, authority) = (self.host.clone(), self.authority.clone());
        let bare = Bare { host, scheme: self.transport.scheme(), authority, sender };
        Ok((connection, bare))
    }
}

/// A connection without a login; keeps nothing open
#[derive(Clone)]
pub(super) struct Bare {
    host: Address,
    scheme: Scheme,
    authority: Authority,
    sender: Sender,
}

impl Bare {
    pub(super) fn host(&self) -> &Address {
        &self.host
    }

    /// Whether it is the same connection, not one to the same host
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(self.sender.streams(), other.sender.streams())
    }

    pub(super) async fn call(&self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        self.send(&mut Outgoing::new(request), None).await
    }

    async fn send(
        &self,
        call: &mut Outgoing,
        token: Option<&HeaderValue>,
    ) -> Result<http::Response<Body>, Status> {
        let head = call.head_mut();
        head.uri = self.uri(&head.uri);
        match token {
            Some(token) => head.headers.insert("token", token.clone()),
            None => head.headers.remove("token"),
        };
        self.sender.call(call).await
    }

    fn uri(&self, path: &Uri) -> Uri {
        let path = path.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let uri =
            Uri::builder().scheme(self.scheme.clone()).authority(self.authority.clone()).path_and_query(path);
        uri.build().expect("all three parts are valid")
    }
}

/// A client over `wire`
pub(super) fn client(wire: Arc<Wire>) -> Client {
    client_over(move |request| {
        let wire = Arc::clone(&wire);
        async move { wire.call(request).await }
    })
}

/// etcd-client's stub over what sends a request; it knows of no user, whose password its options would show
pub(super) fn client_over<F>(
    call: impl Fn(http::Request<Body>) -> F + Clone + Send + Sync + 'static,
) -> Client
where
    F: Future<Output = Result<http::Response<Body>, Status>> + Send + 'static,
{
    let service = tower::service_fn(move |request| {
        let answer = call(request);
        async move { answer.await.map_err(BoxError::from) }
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
