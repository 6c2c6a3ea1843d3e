//! A channel's endpoints, for those who look on

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_core::Stream;
use tokio_stream::wrappers::{BroadcastStream, errors::BroadcastStreamRecvError};

use super::{EjectionReason, shared::Shared};
use crate::{endpoint::EndpointState, instance::Address};

/// An endpoint as it stands now
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EndpointInfo {
    /// Where it is
    pub address: Address,
    /// Its state
    pub state: EndpointState,
    /// Whether calls are sent to it although discovery has removed it, because too many vanished with it
    pub held: bool,
    /// Why calls are not sent to it although it is ready; on trial, with one call at a time, it is not ejected any more
    pub ejected: Option<EjectionReason>,
    /// Calls in flight, streams included
    pub in_flight: u32,
    /// Calls sent to it since it is known
    pub started: u64,
    /// Those of them that have ended as they should, or through no fault of the endpoint's
    pub succeeded: u64,
    /// Those of them that have failed, and the endpoint may be to blame
    pub failed: u64,
    /// The usual time to the beginning of a response, as estimated now; `None` before there is anything to go by
    pub latency: Option<Duration>,
    /// Why its last connection or attempt ended, if one did
    pub last_error: Option<String>,
}

/// A change of an endpoint's state, or of its being held or ejected
///
/// When it says that an endpoint is no longer ready, or that it is ejected, no call picks that endpoint any more.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct EndpointUpdate {
    /// Where the endpoint is
    pub address: Address,
    /// Its new state
    pub state: EndpointState,
    /// Whether it is ready although discovery has removed it
    pub held: bool,
    /// Why calls are not sent to it although it is ready
    pub ejected: Option<EjectionReason>,
    /// Why it is not ready, if a connection or an attempt ended
    pub cause: Option<String>,
}

/// A stream of [`EndpointUpdate`]s: first the present state of each endpoint, then each change
///
/// A reader that falls far behind is told the present states again. Ends with the channel, which it does not keep alive.
#[derive(Debug)]
pub struct Updates {
    shared: Weak<Shared>,
    present: VecDeque<EndpointUpdate>,
    changes: BroadcastStream<EndpointUpdate>,
}

impl Updates {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        let (present, changes) = shared.watch();
        Self {
            shared: Arc::downgrade(shared),
            present: present.into(),
            changes: BroadcastStream::new(changes),
        }
    }
}

impl Stream for Updates {
    type Item = EndpointUpdate;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<EndpointUpdate>> {
        loop {
            if let Some(update) = self.present.pop_front() {
                return Poll::Ready(Some(update));
            }
            match ready!(Pin::new(&mut self.changes).poll_next(cx)) {
                Some(Ok(update)) => return Poll::Ready(Some(update)),
                Some(Err(BroadcastStreamRecvError::Lagged(_))) => match self.shared.upgrade() {
                    Some(shared) => *self = Self::new(&shared),
                    None => return Poll::Ready(None),
                },
                None => return Poll::Ready(None),
            }
        }
    }
}
