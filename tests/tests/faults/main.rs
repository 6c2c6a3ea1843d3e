//! Every fault of etcd that is known, beside servers under load: no call fails, and everything comes back by itself
//!
//! Each row of the table is a test of its own, on three real etcd members behind proxies: run by `cargo xtask faults`,
//! left out by `cargo xtask test`. Outages last up to four TTLs; `CALLSIGN_FAULTS=all` asks for the long forms. The
//! times are an idle machine's, and 2 s more.

#![cfg(unix)]

mod row;

mod instances;
mod log;
mod members;
mod protocol;
mod store;
mod views;
