//! How calls end, and what that says of their endpoints

use http::{HeaderMap, StatusCode, header::CONTENT_TYPE, response::Parts};
use tonic::Code;

/// How a call has ended, and what that says of its endpoint
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) code: Code,
    pub(crate) verdict: Verdict,
}

/// What a call's end says of its endpoint
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It does its work
    Success,
    /// It may be its fault
    Failure,
    /// Nothing, neither good nor bad
    Nothing,
}

impl Outcome {
    /// With a status of gRPC, the server's or our own
    pub(crate) fn grpc(code: Code) -> Self {
        Self { code, verdict: if blames(code) { Verdict::Failure } else { Verdict::Success } }
    }

    /// The same, after messages were delivered
    ///
    /// Nobody is to blame for a stream that lasted as long as its caller wanted it, whoever noticed first.
    pub(crate) fn after_messages(code: Code) -> Self {
        match code {
            Code::DeadlineExceeded => Self { code, verdict: Verdict::Nothing },
            code => Self::grpc(code),
        }
    }

    /// What the head of a response says, with the status [`stated`](code_in) in it, unless the rest is still to say it
    pub(crate) fn of_head(stated: Option<Code>, head: &Parts) -> Option<Self> {
        match stated {
            Some(code) => Some(Self::grpc(code)),
            None => (!is_grpc(head)).then(|| Self::http(head.status)),
        }
    }

    /// With a response that was not made by a gRPC server ("HTTP to gRPC Status Code Mapping")
    ///
    /// Something in between has made it, and the server is not behind it now: UNIMPLEMENTED, too, stands for a proxy without
    /// a route, not for a server without a method. Only what is about credentials may be the caller's own fault.
    fn http(status: StatusCode) -> Self {
        let (code, verdict) = match status.as_u16() {
            400 => (Code::Internal, Verdict::Failure),
            401 => (Code::Unauthenticated, Verdict::Nothing),
            403 => (Code::PermissionDenied, Verdict::Nothing),
            404 => (Code::Unimplemented, Verdict::Failure),
            429 | 502 | 503 | 504 => (Code::Unavailable, Verdict::Failure),
            _ => (Code::Unknown, Verdict::Failure),
        };
        Self { code, verdict }
    }
}

/// The status in headers or trailers
pub(crate) fn code_in(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|code| Code::from_bytes(code.as_bytes()))
}

/// Whether a gRPC server may have written this head; one that does not say what it is gets the benefit of the doubt
fn is_grpc(head: &Parts) -> bool {
    let kind = head.headers.get(CONTENT_TYPE);
    head.status == StatusCode::OK && kind.is_none_or(|kind| kind.as_bytes().starts_with(b"application/grpc"))
}

/// Whether a call that ends like this may be its endpoint's fault
///
/// The codes that Envoy and linkerd count as a server's failures, but for UNIMPLEMENTED: a method that a server lacks says
/// nothing of its others. What a caller did (INVALID_ARGUMENT, NOT_FOUND, CANCELLED...) is nobody else's fault.
fn blames(code: Code) -> bool {
    matches!(
        code,
        Code::Unknown
            | Code::DeadlineExceeded
            | Code::ResourceExhausted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(status: u16, headers: &[(&'static str, &'static str)]) -> Parts {
        let response = http::Response::builder().status(status);
        let response =
            headers.iter().fold(response, |response, (name, value)| response.header(*name, *value));
        response.body(()).unwrap().into_parts().0
    }

    fn of_head(head: &Parts) -> Option<Outcome> {
        Outcome::of_head(code_in(&head.headers), head)
    }

    #[test]
    fn a_status_of_http_has_the_code_that_grpc_maps_it_to() {
        for (status, code) in [
            (400, Code::Internal),
            (401, Code::Unauthenticated),
            (403, Code::PermissionDenied),
            (404, Code::Unimplemented),
            (429, Code::Unavailable),
            (502, Code::Unavailable),
            (503, Code::Unavailable),
            (504, Code::Unavailable),
            (302, Code::Unknown),
            (500, Code::Unknown),
        ] {
            let outcome = of_head(&head(status, &[])).unwrap();
            let may_be_the_callers = matches!(status, 401 | 403);
            let verdict = if may_be_the_callers { Verdict::Nothing } else { Verdict::Failure };
            assert_eq!(outcome, Outcome { code, verdict }, "{status}");
        }
    }

    #[test]
    fn a_status_of_grpc_counts_whatever_http_says_and_a_response_of_grpc_is_yet_to_end() {
        let stated = of_head(&head(503, &[("grpc-status", "5")]));
        assert_eq!(stated, Some(Outcome::grpc(Code::NotFound)));
        assert_eq!(of_head(&head(200, &[])), None);
        assert_eq!(of_head(&head(200, &[("content-type", "application/grpc+proto")])), None);
        let page = of_head(&head(200, &[("content-type", "text/html")])).unwrap();
        assert_eq!((page.code, page.verdict), (Code::Unknown, Verdict::Failure));
    }

    #[test]
    fn a_deadline_says_nothing_after_messages_and_other_codes_say_the_same() {
        assert_eq!(Outcome::grpc(Code::DeadlineExceeded).verdict, Verdict::Failure);
        assert_eq!(Outcome::after_messages(Code::DeadlineExceeded).verdict, Verdict::Nothing);
        for code in [Code::Ok, Code::Cancelled, Code::Unavailable, Code::Unimplemented] {
            assert_eq!(Outcome::after_messages(code), Outcome::grpc(code));
        }
    }
}
