//! Where a channel's endpoints come from

use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};

use futures_core::Stream;
use tower::discover::Change;

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
