//! What a registration writes: layout and metadata

use super::RegisterError;
use crate::{
    etcd::ServiceName,
    instance::{Address, Layout, Metadata, MetadataError, format},
};

/// How an instance is written, and what it says about itself
///
/// The first thing that cannot be said is kept, and reported by [`check`](Self::check).
#[derive(Clone, Debug)]
pub(crate) struct Form {
    pub(crate) layout: Layout,
    metadata: Result<Metadata, MetadataError>,
}

impl Default for Form {
    fn default() -> Self {
        Self { layout: Layout::default(), metadata: Ok(Metadata::new()) }
    }
}

impl Form {
    pub(crate) fn weight(&mut self, weight: u32) {
        self.say(|metadata| Ok(metadata.with_weight(weight)));
    }

    pub(crate) fn zone(&mut self, zone: &str) {
        self.say(|metadata| metadata.with_zone(zone));
    }

    pub(crate) fn version(&mut self, version: &str) {
        self.say(|metadata| metadata.with_version(version));
    }

    pub(crate) fn pair(&mut self, key: &str, value: &str) {
        self.say(|metadata| metadata.with(key, value));
    }

    fn say(&mut self, more: impl FnOnce(Metadata) -> Result<Metadata, MetadataError>) {
        self.metadata = self.metadata.clone().and_then(more);
    }

    /// Whether layout, metadata and the id, if one was given, go together
    pub(crate) fn check(&self, id: Option<i64>) -> Result<(), RegisterError> {
        let said = !self.metadata.as_ref().map_err(Clone::clone)?.is_empty();
        match (self.layout, id) {
            (Layout::GoZero, _) if said => Err(RegisterError::NoMetadata),
            (Layout::Grpc, Some(id)) => Err(RegisterError::NoId { id }),
            _ => Ok(()),
        }
    }

    /// Key and value
    pub(super) fn pair_of(
        &self,
        service: &ServiceName,
        id: i64,
        address: &Address,
    ) -> Result<(String, String), MetadataError> {
        let key = match self.layout {
            Layout::GoZero => service.key(id),
            Layout::Grpc => service.prefix() + address.authority(),
        };
        Ok((key, format::write(self.layout, address, self.metadata.as_ref().map_err(Clone::clone)?)))
    }
}
