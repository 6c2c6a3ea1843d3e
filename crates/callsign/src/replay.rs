//! A request that can be sent again until it is committed
//!
//! h2 hands no refused request back, so head and body are kept here: the head whole, of the body what was sent. A call is
//! committed, and what was kept let go, when more than 64 KiB of its body were sent or its response headers are there.

use std::{
    collections::VecDeque,
    future::{Future as _, poll_fn},
    panic::resume_unwind,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http::{HeaderMap, Request, request::Parts};
use http_body::Body as _;
use tokio::task::JoinHandle;
use tonic::{Status, body::Body};

/// Body bytes sent that a call may have and still be sent again.
const KEPT: usize = 64 * 1024;

/// A request on its way out
#[derive(Debug)]
pub(crate) struct Outgoing {
    head: Parts,
    replay: Replay,
}

impl Outgoing {
    /// A request that was not sent yet
    pub(crate) fn new(request: Request<Body>) -> Self {
        let (head, body) = request.into_parts();
        Self { head, replay: Replay::new(body) }
    }

    /// The head, to be completed before it is sent
    pub(crate) fn head_mut(&mut self) -> &mut Parts {
        &mut self.head
    }

    /// What the caller said in the head
    pub(crate) fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }

    /// The head as h2 takes it
    pub(crate) fn head(&self) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = self.head.method.clone();
        *request.uri_mut() = self.head.uri.clone();
        *request.version_mut() = http::Version::HTTP_2;
        *request.headers_mut() = self.head.headers.clone();
        request
    }

    /// Whether there is no body at all
    pub(crate) fn is_empty(&self) -> bool {
        self.replay.body.is_none() && self.replay.kept.is_empty()
    }

    /// Whether the call may be sent again: all that was sent of its body is still here
    pub(crate) fn is_replayable(&self) -> bool {
        !self.replay.committed
    }

    /// The error that the caller's own body ended with, if it did
    pub(crate) fn body_error(&mut self) -> Option<Status> {
        self.replay.error.take()
    }

    /// Begins to send the body, from its beginning, on a new stream; nothing to send is `None`
    pub(crate) fn transmit(&mut self, stream: SendStream<Bytes>) -> Option<Attempt> {
        (self.replay.read, self.replay.sent) = (0, 0);
        // Not made in vain: its drop would cancel the stream.
        (!self.is_empty()).then(|| Attempt { stream, chunk: None, next: None, ended: false })
    }

    /// Sends on until the body has ended or must wait
    pub(crate) fn poll_send(&mut self, attempt: &mut Attempt, cx: &mut Context<'_>) -> Poll<()> {
        attempt.poll_send(&mut self.replay, cx)
    }

    /// Leaves the rest of the body to a task: the response has begun, so nothing is sent again
    pub(crate) fn pump(&mut self, mut attempt: Attempt) -> Pump {
        let mut replay = std::mem::replace(&mut self.replay, Replay::new(Body::empty()));
        replay.commit();
        let sending = async move { poll_fn(|cx| attempt.poll_send(&mut replay, cx)).await };
        Pump { task: tokio::spawn(sending) }
    }
}

/// The task that sends the rest of a body; dropping it ends the task and, unless all was sent, cancels the stream
#[derive(Debug)]
pub(crate) struct Pump {
    task: JoinHandle<()>,
}

impl Pump {
    /// Panics as the body did, if it did: a caller's panic belongs to the caller
    pub(crate) fn propagate_panic(&mut self, cx: &mut Context<'_>) {
        if let Poll::Ready(Err(ended)) = Pin::new(&mut self.task).poll(cx)
            && let Ok(panic) = ended.try_into_panic()
        {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A body and what of it was already read
#[derive(Debug)]
struct Replay {
    /// `None` once it has ended.
    body: Option<Body>,
    error: Option<Status>,
    /// Until committed all that was read of the body; then what was kept and is not sent yet.
    kept: VecDeque<Bytes>,
    /// How much of `kept` the current attempt has read; 0 once committed.
    read: usize,
    /// Bytes that the current attempt has sent.
    sent: usize,
    committed: bool,
}

impl Replay {
    fn new(body: Body) -> Self {
        let body = (!body.is_end_stream()).then_some(body);
        Self { body, error: None, kept: VecDeque::new(), read: 0, sent: 0, committed: false }
    }

    fn commit(&mut self) {
        self.kept.drain(..self.read);
        self.read = 0;
        self.committed = true;
    }

    fn on_sent(&mut self, bytes: usize) {
        self.sent += bytes;
        if self.sent > KEPT && !self.committed {
            self.commit();
        }
    }

    /// The next chunk to send, from what was kept or from the body; never an empty one
    fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, ()>>> {
        if self.committed {
            if let Some(chunk) = self.kept.pop_front() {
                return Poll::Ready(Some(Ok(chunk)));
            }
        } else if let Some(chunk) = self.kept.get(self.read) {
            self.read += 1;
            return Poll::Ready(Some(Ok(chunk.clone())));
        }
        while let Some(body) = &mut self.body {
            match ready!(Pin::new(body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    // A gRPC request has no trailers, and servers count empty DATA frames against us.
                    let Some(chunk) = frame.into_data().ok().filter(|chunk| !chunk.is_empty()) else {
                        continue;
                    };
                    if !self.committed {
                        self.kept.push_back(chunk.clone());
                        self.read += 1;
                    }
                    return Poll::Ready(Some(Ok(chunk)));
                }
                Some(Err(status)) => {
                    self.error = Some(status);
                    self.body = None;
                    return Poll::Ready(Some(Err(())));
                }
                None => self.body = None,
            }
        }
        Poll::Ready(None)
    }
}

/// One sending of the body, on one stream; dropping it before the end cancels the stream
#[derive(Debug)]
pub(crate) struct Attempt {
    stream: SendStream<Bytes>,
    /// Read, and not yet sent as a whole.
    chunk: Option<Bytes>,
    /// Read after `chunk`, to know whether `chunk` is the last; `Some(None)` is the end.
    next: Option<Option<Bytes>>,
    /// All of it was sent.
    ended: bool,
}

impl Attempt {
    /// Sends until the body has ended or must wait; errors of the stream end it, the response tells what they mean
    fn poll_send(&mut self, replay: &mut Replay, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let looked = self.look_ahead(replay, cx);
            if let Poll::Ready(false) = looked {
                return Poll::Ready(());
            }
            if let Some(chunk) = self.chunk.take() {
                let taken = ready!(self.poll_chunk(chunk, replay, cx));
                if !taken || self.ended {
                    return Poll::Ready(());
                }
            } else if let Some(None) = self.next {
                self.ended = self.stream.send_data(Bytes::new(), true).is_ok();
                return Poll::Ready(());
            }
            if self.chunk.is_none() && looked.is_pending() {
                // Nothing to send, and the body has our waker; only the peer can have news.
                return self.stream.poll_reset(cx).map(drop);
            }
        }
    }

    /// Reads the chunk to send and the one after it, as far as they are there; false if the body failed
    fn look_ahead(&mut self, replay: &mut Replay, cx: &mut Context<'_>) -> Poll<bool> {
        loop {
            match (&self.chunk, &self.next) {
                (None, Some(Some(_))) => self.chunk = self.next.take().flatten(),
                (Some(_), Some(_)) | (None, Some(None)) => return Poll::Ready(true),
                (_, None) => match ready!(replay.poll_chunk(cx)) {
                    Some(Ok(chunk)) => self.next = Some(Some(chunk)),
                    Some(Err(())) => return Poll::Ready(false),
                    None => self.next = Some(None),
                },
            }
        }
    }

    /// Sends a chunk as far as the window allows, keeping the rest; false if the stream takes no more
    fn poll_chunk(&mut self, mut chunk: Bytes, replay: &mut Replay, cx: &mut Context<'_>) -> Poll<bool> {
        // What is kept anyway may as well wait for its window inside h2. Beyond that only what the window allows is sent:
        // a call is committed by what has left, not by what would like to.
        if replay.committed || replay.sent + chunk.len() > KEPT {
            self.stream.reserve_capacity(chunk.len());
            let mut capacity = self.stream.capacity();
            while capacity == 0 {
                match self.stream.poll_capacity(cx) {
                    Poll::Ready(Some(Ok(granted))) => capacity = granted,
                    Poll::Ready(_) => return Poll::Ready(false),
                    Poll::Pending => {
                        self.chunk = Some(chunk);
                        return Poll::Pending;
                    }
                }
            }
            if capacity < chunk.len() {
                self.chunk = Some(chunk.split_off(capacity));
            }
        }
        replay.on_sent(chunk.len());
        let last = self.chunk.is_none() && matches!(self.next, Some(None));
        let taken = self.stream.send_data(chunk, last).is_ok();
        self.ended = taken && last;
        Poll::Ready(taken)
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        // The response future keeps the stream open, so a body that ends early, by its own error or by a panic, has to
        // say so. On a stream that is closed already this does nothing.
        if !self.ended {
            self.stream.send_reset(Reason::CANCEL);
        }
    }
}
