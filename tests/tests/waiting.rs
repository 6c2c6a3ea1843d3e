//! Calls that wait for room: none sleeps beside a free endpoint, and none spins

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU8, Ordering::Relaxed},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use callsign::{
    Address, Channel, EndpointState, HashKey, PinnedEndpoint,
    discover::fixed,
    policy::{Candidate, LeastRequest, Pick, Policy},
};
use callsign_tests::{
    channel::{over, until_ready},
    echo::{Chunk, echo_client::EchoClient},
    scripted::{Scripted, code},
    service::Local,
    wait,
};
use tokio::task::JoinHandle;
use tonic::{Code, Request, Status};

/// For what should take no time
const BOUND: Duration = Duration::from_secs(10);
/// Of calls that nobody answers
const DEADLINE: Duration = Duration::from_millis(300);

/// What a server does with its calls from now on
#[derive(Clone, Default)]
struct Manner(Arc<AtomicU8>);

const ANSWER: u8 = 0;
const FAIL: u8 = 1;
/// More than that: answers so many more, and then holds
const HOLD: u8 = 2;

impl Manner {
    fn turn(&self, manner: u8) {
        self.0.store(manner, Relaxed);
    }

    /// What to do with a call, and one less is to be answered
    fn next(&self) -> u8 {
        let manner = self.0.load(Relaxed);
        if manner > HOLD {
            self.turn(manner - 1);
            return ANSWER;
        }
        manner
    }
}

/// A server that allows so many streams, and does with its calls as it is told
async fn server(streams: Option<u32>) -> (Scripted, Manner) {
    let manner = Manner::default();
    let told = manner.clone();
    let server = Scripted::start(move |_, peer| {
        let manner = told.clone();
        async move {
            peer.settings(streams).await;
            for nth in 0.. {
                let stream = peer.headers(nth).await;
                peer.end(stream).await;
                match manner.next() {
                    ANSWER => peer.respond(stream).await,
                    FAIL => peer.reset(stream, code::INTERNAL_ERROR).await,
                    _ => {}
                }
            }
        }
    })
    .await;
    (server, manner)
}

fn request<T: Clone + Send + Sync + 'static>(name: &'static str, option: T) -> Request<Chunk> {
    let mut request = Request::new(Chunk { payload: name.into(), rest_ms: 0 });
    request.extensions_mut().insert(option);
    request
}

type Outcome = Result<(), Status>;
type Sending = Pin<Box<dyn Future<Output = Outcome> + Send>>;

/// A call to whichever endpoint the policy picks
fn call(channel: &Channel, name: &'static str) -> Sending {
    send(channel, request(name, ()))
}

/// A call to one endpoint
fn pinned(channel: &Channel, name: &'static str, to: &Address) -> Sending {
    send(channel, request(name, PinnedEndpoint(to.clone())))
}

fn send(channel: &Channel, request: Request<Chunk>) -> Sending {
    let mut client = EchoClient::new(channel.clone());
    Box::pin(async move { client.unary(request).await.map(drop) })
}

/// A server that takes one call at a time, and answers none
async fn holding() -> Scripted {
    let (server, manner) = server(Some(1)).await;
    manner.turn(HOLD);
    server
}

/// A call that a server has, and holds
async fn held(channel: &Channel, by: &Scripted) -> JoinHandle<Outcome> {
    let call = tokio::spawn(pinned(channel, "held", &by.address()));
    wait::within("a call that is held", BOUND, sent(by, "held")).await;
    call
}

/// Waits until a server has a call
async fn sent(to: &Scripted, name: &str) {
    to.record().until(|calls| calls.iter().any(|call| call.is_call(name) && call.ended).then_some(())).await;
}

/// Has an endpoint fail beside one that does not, until it is ejected, and then until it is on trial
async fn put_on_trial(channel: &Channel, failing: &Address, manner: &Manner, other: &Address) {
    let ejected = || {
        let infos = channel.endpoints();
        let info = infos.into_iter().find(|info| info.address == *failing);
        info.expect("it is known").ejected
    };
    manner.turn(FAIL);
    let began = Instant::now();
    while ejected().is_none() {
        pinned(channel, "failing", failing).await.expect_err("it fails");
        pinned(channel, "fine", other).await.expect("the other is fine");
        assert!(began.elapsed() < BOUND, "it is not ejected");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    wait::until("it is on trial", BOUND, || ejected().is_none().then_some(())).await;
}

/// Runs a test on a runtime of one thread, and fails if that stands still
fn on_one_thread<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let (done, told) = mpsc::channel::<Infallible>();
    let running = thread::spawn(move || {
        let _done = done;
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        runtime.enable_all().build().expect("a runtime").block_on(test());
    });
    let stood_still = told.recv_timeout(3 * BOUND) == Err(mpsc::RecvTimeoutError::Timeout);
    assert!(!stood_still, "the runtime stands still");
    running.join().expect("the test passes");
}

#[test]
fn pinned_calls_go_to_an_endpoint_on_trial_however_many_wait_there() {
    on_one_thread(|| async {
        let ((failing, manner), (other, _)) = (server(None).await, server(None).await);
        let channel = over([failing.address(), other.address()]);
        until_ready(&channel, 2).await;
        put_on_trial(&channel, &failing.address(), &manner, &other.address()).await;
        manner.turn(HOLD);
        let held = || tokio::time::timeout(DEADLINE, pinned(&channel, "held", &failing.address()));
        let (one, two) = tokio::join!(held(), held());
        assert!(one.is_err() && two.is_err(), "{one:?} {two:?}");
        assert_eq!(failing.record().times_sent("held"), 2);
    });
}

/// Picks one endpoint whatever [`Pick::allows`] says
struct Stubborn(Address);

impl Policy for Stubborn {
    type Plan = ();

    fn plan(&self, _: &[Candidate]) {}

    fn pick(&self, (): &(), candidates: &[Candidate], _: &mut Pick<'_>) -> Option<usize> {
        candidates.iter().position(|candidate| candidate.name() == self.0.authority())
    }
}

#[test]
fn a_policy_that_asks_nobody_gets_one_call_at_a_time_to_an_endpoint_on_trial() {
    on_one_thread(|| async {
        let ((failing, manner), (other, _)) = (server(None).await, server(None).await);
        let builder = Channel::builder(fixed([failing.address(), other.address()]));
        let channel = builder.policy(Stubborn(failing.address())).build().unwrap();
        until_ready(&channel, 2).await;
        put_on_trial(&channel, &failing.address(), &manner, &other.address()).await;
        manner.turn(HOLD);
        let held = || async {
            let mut request = request("held", ());
            request.set_timeout(DEADLINE);
            send(&channel, request).await.unwrap_err().code()
        };
        assert_eq!(tokio::join!(held(), held()), (Code::DeadlineExceeded, Code::DeadlineExceeded));
        assert_eq!(failing.record().times_sent("held"), 1);
    });
}

#[tokio::test]
async fn a_passed_trial_wakes_all_who_wait_for_room() {
    let ((failing, manner), (full, holding)) = (server(None).await, server(Some(1)).await);
    let channel = over([failing.address(), full.address()]);
    until_ready(&channel, 2).await;
    put_on_trial(&channel, &failing.address(), &manner, &full.address()).await;
    holding.turn(HOLD);
    let holder = held(&channel, &full).await;
    // Three pass the trial; all others are let in then.
    manner.turn(HOLD + 3);
    let calls: Vec<_> = (0..8).map(|_| tokio::spawn(call(&channel, "many"))).collect();
    let all = || (failing.record().times_sent("many") == 8).then_some(());
    wait::until("all calls are sent", BOUND, all).await;
    calls.iter().for_each(JoinHandle::abort);
    holder.abort();
}

#[tokio::test]
async fn a_stream_given_back_wakes_who_can_use_it_though_another_waits_longer_for_another_endpoint() {
    let (one, other) = (holding().await, holding().await);
    let channel = over([one.address(), other.address()]);
    until_ready(&channel, 2).await;
    let taken = [held(&channel, &one).await, held(&channel, &other).await];
    let mut first = pinned(&channel, "first", &other.address());
    wait::assert_waits("a call to a full endpoint", &mut first);
    let mut second = call(&channel, "second");
    wait::assert_waits("a call to full endpoints", &mut second);
    taken[0].abort();
    let second = tokio::spawn(second);
    wait::within("the call that may use the stream", BOUND, sent(&one, "second")).await;
    second.abort();
    taken[1].abort();
}

/// Keeps calls off one endpoint, as policies may for reasons of their own
struct Averse(Address);

impl Policy for Averse {
    type Plan = ();

    fn plan(&self, _: &[Candidate]) {}

    fn pick(&self, (): &(), candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        let may = |candidate: &Candidate| call.key.is_none() || candidate.name() != self.0.authority();
        candidates.iter().position(|candidate| call.allows(candidate) && may(candidate))
    }
}

#[tokio::test]
async fn a_stream_given_back_wakes_who_can_use_it_though_the_policy_keeps_another_from_it() {
    let (one, other) = (holding().await, holding().await);
    let builder = Channel::builder(fixed([one.address(), other.address()]));
    let channel = builder.policy(Averse(one.address())).build().unwrap();
    until_ready(&channel, 2).await;
    let taken = [held(&channel, &one).await, held(&channel, &other).await];
    let mut first = send(&channel, request("first", HashKey::new("key")));
    wait::assert_waits("a call that the policy sends elsewhere", &mut first);
    let first = tokio::spawn(first);
    let mut second = call(&channel, "second");
    wait::assert_waits("a call to full endpoints", &mut second);
    taken[0].abort();
    let second = tokio::spawn(second);
    wait::within("the call that may use the stream", BOUND, sent(&one, "second")).await;
    first.abort();
    second.abort();
    taken[1].abort();
}

/// Looks at its channel when it plans
struct Curious(Arc<OnceLock<Channel>>);

impl Policy for Curious {
    type Plan = <LeastRequest as Policy>::Plan;

    fn plan(&self, candidates: &[Candidate]) -> Self::Plan {
        let ready = |channel: &Channel| {
            let infos = channel.endpoints();
            infos.iter().filter(|info| info.state == EndpointState::Ready).count()
        };
        assert!(self.0.get().is_none_or(|channel| ready(channel) >= candidates.len()));
        LeastRequest::new().plan(candidates)
    }

    fn pick(&self, plan: &Self::Plan, candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        LeastRequest::new().pick(plan, candidates, call)
    }
}

#[test]
fn a_plan_may_look_at_the_channel_that_asks() {
    on_one_thread(|| async {
        let server = Local::start().await;
        let known = Arc::new(OnceLock::new());
        let channel = Channel::builder(fixed([server.address()])).policy(Curious(known.clone()));
        let channel = channel.build().unwrap();
        assert!(known.set(channel.clone()).is_ok());
        let outcome = wait::within("a call", BOUND, call(&channel, "any")).await;
        outcome.unwrap();
    });
}
