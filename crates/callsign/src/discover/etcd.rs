//! A service's endpoints, found in etcd

use std::{
    convert::Infallible,
    iter,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use tokio::sync::watch;
use tower::discover::Change;

use super::{
    DiscoveryState, ServiceError,
    by_address::{ByAddress, Changes},
    tonic_channel,
};
use crate::{
    etcd::{Etcd, InstanceSet, ServiceName, Subscription, Update},
    instance::{Address, Instance},
};

/// The endpoints of a service, from etcd: a [`Discover`](tower::discover::Discover) whose key is the address
///
/// Says nothing before the first list is in, never ends and never fails: while etcd is away the last known set stays.
/// Instances with the same address are one endpoint, shown as the one with the newest `mod_revision`; where one is written
/// without a scheme, those with the same host and port and a scheme are covered by it. An insert of a known
/// key with another revision means that a server has registered anew under that address, or that the newest instance has
/// left and another is still there: in a channel it ends a backoff and leaves a connection alone. One with the same revision
/// changes the metadata only. All who follow one service over one [`Etcd`] share one watch, which ends with the last of them.
/// Must be polled within a tokio runtime: when the one that the watch ran in has ended, it goes on in the next.
///
/// ```no_run
/// use callsign::{Channel, discover::EtcdDiscover, etcd::{Etcd, EtcdOptions}};
///
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let etcd = Etcd::connect(EtcdOptions::from_env()).await?;
/// let discover = EtcdDiscover::new(&etcd, "hello.rpc")?;
/// let channel = Channel::builder(discover).build()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct EtcdDiscover {
    service: ServiceName,
    subscription: Subscription<InstanceSet>,
    endpoints: ByAddress,
    changes: Changes,
}

impl EtcdDiscover {
    /// Follows `service`; must be called within a tokio runtime
    ///
    /// # Errors
    ///
    /// [`ServiceError`] if the name cannot be a service's; never because of the network.
    pub fn new(etcd: &Etcd, service: impl Into<String>) -> Result<Self, ServiceError> {
        let service = etcd.service(service)?;
        let subscription = etcd.follow(&service);
        Ok(Self { service, subscription, endpoints: ByAddress::default(), changes: Changes::new() })
    }

    /// Where the discovery stands, and each change of that
    pub fn state(&self) -> watch::Receiver<DiscoveryState> {
        self.subscription.state()
    }

    /// tonic's own balanced channel, fed with the service's endpoints
    ///
    /// For those who need tonic's type. It connects to `http://` addresses, in plaintext. It holds no endpoints: nobody
    /// knows which of them answer, so what etcd forgets is gone until it is registered again. A task feeds it, which
    /// ends when the channel's last clone is dropped. Must be called within a tokio runtime.
    pub fn into_tonic_channel(self) -> tonic::transport::Channel {
        tonic_channel::fed_by(self)
    }

    pub(super) fn service(&self) -> &ServiceName {
        &self.service
    }
}

impl Stream for EtcdDiscover {
    type Item = Result<Change<Address, Instance>, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(change) = this.changes.pop_front() {
                return Poll::Ready(Some(Ok(change)));
            }
            let first = ready!(this.subscription.poll_update(cx));
            // What is there now is told together: a publication of many steps, and what a slow consumer has missed.
            let rest = iter::from_fn(|| match this.subscription.poll_update(cx) {
                Poll::Ready(update) => Some(update),
                Poll::Pending => None,
            });
            let updates = iter::once(first).chain(rest);
            let traced = updates.inspect(|update| trace(&this.service, update));
            this.endpoints.apply(traced, &mut this.changes);
        }
    }
}

/// An update, but for what it tells of each of ten thousand instances
fn trace(service: &ServiceName, update: &Update) {
    match update {
        Update::Reset(set) => tracing::trace!(%service, instances = set.len(), "reset"),
        Update::Put(instance) => {
            tracing::trace!(%service, id = %instance.id, address = %instance.address, "put");
        }
        Update::Remove(id) => tracing::trace!(%service, %id, "remove"),
    }
}
