//! A client that sends any message and sees every field of the answer

use std::time::Duration;

use bytes::Bytes;
use http::uri::PathAndQuery;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Status, Streaming, client::Grpc, transport::Channel, transport::Endpoint};
use tonic_prost::ProstCodec;

use crate::proto::{
    etcdserverpb::{
        self as pb, DeleteRangeRequest, LeaseKeepAliveRequest, LeaseKeepAliveResponse, PutRequest,
        RangeRequest, WatchCancelRequest, WatchCreateRequest, WatchProgressRequest, WatchRequest,
        WatchResponse, watch_request::RequestUnion,
    },
    mvccpb::{Event, KeyValue},
};

/// One connection, with or without a token
#[derive(Clone, Debug)]
pub(crate) struct Client {
    channel: Channel,
    token: Option<String>,
}

/// A request of one answer
pub(crate) trait Call: prost::Message + 'static {
    const PATH: &'static str;
    type Answer: prost::Message + Default + 'static;
}

macro_rules! calls {
    ($($path:literal $request:ident $answer:ident;)*) => {$(
        impl Call for pb::$request {
            const PATH: &'static str = concat!("/etcdserverpb.", $path);
            type Answer = pb::$answer;
        }
    )*};
}

calls! {
    "KV/Range" RangeRequest RangeResponse;
    "KV/Put" PutRequest PutResponse;
    "KV/DeleteRange" DeleteRangeRequest DeleteRangeResponse;
    "KV/Txn" TxnRequest TxnResponse;
    "KV/Compact" CompactionRequest CompactionResponse;
    "Lease/LeaseGrant" LeaseGrantRequest LeaseGrantResponse;
    "Lease/LeaseRevoke" LeaseRevokeRequest LeaseRevokeResponse;
    "Lease/LeaseTimeToLive" LeaseTimeToLiveRequest LeaseTimeToLiveResponse;
    "Lease/LeaseLeases" LeaseLeasesRequest LeaseLeasesResponse;
    "Cluster/MemberList" MemberListRequest MemberListResponse;
    "Maintenance/Status" StatusRequest StatusResponse;
    "Maintenance/Alarm" AlarmRequest AlarmResponse;
    "Auth/AuthEnable" AuthEnableRequest AuthEnableResponse;
    "Auth/AuthDisable" AuthDisableRequest AuthDisableResponse;
    "Auth/Authenticate" AuthenticateRequest AuthenticateResponse;
    "Auth/UserAdd" AuthUserAddRequest AuthUserAddResponse;
    "Auth/UserGet" AuthUserGetRequest AuthUserGetResponse;
    "Auth/UserList" AuthUserListRequest AuthUserListResponse;
    "Auth/UserDelete" AuthUserDeleteRequest AuthUserDeleteResponse;
    "Auth/UserChangePassword" AuthUserChangePasswordRequest AuthUserChangePasswordResponse;
    "Auth/UserGrantRole" AuthUserGrantRoleRequest AuthUserGrantRoleResponse;
    "Auth/UserRevokeRole" AuthUserRevokeRoleRequest AuthUserRevokeRoleResponse;
    "Auth/RoleAdd" AuthRoleAddRequest AuthRoleAddResponse;
    "Auth/RoleList" AuthRoleListRequest AuthRoleListResponse;
}

/// Longer than anything that works takes.
const PATIENCE: Duration = Duration::from_secs(10);

impl Client {
    pub(crate) fn connect(endpoint: &str) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{endpoint}")).unwrap();
        Self::over(endpoint.connect_lazy())
    }

    pub(crate) fn over(channel: Channel) -> Self {
        Self { channel, token: None }
    }

    /// The same connection, another bearer
    pub(crate) fn with_token(&self, token: Option<String>) -> Self {
        Self { channel: self.channel.clone(), token }
    }

    pub(crate) async fn send<Q: Call>(&self, request: Q) -> Result<Q::Answer, Status> {
        self.unary(Q::PATH, request).await
    }

    pub(crate) async fn unary<Q, A>(&self, path: &'static str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut grpc = self.grpc().await?;
        let path = PathAndQuery::from_static(path);
        let call = grpc.unary(self.request(request), path, ProstCodec::default());
        timeout(PATIENCE, call).await.expect("an answer in time").map(tonic::Response::into_inner)
    }

    /// The token a login gets
    pub(crate) async fn login(&mut self, name: &str, password: &str) -> Result<(), Status> {
        let (name, password) = (name.to_owned(), password.to_owned());
        self.token =
            Some(self.with_token(None).send(pb::AuthenticateRequest { name, password }).await?.token);
        Ok(())
    }

    pub(crate) fn watch(&self) -> WatchStream {
        let (requests, responses) = self.stream("/etcdserverpb.Watch/Watch");
        WatchStream { requests: Some(requests), responses }
    }

    pub(crate) fn keep_alive(&self) -> KeepAlive {
        let (requests, responses) = self.stream("/etcdserverpb.Lease/LeaseKeepAlive");
        KeepAlive { requests, responses }
    }

    fn stream<Q, A>(&self, path: &'static str) -> (mpsc::UnboundedSender<Q>, Responses<A>)
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let (requests, stream) = mpsc::unbounded_channel();
        let client = self.clone();
        let open = async move {
            let request = client.request(UnboundedReceiverStream::new(stream));
            let path = PathAndQuery::from_static(path);
            let responses = client.grpc().await?.streaming(request, path, ProstCodec::default()).await;
            responses.map(tonic::Response::into_inner)
        };
        // A real etcd answers, headers included, when it has been asked something.
        (requests, Responses::Opening(tokio::spawn(open)))
    }

    pub(crate) async fn revision(&self) -> i64 {
        let range = RangeRequest { count_only: true, ..all() };
        self.send(range).await.unwrap().header.unwrap().revision
    }

    async fn grpc(&self) -> Result<Grpc<Channel>, Status> {
        let mut grpc = Grpc::new(self.channel.clone()).max_decoding_message_size(64 << 20);
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(grpc)
    }

    fn request<Q>(&self, message: Q) -> Request<Q> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request.metadata_mut().insert("token", token.parse().unwrap());
        }
        request
    }
}

#[derive(Debug)]
enum Responses<A> {
    Opening(JoinHandle<Result<Streaming<A>, Status>>),
    Open(Box<Streaming<A>>),
}

impl<A> Responses<A> {
    /// What comes next, an error of the stream included; None at its end
    async fn next(&mut self) -> Result<Option<A>, Status> {
        loop {
            match self {
                Self::Opening(opening) => {
                    let stream = opening.await.expect("it does not panic")?;
                    *self = Self::Open(Box::new(stream));
                }
                Self::Open(stream) => return stream.message().await,
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct WatchStream {
    /// None once the client's half is closed.
    requests: Option<mpsc::UnboundedSender<WatchRequest>>,
    responses: Responses<WatchResponse>,
}

impl WatchStream {
    /// A second sender of requests
    pub(crate) fn requests(&self) -> mpsc::UnboundedSender<WatchRequest> {
        self.requests.clone().expect("it is open")
    }

    pub(crate) fn create(&self, request: WatchCreateRequest) {
        self.ask(RequestUnion::CreateRequest(request));
    }

    pub(crate) fn cancel(&self, watch_id: i64) {
        self.ask(RequestUnion::CancelRequest(WatchCancelRequest { watch_id }));
    }

    pub(crate) fn progress(&self) {
        self.ask(RequestUnion::ProgressRequest(WatchProgressRequest {}));
    }

    pub(crate) fn close_requests(&mut self) {
        self.requests = None;
    }

    /// The next response; None or an error at the end of the stream
    pub(crate) async fn try_next(&mut self) -> Result<Option<WatchResponse>, Status> {
        self.responses.next().await
    }

    pub(crate) async fn next(&mut self) -> WatchResponse {
        let response = timeout(PATIENCE, self.responses.next()).await.expect("a response in time");
        response.unwrap().expect("the stream is open")
    }

    /// Creates a watch and returns its id; panics if it is refused
    pub(crate) async fn created(&mut self, request: WatchCreateRequest) -> i64 {
        self.create(request);
        let created = self.next().await;
        assert!(created.created && !created.canceled, "{created:?}");
        created.watch_id
    }

    /// The next `n` events, whatever the responses they come in
    pub(crate) async fn events(&mut self, n: usize) -> Vec<Event> {
        let mut events = Vec::new();
        while events.len() < n {
            let response = self.next().await;
            assert!(!response.canceled, "{response:?}");
            events.extend(response.events);
        }
        events
    }

    fn ask(&self, union: RequestUnion) {
        let request = WatchRequest { request_union: Some(union) };
        self.requests.as_ref().expect("it is open").send(request).expect("the stream is open");
    }
}

#[derive(Debug)]
pub(crate) struct KeepAlive {
    requests: mpsc::UnboundedSender<LeaseKeepAliveRequest>,
    responses: Responses<LeaseKeepAliveResponse>,
}

impl KeepAlive {
    pub(crate) async fn keep(&mut self, id: i64) -> LeaseKeepAliveResponse {
        self.requests.send(LeaseKeepAliveRequest { id }).expect("the stream is open");
        let response = timeout(PATIENCE, self.responses.next()).await.expect("a response in time");
        response.unwrap().expect("the stream is open")
    }
}

pub(crate) fn bytes(text: impl AsRef<[u8]>) -> Bytes {
    Bytes::copy_from_slice(text.as_ref())
}

pub(crate) fn put(key: &str, value: &str) -> PutRequest {
    PutRequest { key: bytes(key), value: bytes(value), ..PutRequest::default() }
}

pub(crate) fn get(key: &str) -> RangeRequest {
    RangeRequest { key: bytes(key), ..RangeRequest::default() }
}

pub(crate) fn get_prefix(prefix: &str) -> RangeRequest {
    RangeRequest { range_end: prefix_end(prefix), ..get(prefix) }
}

/// Every key there is
pub(crate) fn all() -> RangeRequest {
    RangeRequest { key: bytes([0]), range_end: bytes([0]), ..RangeRequest::default() }
}

pub(crate) fn delete(key: &str) -> DeleteRangeRequest {
    delete_of(bytes(key))
}

pub(crate) fn delete_of(key: Bytes) -> DeleteRangeRequest {
    DeleteRangeRequest { key, ..DeleteRangeRequest::default() }
}

pub(crate) fn delete_prefix(prefix: &str) -> DeleteRangeRequest {
    DeleteRangeRequest { range_end: prefix_end(prefix), ..delete(prefix) }
}

pub(crate) fn watch_prefix(prefix: &str) -> WatchCreateRequest {
    WatchCreateRequest { key: bytes(prefix), range_end: prefix_end(prefix), ..WatchCreateRequest::default() }
}

/// The key after every key of the prefix; its last byte must not be 0xff
pub(crate) fn prefix_end(prefix: &str) -> Bytes {
    let mut end = prefix.as_bytes().to_vec();
    *end.last_mut().expect("a prefix") += 1;
    end.into()
}

/// Keys as text, for short assertions
pub(crate) fn keys(kvs: &[KeyValue]) -> Vec<String> {
    kvs.iter().map(|kv| String::from_utf8_lossy(&kv.key).into_owned()).collect()
}
