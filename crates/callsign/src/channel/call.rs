//! One call, from the caller's request to the end of its response

use std::{
    fmt::Write as _,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, Uri, header::USER_AGENT, request::Parts};
use http_body::{Body as HttpBody, Frame};
use tokio::time::{Instant, Sleep, sleep_until, timeout_at};
use tonic::{Code, Status, body::Body};
use tracing::field::Empty;

use super::{
    EndpointAddress, Inner,
    options::{Asked, Options, RequestHeaders},
    ready::Picked,
};
use crate::{
    connection::{Incoming, SendError},
    deadline::far,
    endpoint::{Endpoint, InFlight},
    error,
    metrics::Replay,
    outcome::{Outcome, code_in},
    replay::Outgoing,
    trace::Trace,
};

/// Sends `request` to whichever endpoint takes it, and sends it again where that is safe
///
/// The call is made before its future is: what an `async fn` is given has a place of its own there, beside what becomes of it,
/// and the allocator serves small futures much faster.
pub(super) fn call(
    channel: Arc<Inner>,
    request: Request<Body>,
) -> impl Future<Output = Result<Response<Body>, Status>> + Send {
    let mut call = Call::new(channel, request);
    async move { call.run().await }
}

/// What spans of calls, and the events in them, are filtered by.
const TARGET: &str = "callsign::call";

/// The caller's own deadline: covers the body, too, and is told to the server
#[derive(Clone, Copy)]
struct Told {
    /// As the `grpc-timeout` header says.
    timeout: Duration,
    deadline: Instant,
}

/// Time a call may have waited without the server being told: less than it takes to get there.
const UNTOLD: Duration = Duration::from_millis(1);

/// When a call is over, answered or not
#[derive(Clone, Copy)]
struct Limit {
    timeout: Duration,
    at: Instant,
}

struct Call {
    channel: Arc<Inner>,
    outgoing: Outgoing,
    options: Options,
    limit: Option<Limit>,
    told: Option<Told>,
    trace: Trace,
    /// While the request is sent.
    in_flight: Option<InFlight>,
    /// Whether it is over, or a response body sees to the rest.
    settled: bool,
}

impl Call {
    fn new(channel: Arc<Inner>, mut request: Request<Body>) -> Self {
        let Inner { shared, options, .. } = &*channel;
        let trace = Trace::new(tracing::debug_span!(
            target: TARGET,
            "call",
            service = shared.service(),
            method = request.uri().path(),
            endpoint = Empty,
            code = Empty
        ));
        let told = grpc_timeout(request.headers());
        let limit = told.into_iter().chain(options.timeout(request.uri().path())).min();
        let (limit, told) = match limit {
            None => (None, None),
            Some(timeout) => {
                let now = Instant::now();
                let told = told.map(|timeout| Told { timeout, deadline: far(now, timeout) });
                (Some(Limit { timeout, at: far(now, timeout) }), told)
            }
        };
        request.headers_mut().insert(USER_AGENT, options.user_agent.clone());
        let options = Options::take(request.extensions_mut());
        let outgoing = Outgoing::new(request);
        Self { channel, outgoing, options, limit, told, trace, in_flight: None, settled: false }
    }

    async fn run(&mut self) -> Result<Response<Body>, Status> {
        let result = match self.limit {
            None => self.send().await,
            Some(Limit { timeout, at }) => match timeout_at(at, self.send()).await {
                Ok(result) => result,
                Err(_) => {
                    let sent_to = self.in_flight.as_ref().map(|call| &**call.endpoint());
                    Err(error::deadline_exceeded(self.channel.shared.service(), timeout, sent_to))
                }
            },
        };
        if let Err(status) = &result {
            self.end(status.code());
        }
        result
    }

    async fn send(&mut self) -> Result<Response<Body>, Status> {
        let mut avoid = None;
        let mut refused = false;
        loop {
            let headers = RequestHeaders(self.outgoing.headers());
            let asked = Asked { options: &self.options, headers, avoid };
            let Picked { mut in_flight, stream } = self.channel.shared.pick(asked).await?;
            in_flight.trace(&self.trace);
            let endpoint = Arc::clone(self.in_flight.insert(in_flight).endpoint());
            avoid = Some(endpoint.number);
            if let Err(status) = self.address_to(&endpoint) {
                // The caller's fault, and nothing was sent.
                self.take_back();
                return Err(status);
            }
            let reason = match stream.send(&mut self.outgoing).await {
                Ok(response) => return self.respond(response),
                Err(SendError::NotSent) => Replay::Unsent,
                // The server's library refused it, unseen by the application: once more (gRFC A6).
                Err(SendError::Refused(_)) if !refused && self.outgoing.is_replayable() => Replay::Refused,
                Err(SendError::Refused(status) | SendError::Failed(status)) => return Err(status),
            };
            refused |= reason == Replay::Refused;
            self.take_back();
            self.channel.shared.meters().replayed(reason);
            tracing::debug!(target: TARGET, parent: self.trace.id(), endpoint = %endpoint.address, ?reason, "call not taken, sent again");
        }
    }

    /// The call was not taken where it was sent
    fn take_back(&mut self) {
        if let Some(in_flight) = self.in_flight.take() {
            in_flight.untaken();
        }
    }

    /// The call has ended with `code`, wherever it was sent
    fn end(&mut self, code: Code) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        match self.in_flight.take() {
            Some(in_flight) => in_flight.ended(Outcome::grpc(code)),
            None => {
                self.channel.shared.meters().untaken(code);
                self.trace.ended(code);
            }
        }
    }

    /// Completes the head for `endpoint`
    fn address_to(&mut self, endpoint: &Endpoint) -> Result<(), Status> {
        let Parts { uri, headers, .. } = self.outgoing.head_mut();
        let mut parts = std::mem::take(uri).into_parts();
        parts.scheme = Some(endpoint.scheme.clone());
        parts.authority = Some(endpoint.authority.clone());
        *uri = Uri::from_parts(parts).map_err(|_| error::bad_path())?;
        if let Some(told) = &mut self.told {
            let left = told.deadline.saturating_duration_since(Instant::now());
            if left + UNTOLD < told.timeout {
                headers.insert(GRPC_TIMEOUT, timeout_value(left));
                told.timeout = left;
            }
        }
        Ok(())
    }

    /// The response, or the status in place of one that no gRPC server has made
    fn respond(&mut self, response: Response<Incoming>) -> Result<Response<Body>, Status> {
        let (mut parts, incoming) = response.into_parts();
        let mut in_flight = self.in_flight.take();
        self.settled = true;
        let stated = code_in(&parts.headers);
        let outcome = Outcome::of_head(stated, &parts);
        let is_foreign = stated.is_none() && outcome.is_some();
        let ends = incoming.is_end_stream();
        let outcome = outcome.or_else(|| ends.then(|| Outcome::grpc(Code::Unknown)));
        if let Some(in_flight) = &mut in_flight {
            in_flight.answered(outcome);
            parts.extensions.insert(EndpointAddress(in_flight.endpoint().address.clone()));
        }
        // Whoever finds an error in the headers reads no body.
        if let Some(outcome) = outcome.filter(|outcome| ends || outcome.code != Code::Ok)
            && let Some(in_flight) = in_flight.take()
        {
            let endpoint = Arc::clone(in_flight.endpoint());
            in_flight.ended(outcome);
            if is_foreign {
                return Err(error::no_grpc(&endpoint.address, parts.status, outcome.code));
            }
        }
        let deadline = self.told.map(|told| told.deadline);
        let body = ResponseBody { incoming, in_flight, stated, delivered: false, deadline, timer: None };
        Ok(Response::from_parts(parts, Body::new(body)))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        // Given up by its caller. If it is in flight, that says so by its own drop.
        if self.in_flight.is_none() {
            self.end(Code::Cancelled);
        }
    }
}

/// A response body that counts its call as in flight until it ends, at the latest with the caller's deadline
struct ResponseBody {
    incoming: Incoming,
    /// `None` once the response has ended, however long the reader keeps the body.
    in_flight: Option<InFlight>,
    /// What the headers said already.
    stated: Option<Code>,
    /// Whether data has come.
    delivered: bool,
    deadline: Option<Instant>,
    /// Made when there is something to wait for.
    timer: Option<Pin<Box<Sleep>>>,
}

impl ResponseBody {
    fn poll_deadline(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(deadline) = self.deadline else { return Poll::Pending };
        self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline))).as_mut().poll(cx)
    }

    /// Whether the deadline has passed although there is data to read: a stream that never pauses has one, too
    ///
    /// What was there when the reader first came is its own: a caller that stalled may read an answer that did not.
    fn is_late(&self) -> bool {
        self.timer.as_ref().is_some_and(|timer| timer.is_elapsed())
    }

    /// The response has ended like this
    fn end(&mut self, last: Option<&Result<Frame<Bytes>, Status>>) {
        let Some(in_flight) = self.in_flight.take() else { return };
        let trailers = |frame: &Frame<Bytes>| frame.trailers_ref().and_then(code_in);
        let code = match last {
            Some(Ok(frame)) => trailers(frame).unwrap_or(Code::Unknown),
            Some(Err(status)) => status.code(),
            None => self.stated.unwrap_or(Code::Unknown),
        };
        let outcome = if self.delivered { Outcome::after_messages(code) } else { Outcome::grpc(code) };
        in_flight.ended(outcome);
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        match Pin::new(&mut this.incoming).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) if frame.is_data() => {
                this.delivered |= frame.data_ref().is_some_and(|data| !data.is_empty());
                if !this.is_late() {
                    return Poll::Ready(Some(Ok(frame)));
                }
            }
            Poll::Ready(last) => {
                this.end(last.as_ref());
                return Poll::Ready(last);
            }
            Poll::Pending => ready!(this.poll_deadline(cx)),
        }
        this.incoming.cancel();
        let late = this.in_flight.as_ref();
        let late = late.map(|call| Err(error::deadline_exceeded_reading(&call.endpoint().address)));
        this.end(late.as_ref());
        Poll::Ready(late)
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }
}

const GRPC_TIMEOUT: &str = "grpc-timeout";

/// The caller's timeout; one that is malformed is the server's to refuse
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let legal = (1..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    let amount: u64 = digits.parse().ok().filter(|_| legal)?;
    Some(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    })
}

/// A timeout in the finest unit that needs at most eight digits ("gRPC over HTTP2", Timeout)
fn timeout_value(timeout: Duration) -> HeaderValue {
    const MOST: u128 = 99_999_999;
    let units = [(timeout.as_nanos(), 'n'), (timeout.as_micros(), 'u'), (timeout.as_millis(), 'm')];
    let seconds = (u128::from(timeout.as_secs()).min(MOST), 'S');
    let (amount, unit) = units.into_iter().find(|(amount, _)| *amount <= MOST).unwrap_or(seconds);
    let mut value = String::with_capacity(9);
    let _ = write!(value, "{amount}{unit}");
    HeaderValue::try_from(value).expect("digits and a letter")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_future_of_a_call_is_one_that_allocators_serve_from_their_caches() {
        fn size<T, F>(_: impl Fn(T, Request<Body>) -> F) -> usize {
            size_of::<F>()
        }
        let size = size(call);
        assert!(size <= 1024, "{size} bytes; glibc's cache ends at 1032");
    }

    fn parsed(value: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(GRPC_TIMEOUT, value.parse().unwrap());
        grpc_timeout(&headers)
    }

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        assert_eq!(parsed("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parsed("3M"), Some(Duration::from_secs(180)));
        assert_eq!(parsed("99999999S"), Some(Duration::from_secs(99_999_999)));
        assert_eq!(parsed("500m"), Some(Duration::from_millis(500)));
        assert_eq!(parsed("7u"), Some(Duration::from_micros(7)));
        assert_eq!(parsed("0n"), Some(Duration::ZERO));
        for malformed in ["", "5", "S", "123456789S", "+5S", "5x", "5 S", "-1S"] {
            assert_eq!(parsed(malformed), None, "{malformed:?}");
        }
    }

    #[test]
    fn what_is_left_is_written_in_eight_digits_and_never_longer_than_it_is() {
        for (timeout, text) in [
            (Duration::ZERO, "0n"),
            (Duration::from_millis(50), "50000000n"),
            (Duration::from_millis(500), "500000u"),
            (Duration::from_secs(100), "100000m"),
            (Duration::from_secs(200_000), "200000S"),
            (Duration::MAX, "99999999S"),
        ] {
            let value = timeout_value(timeout);
            assert_eq!(value.to_str().unwrap(), text);
            assert!(parsed(text).unwrap() <= timeout);
        }
    }
}
