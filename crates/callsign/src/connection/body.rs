//! A response body as it comes in

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::RecvStream;
use http_body::{Body, Frame};
use tonic::Status;

use super::OpenStream;
use crate::replay::Pump;

/// The body of a response; dropping it before its end cancels the call
///
/// Its data is taken from the connection only when it is polled, so a slow reader slows its server down.
#[derive(Debug)]
pub(crate) struct Incoming {
    open: Option<Open>,
}

/// What an unfinished response holds, in the order of release: the stream is given back before h2 wakes the driver.
#[derive(Debug)]
struct Open {
    stream: OpenStream,
    pump: Option<Pump>,
    body: RecvStream,
    data_ended: bool,
}

impl Incoming {
    pub(super) fn new(stream: OpenStream, body: RecvStream, pump: Option<Pump>) -> Self {
        Self { open: Some(Open { stream, pump, body, data_ended: false }) }
    }

    /// Ends the call now, unless it has ended
    pub(crate) fn cancel(&mut self) {
        self.open = None;
    }
}

impl Open {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        while !self.data_ended {
            match ready!(self.body.poll_data(cx)) {
                Some(Ok(data)) => {
                    // Cannot fail: it is what was just received. The window opens as the reader takes the data.
                    let _ = self.body.flow_control().release_capacity(data.len());
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(self.failed(&error, cx)))),
                None => self.data_ended = true,
            }
        }
        Poll::Ready(match ready!(self.body.poll_trailers(cx)) {
            Ok(Some(trailers)) => Some(Ok(Frame::trailers(trailers))),
            Ok(None) => None,
            Err(error) => Some(Err(self.failed(&error, cx))),
        })
    }

    fn failed(&mut self, error: &h2::Error, cx: &mut Context<'_>) -> Status {
        if let Some(pump) = &mut self.pump {
            pump.propagate_panic(cx);
        }
        self.stream.shared.failed(error)
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(open) = &mut self.open else { return Poll::Ready(None) };
        let frame = ready!(open.poll_frame(cx));
        if !matches!(&frame, Some(Ok(frame)) if frame.is_data()) {
            self.open = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.open.as_ref().is_none_or(|open| open.body.is_end_stream())
    }
}
