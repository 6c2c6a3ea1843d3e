//! The answers of one keepalive stream

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_core::Stream;
use tonic::{Status, Streaming};

use super::Shared;
use crate::proto::etcdserverpb::{LeaseKeepAliveRequest, LeaseKeepAliveResponse};

/// Made when they are polled for: a client that does not read is not read from
#[derive(Debug)]
pub(crate) struct KeepAlives {
    requests: Streaming<LeaseKeepAliveRequest>,
    shared: Arc<Shared>,
}

impl KeepAlives {
    pub(super) fn new(requests: Streaming<LeaseKeepAliveRequest>, shared: Arc<Shared>) -> Self {
        Self { requests, shared }
    }
}

impl Stream for KeepAlives {
    type Item = Result<LeaseKeepAliveResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let shared = self.shared.clone();
        Pin::new(&mut self.requests).poll_next(cx).map_ok(|request| {
            let mut answer = shared.with(|store, now| store.keep_alive(now, request.id));
            shared.sign(&mut answer.header);
            answer
        })
    }
}
