//! Where a channel's endpoints come from
//!
//! [`EtcdDiscover`] follows a service in etcd, [`fixed`] is a list that never changes. Both are
//! [`Discover`](tower::discover::Discover)s: what [`Channel::builder`](crate::Channel::builder) takes.

#[cfg(feature = "etcd")]
mod by_address;
#[cfg(feature = "etcd")]
mod etcd;
#[cfg(feature = "etcd")]
mod tonic_channel;

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use futures_core::Stream;
use tower::discover::Change;

#[cfg(feature = "etcd")]
pub use self::etcd::EtcdDiscover;
#[cfg(feature = "etcd")]
pub use crate::etcd::{ServiceError, discovery::DiscoveryState};
use crate::instance::{Address, Instance};

/// A list of addresses that never changes
pub fn fixed(addresses: impl IntoIterator<Item = Address>) -> Fixed {
    let mut addresses: Vec<_> = addresses.into_iter().collect();
    addresses.reverse();
    Fixed { addresses }
}

/// See [`fixed`]
#[derive(Clone, Debug)]
pub struct Fixed {
    /// Still to be told, last one first.
    addresses: Vec<Address>,
}

impl Stream for Fixed {
    type Item = Result<Change<Address, Instance>, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        match self.addresses.pop() {
            Some(address) => Poll::Ready(Some(Ok(Change::Insert(address.clone(), address.into())))),
            None => Poll::Pending,
        }
    }
}
