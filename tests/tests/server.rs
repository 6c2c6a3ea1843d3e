//! A server's life against an etcd: in which order it comes, and in which it goes

#![cfg(unix)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use callsign::{
    Address, Etcd, EtcdChannel, EtcdOptions, RegistrationState, Serve, ServeError, ServeRegistered,
};
use callsign_tests::{
    echo::{Chunk, echo_client::EchoClient},
    etcd::EtcdProcess,
    greeter,
    load::{Pace, greet},
    pb::{HelloRequest, greeter_client::GreeterClient, greeter_server::GreeterServer},
    proxy::Proxy,
    registry,
    service::{Calls, Hello, router},
    wait,
};
use tokio::{net::TcpStream, sync::oneshot, task::JoinHandle};
use tonic::{
    Request, Status,
    service::{Interceptor, InterceptorLayer},
    transport::{Endpoint, Server, server::Router},
};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_check_response::ServingStatus as Told, health_client::HealthClient},
    server::{HealthReporter, HealthService},
};
use tower::layer::util::{Identity, Stack};

const SERVICE: &str = "hello.rpc";
const NO_LEASES: [i64; 0] = [];
/// So many services that reading their health takes a while
const MANY: u32 = 3000;
const BOUND: Duration = Duration::from_secs(5);

fn session(etcd: &EtcdProcess) -> Etcd {
    Etcd::connect_lazy(EtcdOptions::new([etcd.endpoint()])).expect("a valid host")
}

fn hello(calls: &Calls) -> Router {
    router(Server::builder(), Hello::new("test", Duration::ZERO), calls)
}

/// A server in this process, told to stop by a channel
struct Running {
    address: Address,
    calls: Calls,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), ServeError>>,
}

impl Running {
    /// Serves and waits until it is registered
    async fn start(etcd: &EtcdProcess, configure: impl FnOnce(Serve) -> Serve) -> Self {
        let calls = Calls::default();
        let (stop, stopped) = oneshot::channel();
        let serve = Serve::new(SERVICE).listen("127.0.0.1:0").etcd(&session(etcd));
        let serve = configure(serve.shutdown(async { drop(stopped.await) }));
        let task = tokio::spawn(serve.run(hello(&calls)));
        let all = registry::until_registered(etcd, SERVICE, BOUND, |all| all.len() == 1).await;
        Self { address: all[0].parse().expect("an address was published"), calls, stop, task }
    }

    async fn echo(&self) -> EchoClient<tonic::transport::Channel> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).expect("a valid address");
        EchoClient::new(endpoint.connect().await.expect("it listens"))
    }

    /// A call that is in flight for `rest`
    async fn in_flight(&self, rest: Duration) -> JoinHandle<Result<(), tonic::Status>> {
        let mut client = self.echo().await;
        let rest_ms = rest.as_millis().try_into().expect("a minute at most");
        let started = self.calls.started();
        let call =
            tokio::spawn(async move { client.unary(Chunk { rest_ms, ..Chunk::default() }).await.map(drop) });
        let begun = || (self.calls.started() > started).then_some(());
        wait::until("the call has reached the server", BOUND, begun).await;
        call
    }
}

async fn until_refused(address: &Address) {
    let refused = async {
        while TcpStream::connect(address.authority()).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    wait::within("the listener is closed", BOUND, refused).await;
}

#[tokio::test]
async fn it_deregisters_then_serves_on_then_drains_and_no_call_is_lost() {
    let etcd = registry::etcd().await;
    let server = Running::start(&etcd, |serve| serve.notice(Duration::from_secs(2))).await;
    let slow = server.in_flight(Duration::from_secs(3)).await;
    let stopped = Instant::now();
    server.stop.send(()).unwrap();
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.is_empty()).await;
    assert!(stopped.elapsed() < Duration::from_secs(2), "the key goes first");
    let new = GreeterClient::connect(format!("http://{}", server.address)).await;
    new.unwrap().say_hello(HelloRequest::default()).await.expect("who has not noticed yet is still served");
    until_refused(&server.address).await;
    assert!(stopped.elapsed() >= Duration::from_secs(2), "clients had their time to notice");
    assert!(!server.task.is_finished(), "a call is in flight");
    slow.await.unwrap().expect("what is in flight ends well");
    wait::within("it returns once it has drained", BOUND, server.task).await.unwrap().unwrap();
    assert!(stopped.elapsed() < Duration::from_secs(5), "and no later");
}

#[tokio::test]
async fn a_call_that_does_not_end_is_cut_at_the_end_of_the_drain() {
    let etcd = registry::etcd().await;
    let quick = |serve: Serve| serve.notice(Duration::ZERO).drain(Duration::from_millis(300));
    let server = Running::start(&etcd, quick).await;
    let stuck = server.in_flight(Duration::from_secs(60)).await;
    server.stop.send(()).unwrap();
    let (returned, took) = wait::timed(server.task).await;
    returned.unwrap().unwrap();
    assert!((Duration::from_millis(300)..Duration::from_secs(2)).contains(&took), "{took:?}");
    wait::within("the caller hears of it", BOUND, stuck).await.unwrap().unwrap_err();
    wait::until("the handler is dropped", BOUND, || (server.calls.open() == 0).then_some(())).await;
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    let etcd = registry::etcd().await;
    let mut server =
        greeter!().register(SERVICE, &etcd.endpoint()).delay(Duration::from_secs(60)).start().await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 1).await;
    let mut client = GreeterClient::connect(format!("http://{}", server.address())).await.unwrap();
    let stuck = tokio::spawn(async move { client.say_hello(HelloRequest::default()).await });
    server.sigterm();
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.is_empty()).await;
    server.sigint();
    // One signal would leave it a second for clients to notice and five for the call.
    let status = server.exited(Duration::from_secs(3)).await;
    assert!(status.success(), "{status}");
    wait::within("the caller hears of it", BOUND, stuck).await.unwrap().unwrap_err();
}

#[tokio::test]
async fn one_signal_lets_it_drain_and_end_well() {
    let etcd = registry::etcd().await;
    let mut server =
        greeter!().register(SERVICE, &etcd.endpoint()).delay(Duration::from_secs(2)).start().await;
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 1).await;
    let mut client = GreeterClient::connect(format!("http://{}", server.address())).await.unwrap();
    let slow = tokio::spawn(async move { client.say_hello(HelloRequest::default()).await });
    // Whether the call comes before the signal or after: there is a second in which it is taken.
    server.sigterm();
    slow.await.unwrap().expect("what is in flight ends well");
    let status = server.exited(BOUND).await;
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn it_serves_without_etcd_and_registers_when_that_comes() {
    let mut etcd = registry::etcd().await;
    etcd.kill9();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = Serve::new(SERVICE).listener(listener).etcd(&session(&etcd));
    let serving = tokio::spawn(serve.run(hello(&Calls::default())));
    let mut client = GreeterClient::connect(format!("http://{address}")).await.unwrap();
    client.say_hello(HelloRequest::default()).await.expect("it serves");
    etcd.restart().await;
    let all = registry::until_registered(&etcd, SERVICE, 2 * BOUND, |all| !all.is_empty()).await;
    assert_eq!(all, [address.to_string()]);
    serving.abort();
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.is_empty()).await;
}

/// It ended, although it was to serve without etcd
#[tokio::test]
async fn it_serves_while_nobody_knows_the_way_to_etcd_unless_told_to_fail_fast() {
    let nowhere = Etcd::connect_lazy(EtcdOptions::new(["no-such-host.invalid:2379"])).unwrap();
    let listener = tokio::net::TcpListener::bind("0.0.0.0:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (stop, stopped) = oneshot::channel::<()>();
    let serve = Serve::new(SERVICE).listener(listener).etcd(&nowhere).notice(Duration::ZERO);
    let serve = serve.shutdown(async { drop(stopped.await) });
    let state = serve.state();
    let serving = tokio::spawn(serve.run(hello(&Calls::default())));
    let told = |state: &RegistrationState| matches!(state, RegistrationState::Granting { cause: Some(cause) } if cause.contains("advertise one"));
    until_state(&state, told).await;
    {
        let mut client = GreeterClient::connect(format!("http://127.0.0.1:{port}")).await.unwrap();
        client.say_hello(HelloRequest::default()).await.expect("it serves");
    }
    stop.send(()).unwrap();
    wait::within("it ends", BOUND, serving).await.unwrap().unwrap();
    assert_eq!(*state.borrow(), RegistrationState::Deregistered);

    let serve = Serve::new(SERVICE).listen("0.0.0.0:0").etcd(&nowhere).fail_fast(true);
    let failed = wait::within("it fails", BOUND, serve.run(hello(&Calls::default()))).await.unwrap_err();
    assert!(matches!(failed, ServeError::Advertise(_)), "{failed}");
}

#[tokio::test]
async fn told_to_fail_fast_it_says_what_is_wrong_with_etcd() {
    let mut etcd = registry::etcd().await;
    etcd.kill9();
    let serve = Serve::new(SERVICE).listen("127.0.0.1:0").etcd(&session(&etcd)).fail_fast(true);
    let failed = wait::within("it fails", BOUND, serve.run(hello(&Calls::default()))).await.unwrap_err();
    let message = failed.to_string();
    assert!(message.contains(SERVICE) && message.contains(&etcd.endpoint()), "{message}");
}

#[tokio::test]
async fn all_addresses_are_published_as_one_that_can_be_reached() {
    let etcd = registry::etcd().await;
    let server = Running::start(&etcd, |serve| serve.listen("0.0.0.0:0").notice(Duration::ZERO)).await;
    assert_eq!(server.address.host(), "127.0.0.1", "the way to etcd");
    let call = server.in_flight(Duration::ZERO).await;
    call.await.unwrap().unwrap();
    server.stop.send(()).unwrap();
    server.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn an_advertised_address_wins() {
    let etcd = registry::etcd().await;
    let advertised: Address = "198.51.100.7:443".parse().unwrap();
    let server =
        Running::start(&etcd, |serve| serve.advertise(advertised.clone()).notice(Duration::ZERO)).await;
    assert_eq!(server.address, advertised);
    server.stop.send(()).unwrap();
    server.task.await.unwrap().unwrap();
}

#[tokio::test]
async fn dropped_it_cuts_its_connections_and_deregisters() {
    let etcd = registry::etcd().await;
    let server = Running::start(&etcd, |serve| serve).await;
    let stuck = server.in_flight(Duration::from_secs(60)).await;
    server.task.abort();
    wait::within("the caller hears of it", BOUND, stuck).await.unwrap().unwrap_err();
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.is_empty()).await;
}

#[tokio::test]
async fn what_is_wrong_with_the_input_is_said_before_anything_is_bound() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let run = async |serve: Serve| serve.run(hello(&Calls::default())).await.unwrap_err();
    // Binding would fail first.
    let tls: Address = "https://h:443".parse().unwrap();
    for bad in [
        Serve::new("a/"),
        Serve::new("a").id(0),
        Serve::new("a").ttl(Duration::from_secs(1)),
        Serve::new("a").advertise(tls),
    ] {
        assert!(matches!(run(bad.listen(&address)).await, ServeError::Register(_)));
    }
    assert!(matches!(run(Serve::new("a").listen("9090")).await, ServeError::Listen(_)));
    assert!(matches!(run(Serve::new("a").listen(&address)).await, ServeError::Listen(_)));
}

#[tokio::test]
async fn told_to_stop_while_it_registers_it_leaves_nothing_behind() {
    let etcd = registry::etcd().await;
    let proxy = Proxy::to(etcd.endpoint()).await;
    // The lease passes, the key does not.
    proxy.admit(1);
    let session = Etcd::connect_lazy(EtcdOptions::new([proxy.endpoint()])).unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let serve = Serve::new(SERVICE).listen("127.0.0.1:0").etcd(&session).fail_fast(true);
    let serve = serve.notice(Duration::ZERO).shutdown(async { drop(stopped.await) });
    // As in a process of its own, nothing goes on in the background once it has returned.
    let serving = tokio::task::spawn_blocking(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(serve.run(hello(&Calls::default())))
    });
    proxy.until_made(2).await;
    assert_eq!(etcd.leases().await.len(), 1);
    stop.send(()).unwrap();
    wait::within("it ends", BOUND, serving).await.unwrap().unwrap();
    assert_eq!(etcd.leases().await, NO_LEASES);
}

#[tokio::test]
async fn the_address_of_the_pod_is_published_for_all_addresses() {
    let etcd = registry::etcd().await;
    let all = Address::from(std::net::SocketAddr::from(([0, 0, 0, 0], 0)));
    let greeter = greeter!().register(SERVICE, &etcd.endpoint()).listen(&all).pod_ip("127.9.9.9");
    let server = greeter.start().await;
    let shown = registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 1).await;
    assert_eq!(shown, [format!("127.9.9.9:{}", server.address().port())]);
}

/// A router with a layer that counts the calls
fn layered(counted: &Arc<AtomicUsize>) -> Router<Stack<InterceptorLayer<Count>, Identity>> {
    let hello = Hello::new("test", Duration::ZERO);
    let count = InterceptorLayer::new(Count(Arc::clone(counted)));
    Server::builder().layer(count).add_service(GreeterServer::new(hello))
}

#[derive(Clone)]
struct Count(Arc<AtomicUsize>);

impl Interceptor for Count {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(request)
    }
}

#[tokio::test]
async fn a_layered_router_serves() {
    let etcd = registry::etcd().await;
    let counted = Arc::default();
    let serve = Serve::new(SERVICE).listen("127.0.0.1:0").etcd(&session(&etcd));
    let serving = tokio::spawn(serve.run(layered(&counted)));
    let all = registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 1).await;
    let mut client = GreeterClient::connect(format!("http://{}", all[0])).await.unwrap();
    client.say_hello(HelloRequest::default()).await.unwrap();
    assert_eq!(counted.load(Ordering::Relaxed), 1);
    serving.abort();
}

#[tokio::test]
async fn a_layered_router_serves_in_one_line() {
    // The type is what this shows: it compiles, and its future can be spawned. Where it listens is taken.
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let served = tokio::spawn(layered(&Arc::default()).serve_registered(SERVICE, address));
    assert!(matches!(served.await.unwrap(), Err(ServeError::Listen(_))));
}

fn is_registered(state: &RegistrationState) -> bool {
    matches!(state, RegistrationState::Registered { .. })
}

/// Waits until the state that a `Serve` shows meets `condition`
async fn until_state(
    state: &tokio::sync::watch::Receiver<RegistrationState>,
    condition: impl Fn(&RegistrationState) -> bool,
) {
    let what = format!("the state is {:?}", *state.borrow());
    wait::within(&what, BOUND, state.clone().wait_for(condition)).await.expect("the server runs");
}

/// Waits until there are as many leases
async fn until_leases(etcd: &EtcdProcess, expected: usize) {
    let all = async { while etcd.leases().await.len() != expected {} };
    wait::within(&format!("there are {expected} leases"), BOUND, all).await;
}

async fn set(reporter: &HealthReporter, service: &str, serving: bool) {
    let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
    reporter.set_service_status(service, status).await;
}

#[tokio::test]
async fn what_the_registration_does_is_shown_by_the_server() {
    let etcd = registry::etcd().await;
    let mut state = None;
    let server = Running::start(&etcd, |serve| {
        let serve = serve.notice(Duration::ZERO);
        let shown = state.insert(serve.state());
        assert_eq!(*shown.borrow(), RegistrationState::Granting { cause: None });
        serve
    })
    .await;
    let state = state.unwrap();
    until_state(&state, is_registered).await;
    server.stop.send(()).unwrap();
    server.task.await.unwrap().unwrap();
    assert_eq!(*state.borrow(), RegistrationState::Deregistered);
}

#[tokio::test]
async fn a_server_that_does_not_serve_yet_is_registered_when_it_does() {
    let etcd = registry::etcd().await;
    for fail_fast in [false, true] {
        let reporter = HealthReporter::new();
        set(&reporter, "pb.Greeter", false).await;
        let serve = Serve::new(SERVICE).listen("127.0.0.1:0").etcd(&session(&etcd)).fail_fast(fail_fast);
        let serve = serve.health(reporter.clone()).health_service("pb.Greeter");
        let state = serve.state();
        let mut seen = state.clone();
        let watching = tokio::spawn(async move {
            let mut states = Vec::new();
            while seen.changed().await.is_ok() {
                states.push(seen.borrow_and_update().clone());
            }
            states
        });
        let serving = tokio::spawn(serve.run(hello(&Calls::default())));
        until_state(&state, |state| *state == RegistrationState::Paused).await;
        assert_eq!(registry::registered(&etcd, SERVICE).await, [""; 0]);
        set(&reporter, "pb.Greeter", true).await;
        registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 1).await;
        until_state(&state, is_registered).await;
        drop(state);
        serving.abort();
        let states = wait::within("the state is dropped", BOUND, watching).await.unwrap();
        let registered = states.iter().position(is_registered).unwrap();
        assert!(states[..registered].contains(&RegistrationState::Paused), "not before: {states:?}");
        registry::until_registered(&etcd, SERVICE, BOUND, |all| all.is_empty()).await;
    }
}

#[tokio::test]
async fn a_server_that_is_unwell_at_its_start_is_not_in_etcd_for_a_moment() {
    let etcd = registry::etcd().await;
    for fail_fast in [false, true] {
        let reporter = HealthReporter::new();
        set(&reporter, "", false).await;
        let serve = Serve::new(SERVICE).listen("127.0.0.1:0").etcd(&session(&etcd)).fail_fast(fail_fast);
        // Longer than it takes to get a lease and to put a key: what is followed from then on comes too late.
        let many = |serve: Serve, number: u32| serve.health_service(number.to_string());
        let serve = (0..MANY).fold(serve.health(reporter.clone()), many);
        for number in 0..MANY {
            set(&reporter, &number.to_string(), true).await;
        }
        let state = serve.state();
        let puts = etcd.revision().await;
        let serving = tokio::spawn(serve.run(hello(&Calls::default())));
        until_state(&state, |state| *state == RegistrationState::Paused).await;
        until_leases(&etcd, 1).await;
        assert_eq!(etcd.revision().await, puts, "nothing was put, nor deleted again");
        set(&reporter, "", true).await;
        until_state(&state, is_registered).await;
        serving.abort();
        until_leases(&etcd, 0).await;
    }
}

#[tokio::test]
async fn health_ends_with_the_registration_and_before_the_server() {
    let etcd = registry::etcd().await;
    let reporter = HealthReporter::new();
    let service = HealthService::from_health_reporter(reporter.clone());
    let router =
        hello(&Calls::default()).add_service(tonic_health::pb::health_server::HealthServer::new(service));
    let (stop, stopped) = oneshot::channel::<()>();
    let serve = Serve::new(SERVICE).listen("127.0.0.1:0").etcd(&session(&etcd)).health(reporter);
    let serving = tokio::spawn(serve.shutdown(async { drop(stopped.await) }).run(router));
    let all = registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 1).await;
    let endpoint = Endpoint::from_shared(format!("http://{}", all[0])).unwrap();
    let client = HealthClient::new(endpoint.connect().await.unwrap());
    let status = async || client.clone().check(HealthCheckRequest::default()).await.unwrap().get_ref().status;
    assert_eq!(status().await, Told::Serving as i32);
    stop.send(()).unwrap();
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.is_empty()).await;
    assert_eq!(status().await, Told::NotServing as i32);
    drop(client);
    serving.await.unwrap().unwrap();
    assert_eq!(etcd.leases().await, NO_LEASES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_whose_health_comes_and_goes_lose_no_call() {
    let etcd = registry::etcd().await;
    let start = || greeter!().register(SERVICE, &etcd.endpoint()).health("serving").start();
    let mut servers = [start().await, start().await];
    registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 2).await;
    let leases = etcd.leases().await.len();
    let channel = EtcdChannel::builder(SERVICE).etcd(&session(&etcd)).connect().await.unwrap();
    let client = GreeterClient::new(channel);
    let pace = Pace { rate: 100, lasting: Duration::from_secs(5) };
    let load = tokio::spawn(pace.open_loop(move || greet(client.clone(), Duration::from_secs(2))));
    let mut away = Vec::new();
    for turn in 0..4 {
        let server = &mut servers[turn % 2];
        let address = server.address().to_string();
        server.tell("not-serving");
        server.until_line(BOUND, |line| line == "registration paused").await;
        let gone = registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 1).await;
        assert!(!gone.contains(&address));
        // From when all clients have had their time to hear of it.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let from = Instant::now();
        tokio::time::sleep(Duration::from_millis(400)).await;
        away.push((address, from, Instant::now()));
        server.tell("serving");
        server.until_line(BOUND, |line| line.starts_with("registration registered")).await;
    }
    let load = load.await.unwrap();
    load.assert_none_failed(pace);
    for (server, from, to) in away {
        assert_eq!(load.share(&server, from, to), 0.0, "{server} was called while it did not serve");
    }
    assert_eq!(etcd.leases().await.len(), leases);
    for server in &mut servers {
        server.sigterm();
        server.until_line(BOUND, |line| line == "registration deregistered").await;
        server.exited(BOUND).await;
    }
    assert_eq!((registry::registered(&etcd, SERVICE).await, etcd.leases().await), (Vec::new(), Vec::new()));
}
