//! `cargo xtask chaos [--seed N] [--minutes M]`

use std::ffi::OsString;

use crate::{Result, cargo};

/// The program, and the servers that it starts
const PACKAGE: [&str; 2] = ["--package", "callsign-tests"];

pub(crate) fn run(arguments: &[OsString]) -> Result {
    cargo::run(["build", "--bins"].into_iter().chain(PACKAGE))?;
    let run = ["run"].into_iter().chain(PACKAGE).chain(["--bin", "chaos", "--"]).map(OsString::from);
    cargo::run(run.chain(arguments.iter().cloned()))
}
