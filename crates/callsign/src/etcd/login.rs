//! Logging in: a name, a password, and the token that comes of them
//!
//! A simple token's TTL is refreshed only on the host where it is used, so each new host gets a token of its own. A refused
//! login stands for the whole session until it is due again: however many ask, etcd is asked once.

use std::{fmt, future::Future, pin::Pin, sync::Arc, time::Duration};

use http::HeaderValue;
use tokio::{
    sync::Mutex,
    time::{Instant, sleep_until},
};
use tonic::{Code, Status};

use super::{
    pace::REFUSED,
    request::{self, LoginRefused},
    state::Report,
    wire::{self, Bare},
};

/// Between two logins of a session. Each costs etcd 60 ms of a core, for bcrypt.
const SPACING: Duration = Duration::from_secs(1);

/// A change of users refuses the tokens of all clients at once: their logins are spread over this time. Short enough for
/// a registration that leaves, whose requests have a second.
const SPREAD: Duration = Duration::from_millis(400);

/// A text that is never shown
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(Arc<str>);

impl Secret {
    pub(super) fn new(text: &str) -> Self {
        Self(text.into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Who logs in
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    pub(super) name: Secret,
    pub(super) password: Secret,
}

/// What requests carry once a login has succeeded; cheap to clone
#[derive(Clone)]
pub(super) struct Token {
    /// Each login's token has its own
    pub(super) number: u64,
    /// `None`: etcd has said that it wants no login
    pub(super) header: Option<HeaderValue>,
    obtained: Instant,
}

impl Token {
    /// Whether it was obtained a moment ago: good on every host, and not to be doubted
    pub(super) fn is_fresh(&self) -> bool {
        self.obtained.elapsed() < SPACING
    }

    /// Whether `answer` says that this token is no good, or that one is needed after all
    pub(super) fn is_refused_by(&self, answer: &http::HeaderMap) -> bool {
        let Some(status) = Status::from_header_map(answer) else { return false };
        request::refuses_token(status.message())
            || self.header.is_none() && request::needs_login(status.message())
    }
}

/// One session's logins, one at a time
pub(super) struct Login {
    credentials: Credentials,
    report: Arc<Report>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The latest
    token: Option<Token>,
    /// When the latest login was sent
    sent: Option<Instant>,
    /// Why the latest login was refused, and until when nobody asks again
    refused: Option<(LoginRefused, Status)>,
    /// A login under way; kept when those who wait for it give up, since a busy etcd would never be done with it
    pending: Option<Pending>,
}

struct Pending {
    bare: Bare,
    /// When it is to be sent. No timer is kept: it would panic once the runtime of the first who waited has ended
    at: Instant,
    answer: Pin<Box<dyn Future<Output = Result<Option<HeaderValue>, Status>> + Send>>,
}

impl Login {
    pub(super) fn new(credentials: Credentials, report: Arc<Report>) -> Self {
        Self { credentials, report, inner: Mutex::default() }
    }

    /// A token for a connection that has none yet, or whose last one was `refused`
    pub(super) async fn token(&self, bare: &Bare, refused: Option<u64>) -> Result<Token, Status> {
        let mut inner = self.inner.lock().await;
        let fresh = inner.token.as_ref().filter(|token| token.is_fresh() && Some(token.number) != refused);
        if let Some(token) = fresh {
            return Ok(token.clone());
        }
        if let Some((until, status)) = &inner.refused
            && Instant::now() < until.due
        {
            return Err(status.clone());
        }
        if inner.pending.as_ref().is_none_or(|pending| pending.bare.host() != bare.host()) {
            inner.pending = Some(self.begin(bare, inner.sent, refused.is_some()));
        }
        let Inner { pending, sent, .. } = &mut *inner;
        let answer = match pending {
            Some(pending) => {
                sleep_until(pending.at).await;
                pending.answer.as_mut().await
            }
            None => unreachable!("it was begun above"),
        };
        (*pending, *sent) = (None, Some(Instant::now()));
        self.settle(&mut inner, bare, answer)
    }

    fn begin(&self, bare: &Bare, last: Option<Instant>, after_refusal: bool) -> Pending {
        let spread = if after_refusal { SPREAD.mul_f64(fastrand::f64()) } else { Duration::ZERO };
        let now = Instant::now();
        let at = last.map_or(now, |last| now.max(last + SPACING)) + spread;
        let (credentials, over) = (self.credentials.clone(), bare.clone());
        let answer = Box::pin(async move { authenticate(over, &credentials).await });
        Pending { bare: bare.clone(), at, answer }
    }

    fn settle(
        &self,
        inner: &mut Inner,
        bare: &Bare,
        answer: Result<Option<HeaderValue>, Status>,
    ) -> Result<Token, Status> {
        match answer {
            Ok(header) => {
                let number = inner.token.as_ref().map_or(0, |token| token.number) + 1;
                tracing::debug!(host = %bare.host(), authenticated = header.is_some(), "logged in to etcd");
                let token = Token { number, header, obtained: Instant::now() };
                (inner.token, inner.refused) = (Some(token.clone()), None);
                Ok(token)
            }
            Err(status) if request::is_refusal(&status) => {
                let refused = LoginRefused { due: Instant::now() + REFUSED };
                let mut status =
                    Status::new(status.code(), format!("the login was refused: {}", status.message()));
                status.set_source(Arc::new(refused));
                let said = request::printable(status.message());
                self.report.on_refused(&format!("etcd {}: {said}", bare.host()));
                inner.refused = Some((refused, status.clone()));
                Err(status)
            }
            Err(status) => Err(status),
        }
    }
}

/// Asks for a token; `None` where etcd has authentication disabled
async fn authenticate(bare: Bare, credentials: &Credentials) -> Result<Option<HeaderValue>, Status> {
    let client = wire::client_over(move |request| {
        let bare = bare.clone();
        async move { bare.call(request).await }
    });
    let Credentials { name, password } = credentials;
    match client.auth_client().authenticate(name.0.to_string(), password.0.to_string()).await {
        Ok(answer) => {
            let mut token = HeaderValue::try_from(answer.token())
                .map_err(|_| Status::internal("etcd gave a token that no header can hold"))?;
            token.set_sensitive(true);
            Ok(Some(token))
        }
        Err(etcd_client::Error::GRpcStatus(status)) if is_disabled(&status) => Ok(None),
        Err(etcd_client::Error::GRpcStatus(status)) => Err(status),
        Err(error) => Err(Status::unknown(error.to_string())),
    }
}

fn is_disabled(status: &Status) -> bool {
    status.code() == Code::FailedPrecondition && status.message().contains("authentication is not enabled")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_not_shown() {
        let credentials = Credentials { name: Secret::new("root"), password: Secret::new("s3cret") };
        let shown = format!("{credentials:?}");
        assert!(!shown.contains("s3cret") && !shown.contains("root") && shown.contains("***"), "{shown}");
    }

    #[test]
    fn a_token_is_refused_by_what_etcd_says_of_it() {
        let token = |header| Token { number: 1, header, obtained: Instant::now() };
        let (some, none) = (token(Some(HeaderValue::from_static("t"))), token(None));
        let says = |message: &str| Status::unauthenticated(message).into_http::<()>().into_parts().0.headers;
        assert!(some.is_refused_by(&says("etcdserver: invalid auth token")));
        assert!(some.is_refused_by(&says("etcdserver: revision of auth store is old")));
        assert!(!some.is_refused_by(&says("etcdserver: permission denied")));
        assert!(
            !some.is_refused_by(&says("etcdserver: user name is empty")),
            "it knows nothing of the token"
        );
        assert!(none.is_refused_by(&says("etcdserver: user name is empty")));
        assert!(!none.is_refused_by(&http::HeaderMap::new()), "an answer is no refusal");
    }
}
