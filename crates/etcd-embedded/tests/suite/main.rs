//! The embedded server beside a real etcd: the same tests for both, and random operations for both
//!
//! Without an `etcd` on PATH the suites say that they compared nothing; with `CALLSIGN_REQUIRE_ETCD=1` they fail.
#![allow(clippy::unwrap_used, reason = "all of this is tests")]

mod client;
mod conformance;
mod differential;
mod etcdctl;
mod faults;
mod proto;
mod real;
