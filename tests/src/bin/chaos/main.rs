//! Chaos: random faults of three real etcd members, of twenty registered servers and of the ways to etcd, under the
//! load of five clients
//!
//! `chaos --seed N --minutes M`. The faults, their order and their lengths depend on the seed alone. After each round
//! everything is healed, and what must hold then is judged by the suites' checker. It ends with figures and fails if
//! anything was violated or a call failed. What counts as a failed call: see `judge.rs`.

#[cfg(unix)]
mod judge;
#[cfg(unix)]
mod run;
#[cfg(unix)]
mod schedule;
#[cfg(unix)]
mod stage;

#[cfg(unix)]
#[tokio::main(worker_threads = 2)]
async fn main() -> std::process::ExitCode {
    run::main().await
}

#[cfg(not(unix))]
fn main() {
    eprintln!("chaos needs signals");
}
