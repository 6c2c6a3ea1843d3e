//! etcd's gRPC services over a [`Store`]: the store decides, these act

mod auth;
mod delayed;
mod fault;
mod keepalive;
mod kv;
mod lease;
mod member;
mod status;
mod unimplemented;
mod watch;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use tokio::{
    sync::{Notify, watch as channel},
    time::{Instant, sleep_until},
};
use tonic::{Request, Response, Status, metadata::MetadataMap, service::RoutesBuilder};

pub(crate) use self::{fault::Faults, unimplemented::NameUnimplemented};
use crate::{
    proto::etcdserverpb::{
        ResponseHeader, auth_server::AuthServer, cluster_server::ClusterServer, kv_server::KvServer,
        lease_server::LeaseServer, maintenance_server::MaintenanceServer, watch_server::WatchServer,
    },
    store::{Limits, Need, Refused, Store},
};

/// What every service of one server shares
#[derive(Debug)]
pub(crate) struct Shared {
    store: Mutex<Store>,
    limits: Limits,
    /// Sent to whenever there may be news for a watch.
    news: channel::Sender<()>,
    /// Told when a lease ends earlier than any before.
    earlier_expiry: Notify,
    pub(crate) faults: Faults,
    cluster_id: u64,
    member_id: u64,
    /// Where clients find this member.
    client_url: String,
}

/// A clone per service.
#[derive(Clone, Debug)]
pub(crate) struct Service(pub(crate) Arc<Shared>);

impl Shared {
    pub(crate) fn new(limits: Limits, client_url: String) -> Self {
        let random = fastrand::Rng::new();
        Self {
            store: Mutex::new(Store::new(limits, random)),
            limits,
            news: channel::Sender::new(()),
            earlier_expiry: Notify::new(),
            faults: Faults::default(),
            cluster_id: fastrand::u64(1..),
            member_id: fastrand::u64(1..),
            client_url,
        }
    }

    /// Lets `act` have the store as it is now, then wakes whoever its changes concern
    pub(crate) fn with<T>(&self, act: impl FnOnce(&mut Store, std::time::Instant) -> T) -> T {
        let now = Instant::now().into_std();
        let mut store = self.lock();
        let (revision, expiry) = (store.revision(), store.next_expiry());
        // A lease whose time is over must not be seen, however late the expiry task is.
        store.expire(now);
        let answer = act(&mut store, now);
        let news = store.revision() != revision;
        let earlier = store.next_expiry().is_some_and(|next| expiry.is_none_or(|before| next < before));
        drop(store);
        if news {
            self.tell_watches();
        }
        if earlier {
            self.earlier_expiry.notify_one();
        }
        answer
    }

    /// Replaces the store by an empty one
    pub(crate) fn forget_everything(&self) {
        *self.lock() = Store::new(self.limits, fastrand::Rng::new());
        self.tell_watches();
    }

    pub(crate) fn tell_watches(&self) {
        self.news.send_replace(());
    }

    /// Ends leases when their time is over; the server's one task of its own beside its connections
    pub(crate) async fn expire_leases(self: Arc<Self>) {
        loop {
            let next = self.with(|store, _| store.next_expiry());
            let end = async {
                match next {
                    Some(next) => sleep_until(next.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = end => {}
                () = self.earlier_expiry.notified() => {}
            }
        }
    }

    /// A store is as good after a panic elsewhere as before
    fn lock(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Completes a header that has only a revision
    fn sign(&self, header: &mut Option<ResponseHeader>) {
        let header = header.get_or_insert_default();
        header.cluster_id = self.cluster_id;
        header.member_id = self.member_id;
        header.raft_term = RAFT_TERM;
    }
}

/// A member that was elected once, by itself.
const RAFT_TERM: u64 = 2;

/// etcd's default for `--max-request-bytes`.
const MAX_REQUEST_BYTES: usize = 3 << 19;

/// What etcd lets gRPC receive: the above and room for gRPC's own.
const MAX_MESSAGE_BYTES: usize = MAX_REQUEST_BYTES + (512 << 10);

/// A response with a header to complete
trait Headed {
    fn header(&mut self) -> &mut Option<ResponseHeader>;
}

macro_rules! headed {
    ($($response:ident)*) => {$(
        impl Headed for crate::proto::etcdserverpb::$response {
            fn header(&mut self) -> &mut Option<ResponseHeader> {
                &mut self.header
            }
        }
    )*};
}

headed! {
    RangeResponse PutResponse DeleteRangeResponse TxnResponse CompactionResponse WatchResponse
    LeaseGrantResponse LeaseRevokeResponse LeaseKeepAliveResponse LeaseTimeToLiveResponse LeaseLeasesResponse
    MemberListResponse StatusResponse
    AuthEnableResponse AuthDisableResponse AuthenticateResponse AuthUserAddResponse AuthUserGetResponse
    AuthUserListResponse AuthUserDeleteResponse AuthUserChangePasswordResponse AuthUserGrantRoleResponse
    AuthUserRevokeRoleResponse AuthRoleAddResponse AuthRoleListResponse
}

impl Service {
    /// All of them, for a server
    pub(crate) fn routes(self) -> tonic::service::Routes {
        // Sizes are refused by us, in etcd's words.
        const ANY: usize = usize::MAX;
        let mut routes = RoutesBuilder::default();
        routes
            .add_service(KvServer::new(self.clone()).max_decoding_message_size(ANY))
            .add_service(WatchServer::new(self.clone()).max_decoding_message_size(ANY))
            .add_service(LeaseServer::new(self.clone()).max_decoding_message_size(ANY))
            .add_service(ClusterServer::new(self.clone()).max_decoding_message_size(ANY))
            .add_service(MaintenanceServer::new(self.clone()).max_decoding_message_size(ANY))
            .add_service(AuthServer::new(self).max_decoding_message_size(ANY));
        routes.routes()
    }

    /// Answers one call: faults first, then who asks, then the store
    async fn answer<Q: Message, A: Headed>(
        &self,
        request: Request<Q>,
        need: Need,
        act: impl FnOnce(&mut Store, std::time::Instant, Q) -> Result<A, Refused>,
    ) -> Result<Response<A>, Status> {
        self.0.faults.wait().await;
        let (metadata, _, request) = request.into_parts();
        let size = request.encoded_len();
        if size > MAX_MESSAGE_BYTES {
            // grpc-go's words.
            let text = format!("grpc: received message larger than max ({size} vs. {MAX_MESSAGE_BYTES})");
            return Err(Status::resource_exhausted(text));
        }
        let mut answer = self.0.with(|store, now| {
            store.auth.authorize(now, token(&metadata), need)?;
            act(store, now, request)
        })?;
        self.0.sign(answer.header());
        Ok(Response::new(answer))
    }
}

/// The two names under which etcd takes a token
fn token(metadata: &MetadataMap) -> Option<&str> {
    ["token", "authorization"].iter().find_map(|name| metadata.get(*name)?.to_str().ok())
}

/// Whether etcd would put a request of that size through raft
fn fits(request: &impl Message) -> Result<(), Refused> {
    if request.encoded_len() > MAX_REQUEST_BYTES { Err(Refused::TooLarge) } else { Ok(()) }
}
