//! `cargo xtask run BIN [ARGUMENTS]`: an example, also where no `protoc` is installed

use std::ffi::{OsStr, OsString};

use crate::{Result, cargo};

/// What a person would run; the demo has its own client.
const BINS: [(&str, &str); 5] = [
    (
        "hello_server",
        "a greeting server that registers itself: [--listen 127.0.0.1:9090] [--service hello.rpc]",
    ),
    ("hello_client", "calls it by its name, steadily: [--service hello.rpc] [--name World] [--rate 5]"),
    (
        "registry",
        "registers, lists, watches until ctrl-c, deregisters: [--service hello.rpc] [--address 127.0.0.1:9090]",
    ),
    (
        "live_config",
        "greets as a value in etcd says; with options, puts that value: [--greeting Hello] [--every-ms 1000]",
    ),
    ("custom_policy", "a canary takes one call in twenty: [--canary 127.0.0.1:9091]"),
];

pub(crate) fn run(arguments: &[OsString]) -> Result {
    let Some((name, options)) = arguments.split_first() else {
        println!("{}", list());
        return Ok(());
    };
    if !BINS.iter().any(|(bin, _)| OsStr::new(bin) == name) {
        return Err(format!("no example {}\n\n{}", name.display(), list()).into());
    }
    let fixed = ["run", "--package", "callsign-examples", "--bin"].map(OsString::from);
    cargo::hand_over(fixed.iter().chain([name, &OsString::from("--")]).chain(options))
}

fn list() -> String {
    let lines = BINS.iter().map(|(name, what)| format!("  {name:<15}{what}\n"));
    ["usage: cargo xtask run BIN [ARGUMENTS]\n\n".to_owned()].into_iter().chain(lines).collect()
}
