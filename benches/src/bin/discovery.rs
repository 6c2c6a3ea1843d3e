//! Discovery beside a bare etcd-client, on a real etcd in a process of its own
//!
//! | figure | what |
//! | --- | --- |
//! | `put_to_update_p50_extra_ms`, `_p99_` | from the put of an instance to the first of `EtcdChannel::updates` that names its endpoint, beyond what a bare watch of the same prefix needs |
//! | `change_10000_us` | as the first figure, p50, in a channel of 10 000 endpoints, in microseconds |
//! | `discover_p50_extra_ms`, `_p99_`, `discover_change_10000_us` | the same up to the change at a consumer of `EtcdDiscover`, which is part of that way |
//! | `list_10000_extra_ms` | from `EtcdDiscover::new` to the last of 10 000 changes at its consumer, beyond one bare range read of all keys |
//! | `bytes_per_instance` | what is allocated more once 10 000 instances were told: the discovery and one consumer |
//!
//! A channel's first update of an endpoint says that it connects. Nobody listens at any address: the channel is refused at
//! once, and tries again after ever longer waits. A channel of 10 000 has half a minute before it is measured; the attempts
//! that go on are part of the measurement.
//!
//! Puts are paired: both sides watch the same prefix, each over a connection of its own, in one runtime, and every put
//! is seen by both. Which of the two etcd tells first is its own choice, put by put. Percentiles are of each side's own
//! times over one round, the extra is their difference, the figure the median over the rounds; nothing is excluded. Lists
//! take turns. All connections to etcd are open before anything is timed.

use std::{
    alloc::System,
    future::poll_fn,
    ops::Range,
    pin::Pin,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use callsign::{
    Etcd, EtcdChannel, EtcdOptions,
    discover::{DiscoveryState, EtcdDiscover},
};
use callsign_benches::{Real, Result, median, millis};
use etcd_client::{Client, GetOptions, Txn, TxnOp, WatchOptions};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::task::JoinHandle;
use tokio_stream::{Stream, StreamExt as _};
use tower::discover::Change;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

#[derive(Clone, Copy)]
struct Size {
    rounds: usize,
    /// Per round
    puts: usize,
}

const FULL: Size = Size { rounds: 5, puts: 500 };
const QUICK: Size = Size { rounds: 2, puts: 50 };

/// Slower than what discovery coalesces: each put is a change of its own.
const APART: Duration = Duration::from_millis(20);

const MANY: usize = 10_000;

/// Keys that the puts go round
const CHANGING: usize = 16;

/// etcd takes up to 128 operations in one transaction.
const BATCH: usize = 100;

/// What discovery reads at a time
const PAGE: i64 = 500;

/// After this long attempts to connect to a dead endpoint are some 17 s apart, then more: 1 s, times 1.6 each.
const REST: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let size = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => FULL,
        ["--quick"] => QUICK,
        _ => return Err("usage: discovery [--quick]".into()),
    };
    let Some(etcd) = Real::start().await? else { return Err("no etcd on PATH".into()) };
    let hosts = etcd.endpoint();
    println!("{:<42}{:>12}{:>12}{:>12}", "", "callsign ms", "bare ms", "extra ms");

    let mut numbers = Numbers(0);
    let channel = Ours::Channel(channel_of(hosts, "few.rpc").await?);
    let few = latencies(hosts, "few.rpc", &channel, size, &mut numbers).await?;
    drop(channel);
    let [p50, p99] = few.shown("put to channel's update");
    let few = latencies(hosts, "few.rpc", &Ours::Discover, size, &mut numbers).await?;
    let [discover_p50, discover_p99] = few.shown("put to EtcdDiscover's");

    fill(hosts, "many.rpc").await?;
    let list = lists(hosts, "many.rpc", size).await?;
    let bytes = bytes_per_instance(hosts, "many.rpc").await?;
    let many = latencies(hosts, "many.rpc", &Ours::Discover, size, &mut numbers).await?;
    let [discover_change, _] = many.shown("put to EtcdDiscover's among 10 000");
    let channel = channel_of(hosts, "many.rpc").await?;
    tokio::time::sleep(REST).await;
    let many = latencies(hosts, "many.rpc", &Ours::Channel(channel), size, &mut numbers).await?;
    let [change, _] = many.shown("put to channel's update among 10 000");

    println!("figure put_to_update_p50_extra_ms {p50:.3}");
    println!("figure put_to_update_p99_extra_ms {p99:.3}");
    println!("figure discover_p50_extra_ms {discover_p50:.3}");
    println!("figure discover_p99_extra_ms {discover_p99:.3}");
    println!("figure list_10000_extra_ms {list:.2}");
    println!("figure change_10000_us {:.0}", change * 1e3);
    println!("figure discover_change_10000_us {:.0}", discover_change * 1e3);
    println!("figure bytes_per_instance {bytes}");
    Ok(())
}

/// p50 and p99 of each round, of both sides
#[derive(Default)]
struct Latencies {
    ours: [Vec<f64>; 2],
    theirs: [Vec<f64>; 2],
}

impl Latencies {
    /// Prints a line for each percentile; the extra, in milliseconds
    fn shown(&self, what: &str) -> [f64; 2] {
        [0, 1].map(|at| {
            let extras = self.ours[at].iter().zip(&self.theirs[at]).map(|(ours, theirs)| ours - theirs);
            let extra = median(extras.collect());
            let (ours, theirs) = (median(self.ours[at].clone()), median(self.theirs[at].clone()));
            line(&format!("{what}, {}", ["p50", "p99"][at]), ours, theirs, extra);
            extra
        })
    }
}

fn line(what: &str, ours: f64, theirs: f64, extra: f64) {
    println!("{what:<42}{ours:>12.3}{theirs:>12.3}{extra:>12.3}");
}

/// Who is told, on our side
enum Ours {
    Channel(EtcdChannel),
    Discover,
}

/// Numbers puts, so that no address comes twice
struct Numbers(usize);

impl Numbers {
    fn next(&mut self, count: usize) -> Range<usize> {
        let first = self.0;
        self.0 += count;
        first..self.0
    }
}

/// When each of the puts with these numbers was seen
#[derive(Clone)]
struct Seen {
    numbers: Range<usize>,
    times: Arc<Mutex<Vec<Option<Instant>>>>,
}

impl Seen {
    fn new(numbers: Range<usize>) -> Self {
        Self { times: Arc::new(Mutex::new(vec![None; numbers.len()])), numbers }
    }

    /// Notes when an address is first seen, if it is one of these puts'; whether all were
    fn note(&self, now: Instant, address: &str) -> bool {
        let Some(number) = number_of(address).filter(|number| self.numbers.contains(number)) else {
            return false;
        };
        let mut times = self.times.lock().expect("nobody panics");
        times[number - self.numbers.start].get_or_insert(now);
        times.iter().all(Option::is_some)
    }
}

async fn latencies(
    hosts: &str,
    service: &str,
    ours: &Ours,
    size: Size,
    numbers: &mut Numbers,
) -> Result<Latencies> {
    let mut latencies = Latencies::default();
    for _ in 0..size.rounds {
        let times = round(hosts, service, ours, numbers.next(size.puts)).await?;
        for (side, mut times) in [&mut latencies.ours, &mut latencies.theirs].into_iter().zip(times) {
            times.sort();
            side[0].push(millis(times[times.len() / 2]));
            side[1].push(millis(times[times.len() * 99 / 100]));
        }
    }
    Ok(latencies)
}

/// How long each put took to be seen, by us and by the bare watch
async fn round(hosts: &str, service: &str, ours: &Ours, numbers: Range<usize>) -> Result<[Vec<Duration>; 2]> {
    let seen = [(); 2].map(|()| Seen::new(numbers.clone()));
    let our_watcher = match ours {
        Ours::Channel(channel) => watch_channel(channel, seen[0].clone()),
        Ours::Discover => watch_discover(hosts, service, seen[0].clone()).await?,
    };
    let watchers = [our_watcher, watch_bare(hosts, service, seen[1].clone()).await?];
    let mut client = Client::connect([hosts], None).await?;
    let mut put = Vec::new();
    let mut ticks = tokio::time::interval(APART);
    for number in numbers {
        ticks.tick().await;
        let (key, value) = (format!("{service}/{}", number % CHANGING), address_of(number));
        put.push(Instant::now());
        client.put(key, value, None).await?;
    }
    for watcher in watchers {
        tokio::time::timeout(Duration::from_secs(10), watcher).await???;
    }
    Ok(seen.map(|seen| {
        let times = seen.times.lock().expect("nobody panics");
        times.iter().zip(&put).map(|(seen, put)| seen.expect("it was seen") - *put).collect()
    }))
}

/// An address that numbers a put
fn address_of(number: usize) -> String {
    format!("127.9.{}.{}:1", number / 256, number % 256)
}

fn number_of(address: &str) -> Option<usize> {
    let (high, low) = address.strip_prefix("127.9.")?.strip_suffix(":1")?.split_once('.')?;
    Some(high.parse::<usize>().ok()? * 256 + low.parse::<usize>().ok()?)
}

/// A channel that watches and has all endpoints that were there before
async fn channel_of(hosts: &str, service: &str) -> Result<EtcdChannel> {
    let etcd = Etcd::connect(EtcdOptions::new([hosts])).await?;
    let channel = EtcdChannel::builder(service).etcd(&etcd).connect_lazy()?;
    // It shares the channel's watch.
    until_watching(&EtcdDiscover::new(&etcd, service)?).await?;
    let before = addresses(hosts, service).await?;
    while channel.endpoints().len() < before {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(channel)
}

fn watch_channel(channel: &EtcdChannel, seen: Seen) -> JoinHandle<Result<()>> {
    let mut updates = channel.updates();
    tokio::spawn(async move {
        while let Some(update) = updates.next().await {
            if seen.note(Instant::now(), update.address.authority()) {
                return Ok(());
            }
        }
        Err("the channel has ended".into())
    })
}

/// Returns once discovery watches and all that was there before was told
async fn watch_discover(hosts: &str, service: &str, seen: Seen) -> Result<JoinHandle<Result<()>>> {
    let etcd = Etcd::connect(EtcdOptions::new([hosts])).await?;
    let mut discover = EtcdDiscover::new(&etcd, service)?;
    let before = addresses(hosts, service).await?;
    told(&mut discover, before).await;
    until_watching(&discover).await?;
    Ok(tokio::spawn(async move {
        loop {
            let Change::Insert(address, _) = next(&mut discover).await else { continue };
            if seen.note(Instant::now(), address.authority()) {
                return Ok(());
            }
        }
    }))
}

/// Returns once etcd has confirmed the watch
async fn watch_bare(hosts: &str, service: &str, seen: Seen) -> Result<JoinHandle<Result<()>>> {
    let client = Client::connect([hosts], None).await?;
    let options = WatchOptions::new().with_prefix();
    let mut stream = client.watch_client().watch(format!("{service}/"), Some(options)).await?;
    stream.message().await?;
    Ok(tokio::spawn(async move {
        loop {
            let message = stream.message().await?.ok_or("the watch has ended")?;
            let now = Instant::now();
            for pair in message.events().iter().filter_map(|event| event.kv()) {
                if seen.note(now, pair.value_str()?) {
                    return Ok(());
                }
            }
        }
    }))
}

async fn next(discover: &mut EtcdDiscover) -> Change<callsign::Address, callsign::Instance> {
    match poll_fn(|cx| Pin::new(&mut *discover).poll_next(cx)).await {
        Some(Ok(change)) => change,
        None => unreachable!("a discovery never ends"),
    }
}

/// Waits until as many inserts were told
async fn told(discover: &mut EtcdDiscover, mut inserts: usize) {
    while inserts > 0 {
        if let Change::Insert(..) = next(discover).await {
            inserts -= 1;
        }
    }
}

async fn until_watching(discover: &EtcdDiscover) -> Result<()> {
    let mut state = discover.state();
    state.wait_for(|state| matches!(state, DiscoveryState::Watching { .. })).await?;
    Ok(())
}

/// Different addresses under the service
async fn addresses(hosts: &str, service: &str) -> Result<usize> {
    let mut client = Client::connect([hosts], None).await?;
    let listed = client.get(format!("{service}/"), Some(GetOptions::new().with_prefix())).await?;
    let addresses = listed.kvs().iter().map(etcd_client::KeyValue::value);
    Ok(addresses.collect::<std::collections::HashSet<_>>().len())
}

/// As many instances with ids as registrations choose them
async fn fill(hosts: &str, service: &str) -> Result<()> {
    let mut client = Client::connect([hosts], None).await?;
    for batch in 0..MANY / BATCH {
        let numbers = batch * BATCH..(batch + 1) * BATCH;
        let puts = numbers.map(|number| {
            let address = format!("127.10.{}.{}:1", number / 256, number % 256);
            TxnOp::put(format!("{service}/{}", 7_000_000_000_000_000_000 + number), address, None)
        });
        client.txn(Txn::new().and_then(puts.collect::<Vec<_>>())).await?;
    }
    Ok(())
}

/// How much longer discovery's first list takes, in milliseconds
async fn lists(hosts: &str, service: &str, size: Size) -> Result<f64> {
    let (mut ours, mut whole, mut paged) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..2 * size.rounds {
        ours.push(millis(list_ours(hosts, service).await?));
        whole.push(millis(list_bare(hosts, service, 0).await?));
        paged.push(millis(list_bare(hosts, service, PAGE).await?));
    }
    let (ours, whole, paged) = (median(ours), median(whole), median(paged));
    line("list of 10 000, bare in one read", ours, whole, ours - whole);
    line("list of 10 000, bare in pages", ours, paged, ours - paged);
    Ok(ours - whole)
}

async fn list_ours(hosts: &str, service: &str) -> Result<Duration> {
    let etcd = Etcd::connect(EtcdOptions::new([hosts])).await?;
    let began = Instant::now();
    let mut discover = EtcdDiscover::new(&etcd, service)?;
    told(&mut discover, MANY).await;
    Ok(began.elapsed())
}

/// All keys, `page` at a time; 0 is all at once
async fn list_bare(hosts: &str, service: &str, page: i64) -> Result<Duration> {
    let mut client = Client::connect([hosts], None).await?;
    client.status().await?;
    let (mut from, end) = (format!("{service}/").into_bytes(), format!("{service}0"));
    let (mut read, began) = (0, Instant::now());
    loop {
        let options = GetOptions::new().with_range(end.as_str()).with_limit(page);
        let answer = client.get(from.clone(), Some(options)).await?;
        read += answer.kvs().len();
        match answer.kvs().last() {
            Some(last) if answer.more() => from = [last.key(), &[0]].concat(),
            _ => break,
        }
    }
    let took = began.elapsed();
    if read == MANY { Ok(took) } else { Err(format!("{read} keys").into()) }
}

/// What lives in the heap more when all is known and told, by instance
async fn bytes_per_instance(hosts: &str, service: &str) -> Result<usize> {
    let etcd = Etcd::connect(EtcdOptions::new([hosts])).await?;
    let before = allocated();
    let mut discover = EtcdDiscover::new(&etcd, service)?;
    told(&mut discover, MANY).await;
    until_watching(&discover).await?;
    Ok(allocated().saturating_sub(before) / MANY)
}

fn allocated() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated.saturating_sub(stats.bytes_deallocated)
}
