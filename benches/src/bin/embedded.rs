//! `etcd-embedded` beside a real etcd: start, puts, watchers of one prefix, leases
//!
//! The embedded server runs in this process, as it does in its users' tests; the real one in its own, with its data in
//! the temp dir. Both are asked by the same client over TCP. They take turns; medians over the rounds are printed, and
//! `*_ratio` as embedded time / real time.

use std::time::{Duration, Instant};

use callsign_benches::{Real, Result, median, millis};
use etcd_client::{Client, WatchOptions};
use etcd_embedded::EmbeddedEtcd;
use tokio::task::JoinSet;

/// How much is done per round.
#[derive(Clone, Copy)]
struct Size {
    rounds: usize,
    puts: usize,
    watchers: usize,
    events: usize,
    leases: usize,
}

const FULL: Size = Size { rounds: 5, puts: 10_000, watchers: 1_000, events: 100, leases: 10_000 };
const QUICK: Size = Size { rounds: 2, puts: 1_000, watchers: 100, events: 100, leases: 1_000 };

/// Calls in flight, as of a busy test.
const IN_FLIGHT: usize = 16;

/// Starts measured, each a few milliseconds.
const STARTS: usize = 20;

#[tokio::main]
async fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let size = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => FULL,
        ["--quick"] => QUICK,
        _ => return Err("usage: embedded [--quick]".into()),
    };
    let mut starts = Vec::new();
    for _ in 0..STARTS {
        starts.push(start().await?);
    }
    let mut figures = vec![format!("figure start_ms {:.2}", millis(median(starts)))];
    let mut ours = Vec::new();
    let mut theirs = Vec::new();
    for _ in 0..size.rounds {
        let etcd = EmbeddedEtcd::start("127.0.0.1:0").await?;
        ours.push(round(etcd.endpoint(), size).await?);
        etcd.shutdown().await;
        if let Some(etcd) = Real::start().await? {
            theirs.push(round(etcd.endpoint(), size).await?);
        }
    }
    if theirs.is_empty() {
        println!("no etcd on PATH: nothing to compare with");
    }
    println!("{:<8}{:>14}{:>14}", "", "embedded ms", "real ms");
    for (at, name) in ["put", "watch", "lease"].iter().enumerate() {
        let of = |rounds: &[[Duration; 3]]| median(rounds.iter().map(|round| round[at]).collect());
        let (embedded, real) = (of(&ours), (!theirs.is_empty()).then(|| of(&theirs)));
        let shown = real.map_or_else(|| "-".to_owned(), |real| format!("{:.1}", millis(real)));
        println!("{name:<8}{:>14.1}{shown:>14}", millis(embedded));
        figures.extend(
            real.map(|real| {
                format!("figure {name}_ratio {:.3}", embedded.as_secs_f64() / real.as_secs_f64())
            }),
        );
    }
    println!("{}", figures.join("\n"));
    Ok(())
}

/// From nothing to the first answer
async fn start() -> Result<Duration> {
    let began = Instant::now();
    let etcd = EmbeddedEtcd::start("127.0.0.1:0").await?;
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    client.get("k", None).await?;
    let took = began.elapsed();
    etcd.shutdown().await;
    Ok(took)
}

/// Puts, watchers, leases: how long each took
async fn round(endpoint: &str, size: Size) -> Result<[Duration; 3]> {
    let client = Client::connect([endpoint], None).await?;
    Ok([puts(&client, size).await?, watches(&client, size).await?, leases(&client, size).await?])
}

async fn puts(client: &Client, size: Size) -> Result<Duration> {
    let began = Instant::now();
    spread(client, size.puts, |mut client, n| async move {
        client.put(format!("put/{n}"), "a value of some size", None).await?;
        Ok(())
    })
    .await?;
    Ok(began.elapsed())
}

/// From the first write to the last watcher's last event
async fn watches(client: &Client, size: Size) -> Result<Duration> {
    let mut watchers = JoinSet::new();
    for _ in 0..size.watchers {
        let options = WatchOptions::new().with_prefix();
        let mut stream = client.watch_client().watch("watched/", Some(options)).await?;
        stream.message().await?;
        watchers.spawn(async move {
            let mut seen = 0;
            while seen < size.events {
                let response = stream.message().await?.ok_or("the stream has ended")?;
                seen += response.events().len();
            }
            Result::Ok(())
        });
    }
    let began = Instant::now();
    for n in 0..size.events {
        client.kv_client().put(format!("watched/{n}"), "a value of some size", None).await?;
    }
    while let Some(watcher) = watchers.join_next().await {
        watcher??;
    }
    Ok(began.elapsed())
}

/// Granting all, then revoking all
async fn leases(client: &Client, size: Size) -> Result<Duration> {
    let began = Instant::now();
    let id = |n: usize| n as i64 + 1;
    spread(client, size.leases, move |mut client, n| async move {
        client.lease_grant(600, Some(etcd_client::LeaseGrantOptions::new().with_id(id(n)))).await?;
        Ok(())
    })
    .await?;
    spread(client, size.leases, move |mut client, n| async move {
        client.lease_revoke(id(n)).await?;
        Ok(())
    })
    .await?;
    Ok(began.elapsed())
}

/// Does something `n` times, some at a time
async fn spread<F, A>(client: &Client, n: usize, act: F) -> Result<()>
where
    F: Fn(Client, usize) -> A + Clone + Send + 'static,
    A: Future<Output = Result<()>> + Send,
{
    let mut workers = JoinSet::new();
    for worker in 0..IN_FLIGHT {
        let (client, act) = (client.clone(), act.clone());
        workers.spawn(async move {
            for n in (worker..n).step_by(IN_FLIGHT) {
                act(client.clone(), n).await?;
            }
            Result::Ok(())
        });
    }
    while let Some(worker) = workers.join_next().await {
        worker??;
    }
    Ok(())
}
