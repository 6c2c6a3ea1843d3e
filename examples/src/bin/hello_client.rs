//! Calls the greeting service by its name, steadily, and prints answers and errors
//!
//!     cargo run -p callsign-examples --bin hello_client -- --service hello.rpc --rate 5
//!
//! (without a `protoc`: `cargo xtask run hello_client --service hello.rpc --rate 5`)
//!
//! etcd is the cluster named by `CALLSIGN_ETCD` (hosts, login, TLS: see the README), else 127.0.0.1:2379. Start and stop servers
//! while it runs; ctrl-c ends it.

use std::{error::Error, time::Duration};

use callsign::EtcdChannel;
use callsign_examples::pb::{HelloRequest, greeter_client::GreeterClient};
use lexopt::prelude::*;
use tonic::Request;
use tracing_subscriber::filter::{EnvFilter, LevelFilter};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // Changes of state are logged; RUST_LOG asks for more or less.
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    tracing_subscriber::fmt().with_env_filter(filter).init();
    let Options { service, name, rate } = Options::from_command_line()?;

    // A channel is cheap to clone, and so is the generated client on top of it.
    let channel = EtcdChannel::connect(&service).await?;
    let greeter = GreeterClient::new(channel);

    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate);
    loop {
        ticks.tick().await;
        // A task for each call: a slow answer does not hold up the next call.
        tokio::spawn(greet(greeter.clone(), name.clone()));
    }
}

async fn greet(mut greeter: GreeterClient<EtcdChannel>, name: String) {
    let mut request = Request::new(HelloRequest { name });
    request.set_timeout(Duration::from_secs(2));
    match greeter.say_hello(request).await {
        Ok(reply) => println!("{}", reply.into_inner().message),
        Err(status) => println!("error: {:?}: {}", status.code(), status.message()),
    }
}

struct Options {
    service: String,
    name: String,
    /// Calls a second
    rate: u32,
}

impl Options {
    fn from_command_line() -> Result<Self, lexopt::Error> {
        let mut options = Self { service: "hello.rpc".to_owned(), name: "World".to_owned(), rate: 5 };
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("service") => options.service = arguments.value()?.string()?,
                Long("name") => options.name = arguments.value()?.string()?,
                Long("rate") => options.rate = arguments.value()?.parse_with(parse_rate)?,
                other => return Err(other.unexpected()),
            }
        }
        Ok(options)
    }
}

fn parse_rate(rate: &str) -> Result<u32, &'static str> {
    rate.parse().ok().filter(|rate| (1..=1_000).contains(rate)).ok_or("not a number from 1 to 1000")
}
