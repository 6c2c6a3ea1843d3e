//! Servers that stand still, and streams on which nothing happens

#![cfg(unix)]

use std::time::{Duration, Instant};

use callsign::{Address, Channel, EndpointState};
use callsign_tests::{
    channel::{UpdateLog, over},
    echo::{Chunk, echo_client::EchoClient},
    greeter,
    load::{Pace, greet},
    pb::{HelloRequest, greeter_client::GreeterClient},
    stall::on_a_steady_machine,
    wait,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Code;

const SECOND: Duration = Duration::from_secs(1);

fn channel(addresses: impl IntoIterator<Item = Address>) -> (Channel, UpdateLog) {
    let channel = over(addresses);
    let log = UpdateLog::new(channel.updates());
    (channel, log)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_server_fails_its_calls_within_30_s_and_is_ready_again_only_when_it_goes_on() {
    let began = Instant::now();
    let server = greeter!().start().await;
    let address = server.address();
    let (channel, log) = channel([address.clone()]);
    let mut client = GreeterClient::new(channel);
    log.until(&address, EndpointState::Ready, began, 5 * SECOND).await;

    server.sigstop().await;
    let stopped = Instant::now();
    let call = client.say_hello(HelloRequest { name: "no deadline".to_owned() });
    let status = wait::within("a call without a deadline", 30 * SECOND, call).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().contains(&address.to_string()), "{status:?}");
    log.until_lost(&address, stopped, SECOND).await;

    // The kernel accepts each attempt for the stopped process; one attempt has 20 s.
    let attempts = |states: &[(Instant, EndpointState)]| {
        states.iter().filter(|(_, state)| *state == EndpointState::Connecting).count()
    };
    wait::until("it is dialled again", 30 * SECOND, || {
        (attempts(&log.states(&address, stopped)) >= 2).then_some(())
    })
    .await;
    let states = log.states(&address, stopped);
    assert!(states.iter().all(|(_, state)| *state != EndpointState::Ready), "{states:?}");

    let woken = Instant::now();
    server.sigcont();
    log.until(&address, EndpointState::Ready, woken, 20 * SECOND).await;
    greet(client, 2 * SECOND).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_server_leaves_the_ready_set_under_calls_with_short_deadlines() {
    on_a_steady_machine(stopped_under_short_calls).await;
}

async fn stopped_under_short_calls() {
    let began = Instant::now();
    let servers = [greeter!().start().await, greeter!().start().await];
    let [frozen, lively] = servers.each_ref().map(|server| server.address());
    let (channel, log) = channel([frozen.clone(), lively.clone()]);
    let client = GreeterClient::new(channel);
    for address in [&frozen, &lively] {
        log.until(address, EndpointState::Ready, began, 5 * SECOND).await;
    }

    let stopped = Instant::now();
    servers[0].sigstop().await;
    let load = tokio::spawn(
        Pace { rate: 200, lasting: 20 * SECOND }.open_loop(move || greet(client.clone(), SECOND / 2)),
    );
    let lost = log.until_lost(&frozen, stopped, 20 * SECOND).await;

    let load = load.await.expect("no call panics");
    let late: Vec<_> = load.calls.iter().filter(|call| call.started > lost + SECOND / 2).collect();
    assert!(late.len() > 200, "the load ended too early to tell: lost {:?} after the stop", lost - stopped);
    assert!(late.iter().all(|call| call.result.is_ok()), "after the loss was reported: {load}");
    let states = log.states(&frozen, lost);
    assert!(states.iter().all(|(_, state)| *state != EndpointState::Ready), "{states:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "cargo xtask faults"]
async fn a_quiet_stream_lives_for_60_s() {
    let server = greeter!().start().await;
    let (channel, log) = channel([server.address()]);
    let mut client = EchoClient::new(channel);
    let (sender, receiver) = mpsc::unbounded_channel();
    let chunk = |text: &'static str| Chunk { payload: text.into(), rest_ms: 0 };
    sender.send(chunk("before")).unwrap();
    let mut echoes = client.bidi(UnboundedReceiverStream::new(receiver)).await.unwrap().into_inner();
    assert_eq!(echoes.message().await.unwrap().unwrap().payload, "before");

    let quiet = Instant::now();
    let silence = tokio::time::timeout(60 * SECOND, echoes.message()).await;
    assert!(silence.is_err(), "the quiet stream ended: {silence:?}");

    sender.send(chunk("after")).unwrap();
    let echo = wait::within("the echo", 2 * SECOND, echoes.message()).await;
    assert_eq!(echo.unwrap().unwrap().payload, "after");
    assert_eq!(log.states(&server.address(), quiet), [], "the endpoint stayed as it was");
}
