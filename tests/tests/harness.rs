//! The harness itself: what the other suites take for granted

#![cfg(unix)]

use std::time::{Duration, Instant};

use callsign::instance::Address;
use callsign_tests::{
    greeter,
    load::{Pace, Steady, greet},
    pb::greeter_client::GreeterClient,
    peers::Peer,
    service::Local,
    wait,
};
use tokio::{io::AsyncReadExt, net::TcpStream, time::timeout};
use tonic::transport::{Channel, Endpoint};

const DEADLINE: Duration = Duration::from_millis(500);

fn client(address: &Address) -> GreeterClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address makes a URL");
    GreeterClient::new(endpoint.connect_lazy())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_greeter_process_can_be_stopped_continued_killed_and_started_again_at_its_address() {
    let mut server = greeter!().start().await;
    let address = server.address();
    assert_eq!(greet(client(&address), DEADLINE).await.unwrap(), address.to_string());

    server.sigstop().await;
    greet(client(&address), DEADLINE).await.unwrap_err();
    server.sigcont();
    greet(client(&address), 4 * DEADLINE).await.unwrap();

    server.kill9();
    greet(client(&address), DEADLINE).await.unwrap_err();
    let _again = greeter!().listen(&address).start().await;
    greet(client(&address), DEADLINE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn both_loads_count_every_call() {
    let server = Local::start().await;
    let client = client(&server.address());
    let pace = Pace { rate: 200, lasting: Duration::from_millis(500) };
    for load in [
        pace.open_loop(|| greet(client.clone(), DEADLINE)).await,
        pace.one_after_the_other(|| greet(client.clone(), DEADLINE)).await,
    ] {
        load.assert_none_failed(pace);
        let (first, last) = (load.calls[0].started, load.calls[99].started);
        assert!(
            last - first > Duration::from_millis(450),
            "the calls are spread over the time: {:?}",
            last - first
        );
        let who = server.address().to_string();
        assert_eq!((load.share_of(&who), load.share(&who, first, Instant::now())), (1.0, 1.0));
    }
    let (deaf, nobody) = (Peer::deaf(), Peer::deaf());
    let client = self::client(&deaf.address());
    let load = pace.open_loop(|| greet(client.clone(), DEADLINE)).await;
    assert_eq!(load.failed().len(), 100, "no server, no answer");
    assert_eq!(load.share_of(&nobody.address().to_string()), 0.0);
}

#[tokio::test]
async fn a_steady_load_goes_on_until_it_is_stopped_and_keeps_what_failed() {
    let (server, deaf) = (Local::start().await, Peer::deaf());
    let steady = |address: &Address| {
        let client = client(address);
        Steady::start(200, move || greet(client.clone(), DEADLINE))
    };
    let (answered, refused) = (steady(&server.address()), steady(&deaf.address()));
    let made = || (answered.tally().calls >= 100 && refused.tally().calls >= 100).then_some(());
    wait::until("calls are made", Duration::from_secs(10), made).await;
    let (answered, refused) = (answered.stop().await, refused.stop().await);
    assert!(answered.failed.is_empty(), "{answered}");
    assert_eq!(refused.failed.len() as u64, refused.calls, "no server, no answer");
    let both = answered.clone().and(refused.clone());
    assert_eq!((both.calls, both.failed.len()), (answered.calls + refused.calls, refused.failed.len()));
}

#[tokio::test]
async fn bad_peers_are_as_bad_as_they_say() {
    let connect = |peer: &Peer| TcpStream::connect(peer.address().to_string());

    connect(&Peer::deaf()).await.unwrap_err();

    let mute = Peer::mute().await;
    let mut stream = connect(&mute).await.unwrap();
    timeout(Duration::from_millis(200), stream.read_u8()).await.unwrap_err();

    let http1 = Peer::http1().await;
    let mut stream = connect(&http1).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut stream, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");

    let slammer = Peer::slammer().await;
    assert_eq!(connect(&slammer).await.unwrap().read(&mut [0]).await.unwrap_or(0), 0);
}
