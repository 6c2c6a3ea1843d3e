//! `cargo xtask bench NAME [--quick]`

use std::ffi::{OsStr, OsString};

use crate::{Result, cargo};

/// Every measurement: a program of the package `callsign-benches`.
const BENCHES: [(&str, &str); 5] = [
    ("call", "CPU per call and throughput: EtcdChannel, tonic's Channel, tonic's balance channel"),
    (
        "churn",
        "memory of an idle endpoint beside a bare h2 connection; endpoints that come and go under load",
    ),
    (
        "discovery",
        "from a put to the update beside a bare etcd watch; 10 000 instances: list, change, memory",
    ),
    ("pick", "every balancing policy at 1 to 10 000 endpoints, beside tower's p2c::Balance over PeakEwma"),
    ("embedded", "start, puts, watchers and leases: etcd-embedded beside a real etcd"),
];

pub(crate) fn run(arguments: Vec<OsString>) -> Result {
    let Some((name, options)) = arguments.split_first() else {
        println!("{}", list());
        return Ok(());
    };
    if !BENCHES.iter().any(|(bench, _)| OsStr::new(bench) == name) {
        return Err(format!("no bench {}\n\n{}", name.display(), list()).into());
    }
    let fixed = ["run", "--release", "--package", "callsign-benches", "--bin"].map(OsString::from);
    cargo::run(fixed.iter().chain([name, &OsString::from("--")]).chain(options))
}

fn list() -> String {
    let lines = BENCHES.iter().map(|(name, what)| format!("  {name:<10}{what}"));
    ["usage: cargo xtask bench NAME [--quick]\n".to_owned()]
        .into_iter()
        .chain(lines)
        .collect::<Vec<_>>()
        .join("\n")
}
