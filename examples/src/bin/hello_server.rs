//! A greeting server that registers itself in etcd
//!
//!     cargo run -p callsign-examples --bin hello_server -- --listen 127.0.0.1:9090 --service hello.rpc
//!
//! (without a `protoc`: `cargo xtask run hello_server --listen 127.0.0.1:9090 --service hello.rpc`)
//!
//! etcd is the cluster named by `CALLSIGN_ETCD` (hosts, login, TLS: see the README), else 127.0.0.1:2379. Start several of them on
//! different ports; ctrl-c takes one away without losing a call.

use std::error::Error;

use callsign::ServeRegistered;
use callsign_examples::pb::{
    HelloReply, HelloRequest,
    greeter_server::{Greeter, GreeterServer},
};
use lexopt::prelude::*;
use tonic::{Request, Response, Status, transport::Server};
use tracing_subscriber::filter::{EnvFilter, LevelFilter};

/// The service's own code knows nothing of etcd
struct Hello;

#[tonic::async_trait]
impl Greeter for Hello {
    async fn say_hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        // So that callers see who answered.
        let server =
            request.local_addr().map_or_else(|| "an unknown address".to_owned(), |addr| addr.to_string());
        let message = format!("Hello {} from {server}", request.into_inner().name);
        Ok(Response::new(HelloReply { message }))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // Changes of state are logged, the address among them; RUST_LOG asks for more or less.
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).init();
    let Options { listen, service } = Options::from_command_line()?;

    // Registers once it serves; ctrl-c or SIGTERM deregisters, drains and stops.
    Server::builder().add_service(GreeterServer::new(Hello)).serve_registered(service, listen).await?;
    Ok(())
}

struct Options {
    listen: String,
    service: String,
}

impl Options {
    fn from_command_line() -> Result<Self, lexopt::Error> {
        let mut options = Self { listen: "127.0.0.1:9090".to_owned(), service: "hello.rpc".to_owned() };
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("listen") => options.listen = arguments.value()?.string()?,
                Long("service") => options.service = arguments.value()?.string()?,
                other => return Err(other.unexpected()),
            }
        }
        Ok(options)
    }
}
