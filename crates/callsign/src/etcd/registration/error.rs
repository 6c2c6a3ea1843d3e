//! What a registration fails with

use std::time::Duration;

use crate::{
    etcd::ServiceError,
    instance::{Address, MetadataError},
};

/// Why an instance could not be registered or taken out again
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The service's name cannot be a key: use another one
    #[error(transparent)]
    Service(#[from] ServiceError),
    /// The id is not positive: use a positive number, or none
    #[error("the instance id {id} is not positive")]
    Id {
        /// The id given
        id: i64,
    },
    /// The TTL is too short: 2 s is etcd's floor, 5 s is sensible, 15 s is the default
    #[error("a TTL of {ttl:?} is too short: etcd grants no less than 2 s")]
    Ttl {
        /// The TTL given
        ttl: Duration,
    },
    /// Nobody could connect to the address: publish the port that was bound, and the host under which others reach it
    ///
    /// `server::advertised` finds both.
    #[error("nobody can connect to {address}: it needs a port and a certain host")]
    Address {
        /// The address given
        address: Address,
    },
    /// The address has a scheme, which no value in etcd has: publish it without `https://`, for channels with TLS
    #[error("{address} cannot be registered with https: clients have to know themselves that it speaks TLS")]
    Https {
        /// The address given
        address: Address,
    },
    /// Metadata that cannot be written: say less
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// The go-zero layout has no room for metadata: say nothing, or choose [`Layout::Grpc`](crate::Layout::Grpc)
    #[error("the go-zero layout has no room for metadata")]
    NoMetadata,
    /// In the grpc layout the address is the id: give none, or choose [`Layout::GoZero`](crate::Layout::GoZero)
    #[error("the grpc layout has no room for the id {id}: the address is the id")]
    NoId {
        /// The id given
        id: i64,
    },
    /// etcd could not be reached or refused: see the cause
    #[error("{key} was not registered: {cause}")]
    Failed {
        /// The key
        key: String,
        /// What went wrong last
        cause: String,
    },
    /// etcd did not confirm that the instance is out: its key ends with its TTL
    #[error("{key} was not confirmed to be deregistered: {cause}")]
    Unconfirmed {
        /// The key
        key: String,
        /// What went wrong last
        cause: String,
    },
}
