//! A stream whose items come as late as the server's faults say

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures_core::Stream;
use tokio::time::{Sleep, sleep};

use super::Shared;

#[derive(Debug)]
pub(crate) struct Delayed<S: Stream> {
    inner: S,
    shared: Arc<Shared>,
    /// One at a time, so that the order stays.
    held: Option<(S::Item, Pin<Box<Sleep>>)>,
}

impl<S: Stream> Delayed<S> {
    pub(super) fn new(inner: S, shared: Arc<Shared>) -> Self {
        Self { inner, shared, held: None }
    }
}

impl<S: Stream + Unpin> Stream for Delayed<S>
where
    S::Item: Unpin,
{
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        if self.held.is_none() {
            let Some(item) = ready!(Pin::new(&mut self.inner).poll_next(cx)) else {
                return Poll::Ready(None);
            };
            let Some(delay) = self.shared.faults.delay() else {
                return Poll::Ready(Some(item));
            };
            self.held = Some((item, Box::pin(sleep(delay))));
        }
        if let Some((_, sleep)) = &mut self.held {
            ready!(sleep.as_mut().poll(cx));
        }
        Poll::Ready(self.held.take().map(|(item, _)| item))
    }
}
