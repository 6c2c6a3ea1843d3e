//! One of the two servers: sends operations, collects what watches are told, maps ids

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use bytes::Bytes;
use tokio::{sync::watch, task::JoinHandle, time::timeout};
use tonic::Status;

use super::operation::{Operation, STREAMS};
use crate::{
    client::{Client, KeepAlive, WatchStream},
    proto::{
        etcdserverpb::{
            LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, PutRequest, RangeRequest,
            RequestOp, ResponseHeader, ResponseOp, TxnRequest, TxnResponse, WatchCreateRequest, WatchRequest,
            WatchResponse, compare::TargetUnion, request_op::Request, response_op::Response,
            watch_request::RequestUnion,
        },
        mvccpb::{Event, KeyValue},
    },
};

/// From an event to its arrival; a real etcd looks for history every 100 ms.
const PATIENCE: Duration = Duration::from_secs(20);

/// Ids of leases that never were start here.
const UNKNOWN: i64 = 1 << 40;

pub(super) struct Side {
    client: Client,
    keep_alive: KeepAlive,
    /// Ids in the order of granting.
    leases: Vec<i64>,
    slots: HashMap<i64, i64>,
    streams: Vec<Stream>,
}

/// What a stream of watches was told since the last comparison
struct Stream {
    requests: tokio::sync::mpsc::UnboundedSender<WatchRequest>,
    told: watch::Receiver<Vec<WatchResponse>>,
    clear: watch::Sender<Vec<WatchResponse>>,
    reader: JoinHandle<()>,
}

/// An answer with everything mapped that the two servers make up
#[derive(Debug, PartialEq)]
pub(super) enum Answer {
    Refused(tonic::Code, String),
    Kv(Box<ResponseOp>, i64),
    Compacted(i64, i64),
    Granted(i64, i64, i64),
    Revoked(i64),
    Kept(i64, i64),
    Left { revision: i64, there: bool, granted: i64, keys: Vec<Bytes> },
    Leases(i64, Vec<i64>),
    Watch(WatchResponse),
}

/// A watch that both sides have
#[derive(Clone, Debug)]
pub(super) struct Watched {
    stream: usize,
    id: i64,
    request: WatchCreateRequest,
    /// Its start is compacted: it ends without being told anything.
    compacted: bool,
    /// The revision of the last event it will be told.
    last: Option<i64>,
}

impl Side {
    pub(super) fn new(endpoint: &str) -> Self {
        let client = Client::connect(endpoint);
        let keep_alive = client.keep_alive();
        let streams = (0..STREAMS).map(|_| Stream::open(client.watch())).collect();
        Self { client, keep_alive, leases: Vec::new(), slots: HashMap::new(), streams }
    }

    pub(super) async fn apply(&mut self, operation: Operation) -> Answer {
        self.try_apply(operation)
            .await
            .unwrap_or_else(|status| Answer::Refused(status.code(), status.message().to_owned()))
    }

    async fn try_apply(&mut self, operation: Operation) -> Result<Answer, Status> {
        Ok(match operation {
            Operation::Range(request) => {
                let mut response = self.client.send(request.clone()).await?;
                check_sorted(&request, &mut response.kvs);
                self.kv(response.header, Response::ResponseRange(response))
            }
            Operation::Put(request) => {
                let response = self.client.send(self.put(request)).await?;
                self.kv(response.header, Response::ResponsePut(response))
            }
            Operation::Delete(request) => {
                let response = self.client.send(request).await?;
                self.kv(response.header, Response::ResponseDeleteRange(response))
            }
            Operation::Txn(request) => {
                let response = self.client.send(self.txn(request)).await?;
                self.kv(response.header, Response::ResponseTxn(response))
            }
            Operation::Compact(request) => {
                let header = self.client.send(request).await?.header;
                Answer::Compacted(request.revision, revision(header))
            }
            Operation::Watch(stream, request) => {
                let created = self.streams[stream].create(request).await;
                Answer::Watch(self.watch_response(created))
            }
            operation => self.try_lease(operation).await?,
        })
    }

    async fn try_lease(&mut self, operation: Operation) -> Result<Answer, Status> {
        Ok(match operation {
            Operation::Grant(request) => {
                let response = self.client.send(request).await?;
                self.leases.push(response.id);
                self.slots.insert(response.id, self.leases.len() as i64);
                Answer::Granted(revision(response.header), self.slot(response.id), response.ttl)
            }
            Operation::Revoke(slot) => {
                let response = self.client.send(LeaseRevokeRequest { id: self.id(slot) }).await?;
                Answer::Revoked(revision(response.header))
            }
            Operation::KeepAlive(slot) => {
                let response = self.keep_alive.keep(self.id(slot)).await;
                Answer::Kept(revision(response.header), response.ttl)
            }
            Operation::TimeToLive(slot) => {
                let request = LeaseTimeToLiveRequest { id: self.id(slot), keys: true };
                let mut response = self.client.send(request).await?;
                // In etcd they come in the order of a map.
                response.keys.sort();
                let (granted, keys) = (response.granted_ttl, response.keys);
                Answer::Left { revision: revision(response.header), there: response.ttl >= 0, granted, keys }
            }
            Operation::Leases => {
                let response = self.client.send(LeaseLeasesRequest {}).await?;
                let mut slots: Vec<_> = response.leases.iter().map(|lease| self.slot(lease.id)).collect();
                slots.sort_unstable();
                Answer::Leases(revision(response.header), slots)
            }
            operation => unreachable!("{operation:?} is none of leases"),
        })
    }

    pub(super) async fn has_ended(&self, slot: i64) -> bool {
        let request = LeaseTimeToLiveRequest { id: self.id(slot), keys: false };
        self.client.send(request).await.unwrap().ttl < 0
    }

    /// Waits until the watch was told its last event, or that it is over
    pub(super) async fn wait_for(&self, watched: &Watched) {
        let done = |told: &Vec<WatchResponse>| {
            let mut told = told.iter().filter(|response| response.watch_id == watched.id);
            told.any(|response| match (watched.compacted, watched.last) {
                (true, _) => response.canceled,
                (false, None) => true,
                (false, Some(last)) => response.events.iter().any(|event| kv(event).mod_revision >= last),
            })
        };
        if watched.compacted || watched.last.is_some() {
            let mut told = self.streams[watched.stream].told.clone();
            let waited = timeout(PATIENCE, told.wait_for(done)).await;
            assert!(waited.is_ok(), "{watched:?} was not told its last event");
        }
    }

    /// Cancels a watch and waits for the answer
    pub(super) async fn cancel(&self, watched: &Watched) {
        let stream = &self.streams[watched.stream];
        let watch_id = watched.id;
        let union = RequestUnion::CancelRequest(crate::proto::etcdserverpb::WatchCancelRequest { watch_id });
        stream.ask(union);
        let over = |told: &Vec<WatchResponse>| {
            told.iter().any(|response| response.canceled && response.watch_id == watch_id)
        };
        let mut told = stream.told.clone();
        let waited = timeout(PATIENCE, told.wait_for(over)).await;
        assert!(waited.is_ok(), "{watched:?} was not canceled");
    }

    /// Compares everything that the streams were told since the last time; returns how many events that were
    pub(super) fn assert_told_as(&self, other: &Self) -> usize {
        let mut compared = 0;
        for (stream, (ours, theirs)) in self.streams.iter().zip(&other.streams).enumerate() {
            let (ours, theirs) = (ours.take(), theirs.take());
            let (our_words, their_words) = (self.words(&ours), other.words(&theirs));
            assert_eq!(our_words, their_words, "stream {stream} was told differently of its watches");
            let (ours, theirs) = (self.events(ours), other.events(theirs));
            for id in ours.keys().chain(theirs.keys()) {
                let none = Vec::new();
                let (ours, theirs) = (ours.get(id).unwrap_or(&none), theirs.get(id).unwrap_or(&none));
                let same = ours.iter().zip(theirs).take_while(|(ours, theirs)| ours == theirs).count();
                let rest = (ours.get(same), theirs.get(same));
                assert!(ours == theirs, "events of watch {id} of stream {stream} differ: {rest:#?}");
            }
            compared += ours.values().map(Vec::len).sum::<usize>();
        }
        compared
    }

    /// Words about each watch, in order
    fn words(&self, told: &[WatchResponse]) -> BTreeMap<i64, Vec<WatchResponse>> {
        let mut words: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for response in told.iter().filter(|response| response.created || response.canceled) {
            words.entry(response.watch_id).or_default().push(self.watch_response(response.clone()));
        }
        words
    }

    /// Events by watch, in order
    fn events(&self, told: Vec<WatchResponse>) -> HashMap<i64, Vec<Event>> {
        let mut events: HashMap<_, Vec<_>> = HashMap::new();
        for mut response in told.into_iter().filter(|response| !response.events.is_empty()) {
            for event in &mut response.events {
                event.kv.iter_mut().chain(&mut event.prev_kv).for_each(|kv| self.map_kv(kv));
            }
            events.entry(response.watch_id).or_default().append(&mut response.events);
        }
        events
    }

    fn watch_response(&self, mut response: WatchResponse) -> WatchResponse {
        response.header.iter_mut().for_each(map_header);
        response
    }

    fn put(&self, mut request: PutRequest) -> PutRequest {
        request.lease = self.id(request.lease);
        request
    }

    fn txn(&self, mut request: TxnRequest) -> TxnRequest {
        for compare in &mut request.compare {
            if let Some(TargetUnion::Lease(lease)) = &mut compare.target_union {
                *lease = self.id(*lease);
            }
        }
        for RequestOp { request } in request.success.iter_mut().chain(&mut request.failure) {
            *request = request.take().map(|request| match request {
                Request::RequestPut(put) => Request::RequestPut(self.put(put)),
                Request::RequestTxn(txn) => Request::RequestTxn(self.txn(txn)),
                request => request,
            });
        }
        request
    }

    fn kv(&self, header: Option<ResponseHeader>, response: Response) -> Answer {
        let mut op = ResponseOp { response: Some(response) };
        self.map_op(&mut op);
        Answer::Kv(Box::new(op), revision(header))
    }

    fn map_op(&self, op: &mut ResponseOp) {
        match op.response.as_mut().expect("it has one") {
            Response::ResponseRange(range) => {
                range.header.iter_mut().for_each(map_header);
                range.kvs.iter_mut().for_each(|kv| self.map_kv(kv));
            }
            Response::ResponsePut(put) => {
                put.header.iter_mut().for_each(map_header);
                put.prev_kv.iter_mut().for_each(|kv| self.map_kv(kv));
            }
            Response::ResponseDeleteRange(delete) => {
                delete.header.iter_mut().for_each(map_header);
                delete.prev_kvs.iter_mut().for_each(|kv| self.map_kv(kv));
            }
            Response::ResponseTxn(TxnResponse { header, responses, .. }) => {
                header.iter_mut().for_each(map_header);
                responses.iter_mut().for_each(|op| self.map_op(op));
            }
        }
    }

    fn map_kv(&self, kv: &mut KeyValue) {
        kv.lease = self.slot(kv.lease);
    }

    fn id(&self, slot: i64) -> i64 {
        match usize::try_from(slot - 1) {
            Err(_) => 0,
            Ok(place) => self.leases.get(place).copied().unwrap_or(UNKNOWN + slot),
        }
    }

    fn slot(&self, id: i64) -> i64 {
        if id == 0 { 0 } else { self.slots[&id] }
    }
}

impl Stream {
    fn open(mut stream: WatchStream) -> Self {
        let (clear, told) = watch::channel(Vec::new());
        let requests = stream.requests();
        let tell = clear.clone();
        let reader = tokio::spawn(async move {
            while let Ok(Some(response)) = stream.try_next().await {
                tell.send_modify(|told| told.push(response));
            }
        });
        Self { requests, told, clear, reader }
    }

    fn ask(&self, union: RequestUnion) {
        let request = WatchRequest { request_union: Some(union) };
        self.requests.send(request).expect("the stream is open");
    }

    /// Asks for a watch and waits for the answer
    async fn create(&self, request: WatchCreateRequest) -> WatchResponse {
        let created = |told: &Vec<WatchResponse>| told.iter().filter(|response| response.created).count();
        let before = created(&self.told.borrow());
        self.ask(RequestUnion::CreateRequest(request));
        let mut told = self.told.clone();
        let waited = timeout(PATIENCE, told.wait_for(|told| created(told) > before)).await;
        let told = waited.expect("an answer in time").expect("the stream is open");
        told.iter().rev().find(|response| response.created).expect("it was counted").clone()
    }

    fn take(&self) -> Vec<WatchResponse> {
        let mut taken = Vec::new();
        self.clear.send_modify(|told| taken = std::mem::take(told));
        taken
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Answer {
    pub(super) fn revision(&self) -> Option<i64> {
        match self {
            Self::Kv(_, revision) | Self::Revoked(revision) | Self::Leases(revision, _) => Some(*revision),
            _ => None,
        }
    }

    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused(..))
    }

    pub(super) fn granted(&self) -> bool {
        matches!(self, Self::Granted(..))
    }

    pub(super) fn compacted(&self) -> Option<i64> {
        match self {
            Self::Compacted(revision, _) => Some(*revision),
            _ => None,
        }
    }

    /// The watch that this answers, if it was created
    pub(super) fn watched(&self, operation: &Operation) -> Option<Watched> {
        match (self, operation) {
            (Self::Watch(created), Operation::Watch(stream, request)) if !created.canceled => {
                let (stream, id, request) = (*stream, created.watch_id, request.clone());
                Some(Watched { stream, id, request, compacted: false, last: None })
            }
            _ => None,
        }
    }
}

impl Watched {
    /// A key that is in its range
    pub(super) fn start(&self) -> Bytes {
        if self.request.key.is_empty() { Bytes::from_static(&[0]) } else { self.request.key.clone() }
    }

    /// What compaction has overtaken before the first event ends by itself
    pub(super) fn starts_before(mut self, compacted: i64) -> Self {
        self.compacted = self.request.start_revision != 0 && self.request.start_revision < compacted;
        self
    }

    pub(super) fn ends_by_itself(&self) -> bool {
        self.compacted
    }

    /// Takes note of a put and a delete of a key
    pub(super) fn expect(&mut self, key: &Bytes, put: i64, deleted: i64) {
        let (start, end) = (self.start(), &self.request.range_end);
        let inside = match &end[..] {
            [] => *key == start,
            [0] => start <= *key,
            _ => start <= *key && key < end,
        };
        let last = if self.request.filters.contains(&1) { put } else { deleted };
        if inside && last >= self.request.start_revision {
            self.last = Some(last);
        }
    }
}

fn revision(header: Option<ResponseHeader>) -> i64 {
    header.map_or(-1, |header| header.revision)
}

fn map_header(header: &mut ResponseHeader) {
    *header = ResponseHeader { revision: header.revision, ..ResponseHeader::default() };
}

fn kv(event: &Event) -> &KeyValue {
    event.kv.as_ref().expect("every event has one")
}

/// Checks the order that was asked for, then puts equal ones in the order of their keys
fn check_sorted(request: &RangeRequest, kvs: &mut [KeyValue]) {
    let field = |kv: &KeyValue| match request.sort_target {
        1 => (kv.version, Bytes::new()),
        2 => (kv.create_revision, Bytes::new()),
        3 => (kv.mod_revision, Bytes::new()),
        4 => (0, kv.value.clone()),
        _ => (0, kv.key.clone()),
    };
    let descending = request.sort_order == 2;
    // Values are gone when only keys were asked for.
    if !(request.keys_only && request.sort_target == 4) {
        let ordered =
            kvs.is_sorted_by(|a, b| if descending { field(a) >= field(b) } else { field(a) <= field(b) });
        assert!(ordered, "not in order: {request:?} {kvs:?}");
    }
    if request.sort_target != 0 {
        kvs.sort_by_key(|kv| (field(kv), kv.key.clone()));
    }
}
