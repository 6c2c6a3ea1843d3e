//! Channels over a list of addresses, fixed or changing, and what they said about their endpoints, and when

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use callsign::{
    Address, Channel, EndpointState, EndpointUpdate, Instance, channel::ChannelBuilder, discover,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_stream::{Stream, StreamExt, wrappers::UnboundedReceiverStream};
use tower::discover::Change;

use crate::wait;

/// A channel with the library's defaults
pub fn over(addresses: impl IntoIterator<Item = Address>) -> Channel {
    let addresses: Vec<_> = addresses.into_iter().collect();
    Channel::builder(discover::fixed(addresses)).build().expect("the defaults are valid")
}

/// A channel over instances that the test names as it goes, and everything that it says about its endpoints
pub fn changing(
    configure: impl FnOnce(ChannelBuilder<Told>) -> ChannelBuilder<Told>,
) -> (Channel, UpdateLog, Changes) {
    let (changes, told) = mpsc::unbounded_channel();
    let builder = configure(Channel::builder(UnboundedReceiverStream::new(told)));
    let channel = builder.build().expect("valid settings");
    let log = UpdateLog::new(channel.updates());
    (channel, log, Changes(changes))
}

/// What [`Changes`] have told
pub type Told = UnboundedReceiverStream<Result<Change<Address, Instance>, Infallible>>;

/// What a test tells a channel about its instances; dropped, discovery has ended
#[derive(Debug)]
pub struct Changes(mpsc::UnboundedSender<Result<Change<Address, Instance>, Infallible>>);

impl Changes {
    /// Discovery lists this, known by its address
    pub fn insert(&self, instance: impl Into<Instance>) {
        let instance = instance.into();
        self.insert_as(&instance.address.clone(), instance);
    }

    /// Discovery lists this, known by whatever it was known by before
    pub fn insert_as(&self, key: &Address, instance: impl Into<Instance>) {
        self.tell(Change::Insert(key.clone(), instance.into()));
    }

    /// Discovery does not list this any more
    pub fn remove(&self, key: &Address) {
        self.tell(Change::Remove(key.clone()));
    }

    fn tell(&self, change: Change<Address, Instance>) {
        self.0.send(Ok(change)).expect("the channel lives");
    }
}

/// Waits until so many of a channel's endpoints are ready
///
/// # Panics
///
/// If they are not within 20 s.
pub async fn until_ready(channel: &Channel, endpoints: usize) {
    let ready =
        || channel.endpoints().iter().filter(|endpoint| endpoint.state == EndpointState::Ready).count();
    let what = format!("{endpoints} endpoints are ready");
    wait::until(&what, Duration::from_secs(20), || (ready() == endpoints).then_some(())).await;
}

/// Everything that came out of `channel.updates()` since the log was begun
#[derive(Debug)]
pub struct UpdateLog {
    seen: Arc<watch::Sender<Vec<(Instant, EndpointUpdate)>>>,
    task: JoinHandle<()>,
}

impl UpdateLog {
    /// Begins to log
    pub fn new(updates: impl Stream<Item = EndpointUpdate> + Send + 'static) -> Self {
        let seen = Arc::new(watch::Sender::new(Vec::new()));
        let log = seen.clone();
        let task = tokio::spawn(async move {
            let mut updates = std::pin::pin!(updates);
            while let Some(update) = updates.next().await {
                log.send_modify(|seen| seen.push((Instant::now(), update)));
            }
        });
        Self { seen, task }
    }

    /// States of one endpoint since a time, in order
    pub fn states(&self, address: &Address, since: Instant) -> Vec<(Instant, EndpointState)> {
        let seen = self.seen.borrow();
        let of = seen.iter().filter(|(at, update)| update.address == *address && *at >= since);
        of.map(|(at, update)| (*at, update.state)).collect()
    }

    /// Everything that was told since a time, in order
    pub fn updates(&self, since: Instant) -> Vec<EndpointUpdate> {
        let seen = self.seen.borrow();
        seen.iter().filter(|(at, _)| *at >= since).map(|(_, update)| update.clone()).collect()
    }

    /// Waits until an endpoint has been in `state`, now or at any time since; says when that was reported
    ///
    /// # Panics
    ///
    /// If it was not within `bound`.
    pub async fn until(
        &self,
        address: &Address,
        state: EndpointState,
        since: Instant,
        bound: Duration,
    ) -> Instant {
        self.until_any(address, since, bound, &format!("{state:?}"), |seen| seen == state).await
    }

    /// Waits until an endpoint was reported in any state but ready; says when
    ///
    /// # Panics
    ///
    /// If it was not within `bound`.
    pub async fn until_lost(&self, address: &Address, since: Instant, bound: Duration) -> Instant {
        self.until_any(address, since, bound, "lost", |seen| seen != EndpointState::Ready).await
    }

    async fn until_any(
        &self,
        address: &Address,
        since: Instant,
        bound: Duration,
        what: &str,
        condition: impl Fn(EndpointState) -> bool,
    ) -> Instant {
        let mut changes = self.seen.subscribe();
        wait::within(&format!("{address} is reported {what}"), bound, async {
            loop {
                changes.borrow_and_update();
                if let Some((at, _)) =
                    self.states(address, since).into_iter().find(|(_, seen)| condition(*seen))
                {
                    return at;
                }
                changes.changed().await.expect("the log holds the sender");
            }
        })
        .await
    }
}

impl Drop for UpdateLog {
    fn drop(&mut self) {
        self.task.abort();
    }
}
