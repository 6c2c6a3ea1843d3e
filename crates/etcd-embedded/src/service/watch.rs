//! The service `Watch`: one stream, its watches, and what they are told

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_core::Stream;
use prost::Message;
use tokio::time::{Instant, Interval, interval_at};
use tokio_stream::wrappers::WatchStream as Changes;
use tonic::{Request, Response, Status, Streaming};

use super::{MAX_MESSAGE_BYTES, Service, Shared, delayed::Delayed, fault::Shown, status::code};
use crate::{
    proto::etcdserverpb::{
        WatchCreateRequest, WatchRequest, WatchResponse, watch_request::RequestUnion, watch_server::Watch,
    },
    store::{Need, Refused, Store, Watches, progress, refuse_watch},
};

/// etcd's interval between unasked words of progress.
const PROGRESS: Duration = Duration::from_secs(600);

/// Responses that are made ahead of what is sent, if they are small.
const QUEUE: usize = 64;

/// And if they are not, in bytes of keys and values.
const QUEUE_BYTES: usize = 1 << 20;

#[tonic::async_trait]
impl Watch for Service {
    type WatchStream = Delayed<Told>;

    async fn watch(
        &self,
        request: Request<Streaming<WatchRequest>>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        self.0.faults.wait().await;
        let token = super::token(request.metadata()).map(str::to_owned);
        let told = Told {
            requests: Some(request.into_inner()),
            token,
            news: Changes::from_changes(self.0.news.subscribe()),
            watches: Watches::default(),
            queue: VecDeque::new(),
            progress_asked: false,
            tick: None,
            shown: self.0.faults.shown(),
            shared: self.0.clone(),
        };
        Ok(Response::new(Delayed::new(told, self.0.clone())))
    }
}

/// What the watches of one stream are told
///
/// Made when it is polled for, that is when the connection has room: a client that does not read costs its cursors and
/// one queue. There is no task behind it.
#[derive(Debug)]
pub(crate) struct Told {
    /// None once the client has said all it will; its watches live on, as in etcd.
    requests: Option<Streaming<WatchRequest>>,
    token: Option<String>,
    news: Changes<()>,
    watches: Watches,
    queue: VecDeque<WatchResponse>,
    /// Progress is to be told once every watch is told everything.
    progress_asked: bool,
    /// None as long as no watch wants it: a timer that nobody needs would wake a paused clock.
    tick: Option<Interval>,
    shown: Shown,
    shared: Arc<Shared>,
}

impl Stream for Told {
    type Item = Result<WatchResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if let Some(mut response) = this.queue.pop_front() {
                this.shared.sign(&mut response.header);
                return Poll::Ready(Some(Ok(response)));
            }
            // Looked at before the store, so that news in between wakes us.
            while let Poll::Ready(news) = Pin::new(&mut this.news).poll_next(cx) {
                if news.is_none() {
                    return Poll::Ready(None);
                }
            }
            match this.poll_request(cx) {
                Poll::Ready(Ok(request)) => this.on_request(request),
                Poll::Ready(Err(_)) => return Poll::Ready(None),
                Poll::Pending => {
                    this.poll_tick(cx);
                    this.on_news();
                    if this.queue.is_empty() {
                        return Poll::Pending;
                    }
                }
            }
        }
    }
}

impl Told {
    fn poll_request(&mut self, cx: &mut Context<'_>) -> Poll<Result<WatchRequest, Status>> {
        let Some(requests) = &mut self.requests else { return Poll::Pending };
        match Pin::new(requests).poll_next(cx) {
            Poll::Ready(Some(request)) => Poll::Ready(request),
            Poll::Ready(None) => {
                self.requests = None;
                Poll::Pending
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn poll_tick(&mut self, cx: &mut Context<'_>) {
        let Some(tick) = &mut self.tick else { return };
        if tick.poll_tick(cx).is_ready() {
            // Again, so that the next one wakes us.
            tick.reset();
            let _ = tick.poll_tick(cx);
            self.shared.with(|store, _| self.queue.extend(self.watches.tick(store)));
        }
    }

    fn on_request(&mut self, request: WatchRequest) {
        match request.request_union {
            Some(RequestUnion::CreateRequest(request)) => {
                let created = self.create(&request);
                self.queue.push_back(created);
                if self.tick.is_none() && self.watches.want_progress() {
                    self.tick = Some(interval_at(Instant::now() + PROGRESS, PROGRESS));
                }
            }
            Some(RequestUnion::CancelRequest(request)) => {
                let canceled = self.shared.with(|store, _| self.watches.cancel(store, request.watch_id));
                self.queue.extend(canceled);
            }
            Some(RequestUnion::ProgressRequest(_)) => self.progress_asked = true,
            None => {}
        }
    }

    fn create(&mut self, request: &WatchCreateRequest) -> WatchResponse {
        let token = self.token.as_deref();
        self.shared.with(|store, now| match store.auth.authorize(now, token, Need::Keys) {
            Ok(()) => self.watches.create(store, request),
            Err(refused) => refuse_watch(store, reason(refused)),
        })
    }

    fn on_news(&mut self) {
        let shared = self.shared.clone();
        shared.with(|store, _| {
            if self.shown.take_resend(&shared.faults) {
                self.queue.extend(self.watches.resend(store));
            }
            self.read(store);
        });
    }

    fn read(&mut self, store: &Store) {
        let mut bytes = 0;
        while self.queue.len() < QUEUE && bytes < QUEUE_BYTES {
            let Some(batch) = self.watches.next(store) else {
                if std::mem::take(&mut self.progress_asked) {
                    self.queue.push_back(progress(store, -1));
                }
                return;
            };
            if self.shown.take_ahead(&self.shared.faults) {
                self.queue.push_back(progress(store, -1));
            }
            bytes += batch.bytes;
            if batch.fragment {
                self.queue.extend(fragments(batch.response, MAX_MESSAGE_BYTES));
            } else {
                self.queue.push_back(batch.response);
            }
        }
    }
}

/// An error as etcd writes it into a response
fn reason(refused: Refused) -> String {
    format!("rpc error: code = {:?} desc = {refused}", code(refused))
}

/// A response in parts of at most `max` bytes, as far as single events allow
fn fragments(mut whole: WatchResponse, max: usize) -> Vec<WatchResponse> {
    if whole.encoded_len() < max || whole.events.len() < 2 {
        return vec![whole];
    }
    let events = std::mem::take(&mut whole.events);
    let empty = WatchResponse { fragment: true, ..whole };
    let mut parts = vec![empty.clone()];
    let mut bytes = empty.encoded_len();
    for event in events {
        // A tag and a length of at most five bytes each come with every event.
        let more = event.encoded_len() + 10;
        let full = bytes + more > max && parts.last().is_some_and(|part| !part.events.is_empty());
        if full {
            parts.push(empty.clone());
            bytes = empty.encoded_len();
        }
        bytes += more;
        parts.last_mut().expect("there is one").events.push(event);
    }
    parts.last_mut().expect("there is one").fragment = false;
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::mvccpb::{Event, KeyValue};

    fn response(sizes: &[usize]) -> WatchResponse {
        let event = |size: &usize| {
            let kv = KeyValue { value: vec![0; *size].into(), ..KeyValue::default() };
            Event { kv: Some(kv), ..Event::default() }
        };
        WatchResponse { events: sizes.iter().map(event).collect(), ..WatchResponse::default() }
    }

    #[test]
    fn every_part_but_the_last_says_that_more_come() {
        let parts = fragments(response(&[40, 40, 40]), 100);
        assert_eq!(parts.iter().map(|part| part.fragment).collect::<Vec<_>>(), [true, true, false]);
        assert!(parts.iter().all(|part| part.encoded_len() <= 100));
    }

    #[test]
    fn an_event_is_never_split() {
        let parts = fragments(response(&[400, 10]), 100);
        assert_eq!(parts.iter().map(|part| part.events.len()).collect::<Vec<_>>(), [1, 1]);
    }

    #[test]
    fn what_fits_is_sent_whole() {
        assert_eq!(fragments(response(&[10, 10]), 100).len(), 1);
    }
}
