//! The project's own tasks, run as `cargo xtask TASK`
//!
//! It builds with cargo alone: it links no crate of the workspace, brings a `protoc` if there is none, and runs everything
//! else through cargo. Where there is no etcd, the demo and the suites use the embedded one.

mod bench;
mod cargo;
mod chaos;
mod demo;
mod etcd;
mod family;
mod faults;
mod fuzz;
mod loom;
mod ports;
mod program;
mod reaper;
mod run;
mod test;

use std::{error::Error, ffi::OsString, process::ExitCode};

use lexopt::Arg::{Long, Short, Value};

const USAGE: &str = "\
usage: cargo xtask TASK

  demo                  two greeting servers, one balanced channel, one SIGKILL: about 12 s on real processes
  run BIN [ARGUMENTS]   one of the examples; without a name: the list of them
  test [CARGO TEST ARGUMENTS]
                        the whole suite, and the suites of the registry a second time on the embedded etcd;
                        where no etcd is on PATH, everything on the embedded one
  faults [--all]        every fault of etcd that is known, each beside servers under load, on three real members:
                        about 4 minutes; with --all the long forms, about 15
  chaos [--seed N] [--minutes M]
                        random faults of a real etcd, of servers and of the ways to etcd, under load
  fuzz                  a million random bad inputs for everything that reads keys, values, addresses and targets
  loom                  every order in which threads can meet in the core's atomics
  bench NAME [--quick]  one measurement; without a name: the list of them

Environment:
  CALLSIGN_ETCD         the etcd cluster, [USER:PASSWORD@]HOST,HOST...[?OPTION=VALUE&...], of the demo and the examples;
                        without it the demo starts the `etcd` on PATH in a temporary directory, or else the embedded one,
                        and the examples use 127.0.0.1:2379
  CALLSIGN_TEST_ETCD    `real` or `embedded`: the tests run once, on that one
  CALLSIGN_REQUIRE_ETCD `1` makes it an error for the tests that etcd or etcdctl is missing
  CALLSIGN_REQUIRE_GO   `1` makes it an error for the tests that Go is missing
  RUST_TEST_THREADS     how many tests of one program `test` runs at a time; without it, 8
  CALLSIGN_FUZZ_INPUTS  how many inputs `fuzz` makes for each reader
  CALLSIGN_FUZZ_SEED    makes the same inputs again; `fuzz` says which it used
  PROTOC                the protobuf compiler; without it, `protoc` on PATH or else a bundled one";

/// Tasks fail with a text for the person in front of the terminal: nobody handles these errors.
type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result {
    let mut arguments = lexopt::Parser::from_env();
    let task = match arguments.next()? {
        None | Some(Long("help") | Short('h')) => {
            println!("{USAGE}");
            return Ok(());
        }
        Some(Value(task)) => task,
        Some(other) => return Err(other.unexpected().into()),
    };
    let rest: Vec<OsString> = arguments.raw_args()?.collect();
    match task.to_str() {
        Some("demo") if rest.is_empty() => demo::run(),
        Some("demo") => Err("demo takes no arguments".into()),
        Some("run") => run::run(&rest),
        Some("test") => test::run(&rest),
        Some("faults") => faults::run(&rest),
        Some("chaos") => chaos::run(&rest),
        Some("fuzz") if rest.is_empty() => fuzz::run(),
        Some("fuzz") => Err("fuzz takes no arguments".into()),
        Some("loom") if rest.is_empty() => loom::run(),
        Some("loom") => Err("loom takes no arguments".into()),
        Some("bench") => bench::run(rest),
        _ => Err(format!("no task {}\n\n{USAGE}", task.display()).into()),
    }
}
