//! An etcd that answers as none should

use std::{
    future::pending,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use callsign::{Etcd, EtcdOptions, discover::EtcdDiscover};
use callsign_tests::{bare::headers, view::View, wait};
use h2::{RecvStream, server::SendResponse};
use http::Response;
use prost::Message;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tonic::Status;

const BOUND: Duration = Duration::from_secs(20);
const A: &str = "10.0.0.1:80";

/// Of etcd's messages what is needed here
#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(int64, tag = "3")]
    limit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct RangeResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<KeyValue>,
}

#[derive(Clone, PartialEq, Message)]
struct ResponseHeader {
    #[prost(int64, tag = "3")]
    revision: i64,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(int64, tag = "3")]
    mod_revision: i64,
    #[prost(string, tag = "5")]
    value: String,
}

#[derive(Clone, PartialEq, Message)]
struct WatchResponse {
    #[prost(bool, tag = "3")]
    created: bool,
    #[prost(bool, tag = "4")]
    canceled: bool,
    #[prost(int64, tag = "5")]
    compact_revision: i64,
}

/// How it is odd, and what it was asked for
#[derive(Debug)]
struct Odd {
    /// A list of more is never answered
    longest_list: i64,
    /// Whether every watch is behind a compaction
    compacted: bool,
    limits: Mutex<Vec<i64>>,
}

impl Odd {
    fn new(longest_list: i64, compacted: bool) -> Arc<Self> {
        Arc::new(Self { longest_list, compacted, limits: Mutex::default() })
    }

    /// What the lists were limited to so far
    fn limits(&self) -> Vec<i64> {
        self.limits.lock().expect("nobody panics with it").clone()
    }

    /// Serves a session, and follows a service in it; the tasks end with the set
    async fn followed(self: &Arc<Self>, tasks: &mut JoinSet<()>) -> View {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("the listener is bound");
        let session = Etcd::connect_lazy(EtcdOptions::new([address.to_string()])).expect("a valid host");
        let odd = Arc::clone(self);
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(Arc::clone(&odd).serve(stream));
            }
        });
        View::of(EtcdDiscover::new(&session, "hello.rpc").expect("a valid name"))
    }

    async fn serve(self: Arc<Self>, stream: TcpStream) {
        let Ok(mut connection) = h2::server::handshake(stream).await else { return };
        let mut calls = JoinSet::new();
        while let Some(Ok((request, respond))) = connection.accept().await {
            let (head, body) = request.into_parts();
            calls.spawn(Arc::clone(&self).answer(head.uri.path().to_owned(), body, respond));
        }
    }

    async fn answer(
        self: Arc<Self>,
        path: String,
        mut body: RecvStream,
        mut respond: SendResponse<Bytes>,
    ) -> Result<(), h2::Error> {
        let mut asked = BytesMut::new();
        // A watch's stream stays open.
        while let Some(Ok(data)) = body.data().await {
            asked.put(data);
            if path.ends_with("/Watch") {
                break;
            }
        }
        let answers = match path.as_str() {
            "/etcdserverpb.KV/Range" => vec![self.list(&asked[5..]).await],
            "/etcdserverpb.Watch/Watch" => self.watch(),
            path => panic!("nobody asks for {path}"),
        };
        let mut response = Response::new(());
        response.headers_mut().insert("content-type", http::HeaderValue::from_static("application/grpc"));
        let mut stream = respond.send_response(response, false)?;
        for answer in answers {
            stream.send_data(framed(&answer), false)?;
        }
        if path.ends_with("/Watch") {
            return pending().await;
        }
        stream.send_trailers(headers(&Status::ok("")))
    }

    async fn list(&self, asked: &[u8]) -> Vec<u8> {
        let limit = RangeRequest::decode(asked).expect("a request").limit;
        self.limits.lock().expect("nobody panics with it").push(limit);
        if limit > self.longest_list {
            pending::<()>().await;
        }
        let pair = KeyValue { key: "hello.rpc/1".to_owned(), mod_revision: 5, value: A.to_owned() };
        RangeResponse { header: Some(ResponseHeader { revision: 7 }), kvs: vec![pair] }.encode_to_vec()
    }

    fn watch(&self) -> Vec<Vec<u8>> {
        let created = WatchResponse { created: true, ..WatchResponse::default() };
        let compacted = WatchResponse { canceled: true, compact_revision: 9, ..WatchResponse::default() };
        let messages = [Some(created), self.compacted.then_some(compacted)];
        messages.into_iter().flatten().map(|message| message.encode_to_vec()).collect()
    }
}

/// In gRPC's frame
fn framed(message: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(message.len() as u32);
    frame.put(message);
    frame.freeze()
}

#[tokio::test]
async fn a_compaction_is_followed_by_a_list_at_once_and_one_after_the_other_by_a_pace() {
    let (odd, mut tasks) = (Odd::new(i64::MAX, true), JoinSet::new());
    let view = odd.followed(&mut tasks).await;
    let until = |lists| {
        let odd = &odd;
        wait::until("it is listed", BOUND, move || (odd.limits().len() >= lists).then_some(()))
    };
    let ((), took) = wait::timed(until(2)).await;
    assert!(took < Duration::from_secs(1), "the first is nobody's fault: {took:?}");
    // Five waits, of up to 0.2, 0.4, 0.8, 1.6 and 3 s: together below a third of a second is no chance to speak of.
    let ((), took) = wait::timed(until(7)).await;
    assert!(took > Duration::from_millis(300), "{took:?}");
    assert_eq!(view.addresses(), [A]);
}

#[tokio::test]
async fn a_list_that_takes_too_long_is_read_in_smaller_pages() {
    let (odd, mut tasks) = (Odd::new(150, false), JoinSet::new());
    let view = odd.followed(&mut tasks).await;
    view.until(&[A], BOUND).await;
    assert_eq!(odd.limits(), [500, 250, 125]);
}
