//! The span of a call: one each, at DEBUG, and none where nobody asks for it

use std::{
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use callsign::{Channel, PinnedEndpoint, discover};
use callsign_tests::{
    channel::over,
    echo::{Chunk, echo_client::EchoClient},
    lines::ask_always,
    peers::Peer,
    scripted::Scripted,
    wait,
};
use tonic::{Code, Request, body::Body};
use tower::Service as _;
use tracing::{
    Event, Instrument as _, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Id, Record},
    subscriber::{DefaultGuard, Interest},
};

const SERVICE: &str = "hello.rpc";
const BOUND: Duration = Duration::from_secs(10);
const TARGET: &str = "callsign::call";

/// The spans of callsign that begin in this thread, until it is dropped
struct Spans {
    seen: Seen,
    _guard: DefaultGuard,
}

type Seen = Arc<Mutex<Vec<Span>>>;

#[derive(Clone, Debug)]
struct Span {
    name: &'static str,
    target: String,
    level: Level,
    /// In the order in which they were recorded
    fields: Fields,
    /// Messages of the events in it
    events: Vec<String>,
    /// That it was made in
    parent: Option<Id>,
    handles: usize,
}

#[derive(Clone, Debug, Default)]
struct Fields(Vec<(&'static str, String)>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.push((field.name(), value.to_owned()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push((field.name(), format!("{value:?}")));
    }
}

impl Span {
    fn all(&self, field: &str) -> Vec<&str> {
        self.fields.0.iter().filter(|(name, _)| *name == field).map(|(_, value)| value.as_str()).collect()
    }
}

impl Spans {
    /// Records from now on, this level and above
    fn record(level: Level) -> Self {
        ask_always();
        let seen = Seen::default();
        let guard = tracing::subscriber::set_default(Recorder {
            level,
            seen: seen.clone(),
            entered: Mutex::default(),
        });
        Self { seen, _guard: guard }
    }

    fn seen(&self) -> Vec<Span> {
        lock(&self.seen).clone()
    }

    /// The only span, which has ended
    fn one(&self) -> Span {
        let seen = self.seen();
        let [span] = seen.as_slice() else { panic!("one span: {seen:?}") };
        assert_eq!((span.name, span.target.as_str(), span.level), ("call", TARGET, Level::DEBUG));
        assert_eq!((span.all("service"), span.all("method")), (vec![SERVICE], vec!["/test.Echo/Unary"]));
        assert_eq!(span.handles, 0, "it has ended");
        span.clone()
    }
}

struct Recorder {
    level: Level,
    seen: Seen,
    /// The spans that this thread is in, the innermost last
    entered: Mutex<Vec<Id>>,
}

impl Recorder {
    fn change(&self, id: &Id, change: impl FnOnce(&mut Span)) {
        let position = usize::try_from(id.into_u64()).expect("a position") - 1;
        change(&mut lock(&self.seen)[position]);
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Subscriber for Recorder {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("callsign") && *metadata.level() <= self.level
    }

    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let metadata = attributes.metadata();
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let (name, target, level) = (metadata.name(), metadata.target().to_owned(), *metadata.level());
        let mut seen = lock(&self.seen);
        let parent = lock(&self.entered).last().filter(|_| attributes.is_contextual()).cloned();
        seen.push(Span { name, target, level, fields, events: Vec::new(), parent, handles: 1 });
        Id::from_u64(seen.len() as u64)
    }

    fn record(&self, id: &Id, record: &Record<'_>) {
        self.change(id, |span| record.record(&mut span.fields));
    }

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let message = fields.0.into_iter().find(|(name, _)| *name == "message");
        if let (Some(parent), Some((_, message))) = (event.parent(), message) {
            self.change(parent, |span| span.events.push(message));
        }
    }

    fn clone_span(&self, id: &Id) -> Id {
        self.change(id, |span| span.handles += 1);
        id.clone()
    }

    fn try_close(&self, id: Id) -> bool {
        self.change(&id, |span| span.handles -= 1);
        false
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, id: &Id) {
        lock(&self.entered).push(id.clone());
    }

    fn exit(&self, _: &Id) {
        lock(&self.entered).pop();
    }
}

fn client(addresses: impl IntoIterator<Item = callsign::Address>) -> EchoClient<Channel> {
    let addresses: Vec<_> = addresses.into_iter().collect();
    EchoClient::new(Channel::builder(discover::fixed(addresses)).name(SERVICE).build().expect("valid"))
}

#[tokio::test]
async fn a_call_has_one_span_that_says_what_was_called_where_and_how_it_ended() {
    let server = Scripted::serving().await;
    let spans = Spans::record(Level::DEBUG);
    client([server.address()]).unary(Chunk::default()).await.unwrap();
    let span = spans.one();
    assert_eq!(span.all("endpoint"), [server.address().to_string()]);
    assert_eq!(span.all("code"), ["OK"]);
}

#[tokio::test]
async fn a_call_that_is_sent_again_has_one_span_with_both_endpoints_and_the_reason_in_it() {
    let refusing = Scripted::refusing().await;
    let other = Scripted::serving().await;
    let mut client = client([refusing.address(), other.address()]);
    let mut pinned = Request::new(Chunk::default());
    pinned.extensions_mut().insert(PinnedEndpoint(other.address()));
    client.unary(pinned).await.unwrap();

    let spans = Spans::record(Level::DEBUG);
    // Whichever of the two is drawn: the refusing one refuses once.
    let refused = async {
        while refusing.record().calls().is_empty() {
            client.unary(Chunk::default()).await.unwrap();
        }
    };
    wait::within("a call is refused", BOUND, refused).await;
    let seen = spans.seen();
    let (last, others) = seen.split_last().expect("a call was made");
    let [refusing, other] = [refusing.address().to_string(), other.address().to_string()];
    assert!(others.iter().all(|span| span.all("endpoint") == [other.as_str()]), "{others:?}");
    assert_eq!(last.all("endpoint"), [refusing, other]);
    assert_eq!((last.all("code"), last.handles), (vec!["OK"], 0));
    assert_eq!(last.events, ["call not taken, sent again"]);
}

#[tokio::test]
async fn a_call_that_no_endpoint_takes_or_nobody_waits_for_says_so_in_its_span() {
    let peer = Peer::deaf();
    let spans = Spans::record(Level::DEBUG);
    let status = client([peer.address()]).unary(Chunk::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    let span = spans.one();
    assert_eq!((span.all("endpoint"), span.all("code")), (vec![], vec!["UNAVAILABLE"]));
    drop(spans);

    let silent = Scripted::start(|_, peer| async move {
        peer.settings(None).await;
        peer.closed().await;
    })
    .await;
    let spans = Spans::record(Level::DEBUG);
    let mut client = client([silent.address()]);
    let mut call = Box::pin(client.unary(Chunk::default()));
    let sent = silent.record().until(|calls| (!calls.is_empty()).then_some(()));
    tokio::select! {
        answer = &mut call => panic!("nobody answers: {answer:?}"),
        () = wait::within("the call is sent", BOUND, sent) => {}
    }
    drop(call);
    let span = spans.one();
    assert_eq!(span.all("endpoint"), [silent.address().to_string()]);
    assert_eq!(span.all("code"), ["CANCELLED"]);
}

#[tokio::test]
async fn a_calls_span_is_a_child_of_the_one_that_it_was_made_in_wherever_it_is_polled() {
    let server = Scripted::serving().await;
    let mut channel = over([server.address()]);
    let spans = Spans::record(Level::DEBUG);
    let making = tracing::info_span!(target: "callsign::test", "making");
    let polling = tracing::info_span!(target: "callsign::test", "polling");
    let request = http::Request::post("/test.Echo/Unary").body(Body::empty()).unwrap();
    let call = making.in_scope(|| channel.call(request));
    call.instrument(polling).await.unwrap();
    let call = spans.seen().into_iter().find(|span| span.target == TARGET).expect("a span of the call");
    assert_eq!(call.parent, making.id());
}

#[tokio::test]
async fn a_call_has_no_span_where_nobody_asks_for_debug() {
    let server = Scripted::serving().await;
    let spans = Spans::record(Level::INFO);
    EchoClient::new(over([server.address()])).unary(Chunk::default()).await.unwrap();
    assert!(spans.seen().is_empty(), "{:?}", spans.seen());
}
