//! An etcd v3 server in one process's memory, for demos and tests
//!
//! [`EmbeddedEtcd`] serves etcd's gRPC API: keys with history, transactions, leases, watches, users and tokens, as far
//! as one member without permissions goes. Its answers, errors and events are compared with those of a real etcd by
//! the suites in `tests/`. It keeps nothing, replicates nothing and is not for production.
//!
//! | module | what |
//! | --- | --- |
//! | `store` | decides: requests in, responses out, time as an argument |
//! | `service` | acts: gRPC, streams, the expiry of leases |
//! | `net` | connections that can be frozen and cut |
//! | `server` | what a user holds: start, stop, faults |

mod net;
mod proto;
mod server;
mod service;
mod store;

pub use server::{Builder, EmbeddedEtcd, StartError};
