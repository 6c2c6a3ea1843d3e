//! The statuses that callsign itself makes
//!
//! Statuses of servers pass unchanged; every other [`Status`] a caller can see is made here, so that codes and wording are
//! decided in one place.

use std::time::Duration;

use h2::Reason;
use http::StatusCode;
use tonic::{Code, Status};

use crate::{endpoint::Endpoint, instance::Address};

/// The peer ended the stream, or the stream broke
pub(crate) fn stream_failed(address: &Address, error: &h2::Error) -> Status {
    // The mapping of RST_STREAM is gRPC's own ("gRPC over HTTP2", Errors); a broken connection is UNAVAILABLE.
    let code = match error.reason() {
        _ if error.is_io() || error.is_go_away() => Code::Unavailable,
        Some(Reason::REFUSED_STREAM) => Code::Unavailable,
        Some(Reason::CANCEL) => Code::Cancelled,
        Some(Reason::ENHANCE_YOUR_CALM) => Code::ResourceExhausted,
        Some(Reason::INADEQUATE_SECURITY) => Code::PermissionDenied,
        _ => Code::Internal,
    };
    Status::new(code, format!("{address}: {error}"))
}

/// What answered is no gRPC server; the mapping to `code` is gRPC's own
pub(crate) fn no_grpc(address: &Address, status: StatusCode, code: Code) -> Status {
    Status::new(code, format!("{address}: no response of gRPC, but HTTP {status}"))
}

/// The connection under the call is gone
pub(crate) fn connection_lost(address: &Address, cause: &str) -> Status {
    Status::unavailable(format!("{address}: connection lost: {cause}"))
}

/// h2 does not take this request
pub(crate) fn bad_request(error: &h2::Error) -> Status {
    Status::internal(format!("the request's head is no valid HTTP/2: {error}"))
}

/// The request's path makes no URI
pub(crate) fn bad_path() -> Status {
    Status::internal("the request's path is no valid URI")
}

/// The deadline passed before response headers came
pub(crate) fn deadline_exceeded(service: &str, after: Duration, sent_to: Option<&Endpoint>) -> Status {
    let what = match sent_to {
        Some(endpoint) => format!("{service}: no answer from {} within {after:?}", endpoint.address),
        None => format!("{service}: no endpoint took the call within {after:?}"),
    };
    Status::deadline_exceeded(what)
}

/// The deadline passed while the response was read
pub(crate) fn deadline_exceeded_reading(address: &Address) -> Status {
    Status::deadline_exceeded(format!("{address}: the response did not end within the deadline"))
}

/// No endpoint was ready in time
pub(crate) fn none_ready(why: String) -> Status {
    Status::unavailable(why)
}

/// The queue of calls that wait for an endpoint is full
pub(crate) fn too_many_waiting(service: &str) -> Status {
    Status::unavailable(format!("{service}: too many calls wait for an endpoint"))
}

/// The runtime that the channel was made in has ended
pub(crate) fn channel_ended(service: &str) -> Status {
    Status::unavailable(format!("{service}: the runtime that the channel was made in has ended"))
}
