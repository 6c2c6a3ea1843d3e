//! What an endpoint costs while nothing happens, and what happens while endpoints come and go
//!
//! | figure | what |
//! | --- | --- |
//! | `bytes_per_idle_endpoint` | what is allocated for each of 1 000 idle endpoints of a channel, connection included |
//! | `bytes_per_idle_endpoint_ours` | the same less what a bare h2 connection costs in the same run |
//! | `churn_changes_per_s` | endpoints added until they are ready, and removed until they are gone |
//! | `churn_failed_calls` | calls that failed meanwhile |
//! | `churn_tasks_left`, `churn_descriptors_left` | more than before the channel was made, once it has ended |
//!
//! The server is a process of its own and listens at all of 127.1.0.0/16: one listener, as many endpoints as one likes. A
//! bare connection has the settings of the channel's, a TCP stream, and the task that drives it. Both kinds take turns;
//! the figures are medians over the rounds.

use std::{
    alloc::System,
    collections::BTreeSet,
    convert::Infallible,
    future::poll_fn,
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    process::{Command, Stdio},
    task::Poll,
    time::{Duration, Instant},
};

use bytes::Bytes;
use callsign::{Address, Channel, EndpointState, Instance};
use callsign_benches::{
    Hello, Result, Running, allow_descriptors, median,
    pb::{HelloRequest, greeter_client::GreeterClient, greeter_server::GreeterServer},
};
use h2::client::{self, SendRequest};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};
use tokio_stream::{StreamExt as _, wrappers::UnboundedReceiverStream};
use tonic::transport::{Server, server::TcpIncoming};
use tower::discover::Change;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

#[derive(Clone, Copy)]
struct Size {
    rounds: usize,
    endpoints: u16,
    /// How long endpoints come and go
    churn: Duration,
}

const FULL: Size = Size { rounds: 3, endpoints: 1_000, churn: Duration::from_secs(30) };
const QUICK: Size = Size { rounds: 1, endpoints: 200, churn: Duration::from_secs(3) };

/// For connections to be made or to end
const BOUND: Duration = Duration::from_secs(30);

/// Endpoints that are added, and as many that are removed, at a time
const BATCH: u16 = 16;

/// Who calls while endpoints come and go, one call after the other
const CALLERS: usize = 8;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve"] => runtime.block_on(serve()),
        ["--quick"] => runtime.block_on(measure(QUICK)),
        [] => runtime.block_on(measure(FULL)),
        _ => Err("usage: churn [--quick]".into()),
    }
}

async fn serve() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    println!("{}", listener.local_addr()?.port());
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Ok(Server::builder().add_service(GreeterServer::new(Hello)).serve_with_incoming(incoming).await?)
}

/// The server's process; killed when dropped
struct Servers {
    child: Running,
    port: u16,
}

impl Servers {
    fn start() -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        let child = command.arg("serve").stdout(Stdio::piped()).spawn()?;
        let mut servers = Self { child: Running(child), port: 0 };
        let mut line = String::new();
        BufReader::new(servers.child.0.stdout.take().expect("stdout is piped")).read_line(&mut line)?;
        servers.port = line.trim().parse()?;
        Ok(servers)
    }

    /// One of its many addresses
    fn at(&self, number: u16) -> SocketAddr {
        let [high, low] = number.to_be_bytes();
        SocketAddr::from((Ipv4Addr::new(127, 1, high, low), self.port))
    }
}

async fn measure(size: Size) -> Result<()> {
    allow_descriptors(4 * u64::from(size.endpoints));
    let servers = Servers::start()?;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..size.rounds {
        bare.push(bare_connections(&servers, size.endpoints).await?);
        ours.push(idle_endpoints(&servers, size.endpoints).await?);
    }
    let (ours, bare) = (median(ours), median(bare));
    println!("bytes: {ours} for an idle endpoint, {bare} for a bare h2 connection");
    let Churned { changes, took, calls, failed, tasks_left, descriptors_left } =
        churn(&servers, size).await?;
    println!("{changes} changes in {took:?}; {failed} of {calls} calls failed");

    println!("figure bytes_per_idle_endpoint {ours}");
    println!("figure bytes_per_idle_endpoint_ours {}", ours.saturating_sub(bare));
    println!("figure churn_changes_per_s {:.0}", changes as f64 / took.as_secs_f64());
    println!("figure churn_failed_calls {}", failed);
    println!("figure churn_tasks_left {}", tasks_left);
    println!("figure churn_descriptors_left {}", descriptors_left);
    Ok(())
}

fn allocated() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated.saturating_sub(stats.bytes_deallocated)
}

/// What is allocated once that stands still
async fn settled() -> Result<usize> {
    let began = Instant::now();
    let mut last = allocated();
    while began.elapsed() < BOUND {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = allocated();
        if now == last {
            return Ok(now);
        }
        last = now;
    }
    Err("memory does not stand still".into())
}

async fn bare_connections(servers: &Servers, count: u16) -> Result<usize> {
    let before = settled().await?;
    let mut connections = Vec::with_capacity(count.into());
    for number in 0..count {
        connections.push(connect(servers.at(number)).await?);
    }
    let each = (settled().await? - before) / usize::from(count);
    let drivers: Vec<_> = connections.into_iter().map(|(_, driver)| driver).collect();
    for driver in drivers {
        driver.await??;
    }
    Ok(each)
}

type Bare = (SendRequest<Bytes>, JoinHandle<std::result::Result<(), h2::Error>>);

/// A connection with the settings of the channel's, ready for calls
async fn connect(address: SocketAddr) -> Result<Bare> {
    const UNTOLD: usize = usize::MAX - 1;
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let (send, mut h2) = client::Builder::new()
        .enable_push(false)
        .initial_window_size(2 << 20)
        .initial_connection_window_size(5 << 20)
        .max_concurrent_reset_streams(1024)
        .max_local_error_reset_streams(None)
        .initial_max_send_streams(UNTOLD)
        .handshake(tcp)
        .await?;
    poll_fn(|cx| match Pin::new(&mut h2).poll(cx) {
        Poll::Pending if h2.max_concurrent_send_streams() == UNTOLD => Poll::Pending,
        Poll::Pending => Poll::Ready(Ok(())),
        Poll::Ready(ended) => Poll::Ready(ended.and(Err(h2::Reason::NO_ERROR.into()))),
    })
    .await?;
    Ok((send, tokio::spawn(h2)))
}

type Told = std::result::Result<Change<Address, Instance>, Infallible>;

/// A channel whose endpoints are told as it goes, and which of them are there
struct Changing {
    channel: Channel,
    tell: mpsc::UnboundedSender<Told>,
    there: BTreeSet<u16>,
}

impl Changing {
    /// With all of so many endpoints ready
    async fn start(servers: &Servers, count: u16) -> Result<Self> {
        let (tell, told) = mpsc::unbounded_channel();
        let channel = Channel::builder(UnboundedReceiverStream::new(told)).build()?;
        let mut this = Self { channel, tell, there: BTreeSet::new() };
        this.change((0..count).collect(), BTreeSet::new(), servers).await?;
        Ok(this)
    }

    /// Adds some and removes others; returns once those are ready and these gone
    async fn change(&mut self, add: BTreeSet<u16>, remove: BTreeSet<u16>, servers: &Servers) -> Result<()> {
        let mut updates = self.channel.updates();
        let address = |number: &u16| Address::from(servers.at(*number));
        let mut adding: BTreeSet<_> = add.iter().map(address).collect();
        let mut removing: BTreeSet<_> = remove.iter().map(address).collect();
        for address in &adding {
            self.tell.send(Ok(Change::Insert(address.clone(), address.clone().into())))?;
        }
        for address in &removing {
            self.tell.send(Ok(Change::Remove(address.clone())))?;
        }
        self.there.extend(add);
        self.there.retain(|number| !remove.contains(number));
        tokio::time::timeout(BOUND, async {
            while !adding.is_empty() || !removing.is_empty() {
                let update = updates.next().await.ok_or("the channel has ended")?;
                match update.state {
                    EndpointState::Ready => adding.remove(&update.address),
                    EndpointState::Gone => removing.remove(&update.address),
                    _ => false,
                };
            }
            Ok(())
        })
        .await?
    }
}

async fn idle_endpoints(servers: &Servers, count: u16) -> Result<usize> {
    let (before, used) = (settled().await?, used()?);
    let changing = Changing::start(servers, count).await?;
    let each = (settled().await? - before) / usize::from(count);
    drop(changing);
    // What is freed late would be missing from the next round's figure.
    match left(used).await? {
        [0, 0] => Ok(each),
        left => Err(format!("tasks and descriptors left: {left:?}").into()),
    }
}

struct Churned {
    changes: usize,
    took: Duration,
    calls: usize,
    failed: usize,
    tasks_left: usize,
    descriptors_left: usize,
}

/// Endpoints come and go at random while others call
async fn churn(servers: &Servers, size: Size) -> Result<Churned> {
    settled().await?;
    let before = used()?;
    let mut changing = Changing::start(servers, size.endpoints).await?;
    let end = Instant::now() + size.churn;
    let callers: JoinSet<_> = (0..CALLERS).map(|_| call(changing.channel.clone(), end)).collect();
    let (began, mut changes) = (Instant::now(), 0);
    while Instant::now() < end {
        // Half as many again as are there at a time.
        let draw = || (0..BATCH).map(|_| fastrand::u16(..size.endpoints / 2 * 3));
        let add = draw().filter(|number| !changing.there.contains(number)).collect::<BTreeSet<_>>();
        let there: Vec<_> = changing.there.iter().copied().collect();
        let remove = fastrand::choose_multiple(there, add.len()).into_iter().collect();
        changes += 2 * add.len();
        changing.change(add, remove, servers).await?;
    }
    let took = began.elapsed();
    let (calls, failed) =
        callers.join_all().await.into_iter().fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    drop(changing);
    let [tasks_left, descriptors_left] = left(before).await?;
    Ok(Churned { changes, took, calls, failed, tasks_left, descriptors_left })
}

/// Calls and failed calls of one caller
async fn call(channel: Channel, end: Instant) -> (usize, usize) {
    let mut client = GreeterClient::new(channel);
    let (mut calls, mut failed) = (0, 0);
    while Instant::now() < end {
        calls += 1;
        failed += usize::from(client.say_hello(HelloRequest { name: "you".to_owned() }).await.is_err());
    }
    (calls, failed)
}

/// Tasks of this runtime, descriptors of this process
fn used() -> Result<[usize; 2]> {
    let descriptors = std::fs::read_dir("/proc/self/fd")?.count();
    Ok([Handle::current().metrics().num_alive_tasks(), descriptors])
}

/// What is used more than before, once that is nothing or time is up
async fn left(before: [usize; 2]) -> Result<[usize; 2]> {
    let began = Instant::now();
    loop {
        let now = used()?;
        let left = [0, 1].map(|at| now[at].saturating_sub(before[at]));
        if left == [0, 0] || began.elapsed() > BOUND {
            return Ok(left);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
