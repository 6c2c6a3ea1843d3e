//! No instances, no server, no etcd

#![cfg(unix)]

use std::time::{Duration, Instant};

use callsign::{Etcd, EtcdChannel, EtcdOptions, WaitForReady};
use callsign_tests::{
    channel::over,
    greeter,
    load::{Pace, greet},
    pb::{HelloRequest, greeter_client::GreeterClient},
    peers::Peer,
    registry,
    service::who,
    wait,
};
use tonic::{Code, Request};

const SERVICE: &str = "hello.rpc";
const SECOND: Duration = Duration::from_secs(1);

fn hello() -> Request<HelloRequest> {
    Request::new(HelloRequest { name: "nobody".to_owned() })
}

#[tokio::test]
async fn a_call_to_an_empty_service_fails_after_the_pick_timeout_and_says_so() {
    let etcd = registry::etcd().await;
    let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.unwrap();
    let channel = EtcdChannel::builder(SERVICE).etcd(&session).connect_lazy().unwrap();
    let mut client = GreeterClient::new(channel);
    let (status, took) = wait::timed(client.say_hello(hello())).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().contains(SERVICE) && status.message().contains("no instances"), "{status:?}");
    assert!((SECOND..6 * SECOND).contains(&took), "{took:?}");
}

#[tokio::test]
async fn connect_to_an_empty_service_fails_within_6_s_and_says_so() {
    let etcd = registry::etcd().await;
    let target = format!("etcd:///{}?key={SERVICE}", etcd.endpoint());
    let (result, took) = wait::timed(EtcdChannel::connect(target)).await;
    let message = result.map(drop).unwrap_err().to_string();
    assert!(took < 6 * SECOND, "{took:?}");
    for part in [SERVICE, &etcd.endpoint(), "no instances"] {
        assert!(message.contains(part), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_server_of_a_service_is_called_within_a_second_of_its_key() {
    let etcd = registry::etcd().await;
    let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.unwrap();
    let channel = EtcdChannel::builder(SERVICE).etcd(&session).connect_lazy().unwrap();
    let client = GreeterClient::new(channel);

    let waiting = tokio::spawn({
        let mut client = client.clone();
        async move {
            let mut request = hello();
            request.extensions_mut().insert(WaitForReady);
            request.set_timeout(20 * SECOND);
            (client.say_hello(request).await, Instant::now())
        }
    });
    let pace = Pace { rate: 100, lasting: 7 * SECOND };
    let load = tokio::spawn(pace.open_loop(move || greet(client.clone(), 2 * SECOND)));

    tokio::time::sleep(2 * SECOND).await;
    assert!(!waiting.is_finished(), "there is nobody to answer");
    let server = greeter!().register(SERVICE, &etcd.endpoint()).start().await;
    registry::until_registered(&etcd, SERVICE, 5 * SECOND, |all| all.len() == 1).await;
    let appeared = Instant::now();

    let (reply, answered) = wait::within("the waiting call", 5 * SECOND, waiting).await.unwrap();
    assert_eq!(who(reply.unwrap().get_ref()), server.address().to_string());
    assert!(answered < appeared + SECOND, "{:?} after the key", answered - appeared);
    let load = load.await.unwrap();
    let late: Vec<_> = load.calls.iter().filter(|call| call.started > appeared + SECOND).collect();
    assert!(late.len() >= 100, "the load ended too early to tell: {} late calls", late.len());
    assert!(late.iter().all(|call| call.result.is_ok()), "after the key and a second: {load}");
    assert!(!load.failed().is_empty(), "before the key, calls fail");
}

#[tokio::test]
async fn a_call_that_finds_nobody_listening_names_the_endpoints_and_the_cause() {
    let peers = [Peer::deaf(), Peer::deaf()];
    let channel = over(peers.each_ref().map(Peer::address));
    let (status, took) = wait::timed(GreeterClient::new(channel).say_hello(hello())).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(took < 2 * SECOND, "{took:?}");
    for part in [peers[0].address().to_string(), peers[1].address().to_string(), "refused".to_owned()] {
        assert!(status.message().contains(&part), "{part} is missing: {status:?}");
    }
}

/// Both ways to connect fail within 6 s and name every host
async fn connect_fails(hosts: [String; 2]) {
    let session = wait::timed(Etcd::connect(EtcdOptions::new(&hosts)));
    let target = format!("etcd:///{}?key={SERVICE}", hosts.join(","));
    let channel = wait::timed(EtcdChannel::connect(target));
    let ((session, session_took), (channel, channel_took)) = tokio::join!(session, channel);
    let session = session.map(drop).expect_err("no etcd").to_string();
    let channel = channel.map(drop).expect_err("no etcd").to_string();
    for (message, took) in [(session, session_took), (channel, channel_took)] {
        assert!(took < 6 * SECOND, "{took:?}: {message}");
        assert!(hosts.iter().all(|host| message.contains(host)), "{message}");
    }
}

#[tokio::test]
async fn connect_fails_within_6_s_and_names_the_hosts_when_there_is_no_etcd() {
    let (absent, mute) = ([Peer::deaf(), Peer::deaf()], [Peer::mute().await, Peer::mute().await]);
    let others = [Peer::http1().await, Peer::slammer().await];
    let hosts = |peers: &[Peer; 2]| peers.each_ref().map(|peer| peer.address().to_string());
    tokio::join!(connect_fails(hosts(&absent)), connect_fails(hosts(&mute)), connect_fails(hosts(&others)));
}
