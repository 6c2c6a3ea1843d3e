//! Call a gRPC service by its name
pub mod instance;
