//! Call a gRPC service by its name

pub mod channel;
pub mod discover;
pub mod instance;

mod connection;
mod endpoint;
mod replay;

mod error;

#[cfg(feature = "etcd")]
pub use crate::channel::EtcdChannel;
pub use crate::{
    channel::{Channel, EndpointAddress, EndpointInfo, EndpointState, EndpointUpdate, WaitForReady},
    instance::{Address, Instance},
};
