//! The client of `cargo xtask demo`: 2000 calls in 10 s, while one of two servers is killed and comes back
//!
//! It leads the demo: a line that starts with `@` on its output tells xtask what to do. It counts by the number of the
//! call, so its phases do not depend on how fast it is obeyed.

mod tally;

use std::{
    error::Error,
    pin::Pin,
    process::ExitCode,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use callsign::{Address, EndpointState, EtcdChannel, Updates};
use callsign_examples::pb::{HelloRequest, greeter_client::GreeterClient};
use lexopt::prelude::*;
use tally::{Call, Phase, Tally};
use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, timeout},
};
use tokio_stream::StreamExt;
use tonic::{Request, Status};
use tracing_subscriber::EnvFilter;

const CALLS: usize = 2_000;
const CALLS_A_SECOND: usize = 200;
/// Calls before the kill: 3.5 s
const KILL: usize = 700;
/// Calls before the restart: 3 s later, so that the survivor is seen alone for a while
const RESTART: usize = 1_300;

/// A call to a killed server must not wait for longer.
const DEADLINE: Duration = Duration::from_millis(500);
/// Both servers register and are connected to; more than this means that something is broken.
const START: Duration = Duration::from_secs(5);

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    // Output is the demo's; the log is silent up to errors unless RUST_LOG wants more.
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let Options { service, killed } = Options::from_command_line()?;
    // Lazy: the servers may not have registered yet.
    let channel = EtcdChannel::connect_lazy(&service)?;
    let mut updates = Box::pin(channel.updates());
    timeout(START, two_ready(&mut updates))
        .await
        .map_err(|_| format!("no two servers of {service} within {START:?}: {:?}", channel.endpoints()))?;

    let lost = Arc::new(OnceLock::new());
    let watch = tokio::spawn(show_updates(updates, killed.clone(), lost.clone()));
    let tally = run_calls(GreeterClient::new(channel)).await;
    watch.abort();

    let result = tally.result(&killed, lost.get().copied());
    print!("{result}");
    Ok(if result.is_good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Returns when the channel has two endpoints that are ready
async fn two_ready(updates: &mut Pin<Box<Updates>>) {
    let mut ready = Vec::new();
    while ready.len() < 2 {
        let Some(update) = updates.next().await else { return std::future::pending().await };
        ready.retain(|address| *address != update.address);
        if update.state == EndpointState::Ready {
            ready.push(update.address);
        }
    }
}

/// Prints each change, and notes when the channel first reported the killed server as not ready
async fn show_updates(mut updates: Pin<Box<Updates>>, killed: Address, lost: Arc<OnceLock<Instant>>) {
    while let Some(update) = updates.next().await {
        if update.address == killed && update.state != EndpointState::Ready {
            // Only the first report counts.
            let _ = lost.set(Instant::now());
        }
        let cause = update.cause.map(|cause| format!(": {cause}")).unwrap_or_default();
        println!("the channel says    {} is {:?}{cause}", update.address, update.state);
    }
}

/// Starts a call at each tick, whatever has become of the earlier ones
async fn run_calls(greeter: GreeterClient<EtcdChannel>) -> Tally {
    let mut tally = Tally::default();
    let mut calls = JoinSet::new();
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / CALLS_A_SECOND as u32);
    // A machine that stalls owes no burst of calls afterwards: half of it would be in flight when the server is killed.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    for number in 0..CALLS {
        ticks.tick().await;
        match number {
            KILL => println!("@kill"),
            RESTART => println!("@restart"),
            _ => {}
        }
        calls.spawn(call(greeter.clone(), phase_of(number)));
        while let Some(done) = calls.try_join_next() {
            tally.add(done.expect("a call does not panic and is not aborted"));
        }
        if (number + 1) % CALLS_A_SECOND == 0 {
            println!("{:>2} s                {}", (number + 1) / CALLS_A_SECOND, tally.running());
        }
    }
    while let Some(done) = calls.join_next().await {
        tally.add(done.expect("a call does not panic and is not aborted"));
    }
    tally
}

fn phase_of(number: usize) -> Phase {
    match number {
        ..KILL => Phase::Before,
        KILL..RESTART => Phase::During,
        _ => Phase::After,
    }
}

async fn call(mut greeter: GreeterClient<EtcdChannel>, phase: Phase) -> Call {
    let started = Instant::now();
    let answer = say_hello(&mut greeter).await;
    Call { phase, started, answer }
}

/// Who answered, in the server's own words
async fn say_hello(greeter: &mut GreeterClient<EtcdChannel>) -> Result<String, Status> {
    let mut request = Request::new(HelloRequest { name: "World".to_owned() });
    request.set_timeout(DEADLINE);
    let message = greeter.say_hello(request).await?.into_inner().message;
    let (_, server) =
        message.rsplit_once(" from ").ok_or_else(|| Status::unknown(format!("no server in {message:?}")))?;
    Ok(server.to_owned())
}

struct Options {
    service: String,
    /// The server that xtask kills
    killed: Address,
}

impl Options {
    fn from_command_line() -> Result<Self, lexopt::Error> {
        let (mut service, mut killed) = ("hello.rpc".to_owned(), None);
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("service") => service = arguments.value()?.string()?,
                Long("killed") => killed = Some(arguments.value()?.parse()?),
                other => return Err(other.unexpected()),
            }
        }
        Ok(Self { service, killed: killed.ok_or("--killed is missing")? })
    }
}
