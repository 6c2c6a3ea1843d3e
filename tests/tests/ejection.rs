//! Servers that stand still under load: the channel finds out with a PING, not with calls

#![cfg(unix)]

use std::time::{Duration, Instant};

use callsign::{
    Address, Channel, EjectionReason, EndpointInfo, EndpointState, discover, policy::LeastRequest,
};
use callsign_tests::{
    bare::{Answer, Bare, headers},
    channel::{UpdateLog, over, until_ready},
    echo::{Chunk, Wanted, echo_client::EchoClient},
    greeter,
    load::{Load, Pace, greet},
    pb::greeter_client::GreeterClient,
    process::Process,
    scripted::Scripted,
    stall::on_a_steady_machine,
    wait,
};
use http::StatusCode;
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Request, Status};

const SECOND: Duration = Duration::from_secs(1);
const DEADLINE: Duration = Duration::from_millis(500);

fn info(channel: &Channel, address: &Address) -> EndpointInfo {
    let endpoints = channel.endpoints();
    endpoints.into_iter().find(|endpoint| endpoint.address == *address).expect("the endpoint is known")
}

async fn load(channel: &Channel, pace: Pace) -> Load {
    let client = GreeterClient::new(channel.clone());
    pace.open_loop(move || greet(client.clone(), DEADLINE)).await
}

/// Stops the first of `count` servers for good while calls are made, then lets it go on
async fn one_stands_still(count: usize) {
    let mut servers = Vec::new();
    for _ in 0..count {
        servers.push(greeter!().start().await);
    }
    let channel = over(servers.iter().map(Process::address));
    let log = UpdateLog::new(channel.updates());
    until_ready(&channel, servers.len()).await;
    let stopped = servers[0].address();

    let calls = tokio::spawn({
        let channel = channel.clone();
        async move { load(&channel, Pace::FULL).await }
    });
    wait::until("it is called", 5 * SECOND, || (info(&channel, &stopped).started > 50).then_some(())).await;
    servers[0].sigstop().await;
    let began = Instant::now();
    let before = wait::until("it is ejected", 2 * SECOND, || {
        let info = info(&channel, &stopped);
        (info.ejected == Some(EjectionReason::Silent)).then_some(info.started)
    })
    .await;
    let calls = calls.await.expect("no call panics");
    assert_eq!(calls.calls.len(), Pace::FULL.calls() as usize);
    assert!(calls.failed().len() <= 3, "{calls}");
    assert_eq!(info(&channel, &stopped).started, before, "a call went to who says nothing");
    let told = log.updates(began).into_iter().filter(|update| update.address == stopped);
    let told: Vec<_> = told.map(|update| (update.state, update.ejected)).collect();
    assert_eq!(told[0], (EndpointState::Ready, Some(EjectionReason::Silent)), "{told:?}");
    assert!(told[1..].iter().all(|(state, _)| *state != EndpointState::Ready), "{told:?}");

    servers[0].sigcont();
    let pace = Pace { rate: 200, lasting: 5 * SECOND };
    let calls = load(&channel, pace).await;
    calls.assert_none_failed(pace);
    assert!(calls.share_of(&stopped.to_string()) > 0.0, "it serves again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_stands_still_for_good_and_three_calls_at_most_notice() {
    on_a_steady_machine(|| one_stands_still(3)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_two_stands_still_for_good_and_three_calls_at_most_notice() {
    on_a_steady_machine(|| one_stands_still(2)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_goes_on_before_its_ping_times_out_keeps_its_connection() {
    on_a_steady_machine(one_goes_on_in_time).await;
}

async fn one_goes_on_in_time() {
    let servers = [greeter!().start().await, greeter!().start().await];
    let channel = over(servers.each_ref().map(Process::address));
    let log = UpdateLog::new(channel.updates());
    until_ready(&channel, servers.len()).await;
    let stopped = servers[0].address();
    let pace = Pace { rate: 200, lasting: 4 * SECOND };
    let calls = tokio::spawn({
        let channel = channel.clone();
        async move { load(&channel, pace).await }
    });
    servers[0].sigstop().await;
    let began = Instant::now();
    let ejected = || info(&channel, &stopped).ejected;
    wait::until("it is ejected", 2 * SECOND, || ejected().map(drop)).await;
    servers[0].sigcont();
    wait::until("it is back", SECOND, || ejected().is_none().then_some(())).await;
    let calls = calls.await.expect("no call panics");
    assert!(calls.failed().len() <= 3, "{calls}");
    let told = log.states(&stopped, began);
    assert!(told.iter().all(|(_, state)| *state == EndpointState::Ready), "{told:?}");
    let answered = calls.share(&stopped.to_string(), Instant::now() - SECOND, Instant::now());
    assert!(answered > 0.2, "its share in the last second: {answered}");
}

#[tokio::test]
async fn an_error_without_a_message_counts_as_its_endpoints_failure() {
    let stated = || headers(&Status::unavailable("not today"));
    for (answer, code) in [
        (Answer::Headers(stated()), Code::Unavailable),
        (Answer::HeadersThenEnd(stated()), Code::Unavailable),
        (Answer::Page(StatusCode::BAD_GATEWAY), Code::Unavailable),
        (Answer::Page(StatusCode::NOT_FOUND), Code::Unimplemented),
    ] {
        let server = Bare::start(answer.clone()).await;
        let channel = over([server.address()]);
        for failed in 1..=10 {
            let status = greet(GreeterClient::new(channel.clone()), 5 * SECOND).await.unwrap_err();
            assert_eq!(status.code(), code, "{answer:?}");
            let info = info(&channel, &server.address());
            assert_eq!((info.failed, info.in_flight, info.ejected), (failed, 0, None), "{answer:?}");
        }
    }
}

#[tokio::test]
async fn a_proxy_that_answers_at_once_for_a_server_that_is_gone_is_ejected() {
    let proxy = Bare::start(Answer::Page(StatusCode::SERVICE_UNAVAILABLE)).await;
    let well = Bare::well().await;
    // By calls in flight alone: the proxy gets its share until it is ejected.
    let both = discover::fixed([proxy.address(), well.address()]);
    let channel = Channel::builder(both).policy(LeastRequest::new()).build().expect("valid settings");
    until_ready(&channel, 2).await;
    let ejected = async {
        while info(&channel, &proxy.address()).ejected.is_none() {
            // Whether it fails depends on who is drawn.
            let _ = EchoClient::new(channel.clone()).unary(Chunk::default()).await;
        }
    };
    wait::within("the proxy is ejected", 10 * SECOND, ejected).await;
    assert_eq!(info(&channel, &well.address()).ejected, None);
}

#[tokio::test]
async fn a_watch_that_its_caller_ends_by_a_deadline_is_nobodys_failure() {
    let server = Scripted::start(|_, peer| async move {
        peer.settings(None).await;
        for nth in 0..6 {
            let stream = peer.headers(nth).await;
            peer.respond_message(stream).await;
        }
        peer.closed().await;
    })
    .await;
    let channel = over([server.address()]);
    for _ in 0..6 {
        let mut wanted = Request::new(Wanted::default());
        wanted.set_timeout(DEADLINE);
        let mut watch = EchoClient::new(channel.clone()).download(wanted).await.unwrap().into_inner();
        assert_eq!(watch.message().await.unwrap(), Some(Chunk::default()));
        assert_eq!(watch.message().await.unwrap_err().code(), Code::DeadlineExceeded);
    }
    let info = info(&channel, &server.address());
    assert_eq!((info.started, info.failed, info.in_flight), (6, 0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quiet_streams_and_long_calls_get_nobody_ejected() {
    let slow = || greeter!().delay(3 * SECOND).start();
    let servers = [slow().await, slow().await];
    let channel = over(servers.each_ref().map(Process::address));
    let log = UpdateLog::new(channel.updates());
    until_ready(&channel, servers.len()).await;
    let began = Instant::now();

    let (sender, receiver) = mpsc::unbounded_channel();
    let chunk = |text: &'static str| Chunk { payload: text.into(), rest_ms: 0 };
    sender.send(chunk("before")).unwrap();
    let mut client = EchoClient::new(channel.clone());
    let stream = client.bidi(UnboundedReceiverStream::new(receiver)).await.unwrap();
    let mut echoes = stream.into_inner();
    assert_eq!(echoes.message().await.unwrap().unwrap().payload, "before");

    let client = GreeterClient::new(channel.clone());
    let long = || greet(client.clone(), 10 * SECOND);
    let results = tokio::join!(long(), long(), long(), long());
    for result in [results.0, results.1, results.2, results.3] {
        result.unwrap();
    }
    sender.send(chunk("after")).unwrap();
    let echo = wait::within("the echo", 2 * SECOND, echoes.message()).await;
    assert_eq!(echo.unwrap().unwrap().payload, "after");
    assert_eq!(log.updates(began), [], "nothing has changed");
}
