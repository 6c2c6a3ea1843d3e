//! A gRPC server on bare `h2`: it sees every head as it came, and answers with what a test wrote down

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use callsign::instance::Address;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderValue, Response, StatusCode, header::CONTENT_TYPE};
use tokio::{
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
};
use tonic::Status;

/// How it answers every call
#[derive(Clone, Debug)]
pub enum Answer {
    /// With these headers only, trailers-only in gRPC's words
    Headers(HeaderMap),
    /// With these headers, then with an end that says nothing
    HeadersThenEnd(HeaderMap),
    /// With one message without content, then with these trailers
    MessageThen(HeaderMap),
    /// As a proxy does that has no server: with this status of HTTP and a text
    Page(StatusCode),
}

/// The server; dropped, it and its connections are gone
#[derive(Debug)]
pub struct Bare {
    address: Address,
    heads: Heads,
    task: JoinHandle<()>,
}

type Heads = Arc<Mutex<Vec<http::request::Parts>>>;

impl Bare {
    /// Answers on a port of its own
    pub async fn start(answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = Address::from(listener.local_addr().expect("the listener is bound"));
        let heads = Heads::default();
        let seen = heads.clone();
        let task = tokio::spawn(async move {
            // Owns the connections: they end with the listener.
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, answer.clone(), seen.clone()));
            }
        });
        Self { address, heads, task }
    }

    /// One that answers every call with one message and `grpc-status: 0`
    pub async fn well() -> Self {
        Self::start(Answer::MessageThen(headers(&Status::ok("")))).await
    }

    /// Where it listens
    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// The heads that came in so far, taken out
    pub fn take_heads(&self) -> Vec<http::request::Parts> {
        std::mem::take(&mut *self.heads.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A status as it stands in headers or trailers
pub fn headers(status: &Status) -> HeaderMap {
    let mut headers = HeaderMap::new();
    status.add_header(&mut headers).expect("a status makes headers");
    headers
}

/// An error of h2 ends the connection, which is what a client then sees
async fn serve(stream: TcpStream, answer: Answer, heads: Heads) {
    let Ok(mut connection) = h2::server::handshake(stream).await else { return };
    // Beside the connection, which moves only while it is asked for the next call.
    let mut calls = JoinSet::new();
    while let Some(Ok((request, respond))) = connection.accept().await {
        let (head, body) = request.into_parts();
        heads.lock().unwrap_or_else(PoisonError::into_inner).push(head);
        calls.spawn(reply(body, respond, answer.clone()));
    }
}

async fn reply(
    mut body: RecvStream,
    mut respond: SendResponse<Bytes>,
    answer: Answer,
) -> Result<(), h2::Error> {
    // To its end, or h2 would reset the stream of a request that it has not seen whole. The window is large enough.
    while body.data().await.transpose()?.is_some() {}
    let mut response = Response::new(());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    match answer {
        Answer::Headers(headers) => {
            response.headers_mut().extend(headers);
            respond.send_response(response, true).map(drop)
        }
        Answer::HeadersThenEnd(headers) => {
            response.headers_mut().extend(headers);
            respond.send_response(response, false)?.send_data(Bytes::new(), true)
        }
        Answer::Page(status) => {
            *response.status_mut() = status;
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            let text = Bytes::from_static(b"no healthy upstream");
            respond.send_response(response, false)?.send_data(text, true)
        }
        Answer::MessageThen(trailers) => {
            let mut body = respond.send_response(response, false)?;
            body.send_data(Bytes::from_static(&[0; 5]), false)?;
            body.send_trailers(trailers)
        }
    }
}
