//! Logging in: a name, a password, and the token that comes of them
//!
//! A simple token's TTL is refreshed only on the host where it is used, so each new host gets a token of its own. A refused
//! login stands for the whole session until it is due again: however many ask, etcd is asked once.

use std::{fmt, mem, sync::Arc, time::Duration};

use http::HeaderValue;
use tokio::{
    sync::watch,
    task::AbortHandle,
    time::{Instant, timeout_at},
};
use tonic::{Code, Status};

use super::{
    pace::REFUSED,
    request::{self, LoginRefused},
    state::Report,
    wire::{self, Bare},
};
use crate::instance::Address;

/// Between two logins of a session. Each costs etcd 60 ms of a core, for bcrypt.
const SPACING: Duration = Duration::from_secs(1);

/// A change of users refuses the tokens of all clients at once: their logins are spread over this time. Short enough for
/// a registration that leaves, whose requests have a second.
const SPREAD: Duration = Duration::from_millis(400);

/// How long a token that nobody waited for any more is kept for who comes back to its host: some rounds of a lane. A fifth
/// of the time for which etcd keeps one that is not used, unless told otherwise.
const KEPT: Duration = Duration::from_secs(60);

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

/// One session's logins: one a host at a time, one a second in all
///
/// A login goes on when those who wait for it give up and the lane moves: cancelled, it would cost a busy etcd the same, and
/// begun anew each time it would never be done. It ends with its connection, or with the session.
pub(super) struct Login {
    shared: Arc<Shared>,
}

struct Shared {
    credentials: Credentials,
    report: Arc<Report>,
    inner: watch::Sender<Inner>,
}

#[derive(Default)]
struct Inner {
    /// The latest
    token: Option<Token>,
    /// When the latest login was sent
    sent: Option<Instant>,
    /// When the next one may be, once one is wanted
    due: Option<Instant>,
    /// Why the latest login was refused, and until when nobody asks again
    refused: Option<(LoginRefused, Status)>,
    /// Logins that were ever begun
    begun: u64,
    /// At most one for each host
    asked: Vec<Asked>,
}

/// A login, until somebody has taken what came of it
struct Asked {
    number: u64,
    over: Bare,
    stage: Stage,
    task: Option<AbortHandle>,
}

enum Stage {
    Pending,
    Answered(Token),
    Failed(Status),
}

/// What somebody finds who needs a token
enum Found {
    Settled(Result<Token, Status>),
    Pending(u64),
    /// It has just been
    Begun(u64),
    /// The next login is sent then
    Early(Instant),
}

impl Login {
    pub(super) fn new(credentials: Credentials, report: Arc<Report>) -> Self {
        Self { shared: Arc::new(Shared { credentials, report, inner: watch::Sender::default() }) }
    }

    /// A token for a connection that has none yet, or whose last one was `refused`
    pub(super) async fn token(&self, bare: &Bare, refused: Option<u64>) -> Result<Token, Status> {
        let mut news = self.shared.inner.subscribe();
        let mut joined = None;
        loop {
            // What changes from here on is news, what changed before is found.
            news.mark_unchanged();
            match self.shared.change(|inner| inner.find(bare, refused, joined)) {
                Found::Settled(settled) => return settled,
                Found::Pending(number) => joined = Some(number),
                Found::Begun(number) => {
                    joined = Some(number);
                    self.shared.begin(number, bare);
                }
                Found::Early(due) => {
                    // Whoever waits has a timer of its own: one that is shared would end with the runtime of the first.
                    let _ = timeout_at(due, news.changed()).await;
                    continue;
                }
            }
            news.changed().await.map_err(|_| Status::cancelled("the session has ended"))?;
        }
    }
}

impl Drop for Login {
    fn drop(&mut self) {
        let asked = self.shared.change(|inner| mem::take(&mut inner.asked));
        asked.iter().filter_map(|asked| asked.task.as_ref()).for_each(AbortHandle::abort);
    }
}

impl Shared {
    /// Changes what nobody waits for
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut changed = None;
        self.inner.send_if_modified(|inner| {
            changed = Some(change(inner));
            false
        });
        changed.expect("it is called once")
    }

    fn begin(self: &Arc<Self>, number: u64, over: &Bare) {
        let asking = Asking {
            shared: Arc::clone(self),
            number,
            host: over.host().clone(),
            answer: Err(Status::unavailable("the runtime in which the login was sent has ended")),
        };
        // Not while `inner` is locked: a runtime that ends drops what it is given.
        let task = tokio::spawn(asking.run(over.clone())).abort_handle();
        self.change(|inner| {
            if let Some(asked) = inner.asked.iter_mut().find(|asked| asked.number == number) {
                asked.task = Some(task);
            }
        });
    }

    fn settle(&self, number: u64, host: &Address, answer: Result<Option<HeaderValue>, Status>) {
        // Reported under the lock, so that states are shown in the order in which they came.
        self.inner.send_modify(|inner| match answer {
            Ok(header) => {
                tracing::debug!(%host, authenticated = header.is_some(), "logged in to etcd");
                inner.on_answered(number, header);
                self.report.on_logged_in();
            }
            Err(status) if request::is_refusal(&status) => {
                let said = request::printable(status.message());
                inner.on_refused(number, &status);
                self.report.on_refused(&format!("etcd {host}: {said}"));
            }
            Err(status) => inner.on_failed(number, status),
        });
    }
}

impl Inner {
    fn find(&mut self, bare: &Bare, refused: Option<u64>, joined: Option<u64>) -> Found {
        let fresh = self.token.as_ref().filter(|token| token.is_fresh() && Some(token.number) != refused);
        if let Some(token) = fresh.cloned() {
            self.asked.retain(|asked| !asked.has_given(token.number));
            return Found::Settled(Ok(token));
        }
        if let Some((until, status)) = &self.refused
            && Instant::now() < until.due
        {
            return Found::Settled(Err(status.clone()));
        }
        if let Some(position) = self.asked.iter().position(|asked| asked.over.host() == bare.host()) {
            let asked = &self.asked[position];
            match &asked.stage {
                Stage::Pending => return Found::Pending(asked.number),
                Stage::Failed(status) if joined == Some(asked.number) && asked.over.is_same(bare) => {
                    return Found::Settled(Err(status.clone()));
                }
                // With a connection that was left and lost, its login was.
                Stage::Failed(_) => {}
                Stage::Answered(token) => {
                    let token = token.clone();
                    let good = token.obtained.elapsed() < KEPT;
                    if good && refused.is_none_or(|refused| token.number > refused) {
                        self.asked.swap_remove(position);
                        return Found::Settled(Ok(token));
                    }
                }
            }
            self.asked.swap_remove(position);
        }
        self.begin(bare, refused.is_some())
    }

    fn begin(&mut self, bare: &Bare, after_refusal: bool) -> Found {
        let now = Instant::now();
        let due = *self.due.get_or_insert_with(|| {
            let spread = if after_refusal { SPREAD.mul_f64(fastrand::f64()) } else { Duration::ZERO };
            self.sent.map_or(now, |last| now.max(last + SPACING)) + spread
        });
        if now < due {
            return Found::Early(due);
        }
        (self.sent, self.due, self.begun) = (Some(now), None, self.begun + 1);
        self.asked.push(Asked { number: self.begun, over: bare.clone(), stage: Stage::Pending, task: None });
        Found::Begun(self.begun)
    }

    fn on_answered(&mut self, number: u64, header: Option<HeaderValue>) {
        let next = self.token.as_ref().map_or(0, |token| token.number) + 1;
        let token = Token { number: next, header, obtained: Instant::now() };
        (self.token, self.refused) = (Some(token.clone()), None);
        self.on_settled(number, Stage::Answered(token));
    }

    fn on_refused(&mut self, number: u64, status: &Status) {
        let refused = LoginRefused { due: Instant::now() + REFUSED };
        let said = format!("the login was refused: {}", status.message());
        let mut status = Status::new(status.code(), said);
        status.set_source(Arc::new(refused));
        self.refused = Some((refused, status));
        self.asked.retain(|asked| asked.number != number);
    }

    fn on_failed(&mut self, number: u64, status: Status) {
        self.on_settled(number, Stage::Failed(status));
    }

    fn on_settled(&mut self, number: u64, stage: Stage) {
        if let Some(asked) = self.asked.iter_mut().find(|asked| asked.number == number) {
            asked.stage = stage;
        }
    }
}

impl Asked {
    fn has_given(&self, token: u64) -> bool {
        matches!(&self.stage, Stage::Answered(given) if given.number == token)
    }
}

/// A login under way; settled by its drop, whatever ends it
struct Asking {
    shared: Arc<Shared>,
    number: u64,
    host: Address,
    answer: Result<Option<HeaderValue>, Status>,
}

impl Asking {
    async fn run(mut self, over: Bare) {
        self.answer = authenticate(over, &self.shared.credentials).await;
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        let answer = mem::replace(&mut self.answer, Ok(None));
        self.shared.settle(self.number, &self.host, answer);
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
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use etcd_client::Client;
    use tokio::{
        net::TcpListener,
        task::{AbortHandle, JoinSet},
        time::timeout,
    };

    use super::*;
    use crate::{
        connection::Transport,
        etcd::{
            lane::{Cluster, Lane},
            request::RequestError,
        },
    };

    /// A host of which nothing is known but how it answers logins: when it is let
    struct Host {
        address: Address,
        logins: Arc<AtomicUsize>,
        lets: watch::Sender<bool>,
        connections: Arc<Mutex<Vec<AbortHandle>>>,
        _serving: JoinSet<()>,
    }

    impl Host {
        async fn start() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().into();
            let (logins, connections) = (Arc::default(), Arc::<Mutex<Vec<_>>>::default());
            let (lets, letting) = watch::channel(false);
            let (counted, seen) = (Arc::clone(&logins), Arc::clone(&connections));
            let mut serving = JoinSet::new();
            serving.spawn(async move {
                let mut all = JoinSet::new();
                while let Ok((tcp, _)) = listener.accept().await {
                    let served = all.spawn(serve(tcp, Arc::clone(&counted), letting.clone()));
                    seen.lock().unwrap().push(served);
                }
            });
            Self { address, logins, lets, connections, _serving: serving }
        }

        fn logins(&self) -> usize {
            self.logins.load(Ordering::Relaxed)
        }

        fn connections(&self) -> Vec<AbortHandle> {
            self.connections.lock().unwrap().clone()
        }

        async fn until_asked(&self, logins: usize) {
            until(|| self.logins() >= logins).await;
        }
    }

    async fn until(condition: impl Fn() -> bool) {
        let met = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(5), met).await.expect("it comes to be so");
    }

    async fn serve(tcp: tokio::net::TcpStream, logins: Arc<AtomicUsize>, lets: watch::Receiver<bool>) {
        let Ok(mut h2) = h2::server::handshake(tcp).await else { return };
        let mut calls = JoinSet::new();
        while let Some(Ok((request, mut respond))) = h2.accept().await {
            let is_login = request.uri().path().ends_with("/Authenticate");
            logins.fetch_add(usize::from(is_login), Ordering::Relaxed);
            let mut lets = lets.clone();
            calls.spawn(async move {
                if is_login && lets.wait_for(|lets| *lets).await.is_err() {
                    return;
                }
                // An AuthenticateResponse has its token in field 2; the other calls' answers are empty.
                let message: &[u8] = if is_login { b"\0\0\0\0\x03\x12\x01t" } else { &[0; 5] };
                let head = http::Response::builder().header("content-type", "application/grpc");
                let mut body = respond.send_response(head.body(()).unwrap(), false).unwrap();
                body.send_data(bytes::Bytes::from_static(message), false).unwrap();
                let ok = [(http::HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))];
                // Who has gone needs no answer.
                let _ = body.send_trailers(ok.into_iter().collect());
            });
        }
    }

    fn lane(hosts: &[&Host]) -> Lane {
        let credentials = Credentials { name: Secret::new("root"), password: Secret::new("root") };
        let login = Some(Arc::new(Login::new(credentials, Arc::new(Report::new()))));
        let hosts = hosts.iter().map(|host| host.address.clone()).collect();
        Lane::new(Arc::new(Cluster { hosts, login, transport: Transport::Plain }), None)
    }

    async fn ask(lane: &Lane, limit: Duration) -> Result<(), RequestError> {
        let status = |client: Client| async move { client.maintenance_client().status().await.map(drop) };
        lane.request(limit, status).await
    }

    const SHORT: Duration = Duration::from_millis(300);
    const LONG: Duration = Duration::from_secs(5);

    /// It was dropped when the lane moved, and another one sent to the next host, for ever
    #[tokio::test]
    async fn a_login_that_takes_longer_than_a_request_is_sent_once_to_each_host_and_used() {
        let hosts = [Host::start().await, Host::start().await];
        let lane = lane(&[&hosts[0], &hosts[1]]);
        for _ in 0..10 {
            ask(&lane, SHORT).await.unwrap_err();
        }
        assert_eq!(hosts.each_ref().map(Host::logins), [1, 1]);
        // Nobody waits when the answers come, nor for a while.
        for host in &hosts {
            host.lets.send_replace(true);
        }
        tokio::time::sleep(2 * SPACING).await;
        ask(&lane, SHORT).await.unwrap();
        assert_eq!(hosts.each_ref().map(Host::logins), [1, 1]);
    }

    /// When those who wait gave up it counted as never sent, and the next host was asked at once
    #[tokio::test]
    async fn logins_that_nobody_waits_for_any_more_keep_their_distance_too() {
        let hosts = [Host::start().await, Host::start().await];
        let lane = lane(&[&hosts[0], &hosts[1]]);
        let begun = Instant::now();
        while hosts.iter().any(|host| host.logins() == 0) {
            ask(&lane, SHORT).await.unwrap_err();
        }
        assert!(begun.elapsed() >= SPACING);
    }

    /// The new connection failed with the old one's login
    #[tokio::test]
    async fn a_login_is_lost_with_its_connection_and_begun_anew_over_the_next() {
        let host = Host::start().await;
        let lane = lane(&[&host]);
        ask(&lane, SHORT).await.unwrap_err();
        let losing = async {
            until(|| host.connections().len() == 2).await;
            assert_eq!(host.logins(), 1, "that one is waited for");
            host.connections()[0].abort();
            host.until_asked(2).await;
            host.lets.send_replace(true);
        };
        let (asked, ()) = tokio::join!(ask(&lane, LONG), losing);
        asked.unwrap();
    }

    /// It kept its stream, and the stream the connection, until somebody asked
    #[tokio::test]
    async fn a_connection_that_was_left_closes_when_its_login_is_answered() {
        let host = Host::start().await;
        let lane = lane(&[&host]);
        ask(&lane, SHORT).await.unwrap_err();
        let former = host.connections().remove(0);
        assert!(!former.is_finished(), "a login is under way");
        host.lets.send_replace(true);
        until(|| former.is_finished()).await;
        ask(&lane, SHORT).await.unwrap();
        assert_eq!(host.logins(), 1, "and its token is used over the next");
    }

    #[tokio::test]
    async fn a_login_ends_with_its_session() {
        let host = Host::start().await;
        let lane = lane(&[&host]);
        ask(&lane, SHORT).await.unwrap_err();
        drop(lane);
        let former = host.connections().remove(0);
        until(|| former.is_finished()).await;
    }

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
