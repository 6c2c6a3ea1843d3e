//! TLS to endpoints: who is trusted is called, who is not is told why, and no registry talks a channel out of it

#![cfg(unix)]

use std::{
    fs,
    time::{Duration, Instant},
};

use callsign::{
    Address, Channel, EndpointAddress, EndpointState, Etcd, EtcdChannel, EtcdOptions, Registration, Tls,
    TlsError,
    channel::{ChannelBuilder, ConnectError, SettingsError, TargetError},
    discover::{Fixed, fixed},
};
use callsign_tests::{
    bare::Bare,
    certificates::Certificates,
    channel::UpdateLog,
    echo::{Chunk, echo_client::EchoClient},
    front::{Clients, Front},
    lines::Lines,
    load::greet,
    pb::greeter_client::GreeterClient,
    registry,
    service::Local,
    wait,
};
use tonic::Code;
use tracing::Level;

const BOUND: Duration = Duration::from_secs(10);
/// For what must fail
const SHORT: Duration = Duration::from_secs(1);

fn trusting(certificates: &Certificates) -> Tls {
    Tls::new().ca_file(certificates.ca())
}

fn over<const N: usize>(addresses: [Address; N], tls: Tls) -> ChannelBuilder<Fixed> {
    Channel::builder(fixed(addresses)).tls(tls)
}

/// Who greets
async fn greeted(channel: &Channel) -> String {
    greet(GreeterClient::new(channel.clone()), BOUND).await.expect("a server answers")
}

/// Why there is no connection to `front`
async fn refusal(target: impl std::fmt::Display, tls: Option<Tls>) -> String {
    let mut builder = EtcdChannel::builder(format!("direct:///{target}")).connect_timeout(SHORT);
    if let Some(tls) = tls {
        builder = builder.tls(tls);
    }
    let Err(ConnectError::NotReady(cause)) = builder.connect().await else { panic!("nobody is ready") };
    assert!(cause.contains(&target.to_string().replace("https://", "")), "{cause}");
    cause
}

#[tokio::test]
async fn a_server_whose_ca_is_named_is_called_with_the_scheme_https() {
    let (certificates, server) = (Certificates::new(), Bare::well().await);
    let front = Front::start(server.address(), &certificates, Clients::Any).await;
    let pem = Tls::new().ca_pem(fs::read(certificates.ca()).expect("it was written"));
    for (address, tls) in [(front.address(), trusting(&certificates)), (front.https(), pem)] {
        let channel = over([address], tls).build().unwrap();
        EchoClient::new(channel).unary(Chunk::default()).await.expect("the server answers");
        let [head] = &server.take_heads()[..] else { panic!("one call, one head") };
        assert_eq!(head.uri.scheme_str(), Some("https"));
        assert_eq!(head.uri.authority().unwrap().as_str(), front.address().to_string());
    }
}

#[tokio::test]
async fn metadata_of_plaintext_calls_says_http() {
    let server = Bare::well().await;
    let channel = Channel::builder(fixed([server.address()])).build().unwrap();
    EchoClient::new(channel).unary(Chunk::default()).await.expect("the server answers");
    assert_eq!(server.take_heads()[0].uri.scheme_str(), Some("http"));
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_not_trusted() {
    let (certificates, others, server) = (Certificates::new(), Certificates::new(), Local::start().await);
    let front = Front::start(server.address(), &certificates, Clients::Any).await;
    let cause = refusal(front.address(), Some(trusting(&others))).await;
    assert!(cause.contains("the peer's certificate is not trusted"), "{cause}");
    assert_eq!(front.handshakes(), 0);
}

#[tokio::test]
async fn the_name_is_the_hosts_unless_another_is_set() {
    let (certificates, server) = (Certificates::for_server(&["hello.internal"]), Local::start().await);
    let front = Front::start(server.address(), &certificates, Clients::Any).await;
    let cause = refusal(front.address(), Some(trusting(&certificates))).await;
    assert!(cause.contains("the peer's certificate is for another name"), "{cause}");
    let channel = over([front.address()], trusting(&certificates).server_name("hello.internal"));
    assert_eq!(greeted(&channel.build().unwrap()).await, server.address().to_string());
    // Calls can be addressed to whomever one likes: that is no name to verify.
    let misled =
        over([front.address()], trusting(&certificates)).authority("hello.internal").build().unwrap();
    let status = greet(GreeterClient::new(misled), SHORT).await.unwrap_err();
    assert!(status.message().contains("is for another name"), "{status:?}");
}

#[tokio::test]
async fn a_server_that_wants_to_know_its_clients_is_shown_who_we_are() {
    let (certificates, others, server) = (Certificates::new(), Certificates::new(), Local::start().await);
    let front = Front::start(server.address(), &certificates, Clients::Known).await;
    let cause = refusal(front.address(), Some(trusting(&certificates))).await;
    assert!(cause.contains("the peer asks for a client certificate"), "{cause}");
    let showing = |of: &Certificates| {
        let [certificate, key] = of.client();
        trusting(&certificates).identity_files(certificate, key)
    };
    let cause = refusal(front.address(), Some(showing(&others))).await;
    assert!(cause.contains("the peer refuses our client certificate"), "{cause}");
    let channel = over([front.address()], showing(&certificates)).build().unwrap();
    assert_eq!(greeted(&channel).await, server.address().to_string());
}

#[tokio::test]
async fn certificates_that_are_replaced_on_disk_are_used_from_the_next_connection_on() {
    let (certificates, server) = (Certificates::new(), Local::start().await);
    let front = Front::start(server.address(), &certificates, Clients::Known).await;
    let [certificate, key] = certificates.client();
    let channel = over([front.address()], trusting(&certificates).identity_files(certificate, key));
    let channel = channel.build().unwrap();
    greeted(&channel).await;
    certificates.rotate();
    greeted(&channel).await;
    assert_eq!(front.handshakes(), 1, "a connection outlives the files that it was made with");
    front.cut();
    wait::until("it connects again", BOUND, || (front.handshakes() == 2).then_some(())).await;
    greeted(&channel).await;
}

#[tokio::test]
async fn a_channel_with_tls_calls_nobody_in_plaintext() {
    let lines = Lines::record();
    let (certificates, server, plain) = (Certificates::new(), Local::start().await, Local::start().await);
    let front = Front::start(server.address(), &certificates, Clients::Any).await;
    let http: Address = format!("http://{}", plain.address()).parse().unwrap();
    let channel = over([http.clone(), front.https()], trusting(&certificates)).build().unwrap();
    for _ in 0..20 {
        assert_eq!(greeted(&channel).await, server.address().to_string());
    }
    assert_eq!(channel.endpoints().len(), 1);
    let skipped = format!("instance skipped address={http} reason=asks for plaintext");
    assert_eq!(lines.beginning(&skipped), 1, "{:?}", lines.at(Level::WARN));

    let alone = over([http], trusting(&certificates)).build().unwrap();
    let status = greet(GreeterClient::new(alone), BOUND).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("asks for plaintext (http), and this channel speaks TLS"),
        "{status:?}"
    );
}

#[tokio::test]
async fn a_channel_without_tls_does_not_try_those_who_ask_for_it() {
    let lines = Lines::record();
    let (certificates, server) = (Certificates::new(), Local::start().await);
    let front = Front::start(server.address(), &certificates, Clients::Any).await;
    let channel = Channel::builder(fixed([front.https(), server.address()])).build().unwrap();
    for _ in 0..20 {
        assert_eq!(greeted(&channel).await, server.address().to_string());
    }
    let skipped = format!("instance skipped address={} reason=asks for TLS", front.address());
    assert_eq!(lines.beginning(&skipped), 1, "{:?}", lines.at(Level::WARN));
    let alone = Channel::builder(fixed([front.https()])).build().unwrap();
    let status = greet(GreeterClient::new(alone), BOUND).await.unwrap_err();
    assert!(status.message().contains("give it `.tls(..)`"), "{status:?}");
}

#[tokio::test]
async fn who_speaks_plaintext_where_tls_is_expected_is_named_and_the_reverse() {
    let (certificates, server) = (Certificates::new(), Local::start().await);
    let cause = refusal(server.address(), Some(trusting(&certificates))).await;
    assert!(cause.contains("the peer does not speak TLS"), "{cause}");
    let front = Front::start(server.address(), &certificates, Clients::Any).await;
    let cause = refusal(front.address(), None).await;
    assert!(cause.contains("the peer speaks TLS"), "{cause}");
}

#[tokio::test]
async fn the_systems_roots_vouch_for_no_name_that_discovery_gives_unless_they_are_told_to() {
    let registered = || EtcdChannel::builder("hello.rpc").tls(Tls::new());
    let refused = registered().connect_lazy().unwrap_err();
    assert!(matches!(refused, ConnectError::Settings(SettingsError::DiscoveredNames)), "{refused}");
    let address: Address = "localhost:1".parse().unwrap();
    let refused = over([address.clone()], Tls::new()).build().unwrap_err();
    assert!(matches!(refused, SettingsError::DiscoveredNames), "{refused}");
    // A machine may have no roots at all; that is said then.
    let is_fine = |error: &SettingsError| matches!(error, SettingsError::Tls(TlsError::NoSystemRoots { .. }));
    for allowed in [
        over([address.clone()], Tls::new()).trust_system_roots_for_discovered_names(),
        over([address.clone()], Tls::new().server_name("hello.internal")),
    ] {
        assert!(allowed.build().err().as_ref().is_none_or(is_fine));
    }
    for target in ["direct:///https://localhost:1", "direct:///localhost:1"] {
        match EtcdChannel::builder(target).tls(Tls::new()).connect_lazy() {
            Err(ConnectError::Settings(error)) if is_fine(&error) => {}
            configured => drop(configured.expect("configured names are verified")),
        }
    }
}

#[tokio::test]
async fn a_target_with_https_speaks_tls_and_must_not_ask_for_less() {
    let (certificates, server) = (Certificates::new(), Local::start().await);
    let front = Front::start(server.address(), &certificates, Clients::Any).await;
    let target = format!("direct:///https://{}", front.address());
    let channel = EtcdChannel::builder(&target).tls(trusting(&certificates)).connect().await.unwrap();
    let reply = greet(GreeterClient::new(channel), BOUND).await.unwrap();
    assert_eq!(reply, server.address().to_string());

    let mixed = format!("{target},http://{}", server.address());
    let refused = EtcdChannel::connect_lazy(mixed).unwrap_err();
    assert!(matches!(refused, ConnectError::Target(TargetError::Mixed(_))), "{refused}");
    let plain = format!("direct:///http://{}", server.address());
    let refused = EtcdChannel::builder(&plain).tls(Tls::new()).connect_lazy().unwrap_err();
    assert!(matches!(refused, ConnectError::Target(TargetError::Mixed(_))), "{refused}");
    EtcdChannel::connect(plain).await.expect("a scheme alone harms nobody");
    if Tls::new().validate().is_ok() {
        let cause = refusal(format!("https://{}", front.address()), None).await;
        assert!(cause.contains("is not trusted: invalid peer certificate: UnknownIssuer"), "{cause}");
    }
}

#[tokio::test]
async fn settings_for_tls_that_make_no_sense_are_told_by_the_builder() {
    let (certificates, address) = (Certificates::new(), "h:1".parse::<Address>().unwrap());
    let refused = over([address], Tls::new().ca_file(certificates.path("missing.pem"))).build().unwrap_err();
    assert!(matches!(&refused, SettingsError::Tls(TlsError::Unreadable { .. })), "{refused}");
    assert!(refused.to_string().contains("missing.pem"), "{refused}");
}

#[tokio::test]
async fn a_server_that_is_killed_is_left_for_another() {
    let began = Instant::now();
    let (certificates, servers) = (Certificates::new(), [Local::start().await, Local::start().await]);
    let front = |server: &Local| Front::start(server.address(), &certificates, Clients::Any);
    let (first, second) = (front(&servers[0]).await, front(&servers[1]).await);
    let channel = over([first.address(), second.address()], trusting(&certificates)).build().unwrap();
    let log = UpdateLog::new(channel.updates());
    for front in [&first, &second] {
        log.until(&front.address(), EndpointState::Ready, began, BOUND).await;
    }
    let (killed, gone) = (first.address(), Instant::now());
    drop(first);
    log.until_lost(&killed, gone, BOUND).await;
    for _ in 0..20 {
        let reply = EchoClient::new(channel.clone()).unary(Chunk::default()).await.expect("one is left");
        assert_eq!(reply.extensions().get(), Some(&EndpointAddress(second.address())));
    }
}

#[tokio::test]
async fn servers_found_in_etcd_are_called_over_tls_by_channels_that_say_so() {
    let etcd = registry::etcd().await;
    let session = Etcd::connect(EtcdOptions::new([etcd.endpoint()])).await.expect("etcd answers");
    let (certificates, server) = (Certificates::new(), Local::start().await);
    let front = Front::start(server.address(), &certificates, Clients::Any).await;
    let registration = Registration::builder(&session, "hello.rpc", front.address()).register().await;
    let registration = registration.expect("etcd takes it");
    let channel = EtcdChannel::builder("hello.rpc").etcd(&session).tls(trusting(&certificates));
    let channel = channel.connect().await.expect("an endpoint is ready");
    let reply = greet(GreeterClient::new(channel), BOUND).await.expect("the server answers");
    assert_eq!(reply, server.address().to_string());
    let plain = EtcdChannel::builder("hello.rpc").etcd(&session).connect_timeout(SHORT).connect().await;
    let cause = plain.expect_err("plaintext is not taken").to_string();
    assert!(cause.contains("the peer speaks TLS") && cause.contains(&etcd.endpoint()), "{cause}");
    registration.deregister().await.expect("etcd takes it back");
}
