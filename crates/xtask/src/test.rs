//! `cargo xtask test`: the whole suite

use std::{env, ffi::OsString, path::Path, process::Command};

use crate::{Result, cargo, program};

pub(crate) fn run(arguments: &[OsString]) -> Result {
    report_etcd()?;
    // Without etcd the channel works over static lists; nothing else in the suite builds that.
    cargo::run(["check", "--package", "callsign", "--no-default-features"])?;
    cargo::run(suite(arguments))
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

/// Says which etcd the suites will find
///
/// They pause, kill and restart it, so only a program will do, not a cluster; and they look into it with `etcdctl`.
fn report_etcd() -> Result {
    let found = ["etcd", "etcdctl"].map(program::on_path);
    let missing = missing(found.each_ref().map(Option::is_some));
    match (found, missing) {
        ([Some(etcd), _], None) => println!("real etcd: {}, {}", etcd.display(), version(&etcd)?),
        (_, Some(missing)) if is_etcd_required() => {
            return Err(format!("CALLSIGN_REQUIRE_ETCD=1, but there is no {missing} on PATH").into());
        }
        (_, missing) => {
            let missing = missing.unwrap_or("etcd");
            println!("real etcd: no {missing} on PATH; the suites that need one are skipped, and say so");
        }
    }
    Ok(())
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
    fn an_etcd_without_etcdctl_is_not_enough() {
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
