//! Instances and their addresses, and how they are written in etcd

mod address;
mod metadata;

#[cfg(feature = "etcd")]
pub(crate) mod format;

#[cfg(all(test, feature = "etcd"))]
mod fuzz;

use std::sync::Arc;

#[cfg(feature = "etcd")]
pub use self::format::Layout;
pub use self::{
    address::{Address, AddressError},
    metadata::{Metadata, MetadataError},
};

/// One registered server of a service
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Instance {
    /// Last part of its key in etcd; unique within the service
    pub id: Arc<str>,
    /// Where it listens
    pub address: Address,
    /// etcd's revision at which its key was last put; grows when a server registers anew, also under an id that it has
    /// kept. 0 outside of etcd
    pub mod_revision: i64,
    /// What it says about itself; never sent with a call
    pub metadata: Metadata,
}

impl Instance {
    /// An instance that no registry knows: its id is its address
    pub fn new(address: Address) -> Self {
        let id = address.authority().into();
        Self { id, address, mod_revision: 0, metadata: Metadata::default() }
    }
}

impl From<Address> for Instance {
    fn from(address: Address) -> Self {
        Self::new(address)
    }
}
