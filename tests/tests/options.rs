//! What a caller asks for one call: a key to hash, an endpoint to go to, one not to go to

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use callsign::{
    Address, Channel, EndpointAddress, EndpointInfo, EndpointState, ExcludedEndpoint, HashKey,
    PinnedEndpoint, WaitForReady,
    channel::ChannelBuilder,
    discover::{self, Fixed},
    policy::{Candidate, LeastRequest, Pick, PickFirst, Policy, RingHash},
};
use callsign_tests::{
    bare::{Answer, Bare, headers},
    channel::{changing, over, until_ready},
    echo::{Chunk, echo_client::EchoClient},
    peers::Peer,
    scripted::Scripted,
    wait,
};
use tonic::{Code, Request, Response, Status};

/// For what should take no time
const BOUND: Duration = Duration::from_secs(10);
/// Not the default, so that it cannot be taken for that
const PICKING: Duration = Duration::from_millis(300);

fn builder(addresses: impl IntoIterator<Item = Address>) -> ChannelBuilder<Fixed> {
    Channel::builder(discover::fixed(addresses)).pick_timeout(PICKING).name("hello.rpc")
}

/// Waits until these servers are ready, by a call that is pinned to each
async fn ready(channel: &Channel, servers: &[&Scripted]) {
    for server in servers {
        // It may take longer to connect than a pick may take.
        let is = |one: &EndpointInfo| one.address == server.address() && one.state == EndpointState::Ready;
        wait::until("it is ready", BOUND, || channel.endpoints().iter().any(is).then_some(())).await;
        let pinned = call(channel, PinnedEndpoint(server.address()));
        wait::within("a pinned call", BOUND, pinned).await.expect("it is answered");
    }
}

/// A call with one option
async fn call<T>(channel: &Channel, option: T) -> Result<Response<Chunk>, Status>
where
    T: Clone + Send + Sync + 'static,
{
    let mut request = Request::new(Chunk { payload: "asked".into(), rest_ms: 0 });
    request.extensions_mut().insert(option);
    EchoClient::new(channel.clone()).unary(request).await
}

fn who(response: &Response<Chunk>) -> &Address {
    &response.extensions().get::<EndpointAddress>().expect("every response has one").0
}

/// Says why a call failed that no endpoint took, after the pick timeout
async fn unavailable<T>(channel: &Channel, option: T) -> String
where
    T: Clone + Send + Sync + 'static,
{
    let (outcome, took) = wait::timed(call(channel, option)).await;
    let status = outcome.expect_err("no endpoint takes it");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!((PICKING..BOUND).contains(&took), "{took:?}");
    assert!(status.message().starts_with("hello.rpc: "), "{status:?}");
    status.message().to_owned()
}

#[tokio::test]
async fn a_pinned_call_goes_to_its_endpoint_whatever_the_policy_is() {
    let servers = [Scripted::serving().await, Scripted::serving().await, Scripted::serving().await];
    let channel = builder(servers.iter().map(Scripted::address)).policy(PickFirst::new()).build().unwrap();
    until_ready(&channel, 3).await;
    for server in &servers {
        for _ in 0..5 {
            let response = call(&channel, PinnedEndpoint(server.address())).await.unwrap();
            assert_eq!(*who(&response), server.address());
        }
    }
}

#[tokio::test]
async fn a_pinned_call_that_was_refused_is_sent_to_the_same_endpoint_again() {
    let (refusing, other) = (Scripted::refusing().await, Scripted::serving().await);
    let channel = over([refusing.address(), other.address()]);
    ready(&channel, &[&other]).await;
    let response = call(&channel, PinnedEndpoint(refusing.address())).await.unwrap();
    assert_eq!(*who(&response), refusing.address());
    assert_eq!((refusing.record().times_sent("asked"), other.record().times_sent("asked")), (2, 1));
}

#[tokio::test]
async fn a_call_pinned_to_an_endpoint_that_is_not_ready_says_where_that_stands() {
    let (deaf, other) = (Peer::deaf(), Scripted::serving().await);
    let channel = builder([deaf.address(), other.address()]).build().unwrap();
    ready(&channel, &[&other]).await;
    let message = unavailable(&channel, PinnedEndpoint(deaf.address())).await;
    for part in ["pinned", &deaf.address().to_string(), "in backoff", "refused"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!message.contains(&other.address().to_string()), "{message}");
}

#[tokio::test]
async fn a_call_pinned_to_an_address_that_is_no_endpoint_says_so() {
    let server = Scripted::serving().await;
    let channel = builder([server.address()]).build().unwrap();
    let message = unavailable(&channel, PinnedEndpoint("127.0.0.1:1".parse().unwrap())).await;
    assert!(message.contains("pinned to 127.0.0.1:1, which is no endpoint of this channel"), "{message}");
}

#[tokio::test]
async fn a_call_pinned_and_excluded_at_once_says_so() {
    let server = Scripted::serving().await;
    let channel = builder([server.address()]).build().unwrap();
    let mut request = Request::new(Chunk::default());
    request.extensions_mut().insert(PinnedEndpoint(server.address()));
    request.extensions_mut().insert(ExcludedEndpoint(server.address()));
    let status = EchoClient::new(channel).unary(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("and excludes it"), "{status:?}");
}

#[tokio::test]
async fn a_call_waits_for_the_endpoint_that_it_is_pinned_to() {
    let (first, later) = (Scripted::serving().await, Scripted::serving().await);
    let (channel, _log, changes) = changing(|builder| builder);
    changes.insert(first.address());
    ready(&channel, &[&first]).await;
    let mut request = Request::new(Chunk::default());
    request.extensions_mut().insert(PinnedEndpoint(later.address()));
    request.extensions_mut().insert(WaitForReady);
    let mut client = EchoClient::new(channel);
    let mut pinned = Box::pin(client.unary(request));
    wait::assert_waits("a call to an endpoint that is not known", &mut pinned);
    changes.insert(later.address());
    let response = wait::within("the pinned call", BOUND, pinned).await.unwrap();
    assert_eq!(*who(&response), later.address());
}

#[tokio::test]
async fn a_call_never_goes_to_the_endpoint_that_it_excludes() {
    let (one, other) = (Scripted::serving().await, Scripted::serving().await);
    let channel = builder([one.address(), other.address()]).build().unwrap();
    ready(&channel, &[&one, &other]).await;
    for _ in 0..20 {
        let response = call(&channel, ExcludedEndpoint(one.address())).await.unwrap();
        assert_eq!(*who(&response), other.address());
    }
}

#[tokio::test]
async fn a_call_that_excludes_the_only_endpoint_waits_and_says_so() {
    let server = Scripted::serving().await;
    let channel = builder([server.address()]).build().unwrap();
    ready(&channel, &[&server]).await;
    let message = unavailable(&channel, ExcludedEndpoint(server.address())).await;
    assert!(message.contains(&format!("the call excludes {}", server.address())), "{message}");
    assert_eq!(server.record().calls().len(), 1, "the call that asked whether it is ready");

    // With another one that cannot have it, that one is named, too.
    let deaf = Peer::deaf();
    let channel = builder([server.address(), deaf.address()]).build().unwrap();
    let message = unavailable(&channel, ExcludedEndpoint(server.address())).await;
    assert!(message.contains("none of 1 endpoints") && message.contains("the call excludes"), "{message}");
    assert!(message.contains(&format!("{} is in backoff", deaf.address())), "{message}");
}

#[tokio::test]
async fn two_endpoints_with_one_address_are_both_excluded() {
    let (one, other) = (Scripted::serving().await, Scripted::serving().await);
    let (channel, _log, changes) = changing(|builder| builder);
    for (key, server) in [("a:1", &one), ("b:1", &one), ("c:1", &other)] {
        changes.insert_as(&key.parse().unwrap(), server.address());
    }
    until_ready(&channel, 3).await;
    for _ in 0..20 {
        let response = call(&channel, ExcludedEndpoint(one.address())).await.unwrap();
        assert_eq!(*who(&response), other.address());
    }
}

#[tokio::test]
async fn a_refused_call_is_not_sent_to_the_endpoint_that_it_excludes() {
    let (refusing, excluded) = (Scripted::refusing().await, Scripted::serving().await);
    let channel = over([refusing.address(), excluded.address()]);
    ready(&channel, &[&excluded]).await;
    let response = call(&channel, ExcludedEndpoint(excluded.address())).await.unwrap();
    assert_eq!(*who(&response), refusing.address(), "the same again, for want of another");
    assert_eq!((refusing.record().times_sent("asked"), excluded.record().times_sent("asked")), (2, 1));
}

/// A channel over a server that fails each call at once, and is ejected for it, and one that does not
async fn with_one_ejected(failing: &Bare, well: &Bare) -> Channel {
    // By calls in flight alone: the failing one gets its share until it is ejected.
    let builder = builder([failing.address(), well.address()]).policy(LeastRequest::new());
    let channel = builder.build().expect("valid settings");
    let ejected = || channel.endpoints().iter().any(|endpoint| endpoint.ejected.is_some());
    let failures = async {
        while !ejected() {
            // Whether it fails depends on who is drawn.
            let _ = EchoClient::new(channel.clone()).unary(Chunk::default()).await;
        }
    };
    wait::within("the failing endpoint is ejected", BOUND, failures).await;
    channel
}

#[tokio::test]
async fn an_ejected_endpoint_gets_the_calls_that_are_pinned_to_it_or_exclude_all_others() {
    let failing = Bare::start(Answer::Headers(headers(&Status::unavailable("not today")))).await;
    let well = Bare::well().await;
    let channel = with_one_ejected(&failing, &well).await;
    let pinned = call(&channel, PinnedEndpoint(failing.address())).await.unwrap_err();
    assert_eq!(pinned.message(), "not today", "it was asked, and has answered");
    let excluding = call(&channel, ExcludedEndpoint(well.address())).await.unwrap_err();
    assert_eq!(excluding.message(), "not today", "better than nobody");
    call(&channel, PinnedEndpoint(well.address())).await.unwrap();
}

/// What a policy was told of each pick: the key, a header, and whether an endpoint was to be avoided
type Seen = Arc<Mutex<Vec<(Option<Vec<u8>>, Option<Vec<u8>>, bool)>>>;

/// Sends a call to the endpoint that its key names
struct ByKey(Seen);

impl Policy for ByKey {
    type Plan = ();

    fn plan(&self, _: &[Candidate]) {}

    fn pick(&self, (): &(), candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        let (key, header) = (call.key.map(<[u8]>::to_vec), call.headers.get("x-user").map(<[u8]>::to_vec));
        self.0.lock().expect("nobody panics with it").push((key, header, call.avoid.is_some()));
        let named = |candidate: &Candidate| call.key.is_none_or(|key| candidate.name().as_bytes() == key);
        candidates.iter().position(|candidate| named(candidate) && call.allows(candidate))
    }
}

#[tokio::test]
async fn policies_see_the_key_and_the_headers_of_a_call_each_time_it_is_picked_for() {
    let (refusing, other) = (Scripted::refusing().await, Scripted::serving().await);
    let seen = Seen::default();
    let channel = builder([refusing.address(), other.address()]).policy(ByKey(seen.clone())).build().unwrap();
    until_ready(&channel, 2).await;

    let mut request = Request::new(Chunk::default());
    request.extensions_mut().insert(HashKey::new(refusing.address().to_string()));
    request.metadata_mut().insert("x-user", "7".parse().unwrap());
    let response = EchoClient::new(channel.clone()).unary(request).await.unwrap();
    assert_eq!(*who(&response), refusing.address());
    let key = refusing.address().to_string().into_bytes();
    let expected = [false, true, false].map(|avoids| (Some(key.clone()), Some(b"7".to_vec()), avoids));
    assert_eq!(*seen.lock().unwrap(), expected, "first, elsewhere in vain, then there again");

    seen.lock().unwrap().clear();
    EchoClient::new(channel).unary(Chunk::default()).await.unwrap();
    assert_eq!(*seen.lock().unwrap(), [(None, None, false)]);
}

#[tokio::test]
async fn a_key_goes_to_the_same_endpoint_by_extension_and_by_header_and_in_every_client() {
    let servers = [Scripted::serving().await, Scripted::serving().await, Scripted::serving().await];
    let mut addresses: Vec<_> = servers.iter().map(Scripted::address).collect();
    let policy = || RingHash::new().header("x-user");
    let one = builder(addresses.clone()).policy(policy()).build().unwrap();
    // In another order, and with an authority that is the same for all.
    addresses.reverse();
    let other = builder(addresses).authority("hello.internal:80").policy(policy()).build().unwrap();
    until_ready(&one, 3).await;
    until_ready(&other, 3).await;
    let mut used = HashSet::new();
    for user in 0..60 {
        let user = format!("user-{user}");
        let chosen = who(&call(&one, HashKey::new(&user)).await.unwrap()).clone();
        let mut request = Request::new(Chunk::default());
        request.metadata_mut().insert("x-user", user.parse().unwrap());
        let response = EchoClient::new(other.clone()).unary(request).await.unwrap();
        assert_eq!(*who(&response), chosen, "{user}");
        used.insert(chosen);
    }
    assert_eq!(used.len(), 3, "and not all to one");
}
