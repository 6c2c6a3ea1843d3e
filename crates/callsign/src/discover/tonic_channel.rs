//! tonic's balance channel, fed by a discovery

use std::{collections::HashSet, future::poll_fn, pin::Pin, time::Duration};

use futures_core::Stream;
use tokio::sync::mpsc;
use tonic::transport::{self, Channel, Endpoint};
use tower::discover::Change;

use super::EtcdDiscover;
use crate::instance::{Address, Instance};

/// tonic takes changes when a call polls it; a few may wait until then.
const CAPACITY: usize = 64;

/// tonic has no limit of its own, and a call would wait for an address that swallows packets.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

type Feed = mpsc::Sender<transport::channel::Change<Address, Endpoint>>;

pub(super) fn fed_by(discover: EtcdDiscover) -> Channel {
    let (channel, feed) = Channel::balance_channel(CAPACITY);
    // Ends when the channel, which holds the other end of `feed`, is dropped.
    tokio::spawn(run(discover, feed));
    channel
}

async fn run(mut discover: EtcdDiscover, feed: Feed) {
    let mut known = HashSet::new();
    loop {
        let change = tokio::select! {
            change = next(&mut discover) => change,
            () = feed.closed() => return,
        };
        let Some(change) = real(change, &mut known) else { continue };
        if feed.send(change).await.is_err() {
            tracing::debug!(service = %discover.service(), "tonic's channel is gone");
            return;
        }
    }
}

async fn next(discover: &mut EtcdDiscover) -> Change<Address, Instance> {
    let next = poll_fn(|cx| Pin::new(&mut *discover).poll_next(cx)).await;
    let Ok(change) = next.expect("a discovery never ends");
    change
}

/// The change as tonic wants it, if it is one: inserting a known key would make tonic connect anew
fn real(
    change: Change<Address, Instance>,
    known: &mut HashSet<Address>,
) -> Option<transport::channel::Change<Address, Endpoint>> {
    match change {
        Change::Insert(address, _) => {
            let endpoint = known.insert(address.clone()).then(|| endpoint(&address))?;
            Some(transport::channel::Change::Insert(address, endpoint))
        }
        Change::Remove(address) => {
            known.remove(&address).then_some(transport::channel::Change::Remove(address))
        }
    }
}

fn endpoint(address: &Address) -> Endpoint {
    // https is kept, so that a channel without TLS fails instead of talking plaintext.
    let scheme = if address.is_https() { "https" } else { "http" };
    let endpoint =
        Endpoint::from_shared(format!("{scheme}://{address}")).expect("an address is a valid authority");
    endpoint.connect_timeout(CONNECT_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_key_is_not_inserted_again() {
        let address: Address = "h:1".parse().unwrap();
        let insert = || Change::Insert(address.clone(), Instance::new(address.clone()));
        let mut known = HashSet::new();
        assert!(real(insert(), &mut known).is_some());
        assert!(real(insert(), &mut known).is_none());
        assert!(real(Change::Remove(address.clone()), &mut known).is_some());
        assert!(real(Change::Remove(address.clone()), &mut known).is_none());
        assert!(real(insert(), &mut known).is_some());
    }
}
