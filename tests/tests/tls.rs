//! TLS to etcd: who is trusted is spoken to, who is not is told why, and certificates may change while we run

#![cfg(unix)]

use std::{fs, process::Stdio, time::Duration};

use callsign::{
    Etcd, EtcdChannel, EtcdError, EtcdOptions, Registration, RegistrationState, Tls, TlsError,
    discover::{DiscoveryState, EtcdDiscover},
};
use callsign_tests::{
    certificates::Certificates,
    pb::{HelloRequest, greeter_client::GreeterClient},
    registry,
    service::{Local, who},
    view::View,
    wait,
};
use tokio::{io::AsyncWriteExt, net::TcpListener, sync::watch};

const SERVICE: &str = "hello.rpc";
const A: &str = "10.0.0.1:80";
const B: &str = "10.0.0.2:80";
/// For what starts etcd or waits for a backoff
const BOUND: Duration = Duration::from_secs(20);
/// What a refused session may take
const TIMEOUT: Duration = Duration::from_secs(3);

/// As a client of these certificates should be: whom it trusts and who it is, from files
fn mutual(certificates: &Certificates) -> Tls {
    let [certificate, key] = certificates.client();
    Tls::new().ca_file(certificates.ca()).identity_files(certificate, key)
}

async fn connected(host: &str, tls: Tls) -> Etcd {
    Etcd::connect(EtcdOptions::new([host]).tls(tls)).await.expect("etcd answers over TLS")
}

/// Why there is no session, told in time
async fn refusal(options: EtcdOptions) -> String {
    let (connected, took) = wait::timed(Etcd::connect(options.connect_timeout(TIMEOUT))).await;
    assert!(took < TIMEOUT + Duration::from_secs(1), "{took:?}");
    let Err(EtcdError::Unreachable { cause, .. }) = connected else { panic!("{connected:?}") };
    cause
}

async fn register(etcd: &Etcd, address: &str) -> Registration {
    let builder = Registration::builder(etcd, SERVICE, address.parse().expect("an address"));
    builder.ttl(Duration::from_secs(15)).register().await.expect("etcd takes it")
}

/// A view, and the state of the discovery behind it
fn follow(etcd: &Etcd) -> (View, watch::Receiver<DiscoveryState>) {
    let discover = EtcdDiscover::new(etcd, SERVICE).expect("a valid name");
    let state = discover.state();
    (View::of(discover), state)
}

async fn until_watching(state: &mut watch::Receiver<DiscoveryState>) {
    let watching = state.wait_for(|state| matches!(state, DiscoveryState::Watching { .. }));
    wait::within("watching", BOUND, watching).await.expect("the task lives");
}

/// Waits until the discovery is at a loss for a cause that contains this
async fn until_resuming_for(state: &mut watch::Receiver<DiscoveryState>, cause: &str) {
    let resuming = state.wait_for(|state| format!("{state:?}").contains(cause));
    wait::within(cause, BOUND, resuming).await.expect("the task lives");
}

#[tokio::test]
async fn a_ca_that_is_named_is_trusted_for_an_address_and_for_a_name() {
    let certificates = Certificates::new();
    let Some(etcd) = registry::tls(&certificates.etcd_options()).await else { return };
    connected(&etcd.endpoint(), Tls::new().ca_file(certificates.ca())).await;
    let port = etcd.endpoint().replace("127.0.0.1", "localhost");
    let pem = fs::read(certificates.ca()).expect("it was written");
    connected(&format!("https://{port}"), Tls::new().ca_pem(pem)).await;
}

#[tokio::test]
async fn servers_are_registered_found_and_called_over_an_etcd_with_mtls() {
    let certificates = Certificates::new();
    let Some(etcd) = registry::tls(&certificates.etcd_mtls_options()).await else { return };
    let session = connected(&etcd.endpoint(), mutual(&certificates)).await;
    let server = Local::start().await;
    let _registration = register(&session, &server.address().to_string()).await;
    // Another session, with PEM from memory.
    let pem = |path| fs::read(path).expect("it was written");
    let [certificate, key] = certificates.client().map(pem);
    let tls = Tls::new().ca_pem(pem(certificates.ca())).identity_pem(certificate, key);
    let other = connected(&etcd.endpoint(), tls).await;
    let channel = EtcdChannel::builder(SERVICE).etcd(&other).connect().await.expect("an endpoint is ready");
    let reply = GreeterClient::new(channel).say_hello(HelloRequest { name: "you".into() }).await;
    assert_eq!(who(reply.expect("the server answers").get_ref()), server.address().to_string());
}

#[tokio::test]
async fn a_ca_that_nobody_named_is_not_trusted() {
    let (certificates, others) = (Certificates::new(), Certificates::new());
    let Some(etcd) = registry::tls(&certificates.etcd_options()).await else { return };
    let unknown = "the peer's certificate is not trusted: invalid peer certificate: UnknownIssuer";
    let wrong = EtcdOptions::new([etcd.endpoint()]).tls(Tls::new().ca_file(others.ca()));
    let cause = refusal(wrong).await;
    assert!(cause.contains(unknown) && cause.contains(&etcd.endpoint()), "{cause}");
    if let Err(error) = Tls::new().validate() {
        // Then that is what a session says.
        assert!(matches!(error, TlsError::NoSystemRoots { .. }), "{error}");
        return;
    }
    let cause = refusal(EtcdOptions::new([format!("https://{}", etcd.endpoint())])).await;
    assert!(cause.contains(unknown), "the system's roots: {cause}");
}

#[tokio::test]
async fn the_systems_roots_are_trusted_by_a_host_with_https() {
    let certificates = Certificates::new();
    let Some(etcd) = registry::tls(&certificates.etcd_options()).await else { return };
    // A process of its own, for what it thinks are the system's roots is told by its environment.
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_greeter"));
    command.args(["--service", SERVICE]).env("CALLSIGN_ETCD", format!("https://{}", etcd.endpoint()));
    command.env("SSL_CERT_FILE", certificates.ca()).env_remove("SSL_CERT_DIR");
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true).spawn();
    let mut greeter = spawned.expect("the greeter is built");
    let session = connected(&etcd.endpoint(), Tls::new().ca_file(certificates.ca())).await;
    let (view, _) = follow(&session);
    wait::until("it has registered", BOUND, || (view.addresses().len() == 1).then_some(())).await;
    assert!(greeter.try_wait().expect("it is our child").is_none());
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused_unless_that_name_is_asked_for() {
    let certificates = Certificates::for_server(&["etcd.test"]);
    let Some(etcd) = registry::tls(&certificates.etcd_options()).await else { return };
    let tls = || Tls::new().ca_file(certificates.ca());
    let cause = refusal(EtcdOptions::new([etcd.endpoint()]).tls(tls())).await;
    let told = ["for another name", "not valid for name \"127.0.0.1\"", "etcd.test"];
    assert!(told.iter().all(|part| cause.contains(part)), "{cause}");
    connected(&etcd.endpoint(), tls().server_name("etcd.test")).await;
    let wrong = tls().server_name("other.test");
    let cause = refusal(EtcdOptions::new([etcd.endpoint()]).tls(wrong)).await;
    assert!(cause.contains("other.test"), "{cause}");
}

#[tokio::test]
async fn a_server_that_wants_a_client_certificate_is_understood() {
    let (certificates, others) = (Certificates::new(), Certificates::new());
    let Some(etcd) = registry::tls(&certificates.etcd_mtls_options()).await else { return };
    let options = |tls| EtcdOptions::new([etcd.endpoint()]).tls(tls);
    let trusting = || Tls::new().ca_file(certificates.ca());
    let cause = refusal(options(trusting())).await;
    assert!(cause.contains("asks for a client certificate: received fatal alert"), "{cause}");
    let [certificate, key] = others.client();
    let cause = refusal(options(trusting().identity_files(certificate, key))).await;
    assert!(cause.contains("refuses our client certificate: received fatal alert"), "{cause}");
}

#[tokio::test]
async fn tls_to_a_plain_port_is_said_so() {
    let certificates = Certificates::new();
    let etcd = registry::etcd().await;
    let options = EtcdOptions::new([etcd.endpoint()]).tls(Tls::new().ca_file(certificates.ca()));
    let cause = refusal(options).await;
    assert!(cause.contains("not speak TLS"), "{cause}");
}

#[tokio::test]
async fn plain_to_a_port_for_tls_is_said_so() {
    let certificates = Certificates::new();
    let Some(etcd) = registry::tls(&certificates.etcd_options()).await else { return };
    let cause = refusal(EtcdOptions::new([etcd.endpoint()])).await;
    assert!(cause.contains("closed the connection without a word: it may speak TLS"), "{cause}");
}

/// Answers every connection with these bytes, and closes it
async fn answering(bytes: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            // A peer that is gone has had its answer.
            let _ = socket.write_all(bytes).await;
            let _ = socket.shutdown().await;
            let _ = tokio::io::copy(&mut socket, &mut tokio::io::sink()).await;
        }
    });
    address.to_string()
}

#[tokio::test]
async fn an_answer_of_the_other_kind_is_recognised() {
    let certificates = Certificates::new();
    // An alert: fatal, protocol version.
    let host = answering(b"\x15\x03\x01\x00\x02\x02\x46").await;
    let cause = refusal(EtcdOptions::new([host])).await;
    assert!(cause.contains("the peer speaks TLS"), "{cause}");
    let host = answering(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    let cause = refusal(EtcdOptions::new([host]).tls(mutual(&certificates))).await;
    assert!(cause.contains("the peer does not speak TLS"), "{cause}");
}

#[tokio::test]
async fn a_peer_that_is_silent_in_the_handshake_costs_no_more_than_the_timeout() {
    let certificates = Certificates::new();
    // The kernel accepts; nobody reads.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let host = listener.local_addr().expect("it is bound").to_string();
    let cause = refusal(EtcdOptions::new([host]).tls(mutual(&certificates))).await;
    assert!(cause.contains("the TLS handshake did not end in time"), "{cause}");
}

#[tokio::test]
async fn certificates_that_are_replaced_on_disk_are_used_without_a_restart_of_ours() {
    let certificates = Certificates::new();
    let Some(mut etcd) = registry::tls(&certificates.etcd_mtls_options()).await else { return };
    let session = connected(&etcd.endpoint(), mutual(&certificates)).await;
    let registration = register(&session, A).await;
    let (view, mut discovery) = follow(&session);
    view.until(&[A], BOUND).await;
    let [certificate, key] = certificates.client();
    let pem = |path| fs::read(path).expect("it was written");
    let former = Tls::new().ca_pem(pem(certificates.ca())).identity_pem(pem(certificate), pem(key));

    certificates.rotate();
    etcd.kill9();
    let away = discovery.wait_for(|state| matches!(state, DiscoveryState::Resuming { .. }));
    wait::within("the loss is seen", BOUND, away).await.expect("the task lives");
    etcd.restart().await;
    until_watching(&mut discovery).await;
    let mut state = registration.state();
    let registered = state.wait_for(|state| matches!(state, RegistrationState::Registered { .. }));
    wait::within("it is registered", BOUND, registered).await.expect("the task lives");
    // What happens from now on is seen and done.
    let _other = register(&session, B).await;
    view.until(&[A, B], BOUND).await;
    assert_eq!(view.removed(), 0, "nothing left the view meanwhile");
    let cause = refusal(EtcdOptions::new([etcd.endpoint()]).tls(former)).await;
    assert!(cause.contains("is not trusted"), "the former certificates are worth nothing: {cause}");
    registration.deregister().await.expect("etcd takes it back");
    view.until(&[B], BOUND).await;
}

#[tokio::test]
async fn a_ca_that_only_the_server_has_replaced_keeps_the_view_and_is_named() {
    let certificates = Certificates::new();
    let Some(mut etcd) = registry::tls(&certificates.etcd_options()).await else { return };
    let ours = certificates.path("ours.pem");
    fs::copy(certificates.ca(), &ours).expect("writable");
    let session = connected(&etcd.endpoint(), Tls::new().ca_file(&ours)).await;
    let _registration = register(&session, A).await;
    let (view, mut discovery) = follow(&session);
    view.until(&[A], BOUND).await;

    certificates.rotate();
    etcd.kill9();
    etcd.restart().await;
    until_resuming_for(&mut discovery, "is not trusted: invalid peer certificate: BadSignature").await;
    assert_eq!(view.addresses(), [A]);
    fs::copy(certificates.ca(), &ours).expect("writable");
    until_watching(&mut discovery).await;
    let _other = register(&session, B).await;
    view.until(&[A, B], BOUND).await;
    assert_eq!(view.removed(), 0, "nothing left the view meanwhile");
}

/// Replaces the file by its first half, as one who writes slowly does; gives back what it was
fn halve(path: &std::path::Path) -> Vec<u8> {
    let whole = fs::read(path).expect("it was written");
    fs::write(path, &whole[..whole.len() / 2]).expect("writable");
    whole
}

#[tokio::test]
async fn while_files_are_half_written_the_last_good_ones_are_used() {
    let certificates = Certificates::new();
    let Some(mut etcd) = registry::tls(&certificates.etcd_mtls_options()).await else { return };
    // etcd reads its own copy: it starts with nothing but whole files.
    let ours = certificates.path("ours.pem");
    fs::copy(certificates.ca(), &ours).expect("writable");
    let [certificate, key] = certificates.client();
    let tls = Tls::new().ca_file(&ours).identity_files(&certificate, &key);
    let session = connected(&etcd.endpoint(), tls.clone()).await;
    let (view, mut discovery) = follow(&session);
    until_watching(&mut discovery).await;
    for file in [&ours, &certificate, &key] {
        halve(file);
    }
    let error = Etcd::connect_lazy(EtcdOptions::new([etcd.endpoint()]).tls(tls)).expect_err("a half file");
    assert!(matches!(error, EtcdError::Tls(TlsError::BadPem { .. })), "{error}");
    etcd.kill9();
    let away = discovery.wait_for(|state| matches!(state, DiscoveryState::Resuming { .. }));
    wait::within("the loss is seen", BOUND, away).await.expect("the task lives");
    etcd.restart().await;
    until_watching(&mut discovery).await;
    let _registration = register(&session, A).await;
    view.until(&[A], BOUND).await;
}

#[test]
fn what_makes_no_sense_is_told_before_any_network_call() {
    let (certificates, others) = (Certificates::new(), Certificates::new());
    let [certificate, key] = certificates.client();
    let [_, other_key] = others.client();
    let (missing, empty) = (certificates.path("missing.pem"), certificates.path("empty.pem"));
    fs::write(&empty, "no PEM at all").expect("writable");
    let garbled = certificates.path("garbled.pem");
    fs::write(&garbled, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").expect("writable");
    let told = |tls: Tls| {
        let session = Etcd::connect_lazy(EtcdOptions::new(["127.0.0.1:1"]).tls(tls));
        let Err(EtcdError::Tls(error)) = session else { panic!("{session:?}") };
        (error.to_string(), error)
    };
    let tls = || Tls::new().ca_file(certificates.ca());
    let ca = |path| Tls::new().ca_file(path);

    let (text, error) = told(ca(&missing));
    assert!(matches!(error, TlsError::Unreadable { .. }) && text.contains("missing.pem"), "{text}");
    let (text, error) = told(ca(&empty));
    assert!(matches!(error, TlsError::NoCertificate { .. }) && text.contains("empty.pem"), "{text}");
    let (text, error) = told(ca(&garbled));
    assert!(matches!(error, TlsError::BadCertificate { .. }) && text.contains("garbled.pem"), "{text}");
    let (text, error) = told(tls().identity_files(&certificate, &certificate));
    assert!(matches!(error, TlsError::NoKey { .. }) && text.contains("client.pem"), "{text}");
    let (text, error) = told(tls().identity_files(&certificate, &other_key));
    assert!(matches!(error, TlsError::BadIdentity { .. }) && text.contains("KeyMismatch"), "{text}");
    let (text, error) = told(tls().identity_pem("", ""));
    assert!(matches!(error, TlsError::NoCertificate { .. }) && text.contains("PEM"), "{text}");
    let (text, error) = told(tls().server_name("not a name"));
    assert!(matches!(error, TlsError::BadServerName { .. }) && text.contains("not a name"), "{text}");
    // And what makes sense is not.
    tls().identity_files(certificate, key).server_name("::1").validate().expect("all is well");
}

#[test]
fn no_key_is_shown_by_debug() {
    let certificates = Certificates::new();
    let [certificate, key] = certificates.client().map(|path| fs::read(path).expect("it was written"));
    let secret = String::from_utf8_lossy(&key).lines().nth(1).expect("PEM has lines").to_owned();
    let tls = Tls::new().ca_file(certificates.ca()).identity_pem(certificate, key);
    let options = EtcdOptions::new(["127.0.0.1:1"]).tls(tls);
    let shown = format!("{options:?} {:?}", Etcd::connect_lazy(options.clone()));
    assert!(shown.contains("ca.pem"), "{shown}");
    let bytes = format!("{:?}", secret.as_bytes());
    assert!(!shown.contains(&secret) && !shown.contains(bytes.trim_matches(['[', ']'])), "{shown}");
}
