//! Client CPU per call and throughput: callsign beside tonic's `Channel` and `balance_list`, over four endpoints
//!
//! Servers run in a process of their own. First pinned, servers to one core and a client with one worker thread to
//! another, so that the spread stays small; then unpinned, with two worker threads. All variants take turns within each
//! round; the medians over the rounds are printed. Where processes cannot be pinned, the first part runs unpinned and
//! says so.

use std::{
    error::Error,
    fmt::Write as _,
    io::{BufRead, BufReader},
    net::SocketAddr,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use callsign_benches::{
    Hello, Running,
    pb::{HelloRequest, greeter_client::GreeterClient, greeter_server::GreeterServer},
};
use tokio::{net::TcpListener, runtime::Runtime, task::JoinSet};
use tokio_stream::{StreamExt as _, wrappers::TcpListenerStream};
use tonic::{Status, body::Body, client::GrpcService, transport};

const ENDPOINTS: usize = 4;
const CONCURRENCIES: [usize; 3] = [1, 16, 128];
const VARIANTS: [&str; 3] = ["callsign", "channel", "balance_list"];

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// How one process is run.
struct Setup {
    cpu: Option<usize>,
    workers: usize,
}

impl Setup {
    /// Server and client
    fn both(cpus: [Option<usize>; 2], workers: usize) -> [Self; 2] {
        cpus.map(|cpu| Self { cpu, workers })
    }
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["server", cpu, workers] => runtime(cpu, workers)?.block_on(serve()),
        ["client", cpu, workers, rounds, millis, addresses] => {
            let addresses = addresses.split(',').map(str::parse).collect::<std::result::Result<_, _>>()?;
            let slice = Duration::from_millis(millis.parse()?);
            runtime(cpu, workers)?.block_on(measure(addresses, rounds.parse()?, slice))
        }
        ["--quick"] => compare(7, 200),
        [] => compare(15, 500),
        _ => Err("usage: call [--quick]".into()),
    }
}

/// A runtime on the given core, "-" for any
fn runtime(cpu: &str, workers: &str) -> Result<Runtime> {
    if cpu != "-" {
        // Threads inherit it, so it comes before the runtime's.
        cpus::pin_to(cpu.parse()?)?;
    }
    Ok(tokio::runtime::Builder::new_multi_thread().worker_threads(workers.parse()?).enable_all().build()?)
}

async fn serve() -> Result<()> {
    let mut servers = JoinSet::new();
    let mut line = String::new();
    for _ in 0..ENDPOINTS {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        write!(line, "{}{}", if line.is_empty() { "" } else { "," }, listener.local_addr()?)?;
        let router = transport::Server::builder().add_service(GreeterServer::new(Hello));
        let incoming = TcpListenerStream::new(listener);
        let incoming =
            incoming.map(|stream| stream.and_then(|stream| stream.set_nodelay(true).map(|()| stream)));
        servers.spawn(router.serve_with_incoming(incoming));
    }
    println!("{line}");
    while let Some(ended) = servers.join_next().await {
        ended??;
    }
    Ok(())
}

/// CPU of the client's process per call, and calls per second
struct Sample {
    variant: &'static str,
    concurrency: usize,
    micros: f64,
    rate: f64,
}

async fn measure(addresses: Vec<SocketAddr>, rounds: usize, slice: Duration) -> Result<()> {
    let direct = addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let ours = callsign::EtcdChannel::connect(format!("direct:///{direct}")).await?;
    let endpoint = |address: &SocketAddr| transport::Endpoint::from_shared(format!("http://{address}"));
    let single = endpoint(&addresses[0])?.connect().await?;
    let balanced = addresses.iter().map(endpoint).collect::<std::result::Result<Vec<_>, _>>()?;
    let balanced = transport::Channel::balance_list(balanced.into_iter());
    // The first round warms up and is not counted.
    for round in 0..=rounds {
        for concurrency in CONCURRENCIES {
            for variant in VARIANTS {
                let sample = match variant {
                    "callsign" => {
                        sample(variant, GreeterClient::new(ours.clone()), concurrency, slice).await?
                    }
                    "channel" => {
                        sample(variant, GreeterClient::new(single.clone()), concurrency, slice).await?
                    }
                    _ => sample(variant, GreeterClient::new(balanced.clone()), concurrency, slice).await?,
                };
                if round > 0 {
                    println!("{} {} {} {}", sample.variant, sample.concurrency, sample.micros, sample.rate);
                }
            }
        }
    }
    Ok(())
}

async fn sample<T>(
    variant: &'static str,
    client: GreeterClient<T>,
    concurrency: usize,
    slice: Duration,
) -> Result<Sample>
where
    T: GrpcService<Body, ResponseBody = Body> + Clone + Send + Sync + 'static,
    T::Future: Send,
    T::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let (cpu, start) = (cpus::time(), Instant::now());
    let mut callers = JoinSet::new();
    for _ in 0..concurrency {
        let mut client = client.clone();
        callers.spawn(async move {
            let mut calls = 0_u32;
            while start.elapsed() < slice {
                client.say_hello(HelloRequest { name: "callsign".into() }).await?;
                calls += 1;
            }
            Ok::<_, Status>(calls)
        });
    }
    let mut calls = 0;
    while let Some(done) = callers.join_next().await {
        calls += done??;
    }
    let (cpu, elapsed) = (cpus::time() - cpu, start.elapsed());
    let calls = f64::from(calls);
    Ok(Sample {
        variant,
        concurrency,
        micros: cpu.as_secs_f64() * 1e6 / calls,
        rate: calls / elapsed.as_secs_f64(),
    })
}

/// Runs both processes, pinned and unpinned, and prints tables and figures
fn compare(rounds: usize, millis: u64) -> Result<()> {
    let (cpus, title) = match &cpus::ours()[..] {
        [server, client, ..] => {
            ([Some(*server), Some(*client)], "pinned: servers on one core, client with one worker on another")
        }
        [_] => ([None; 2], "NOT PINNED, this process may use one CPU only: client with one worker"),
        [] => ([None; 2], "NOT PINNED, this system cannot: client with one worker"),
    };
    let pinned = run(&Setup::both(cpus, 1), rounds, millis)?;
    print_table(title, &pinned);
    let unpinned = run(&Setup::both([None; 2], 2), rounds.div_ceil(3), millis)?;
    print_table("unpinned: client with two workers", &unpinned);
    for (what, of) in [("cpu_ratio", micros as fn(&Sample) -> f64), ("throughput_ratio", rate)] {
        for concurrency in CONCURRENCIES {
            let ratio = median(&pinned, "callsign", concurrency, of)
                / median(&pinned, "balance_list", concurrency, of);
            println!("figure {what}_c{concurrency} {ratio:.3}");
        }
    }
    Ok(())
}

fn spawn(
    setup: &Setup,
    role: &str,
    more: &[String],
) -> Result<(Running, impl Iterator<Item = String> + use<>)> {
    let cpu = setup.cpu.map_or_else(|| "-".into(), |cpu| cpu.to_string());
    let mut command = Command::new(std::env::current_exe()?);
    command.args([role, &cpu, &setup.workers.to_string()]).args(more).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let lines =
        BufReader::new(child.stdout.take().expect("piped")).lines().map_while(std::result::Result::ok);
    Ok((Running(child), lines))
}

fn run([server, client]: &[Setup; 2], rounds: usize, millis: u64) -> Result<Vec<Sample>> {
    let (_server, mut lines) = spawn(server, "server", &[])?;
    let addresses = lines.next().ok_or("the server printed no addresses")?;
    let (mut client, lines) = spawn(client, "client", &[rounds.to_string(), millis.to_string(), addresses])?;
    let samples = lines.map(|line| parse(&line)).collect::<Result<_>>()?;
    if !client.0.wait()?.success() {
        return Err("the client failed".into());
    }
    Ok(samples)
}

fn parse(line: &str) -> Result<Sample> {
    let [variant, concurrency, micros, rate] = line.split(' ').collect::<Vec<_>>()[..] else {
        return Err(format!("not a sample: {line}").into());
    };
    let variant = VARIANTS.into_iter().find(|name| *name == variant).ok_or("unknown variant")?;
    Ok(Sample { variant, concurrency: concurrency.parse()?, micros: micros.parse()?, rate: rate.parse()? })
}

fn micros(sample: &Sample) -> f64 {
    sample.micros
}

fn rate(sample: &Sample) -> f64 {
    sample.rate
}

fn sorted(samples: &[Sample], variant: &str, concurrency: usize, of: fn(&Sample) -> f64) -> Vec<f64> {
    let chosen =
        samples.iter().filter(|sample| sample.variant == variant && sample.concurrency == concurrency);
    let mut values: Vec<f64> = chosen.map(of).collect();
    values.sort_by(f64::total_cmp);
    values
}

fn median(samples: &[Sample], variant: &str, concurrency: usize, of: fn(&Sample) -> f64) -> f64 {
    let values = sorted(samples, variant, concurrency, of);
    values[values.len() / 2]
}

fn print_table(title: &str, samples: &[Sample]) {
    println!("\n{title}");
    println!("{:<14}{:>4}{:>14}{:>18}{:>12}", "", "c", "CPU us/call", "(min .. max)", "calls/s");
    for concurrency in CONCURRENCIES {
        for variant in VARIANTS {
            let cpu = sorted(samples, variant, concurrency, micros);
            let spread = format!("({:.2} .. {:.2})", cpu[0], cpu[cpu.len() - 1]);
            let calls = median(samples, variant, concurrency, rate);
            println!("{variant:<14}{concurrency:>4}{:>14.2}{spread:>18}{calls:>12.0}", cpu[cpu.len() / 2]);
        }
    }
}

/// The CPUs of this process, and its time on them
mod cpus {
    use std::time::Duration;

    /// Those it may use; none where processes cannot be pinned
    #[cfg(target_os = "linux")]
    pub(super) fn ours() -> Vec<usize> {
        use rustix::thread::{CpuSet, sched_getaffinity};
        // A mask that cannot be read is one that cannot be narrowed.
        let ours = sched_getaffinity(None).unwrap_or_else(|_| CpuSet::new());
        (0..CpuSet::MAX_CPU).filter(|cpu| ours.is_set(*cpu)).collect()
    }

    #[cfg(target_os = "linux")]
    pub(super) fn pin_to(cpu: usize) -> super::Result<()> {
        use rustix::thread::{CpuSet, sched_setaffinity};
        let mut set = CpuSet::new();
        set.set(cpu);
        Ok(sched_setaffinity(None, &set)?)
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn ours() -> Vec<usize> {
        Vec::new()
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn pin_to(_: usize) -> super::Result<()> {
        Err("processes are pinned on Linux only".into())
    }

    #[cfg(unix)]
    pub(super) fn time() -> Duration {
        use rustix::time::{ClockId, clock_gettime};
        let time = clock_gettime(ClockId::ProcessCPUTime);
        Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).expect("below a second"))
    }

    /// Without a clock of it, CPU per call is shown as 0 and its ratio as NaN: the throughput still tells
    #[cfg(not(unix))]
    pub(super) fn time() -> Duration {
        Duration::ZERO
    }
}
