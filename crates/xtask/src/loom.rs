//! `cargo xtask loom`: every order in which threads can meet in the core's atomics

use crate::{Result, cargo};

pub(crate) fn run() -> Result {
    // Built anew for it, so beside the other builds and not in their place.
    let fixed =
        ["test", "--package", "callsign-core", "--lib", "--release", "--target-dir", "target/loom", "loom"];
    cargo::run_with(fixed, [("RUSTFLAGS", "--cfg loom")])
}
