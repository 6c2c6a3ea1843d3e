//! Call a gRPC service by its name
//!
//! A server registers its callsign in etcd under a lease; a client asks for it by name and gets a balanced, self-healing
//! channel that every tonic-generated client takes.
//!
//! ```no_run
//! # #[cfg(feature = "etcd")]
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use callsign::EtcdChannel;
//!
//! let channel = EtcdChannel::connect("hello.rpc").await?;
//! // let mut greeter = GreeterClient::new(channel);
//! # Ok(())
//! # }
//! ```
//!
//! A server is one line more than tonic's own; ctrl-c deregisters it, drains it, and stops it:
//!
//! ```no_run
//! # #[cfg(feature = "server")]
//! # async fn example(greeter: tonic::transport::server::Router) -> Result<(), Box<dyn std::error::Error>> {
//! use callsign::ServeRegistered;
//!
//! // Server::builder().add_service(GreeterServer::new(Hello))
//! greeter.serve_registered("hello.rpc", "127.0.0.1:9090").await?;
//! # Ok(())
//! # }
//! ```
//!
//! | module | what |
//! | --- | --- |
//! | [`channel`] | [`EtcdChannel`] and [`Channel`]: the client |
//! | [`server`] | [`Serve`]: bind, register, serve, drain |
//! | [`etcd`] | [`Etcd`], the session; registration, discovery and typed values, for those who assemble |
//! | [`discover`] | where endpoints come from: etcd, a fixed list, anything of yours |
//! | [`policy`] | which endpoint takes a call |
//! | [`instance`] | [`Instance`], its [`Address`] and [`Metadata`], and how it is written in etcd |
//! | [`metrics`] | what is counted, by name |
//! | `tls` | `Tls`: whom to trust, who we are (feature `tls`) |
//!
//! # Metrics and spans
//!
//! Calls, picks, replays, endpoints, sessions, registrations and discoveries are counted through the
//! [`metrics`](https://docs.rs/metrics) facade: the names are in [`metrics::TABLE`]. A recorder has to be installed before
//! the channel, the session or the registration is made.
//!
//! Each call has a `tracing` span `call` of level DEBUG and target `callsign::call`, with the fields `service`, `method`,
//! `endpoint` (recorded when it is picked, and again when the call is sent again) and `code` (recorded when the response has
//! ended, or the caller has given up). It is a child of the span that the caller is in, and is not made where nobody wants it.
//!
//! # Features
//!
//! `etcd` and `server` are on by default; `etcd` needs `protoc` at build time. Without them a [`Channel`] balances over
//! static lists and any [`tower::discover::Discover`]. `tls` is off by default: connections to etcd and to endpoints over
//! TLS, by rustls and ring.

pub mod channel;
#[cfg(feature = "server")]
pub mod server;

pub mod discover;
#[cfg(feature = "etcd")]
pub mod etcd;
pub mod instance;
pub mod metrics;
#[cfg(feature = "tls")]
pub mod tls;
pub use callsign_core::policy;

mod attention;
mod connection;
mod deadline;
mod endpoint;
mod outcome;
mod replay;
mod trace;

mod error;

#[cfg(all(test, feature = "etcd"))]
mod fuzz;

#[cfg(feature = "etcd")]
pub use crate::channel::EtcdChannel;
pub use crate::channel::{
    Channel, ChannelState, EjectionReason, EndpointAddress, EndpointInfo, EndpointState, EndpointUpdate,
    ExcludedEndpoint, HashKey, PinnedEndpoint, Updates, WaitForReady,
};
#[cfg(feature = "etcd")]
pub use crate::etcd::{
    Etcd, EtcdError, EtcdOptions, SessionState,
    registration::{PauseError, RegisterError, Registration, RegistrationState},
};
#[cfg(feature = "etcd")]
pub use crate::instance::Layout;
pub use crate::instance::{Address, Instance, Metadata};
#[cfg(feature = "server")]
pub use crate::server::{Serve, ServeError, ServeRegistered};
#[cfg(feature = "tls")]
pub use crate::tls::{Tls, TlsError};
