//! What the programs in `src/bin` share

use std::{
    error::Error,
    fs,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use etcd_client::Client;
use tonic::{Request, Response, Status};

use self::pb::{HelloReply, HelloRequest, greeter_server::Greeter};

/// What can go wrong ends the program
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A real etcd with its data in a fresh temp dir; both go with this value
#[derive(Debug)]
pub struct Real {
    child: Child,
    dir: PathBuf,
    endpoint: String,
}

impl Real {
    /// None without an `etcd` on PATH
    ///
    /// # Errors
    ///
    /// If it does not answer within 20 s.
    pub async fn start() -> Result<Option<Self>> {
        let (client, peer) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
        let endpoint = client.local_addr()?.to_string();
        let (client_url, peer_url) = (format!("http://{endpoint}"), format!("http://{}", peer.local_addr()?));
        drop((client, peer));
        let dir = std::env::temp_dir().join(format!("callsign-bench-etcd-{}", std::process::id()));
        let child = Command::new("etcd")
            .args(["--name", "bench", "--logger", "zap", "--log-level", "error", "--data-dir"])
            .arg(&dir)
            .args(["--listen-client-urls", &client_url, "--advertise-client-urls", &client_url])
            .args(["--listen-peer-urls", &peer_url, "--initial-advertise-peer-urls", &peer_url])
            .args(["--initial-cluster", &format!("bench={peer_url}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let child = match child {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            child => child?,
        };
        let etcd = Self { child, dir, endpoint };
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut client = Client::connect([&etcd.endpoint], None).await?;
        while let Err(error) = client.get("k", None).await {
            if Instant::now() > deadline {
                return Err(error.into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(Some(etcd))
    }

    /// `127.0.0.1:port`
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        // It may be dead already, and a directory that stays behind harms nobody.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// A process that ends with its owner
#[derive(Debug)]
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The greeting service, generated
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod pb {
    tonic::include_proto!("pb");
}

/// Greets with the name that it was given, at once
#[derive(Clone, Copy, Debug)]
pub struct Hello;

#[tonic::async_trait]
impl Greeter for Hello {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> std::result::Result<Response<HelloReply>, Status> {
        Ok(Response::new(HelloReply { message: request.into_inner().name }))
    }
}

/// Lets this process, and those that it starts from here on, have so many descriptors, as far as the system does
pub fn allow_descriptors(count: u64) {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, getrlimit, setrlimit};
        let mut limit = getrlimit(Resource::Nofile);
        if limit.current.is_some_and(|current| current < count) {
            limit.current = Some(count);
            // Else connections fail, which says so.
            let _ = setrlimit(Resource::Nofile, limit);
        }
    }
}

/// The middle one
pub fn median<T: Copy + PartialOrd>(mut values: Vec<T>) -> T {
    values.sort_by(|one, other| one.partial_cmp(other).expect("figures are numbers"));
    values[values.len() / 2]
}

/// In milliseconds
pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
