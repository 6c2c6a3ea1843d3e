//! A request that can be sent again until it is committed
//!
//! h2 hands no refused request back, so head and body are kept here: the head whole, of the body what was sent. A call is
//! committed, and what was kept let go, when more than 64 KiB of its body were sent or its response headers are there.

use std::{
    collections::VecDeque,
    future::poll_fn,
    panic::resume_unwind,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http::{Request, request::Parts};
use http_body::Body as _;
use tokio::task::JoinHandle;
use tonic::{Status, body::Body};

/// Body bytes sent that a call may have and still be sent again.
const KEPT: usize = 64 * 1024;

/// A request on its way out
#[derive(Debug)]
pub(crate) struct Outgoing {
    head: Parts,
    body: Slot,
}

#[derive(Debug)]
enum Slot {
    /// Sent, so far, from the caller's own poll.
    Own(Replay),
    /// Shared with a task that sends the rest.
    Shared(Arc<Mutex<Replay>>),
}

impl Outgoing {
    /// A request that was not sent yet
    pub(crate) fn new(request: Request<Body>) -> Self {
        let (head, body) = request.into_parts();
        Self { head, body: Slot::Own(Replay::new(body)) }
    }

    /// The head, to be completed before it is sent
    pub(crate) fn head_mut(&mut self) -> &mut Parts {
        &mut self.head
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
        matches!(&self.body, Slot::Own(replay) if replay.is_empty())
    }

    /// Whether the call may be sent again: all that was sent of its body is still here
    pub(crate) fn is_replayable(&mut self) -> bool {
        self.replay(|replay| !replay.committed)
    }

    /// Ends keeping what is sent
    pub(crate) fn commit(&mut self) {
        self.replay(Replay::commit);
    }

    /// The error that the caller's own body ended with, if it did
    pub(crate) fn body_error(&mut self) -> Option<Status> {
        self.replay(|replay| replay.error.take())
    }

    fn replay<T>(&mut self, f: impl FnOnce(&mut Replay) -> T) -> T {
        match &mut self.body {
            Slot::Own(replay) => f(replay),
            Slot::Shared(shared) => f(&mut lock(shared)),
        }
    }

    /// Sends the body, from its beginning, on a new stream
    ///
    /// What is there is sent in the caller's poll, which is all there is of a unary call. A body that does not end at once
    /// is left to a task; it ends with the [`Pump`].
    pub(crate) async fn transmit(&mut self, stream: SendStream<Bytes>) -> Option<Pump> {
        if self.is_empty() {
            return None;
        }
        let mut attempt = Attempt { number: self.replay(Replay::restart), stream, chunk: None, next: None };
        let sent = poll_fn(|cx| Poll::Ready(self.replay(|replay| attempt.poll_send(replay, cx)))).await;
        sent.is_pending().then(|| self.spawn(attempt))
    }

    fn spawn(&mut self, mut attempt: Attempt) -> Pump {
        let shared = match &mut self.body {
            Slot::Shared(shared) => Arc::clone(shared),
            Slot::Own(replay) => {
                let shared = Arc::new(Mutex::new(std::mem::replace(replay, Replay::new(Body::empty()))));
                self.body = Slot::Shared(Arc::clone(&shared));
                shared
            }
        };
        let sending = async move { poll_fn(|cx| attempt.poll_send(&mut lock(&shared), cx)).await };
        Pump { task: tokio::spawn(sending) }
    }
}

fn lock(shared: &Mutex<Replay>) -> MutexGuard<'_, Replay> {
    // A body that panicked is the caller's affair (`Pump::propagate_panic`) and leaves nothing half done here.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The task that sends the rest of a body; dropping it ends the task and, unless all was sent, cancels the stream
#[derive(Debug)]
pub(crate) struct Pump {
    task: JoinHandle<()>,
}

impl Pump {
    /// Panics as the body did, if it did: a caller's panic belongs to the caller
    pub(crate) async fn propagate_panic(mut self) {
        self.task.abort();
        if let Err(ended) = (&mut self.task).await
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
    /// Number of the current attempt; older ones must not touch the body any more.
    attempt: u32,
}

impl Replay {
    fn new(body: Body) -> Self {
        let body = (!body.is_end_stream()).then_some(body);
        Self { body, error: None, kept: VecDeque::new(), read: 0, sent: 0, committed: false, attempt: 0 }
    }

    fn is_empty(&self) -> bool {
        self.body.is_none() && self.kept.is_empty()
    }

    fn restart(&mut self) -> u32 {
        (self.read, self.sent) = (0, 0);
        self.attempt += 1;
        self.attempt
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
                    // A gRPC request has no trailers: anything but data is passed over.
                    let Ok(chunk) = frame.into_data() else { continue };
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

/// One sending of the body, on one stream
#[derive(Debug)]
struct Attempt {
    number: u32,
    stream: SendStream<Bytes>,
    /// Read, and not yet sent as a whole.
    chunk: Option<Bytes>,
    /// Read after `chunk`, to know whether `chunk` is the last; `Some(None)` is the end.
    next: Option<Option<Bytes>>,
}

impl Attempt {
    /// Sends until the body has ended or must wait; errors of the stream end it, the response tells what they mean
    fn poll_send(&mut self, replay: &mut Replay, cx: &mut Context<'_>) -> Poll<()> {
        if replay.attempt != self.number {
            return Poll::Ready(());
        }
        loop {
            let looked = self.look_ahead(replay, cx);
            if let Poll::Ready(false) = looked {
                self.stream.send_reset(Reason::CANCEL);
                return Poll::Ready(());
            }
            let ended = matches!(self.next, Some(None));
            match self.chunk.take() {
                Some(chunk) => match self.poll_chunk(chunk, ended, replay, cx) {
                    Poll::Ready(true) => {}
                    Poll::Ready(false) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                },
                None if ended => {
                    let _ = self.stream.send_data(Bytes::new(), true);
                    return Poll::Ready(());
                }
                None => {}
            }
            if ended && self.chunk.is_none() {
                return Poll::Ready(());
            }
            if self.chunk.is_none() && looked.is_pending() {
                // Nothing to send: only the peer can have news. The body has our waker.
                return match self.stream.poll_reset(cx) {
                    Poll::Ready(_) => Poll::Ready(()),
                    Poll::Pending => Poll::Pending,
                };
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
    fn poll_chunk(
        &mut self,
        mut chunk: Bytes,
        ended: bool,
        replay: &mut Replay,
        cx: &mut Context<'_>,
    ) -> Poll<bool> {
        // What is kept anyway may as well wait for its window inside h2: no waiting here, no task for a unary call.
        if replay.committed || replay.sent + chunk.len() > KEPT {
            self.stream.reserve_capacity(chunk.len());
            let mut capacity = self.stream.capacity();
            while capacity == 0 && !chunk.is_empty() {
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
                let rest = chunk.split_off(capacity);
                self.chunk = Some(rest);
            }
        }
        replay.on_sent(chunk.len());
        let last = ended && self.chunk.is_none();
        Poll::Ready(self.stream.send_data(chunk, last).is_ok())
    }
}
