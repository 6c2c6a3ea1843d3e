//! Call a gRPC service by its name

pub mod instance;

mod connection;
mod replay;

mod error;
