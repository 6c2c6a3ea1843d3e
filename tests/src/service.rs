//! The services that the suites call, and a server of them in this process

use std::{
    fmt,
    pin::Pin,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use callsign::instance::Address;
use tokio::{
    net::TcpListener,
    sync::{oneshot, watch},
    time::sleep,
};
use tokio_stream::{Stream, StreamExt};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{
        Server,
        server::{Router, TcpIncoming},
    },
};

use crate::{
    echo::{
        Chunk, Total, Wanted,
        echo_server::{Echo, EchoServer},
    },
    pb::{
        HelloReply, HelloRequest,
        greeter_server::{Greeter, GreeterServer},
    },
};

/// Both services on one router
pub fn router(mut server: Server, hello: Hello, calls: &Calls) -> Router {
    server.add_service(GreeterServer::new(hello)).add_service(EchoServer::new(EchoService(calls.clone())))
}

/// How a greeter answers; as text `after 2`, in milliseconds, `unavailable` or `never`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// With a greeting, this much later
    After(Duration),
    /// With UNAVAILABLE, at once
    Unavailable,
    /// Not at all, until it has another manner
    Never,
}

impl fmt::Display for Manner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::After(delay) => write!(f, "after {}", delay.as_millis()),
            Self::Unavailable => f.write_str("unavailable"),
            Self::Never => f.write_str("never"),
        }
    }
}

impl FromStr for Manner {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text.split_once(' ') {
            Some(("after", delay)) => delay.parse().map(Duration::from_millis).map(Self::After).or(Err(())),
            None if text == "unavailable" => Ok(Self::Unavailable),
            None if text == "never" => Ok(Self::Never),
            _ => Err(()),
        }
    }
}

/// The greeter: its greeting ends with its name; clones are one
#[derive(Clone, Debug)]
pub struct Hello {
    name: String,
    manner: Arc<watch::Sender<Manner>>,
    calls: Arc<AtomicU64>,
}

impl Hello {
    /// It calls itself by this name, and greets this much later
    pub fn new(name: impl Into<String>, delay: Duration) -> Self {
        let manner = Arc::new(watch::Sender::new(Manner::After(delay)));
        Self { name: name.into(), manner, calls: Arc::default() }
    }

    /// Answers like this from here on
    pub fn turn(&self, manner: Manner) {
        self.manner.send_replace(manner);
    }

    /// Calls that have come in so far
    pub fn calls(&self) -> u64 {
        self.calls.load(Relaxed)
    }
}

#[tonic::async_trait]
impl Greeter for Hello {
    async fn say_hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        self.calls.fetch_add(1, Relaxed);
        let mut manner = self.manner.subscribe();
        let answers = manner.wait_for(|manner| *manner != Manner::Never).await;
        let manner = *answers.expect("the greeter keeps the sender");
        let Manner::After(delay) = manner else { return Err(Status::unavailable("as it was told")) };
        sleep(delay).await;
        let message = format!("Hello {}, this is {}", request.get_ref().name, self.name);
        Ok(Response::new(HelloReply { message }))
    }
}

/// Connections that send at once
///
/// As tonic's own: without it the small frames of an answer wait for one another's ACK, 40 ms each time.
pub fn prompt(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

/// Who sent a greeting
pub fn who(reply: &HelloReply) -> String {
    reply.message.rsplit(' ').next().unwrap_or_default().to_owned()
}

/// What the echo service of one server has seen; clones share it
#[derive(Clone, Debug, Default)]
pub struct Calls(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    started: AtomicU64,
    ended: AtomicU64,
    read: AtomicU64,
    written: AtomicU64,
}

impl Calls {
    /// Calls that have started and neither ended nor were cancelled
    pub fn open(&self) -> u64 {
        self.0.started.load(Relaxed) - self.0.ended.load(Relaxed)
    }

    /// Calls that have started
    pub fn started(&self) -> u64 {
        self.0.started.load(Relaxed)
    }

    /// Bytes of payload that handlers have read
    pub fn read(&self) -> u64 {
        self.0.read.load(Relaxed)
    }

    /// Bytes of payload that handlers have handed out to be sent
    pub fn written(&self) -> u64 {
        self.0.written.load(Relaxed)
    }

    fn start(&self) -> OpenCall {
        self.0.started.fetch_add(1, Relaxed);
        OpenCall(self.clone())
    }
}

/// One call; its drop is the call's end, whoever ended it
struct OpenCall(Calls);

impl OpenCall {
    async fn read(&self, chunk: Chunk) -> Bytes {
        self.0.0.read.fetch_add(chunk.payload.len() as u64, Relaxed);
        sleep(Duration::from_millis(chunk.rest_ms.into())).await;
        chunk.payload
    }

    fn write(&self, payload: Bytes) -> Chunk {
        self.0.0.written.fetch_add(payload.len() as u64, Relaxed);
        Chunk { payload, rest_ms: 0 }
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        self.0.0.ended.fetch_add(1, Relaxed);
    }
}

/// The echo service: see `tests/proto/echo.proto`
#[derive(Clone, Debug)]
pub struct EchoService(Calls);

type Chunks = Pin<Box<dyn Stream<Item = Result<Chunk, Status>> + Send>>;

#[tonic::async_trait]
impl Echo for EchoService {
    type DownloadStream = Chunks;
    type BidiStream = Chunks;

    async fn unary(&self, request: Request<Chunk>) -> Result<Response<Chunk>, Status> {
        let call = self.0.start();
        let payload = call.read(request.into_inner()).await;
        Ok(Response::new(call.write(payload)))
    }

    async fn download(&self, request: Request<Wanted>) -> Result<Response<Chunks>, Status> {
        let call = self.0.start();
        let Wanted { chunks, size, rest_ms } = request.into_inner();
        let payload = Bytes::from(vec![7; size as usize]);
        let chunks = tokio_stream::iter(0..chunks).then(move |_| {
            let chunk = call.write(payload.clone());
            async move {
                if rest_ms > 0 {
                    sleep(Duration::from_millis(rest_ms.into())).await;
                }
                Ok(chunk)
            }
        });
        Ok(Response::new(Box::pin(chunks)))
    }

    async fn upload(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Total>, Status> {
        let call = self.0.start();
        let mut chunks = request.into_inner();
        let mut total = Total::default();
        while let Some(chunk) = chunks.message().await? {
            total.chunks += 1;
            total.bytes += call.read(chunk).await.len() as u64;
        }
        Ok(Response::new(total))
    }

    async fn bidi(&self, request: Request<Streaming<Chunk>>) -> Result<Response<Chunks>, Status> {
        let call = Arc::new(self.0.start());
        let chunks = request.into_inner().then(move |chunk| {
            let call = call.clone();
            async move {
                let payload = call.read(chunk?).await;
                Ok(call.write(payload))
            }
        });
        Ok(Response::new(Box::pin(chunks)))
    }
}

/// A server of both services in this process
///
/// Dropped, it stops listening and sends GOAWAY; what is in flight goes on.
#[derive(Debug)]
pub struct Local {
    address: Address,
    calls: Calls,
    _stop: oneshot::Sender<()>,
}

impl Local {
    /// Serves on a port of its own, greeting at once
    pub async fn start() -> Self {
        Self::start_with(Server::builder()).await
    }

    /// Serves with the caller's options
    pub async fn start_with(server: Server) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = Address::from(listener.local_addr().expect("the listener is bound"));
        let calls = Calls::default();
        let router = router(server, Hello::new(address.to_string(), Duration::ZERO), &calls);
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(router.serve_with_incoming_shutdown(prompt(listener), async {
            // An error means that the server's owner is gone, which is the signal.
            let _ = stopped.await;
        }));
        Self { address, calls, _stop: stop }
    }

    /// Where it listens
    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// What its echo service has seen
    pub fn calls(&self) -> &Calls {
        &self.calls
    }
}
