//! Why a request to etcd failed, and what that calls for

use std::{error::Error, fmt, sync::Arc};

use tokio::time::Instant;
use tonic::{Code, Status};

use crate::instance::Address;

/// Why a request to etcd failed; names the host
#[derive(Clone, Debug)]
pub(crate) struct RequestError {
    kind: Kind,
    host: Address,
    message: Arc<str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The host is down, frozen, cut off, without a leader or no etcd: ask the next one
    Host,
    /// The same, as far as can be told: its answer did not come in time
    Silent,
    /// A person has to change something: ask slowly
    Refused,
    /// The same: a permission. Of a watch, it may be that the token has expired
    Denied,
    /// The same: user or password. Asked again when it is due
    Login(LoginRefused),
    /// The token has expired, or one is needed after all: the next request brings a new one, or a refusal
    Token,
    LeaseGone,
    /// The id asked for is taken
    LeasePresent,
    Compacted,
    /// The answer is larger than what is accepted: ask for less
    TooLarge,
    /// etcd is there and cannot (out of space): ask again later
    Other,
}

/// Marks a status, as its source, as the refusal of a login
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("etcd is asked again in a while")]
pub(super) struct LoginRefused {
    pub(super) due: Instant,
}

impl RequestError {
    /// The host did not do `what` in time
    pub(crate) fn timeout(host: &Address, what: &str) -> Self {
        Self::of(Kind::Silent, host, &format!("{what} timed out"))
    }

    /// The host is of no use now
    pub(crate) fn host(host: &Address, message: &str) -> Self {
        Self::of(Kind::Host, host, message)
    }

    fn of(kind: Kind, host: &Address, message: &str) -> Self {
        Self { kind, host: host.clone(), message: printable(message).into() }
    }

    pub(crate) fn new(host: &Address, error: &etcd_client::Error) -> Self {
        match error {
            etcd_client::Error::GRpcStatus(status) => Self::of(classify(status), host, &describe(status)),
            // How etcd-client spells a TTL of 0 in the first answer of a keepalive stream.
            etcd_client::Error::LeaseKeepAliveError(message) if message == "lease not found" => {
                Self::of(Kind::LeaseGone, host, message)
            }
            other => Self::host(host, &other.to_string()),
        }
    }

    /// etcd answered a keepalive with a TTL of 0
    pub(crate) fn lease_gone(host: &Address) -> Self {
        Self::of(Kind::LeaseGone, host, "the lease has ended")
    }

    /// etcd ended a watch in band: the stream stays open and silent
    pub(crate) fn canceled(host: &Address, compact_revision: i64, reason: &str) -> Self {
        let denied = ["permission denied", "PermissionDenied"];
        let (kind, message) = if compact_revision > 0 {
            (Kind::Compacted, format!("the watch's revision was compacted at {compact_revision}"))
        } else if refuses_token(reason) || needs_login(reason) {
            (Kind::Token, format!("the watch was canceled: {reason}"))
        } else if denied.iter().any(|text| reason.contains(text)) {
            (Kind::Denied, format!("the watch was refused: {reason}"))
        } else {
            (Kind::Other, format!("the watch was canceled: {reason}"))
        };
        Self::of(kind, host, &message)
    }

    /// Whether the next host may do better
    pub(crate) fn is_of_host(&self) -> bool {
        matches!(self.kind, Kind::Host | Kind::Silent)
    }

    /// Whether the answer did not come in time
    pub(super) fn is_timeout(&self) -> bool {
        self.kind == Kind::Silent
    }

    /// Whether only a person can help
    pub(crate) fn is_refusal(&self) -> bool {
        matches!(self.kind, Kind::Refused | Kind::Denied | Kind::Login(_))
    }

    /// Whether a permission is missing, or seems to be
    pub(super) fn is_denial(&self) -> bool {
        self.kind == Kind::Denied
    }

    /// Whether another token may help
    pub(super) fn is_of_token(&self) -> bool {
        self.kind == Kind::Token
    }

    /// Whether it was the login that failed, not the request
    pub(super) fn is_of_login(&self) -> bool {
        matches!(self.kind, Kind::Login(_))
    }

    /// When it is time to try again, if that is known
    pub(super) fn due(&self) -> Option<Instant> {
        match self.kind {
            Kind::Login(refused) => Some(refused.due),
            _ => None,
        }
    }

    /// Who said so, and what, apart
    pub(super) fn into_parts(self) -> (Address, String) {
        (self.host, self.message.as_ref().to_owned())
    }

    /// Whether etcd does not know the lease (any more)
    pub(crate) fn is_lease_gone(&self) -> bool {
        self.kind == Kind::LeaseGone
    }

    /// Whether etcd has a lease with the id that was asked for
    pub(crate) fn is_lease_present(&self) -> bool {
        self.kind == Kind::LeasePresent
    }

    /// Whether the answer was too large to be taken in
    pub(crate) fn is_too_large(&self) -> bool {
        self.kind == Kind::TooLarge
    }

    /// Whether the revision asked for is no longer kept
    pub(crate) fn is_compacted(&self) -> bool {
        self.kind == Kind::Compacted
    }
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd {}: {}", self.host, self.message)
    }
}

/// Words of others, which may be anything, as they may be logged: cut, no control characters
pub(super) fn printable(words: &str) -> String {
    const LONGEST: usize = 1000;
    let legal = |c: char| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c };
    words.chars().take(LONGEST).map(legal).collect()
}

/// Whether etcd's words mean that the token is no good (any more)
pub(super) fn refuses_token(message: &str) -> bool {
    // The second is said to older tokens (JWT) after any change of users.
    message.contains("invalid auth token") || message.contains("revision of auth store is old")
}

/// Whether etcd's words mean that there was no token and one is needed
pub(super) fn needs_login(message: &str) -> bool {
    message.contains("user name is empty")
}

/// Whether only a person can help
pub(super) fn is_refusal(status: &Status) -> bool {
    matches!(classify(status), Kind::Refused | Kind::Denied)
}

/// Codes say little here: a broken stream is `Unknown`, a timeout `Cancelled`. So all but a few blame the host.
fn classify(status: &Status) -> Kind {
    if let Some(refused) = status.source().and_then(|source| source.downcast_ref::<LoginRefused>()) {
        return Kind::Login(*refused);
    }
    match status.code() {
        Code::NotFound if status.message().contains("lease not found") => Kind::LeaseGone,
        Code::FailedPrecondition if status.message().contains("lease already exists") => Kind::LeasePresent,
        Code::OutOfRange if status.message().contains("compacted") => Kind::Compacted,
        // tonic's own word, not etcd's.
        Code::OutOfRange if status.message().contains("message length too large") => Kind::TooLarge,
        Code::OutOfRange | Code::ResourceExhausted | Code::NotFound => Kind::Other,
        Code::Unauthenticated | Code::InvalidArgument if refuses_token(status.message()) => Kind::Token,
        Code::PermissionDenied => Kind::Denied,
        Code::Unauthenticated | Code::InvalidArgument | Code::FailedPrecondition => Kind::Refused,
        _ => Kind::Host,
    }
}

fn describe(status: &Status) -> String {
    // A gRPC server of another kind says the first, an HTTP/2 server that speaks no gRPC the second.
    let foreign =
        status.code() == Code::Unimplemented || status.message().contains("grpc-status header missing");
    let hint = if foreign { "this is not an etcd: " } else { "" };
    let message = if status.message().is_empty() { status.code().description() } else { status.message() };
    format!("{hint}{message}")
}

#[cfg(test)]
impl RequestError {
    pub(crate) fn refused() -> Self {
        Self::of(Kind::Refused, &"h:1".parse().unwrap(), "refused")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(error: etcd_client::Error) -> Kind {
        RequestError::new(&"h:1".parse().unwrap(), &error).kind
    }

    #[test]
    fn what_etcd_says_decides_what_is_done() {
        for (status, expected) in [
            (Status::unavailable("etcdserver: no leader"), Kind::Host),
            (Status::unknown("h2 protocol error"), Kind::Host),
            (Status::cancelled("Timeout expired"), Kind::Host),
            (Status::unimplemented(""), Kind::Host),
            (Status::not_found("etcdserver: requested lease not found"), Kind::LeaseGone),
            (Status::failed_precondition("etcdserver: lease already exists"), Kind::LeasePresent),
            (Status::out_of_range("etcdserver: mvcc: required revision has been compacted"), Kind::Compacted),
            (
                Status::out_of_range("Error, decoded message length too large: found 5335051 bytes"),
                Kind::TooLarge,
            ),
            (Status::resource_exhausted("etcdserver: mvcc: database space exceeded"), Kind::Other),
            (Status::permission_denied("etcdserver: permission denied"), Kind::Denied),
            (Status::unauthenticated("etcdserver: invalid auth token"), Kind::Token),
            (Status::invalid_argument("etcdserver: revision of auth store is old"), Kind::Token),
            (Status::failed_precondition("etcdserver: authentication is not enabled"), Kind::Refused),
            (Status::invalid_argument("etcdserver: user name is empty"), Kind::Refused),
        ] {
            assert_eq!(kind(etcd_client::Error::GRpcStatus(status.clone())), expected, "{status}");
        }
        assert_eq!(kind(etcd_client::Error::LeaseKeepAliveError("lease not found".into())), Kind::LeaseGone);
        assert_eq!(kind(etcd_client::Error::LeaseKeepAliveError("channel closed".into())), Kind::Host);
    }

    #[test]
    fn a_canceled_watch_tells_compaction_from_refusal() {
        let canceled =
            |revision, reason| RequestError::canceled(&"h:1".parse().unwrap(), revision, reason).kind;
        assert_eq!(canceled(7, ""), Kind::Compacted);
        assert_eq!(
            canceled(0, "rpc error: code = PermissionDenied desc = etcdserver: permission denied"),
            Kind::Denied
        );
        assert_eq!(
            canceled(0, "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token"),
            Kind::Token
        );
        assert_eq!(canceled(0, "etcdserver: user name is empty"), Kind::Token);
        assert_eq!(canceled(0, "etcdserver: watcher was closed"), Kind::Other);
    }

    #[test]
    fn a_refused_login_is_told_by_its_source_through_the_stub() {
        let refused = LoginRefused { due: Instant::now() };
        let mut status = Status::invalid_argument("authentication failed");
        status.set_source(Arc::new(refused));
        let boxed: Box<dyn Error + Send + Sync> = Box::new(status);
        assert_eq!(kind(etcd_client::Error::GRpcStatus(Status::from_error(boxed))), Kind::Login(refused));
    }

    /// A status of whatever answers on the port was logged as it came
    #[test]
    fn what_a_peer_says_is_cut_and_has_no_control_characters() {
        let words = format!("\n2026-01-01 WARN forged \u{1b}[31m{}", "x".repeat(100_000));
        let host = "h:1".parse().unwrap();
        let said = etcd_client::Error::GRpcStatus(Status::unavailable(words.as_str()));
        for error in [RequestError::new(&host, &said), RequestError::canceled(&host, 0, &words)] {
            let shown = error.to_string();
            assert!(shown.contains("WARN forged") && !shown.chars().any(char::is_control), "{shown}");
            assert!(shown.len() < 2000, "{} bytes", shown.len());
        }
    }

    #[test]
    fn an_error_names_the_host_and_what_is_no_etcd() {
        let status = etcd_client::Error::GRpcStatus(Status::unimplemented(""));
        let error = RequestError::new(&"h:1".parse().unwrap(), &status).to_string();
        assert!(error.starts_with("etcd h:1: this is not an etcd"), "{error}");
    }
}
