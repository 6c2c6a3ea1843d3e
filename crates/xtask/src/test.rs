//! `cargo xtask test`: the whole suite, on a real etcd and on the embedded one

use std::{env, ffi::OsString, path::Path, process::Command, thread};

use crate::{Result, cargo, program};

/// What tells the suites which etcd to start
const CHOICE: &str = "CALLSIGN_TEST_ETCD";

/// Suites in which etcd plays a part of its own: they show that the embedded one can stand for it.
const REGISTRY: [&str; 6] = ["registration", "discovery", "formats", "server", "registry", "empty"];

/// How many tests of one program run at a time, unless the caller has said so: they wait more than they work.
const THREADS: (&str, &str) = ("RUST_TEST_THREADS", "8");

pub(crate) fn run(arguments: &[OsString]) -> Result {
    let found = ["etcd", "etcdctl"].map(program::on_path);
    if let (Some(missing), true) = (missing(found.each_ref().map(Option::is_some)), is_etcd_required()) {
        return Err(format!("CALLSIGN_REQUIRE_ETCD=1, but there is no {missing} on PATH").into());
    }
    // Without etcd the channel works over static lists; nothing else in the suite builds that.
    cargo::run(["check", "--package", "callsign", "--no-default-features"])?;
    let [etcd, _] = found;
    match (env::var_os(CHOICE), etcd) {
        (Some(chosen), _) => {
            println!("== the suite, with {CHOICE}={}", chosen.display());
            cargo::run_with(suite(arguments), threads())
        }
        (None, Some(etcd)) => on_both(&etcd, arguments),
        (None, None) => {
            println!(
                "== no etcd on PATH: the suite on the embedded one; what needs a real one is skipped, and says so"
            );
            cargo::run_with(suite(arguments), on("embedded"))
        }
    }
}

/// All on the real one, and what is about etcd on the embedded one: both wait more than they work
fn on_both(etcd: &Path, arguments: &[OsString]) -> Result {
    println!("== the suite on a real etcd: {}, {}", etcd.display(), version(etcd)?);
    if !arguments.is_empty() {
        cargo::run_with(suite(arguments), on("real"))?;
        println!("== nothing ran on the embedded etcd: with arguments, {CHOICE}=embedded does that");
        return Ok(());
    }
    println!("== and beside it the suites of the registry on the embedded one");
    // Or one would run while the other is built.
    cargo::run(suite(&["--no-run".into()]))?;
    thread::scope(|scope| {
        let embedded = scope.spawn(|| {
            let ran = cargo::run_read(registry(), on("embedded"), |_| {});
            ran.map_err(|error| format!("on the embedded etcd: {error}"))
        });
        let real = cargo::run_with(suite(arguments), on("real"));
        embedded.join().expect("errors are returned")?;
        real
    })
}

/// The environment of a run on this etcd
fn on(etcd: &'static str) -> impl Iterator<Item = (&'static str, &'static str)> {
    threads().into_iter().chain([(CHOICE, etcd)])
}

fn threads() -> Option<(&'static str, &'static str)> {
    env::var_os(THREADS.0).is_none().then_some(THREADS)
}

/// Over the workspace as the suite is, or cargo would choose other features and build anew
fn registry() -> Vec<&'static str> {
    let suites = REGISTRY.into_iter().flat_map(|suite| ["--test", suite]);
    ["test", "--workspace"].into_iter().chain(suites).collect()
}

/// `cargo test` with the caller's arguments, over the workspace unless they name packages
fn suite(arguments: &[OsString]) -> Vec<OsString> {
    let of_cargo = arguments.iter().map_while(|argument| argument.to_str().filter(|text| *text != "--"));
    let scope = (!of_cargo.into_iter().any(chooses_packages)).then(|| OsString::from("--workspace"));
    [OsString::from("test")].into_iter().chain(scope).chain(arguments.iter().cloned()).collect()
}

fn chooses_packages(argument: &str) -> bool {
    argument.starts_with("-p") || argument.starts_with("--package") || argument == "--workspace"
}

/// Which of `etcd` and `etcdctl` is not there
fn missing(found: [bool; 2]) -> Option<&'static str> {
    match found {
        [true, true] => None,
        [true, false] => Some("etcdctl"),
        [false, true] => Some("etcd"),
        [false, false] => Some("etcd and etcdctl"),
    }
}

fn version(etcd: &Path) -> Result<String> {
    let output = Command::new(etcd).arg("--version").output()?.stdout;
    Ok(String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown version").to_owned())
}

/// Whether a missing etcd is an error
pub(crate) fn is_etcd_required() -> bool {
    env::var_os("CALLSIGN_REQUIRE_ETCD").is_some_and(|value| value == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(arguments: &[&str]) -> String {
        let arguments: Vec<_> = arguments.iter().map(OsString::from).collect();
        suite(&arguments).join(&OsString::from(" ")).into_string().unwrap()
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing([true, true]), None);
        assert_eq!(missing([true, false]), Some("etcdctl"));
        assert_eq!(missing([false, true]), Some("etcd"));
        assert_eq!(missing([false, false]), Some("etcd and etcdctl"));
    }

    #[test]
    fn the_suite_is_the_workspace_unless_packages_are_named() {
        assert_eq!(line(&[]), "test --workspace");
        assert_eq!(line(&["killed", "--", "--nocapture"]), "test --workspace killed -- --nocapture");
        assert_eq!(line(&["-p", "callsign"]), "test -p callsign");
        assert_eq!(line(&["--package=callsign"]), "test --package=callsign");
        assert_eq!(line(&["--", "-p"]), "test --workspace -- -p");
    }
}
