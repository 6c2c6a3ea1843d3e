//! The calls of the replay tests: unary and client-streaming, with small and large bodies

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use callsign::{Channel, WaitForReady};
use prost::Message;
use tokio::{sync::watch, task::JoinHandle};
use tokio_stream::StreamExt;
use tonic::{Request, Status};

use crate::echo::{Chunk, echo_client::EchoClient};

/// Bytes of payload in each chunk of a client stream
pub const CHUNK: usize = 8 * 1024;
/// Longer than any test, so that a call that hangs is told from one that waits
const DEADLINE: Duration = Duration::from_secs(20);

/// How a call sends its body
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// In one message
    Unary,
    /// Sends its size in chunks, waits for the test's gate, then sends one more
    ClientStreaming,
}

/// One cell of the matrix
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// How its body is sent
    pub shape: Shape,
    /// Bytes of payload before the gate opens
    pub size: usize,
    /// Waits for an endpoint to be ready, so that a call which is sent again comes through whatever it takes
    pub patient: bool,
}

/// Unary and client-streaming, below and above the 64 KiB that a channel keeps
pub const MATRIX: [Case; 4] = [
    Case { shape: Shape::Unary, size: 3 * CHUNK, patient: false },
    Case { shape: Shape::Unary, size: 25 * CHUNK, patient: false },
    Case { shape: Shape::ClientStreaming, size: 3 * CHUNK, patient: false },
    Case { shape: Shape::ClientStreaming, size: 25 * CHUNK, patient: false },
];

impl Case {
    /// The same call, patient
    pub fn patient(self) -> Self {
        Self { patient: true, ..self }
    }

    /// Whether its body stays below 64 KiB
    pub fn is_kept(self) -> bool {
        self.size < 64 * 1024
    }

    /// What is sent before the gate opens; it begins with the marker
    fn chunks(self, marker: &str) -> Vec<Chunk> {
        let size = if self.shape == Shape::Unary { self.size } else { CHUNK };
        let mut chunks = vec![chunk(vec![b'x'; size]); self.size / size];
        let mut first = chunks[0].payload.to_vec();
        first[..marker.len()].copy_from_slice(marker.as_bytes());
        chunks[0] = chunk(first);
        chunks
    }

    /// What is sent after the gate has opened
    fn last(self) -> Option<Chunk> {
        (self.shape == Shape::ClientStreaming).then(|| chunk(b"last".as_slice()))
    }

    /// Bytes on the wire before the gate opens
    pub fn sent_at_first(self) -> usize {
        self.chunks("").iter().map(|chunk| wire(chunk).len()).sum()
    }

    /// The whole body on the wire
    pub fn body(self, marker: &str) -> Vec<u8> {
        self.chunks(marker).iter().chain(&self.last()).flat_map(wire).collect()
    }

    fn request<T>(self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(DEADLINE);
        if self.patient {
            request.extensions_mut().insert(WaitForReady);
        }
        request
    }

    /// Makes the call; its body begins with `marker`
    ///
    /// # Errors
    ///
    /// The status it failed with.
    pub async fn call(
        self,
        mut client: EchoClient<Channel>,
        marker: &'static str,
        gate: Gate,
    ) -> Result<(), Status> {
        let chunks = self.chunks(marker);
        match self.shape {
            Shape::Unary => client.unary(self.request(chunks[0].clone())).await.map(drop),
            Shape::ClientStreaming => {
                let chunks = chunks.into_iter().map(|chunk| (false, chunk));
                let chunks = chunks.chain(self.last().map(|chunk| (true, chunk)));
                let body = tokio_stream::iter(chunks.collect::<Vec<_>>()).then(move |(gated, chunk)| {
                    let gate = gate.clone();
                    async move {
                        if gated {
                            gate.opened().await;
                        }
                        chunk
                    }
                });
                client.upload(self.request(body)).await.map(drop)
            }
        }
    }

    /// Makes the call in a task of its own
    pub fn spawn(
        self,
        client: &EchoClient<Channel>,
        marker: &'static str,
        gate: &Gate,
    ) -> JoinHandle<Result<(), Status>> {
        tokio::spawn(self.call(client.clone(), marker, gate.clone()))
    }
}

fn chunk(payload: impl Into<Bytes>) -> Chunk {
    Chunk { payload: payload.into(), rest_ms: 0 }
}

/// A message as gRPC frames it
fn wire(chunk: &Chunk) -> Vec<u8> {
    let message = chunk.encode_to_vec();
    let length = u32::try_from(message.len()).expect("a short message");
    [&[0], &length.to_be_bytes()[..], &message].concat()
}

/// Closed at first; clones share it
#[derive(Clone, Debug)]
pub struct Gate(Arc<watch::Sender<bool>>);

impl Default for Gate {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl Gate {
    /// Opens it for good
    pub fn open(&self) {
        self.0.send_replace(true);
    }

    /// Waits until it is open
    pub async fn opened(&self) {
        self.0.subscribe().wait_for(|open| *open).await.expect("the gate holds the sender");
    }
}
