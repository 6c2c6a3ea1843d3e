//! Which instances a channel connects to, and which of its endpoints take calls: rules, subsets, zones, slow starts, pings

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

use callsign::{
    Address, Channel, EndpointAddress, EndpointState, ExcludedEndpoint, Instance, Metadata, PinnedEndpoint,
    channel::SettingsError,
    discover::{self, fixed},
    policy::{Candidate, Pick, PickFirst, Policy},
};
use callsign_tests::{
    channel::{UpdateLog, changing, until_ready},
    echo::{Chunk, echo_client::EchoClient},
    greeter,
    lines::Lines,
    load::greet,
    pb::greeter_client::GreeterClient,
    ports::{everywhere, local},
    scripted::{Scripted, code},
    service::Local,
    wait,
};
use tonic::{Code, Request};
use tracing::Level;

const BOUND: Duration = Duration::from_secs(10);
/// Longer than any test
const FOR_EVER: Duration = Duration::from_secs(3600);

async fn servers<const N: usize>() -> Vec<Local> {
    let mut servers = Vec::new();
    for _ in 0..N {
        servers.push(Local::start().await);
    }
    servers
}

fn instance(server: &Local, metadata: Metadata) -> Instance {
    let mut instance = Instance::new(server.address());
    instance.metadata = metadata;
    instance
}

fn version(server: &Local, version: &str) -> Instance {
    instance(server, Metadata::new().with_version(version).expect("short"))
}

fn in_zone(server: &Local, zone: &str) -> Instance {
    instance(server, Metadata::new().with_zone(zone).expect("short"))
}

/// One after the other: who is one of two gets half of the calls, to one
#[derive(Default)]
struct Turns(AtomicUsize);

impl Policy for Turns {
    type Plan = ();

    fn plan(&self, _: &[Candidate]) {}

    fn pick(&self, (): &(), candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        let (turn, all) = (self.0.fetch_add(1, Relaxed), candidates.len());
        (0..all).map(|next| (turn + next) % all).find(|at| call.allows(&candidates[*at]))
    }
}

fn listed(channel: &Channel) -> BTreeSet<Address> {
    let live = channel.endpoints().into_iter().filter(|endpoint| endpoint.state != EndpointState::Draining);
    live.map(|endpoint| endpoint.address).collect()
}

/// How many of `calls` calls each of the servers got
async fn shares<const N: usize>(channel: &Channel, servers: [&Local; N], calls: u32) -> [u32; N] {
    let mut shares = [0; N];
    for _ in 0..calls {
        let who = greet(GreeterClient::new(channel.clone()), BOUND).await.expect("a server answers");
        let server = servers.iter().position(|server| server.address().to_string() == who);
        shares[server.expect("one of them")] += 1;
    }
    shares
}

#[tokio::test]
async fn who_is_not_accepted_is_not_dialled_and_who_no_longer_is_goes() {
    let (lines, began) = (Lines::record(), Instant::now());
    let [wanted, other] = &servers::<2>().await[..] else { panic!("two") };
    let is_wanted = |instance: &Instance| instance.metadata.version() == Some("2");
    let (channel, log, changes) = changing(|builder| builder.accept(is_wanted));
    changes.insert(version(other, "1"));
    changes.insert(version(wanted, "2"));
    until_ready(&channel, 1).await;
    assert_eq!(listed(&channel), [wanted.address()].into());
    assert_eq!(log.states(&other.address(), began), []);
    changes.insert(version(other, "2"));
    until_ready(&channel, 2).await;
    for _ in 0..3 {
        changes.insert(version(other, "1"));
        log.until(&other.address(), EndpointState::Gone, began, BOUND).await;
    }
    assert_eq!(shares(&channel, [wanted, other], 20).await, [20, 0]);
    let said = format!("instance not accepted address={}", other.address());
    assert_eq!(lines.beginning(&said), 2, "{:?}", lines.at(Level::DEBUG));
    assert!(lines.at(Level::WARN).is_empty(), "that is as it should be");
}

#[tokio::test]
async fn a_rule_that_panics_costs_its_instance_and_nothing_else() {
    let lines = Lines::record();
    let [sane, mad] = &servers::<2>().await[..] else { panic!("two") };
    let rule = |instance: &Instance| match instance.metadata.version() {
        Some("mad") => panic!("a rule may have mistakes"),
        _ => true,
    };
    let (channel, _log, changes) = changing(|builder| builder.accept(rule));
    changes.insert(version(mad, "mad"));
    let status = greet(GreeterClient::new(channel.clone()), BOUND).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("none of 1 instances can be used"), "{status:?}");
    changes.insert(version(sane, "1"));
    until_ready(&channel, 1).await;
    assert_eq!(shares(&channel, [sane, mad], 20).await, [20, 0]);
    assert_eq!(lines.at(Level::ERROR).len(), 1, "{:?}", lines.at(Level::ERROR));
}

#[tokio::test]
async fn a_rule_may_look_at_the_channel_that_asks() {
    let server = Local::start().await;
    let channel = std::sync::Arc::new(std::sync::OnceLock::<Channel>::new());
    let known = channel.clone();
    let look = move |_: &Instance| known.get().is_none_or(|channel| channel.endpoints().len() < 5);
    let (made, _log, changes) = changing(|builder| builder.accept(look));
    assert!(channel.set(made).is_ok());
    changes.insert(server.address());
    until_ready(channel.get().expect("it is set"), 1).await;
}

/// Waits until the channel has settled on `size` ready endpoints
async fn settled(channel: &Channel, size: usize) -> BTreeSet<Address> {
    wait::until("the subset is ready", BOUND, || {
        let endpoints = channel.endpoints();
        let all_ready = endpoints.iter().all(|endpoint| endpoint.state == EndpointState::Ready);
        (all_ready && endpoints.len() == size).then(|| listed(channel))
    })
    .await
}

/// Who was told to have gone into one of these states since then
fn moved(log: &UpdateLog, since: Instant, states: &[EndpointState]) -> BTreeSet<Address> {
    let updates = log.updates(since).into_iter().filter(|update| states.contains(&update.state));
    updates.map(|update| update.address).collect()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn of_a_hundred_endpoints_a_subset_of_32_is_connected_to_and_a_change_moves_one_connection_at_most() {
    const OPENED: &[EndpointState] = &[EndpointState::Connecting];
    const CLOSED: &[EndpointState] = &[EndpointState::Draining, EndpointState::Gone];
    let server = greeter!().listen(&everywhere()).start().await;
    let all: Vec<_> = (0..100).map(|number| local(number, server.address().port())).collect();
    let (channel, log, changes) = changing(|builder| builder.subset(32));
    all.iter().for_each(|address| changes.insert(address.clone()));
    let chosen = settled(&channel, 32).await;
    assert_eq!(moved(&log, Instant::now() - BOUND, OPENED), chosen, "nobody else was dialled");
    for address in &all {
        let (was_chosen, since) = (chosen.contains(address), Instant::now());
        changes.remove(address);
        if was_chosen {
            log.until(address, EndpointState::Gone, since, BOUND).await;
            settled(&channel, 32).await;
            assert_eq!(moved(&log, since, CLOSED), [address.clone()].into());
            assert_eq!(moved(&log, since, OPENED).len(), 1, "one in its place");
        }
        let since = Instant::now();
        changes.insert(address.clone());
        if was_chosen {
            log.until(address, EndpointState::Ready, since, BOUND).await;
            assert_eq!(settled(&channel, 32).await, chosen, "the set is the same");
            assert_eq!(moved(&log, since, OPENED), [address.clone()].into());
            assert_eq!(moved(&log, since, CLOSED).len(), 1, "the one that stood in");
        }
    }
}

#[tokio::test]
async fn the_first_list_moves_no_subset_to_and_fro_and_holds_nobody() {
    let all = servers::<30>().await;
    let (channel, log, changes) = changing(|builder| builder.subset(5).hold_window(Duration::from_secs(15)));
    // One by one, as if over a slow network.
    for server in &all {
        changes.insert(server.address());
        tokio::task::yield_now().await;
    }
    settled(&channel, 5).await;
    assert!(log.updates(Instant::now() - BOUND).iter().all(|update| !update.held));
}

#[tokio::test]
async fn a_zone_takes_all_calls_while_half_of_it_can_be_used() {
    let mut near = servers::<3>().await;
    let far = Local::start().await;
    let (channel, log, changes) = changing(|builder| builder.policy(Turns::default()).zone("eu-1"));
    near.iter().for_each(|server| changes.insert(in_zone(server, "eu-1")));
    changes.insert(in_zone(&far, "us-1"));
    until_ready(&channel, 4).await;
    let calls_to_far = async || {
        let mut got = 0;
        for _ in 0..60 {
            let who = greet(GreeterClient::new(channel.clone()), BOUND).await.expect("a server answers");
            got += u32::from(who == far.address().to_string());
        }
        got
    };
    assert_eq!(calls_to_far().await, 0);
    // Discovery goes on to list those that are gone: servers die before their registrations do.
    for (left, is_far_called) in [(2, false), (1, true)] {
        let (gone, since) = (near.pop().expect("there are some").address(), Instant::now());
        log.until_lost(&gone, since, BOUND).await;
        let got = calls_to_far().await;
        assert_eq!(got > 0, is_far_called, "{left} of 3 are left, and of 60 calls {got} went far");
    }
}

#[tokio::test]
async fn a_call_that_nobody_near_may_take_goes_far() {
    let [near, far] = &servers::<2>().await[..] else { panic!("two") };
    let (channel, _log, changes) = changing(|builder| builder.zone("eu-1"));
    changes.insert(in_zone(near, "eu-1"));
    changes.insert(in_zone(far, "us-1"));
    until_ready(&channel, 2).await;
    assert_eq!(shares(&channel, [near, far], 20).await, [20, 0]);
    for wish in [Some(ExcludedEndpoint(near.address())), None] {
        let mut request = Request::new(Chunk::default());
        match wish {
            Some(excluded) => drop(request.extensions_mut().insert(excluded)),
            None => drop(request.extensions_mut().insert(PinnedEndpoint(far.address()))),
        }
        let call = EchoClient::new(channel.clone()).unary(request).await;
        let answered = call.expect("the far one is ready").extensions().get().cloned();
        assert_eq!(answered, Some(EndpointAddress(far.address())));
    }
}

#[tokio::test]
async fn a_zone_in_which_nobody_is_is_none_until_somebody_is() {
    let [one, other, last] = &servers::<3>().await[..] else { panic!("three") };
    let (channel, _log, changes) = changing(|builder| builder.policy(Turns::default()).zone("eu-1"));
    changes.insert(one.address());
    changes.insert(in_zone(other, "us-1"));
    until_ready(&channel, 2).await;
    assert_eq!(shares(&channel, [one, other], 40).await, [20, 20], "nobody is near");
    changes.insert(in_zone(other, "eu-1"));
    // What comes later is seen later.
    changes.insert(last.address());
    until_ready(&channel, 3).await;
    assert_eq!(shares(&channel, [one, other], 20).await, [0, 20]);
}

#[tokio::test]
async fn an_endpoint_that_has_just_come_takes_its_share_little_by_little() {
    let (window, began) = (Duration::from_secs(5), Instant::now());
    let [old, new] = &servers::<2>().await[..] else { panic!("two") };
    let (channel, log, changes) = changing(|builder| builder.policy(Turns::default()).slow_start(window));
    changes.insert(old.address());
    let ready = log.until(&old.address(), EndpointState::Ready, began, BOUND).await;
    assert_eq!(shares(&channel, [old], 50).await, [50], "a single one takes all calls, however new");
    tokio::time::sleep_until((ready + window).into()).await;
    changes.insert(new.address());
    let ready = log.until(&new.address(), EndpointState::Ready, began, BOUND).await;
    // A twentieth at first, and a quarter if these calls take the whole window.
    let [_, share] = shares(&channel, [old, new], 300).await;
    assert!(share < 100, "{share} of 300");
    tokio::time::sleep_until((ready + window).into()).await;
    let [_, share] = shares(&channel, [old, new], 300).await;
    assert_eq!(share, 150, "its turns");
}

/// The policy's choice made way for the others, which were as new
#[tokio::test]
async fn while_all_endpoints_are_new_the_policy_decides_alone() {
    let [first, other] = &servers::<2>().await[..] else { panic!("two") };
    let channel = Channel::builder(fixed([first.address(), other.address()]));
    let channel = channel.policy(PickFirst::new()).slow_start(FOR_EVER).build().unwrap();
    until_ready(&channel, 2).await;
    assert_eq!(shares(&channel, [first, other], 50).await, [50, 0]);
}

#[tokio::test]
async fn what_cannot_be_set_is_told_before_anything_is_dialled() {
    let builder = || Channel::builder(discover::fixed(["h:1".parse().unwrap()]));
    assert!(matches!(builder().subset(0).build(), Err(SettingsError::Subset)));
    let no_path = builder().method_timeout("pb.Greeter/SayHello", BOUND).build().unwrap_err();
    assert!(matches!(&no_path, SettingsError::Method(told) if told == "pb.Greeter/SayHello"), "{no_path}");
    let short = Duration::from_secs(9);
    let refused = builder().keepalive(short).build().unwrap_err();
    assert!(matches!(refused, SettingsError::Keepalive(told) if told == short), "{refused}");
    builder().keepalive(Duration::from_secs(10)).build().unwrap();
}

#[tokio::test]
async fn a_quiet_stream_is_pinged_at_the_interval_and_a_server_that_minds_is_pinged_less() {
    let lines = Lines::record();
    let server = Scripted::start(|connection, peer| async move {
        peer.settings(None).await;
        let stream = peer.headers(0).await;
        if connection == 0 {
            // The first one asks a server that has yet to answer whether it lives.
            peer.pinged(1).await;
            peer.goaway(stream, code::ENHANCE_YOUR_CALM).await;
            peer.respond(stream).await;
        }
        peer.closed().await;
    })
    .await;
    let channel = Channel::builder(fixed([server.address()])).keepalive(Duration::from_secs(10));
    let mut client = EchoClient::new(channel.build().unwrap());
    let (outcome, took) = wait::timed(client.unary(Chunk::default())).await;
    outcome.unwrap();
    assert!((10..15).contains(&took.as_secs()), "without the setting it is pinged after 5 s: {took:?}");
    wait::until("it is to be pinged less", BOUND, || {
        (lines.beginning("the server minds pings") == 1).then_some(())
    })
    .await;
    let [warning] = &lines.at(Level::WARN)[..] else { panic!("one warning") };
    assert!(warning.text.contains("interval: 20s"), "{warning:?}");
}
