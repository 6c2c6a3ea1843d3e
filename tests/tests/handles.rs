//! A channel goes wherever a generated client goes

#![cfg(unix)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use callsign::{Address, EtcdChannel};
use callsign_tests::{
    channel::over,
    greeter,
    load::greet,
    pb::{HelloRequest, greeter_client::GreeterClient},
    registry,
    service::Local,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::Barrier,
    task::JoinSet,
};
use tonic::{Request, Status};

const DEADLINE: Duration = Duration::from_secs(2);

fn hello() -> HelloRequest {
    HelloRequest { name: "handle".to_owned() }
}

#[tokio::test]
async fn a_client_works_inside_a_spawned_task() {
    let server = Local::start().await;
    let mut client = GreeterClient::new(over([server.address()]));
    let reply = tokio::spawn(async move { client.say_hello(hello()).await });
    assert!(reply.await.unwrap().unwrap().get_ref().message.starts_with("Hello handle"));
}

#[tokio::test]
async fn a_client_works_with_an_interceptor() {
    let server = Local::start().await;
    let channel = over([server.address()]);
    let seen = Arc::new(AtomicU32::new(0));
    let count = seen.clone();
    let mut client = GreeterClient::with_interceptor(channel.clone(), move |request: Request<()>| {
        count.fetch_add(1, Relaxed);
        Ok(request)
    });
    client.say_hello(hello()).await.unwrap();
    assert_eq!(seen.load(Relaxed), 1);

    let refuse = |_| Err(Status::permission_denied("by the interceptor"));
    let mut client = GreeterClient::with_interceptor(channel.clone(), refuse);
    let status = tokio::spawn(async move { client.say_hello(hello()).await }).await.unwrap().unwrap_err();
    assert_eq!(status.message(), "by the interceptor");
    assert_eq!(channel.endpoints()[0].started, 1, "a refused call goes nowhere");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_clones_work_from_64_tasks_at_once() {
    let servers = [Local::start().await, Local::start().await];
    let channel = over(servers.each_ref().map(Local::address));
    let client = GreeterClient::new(channel.clone());
    let mut clones = vec![client; 1000];
    let mut tasks = JoinSet::new();
    let start = Arc::new(Barrier::new(64));
    for left in (1..=64).rev() {
        let mine = clones.split_off(clones.len() - clones.len() / left);
        let start = start.clone();
        tasks.spawn(async move {
            start.wait().await;
            for client in mine {
                greet(client.clone(), DEADLINE).await.unwrap();
                greet(client, DEADLINE).await.unwrap();
            }
        });
    }
    assert_eq!((clones.len(), tasks.len()), (0, 64));
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let started: u64 = channel.endpoints().iter().map(|endpoint| endpoint.started).sum();
    assert_eq!(started, 2000);
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

/// A call over a channel of a runtime's own
async fn call(address: Address) {
    let channel = over([address]);
    greet(GreeterClient::new(channel), DEADLINE).await.expect("the server is at work");
}

/// The same with an etcd of its own
async fn call_by_name(etcd: String) {
    let channel =
        EtcdChannel::connect(format!("etcd:///{etcd}?key=hello.rpc")).await.expect("both are at work");
    greet(GreeterClient::new(channel), DEADLINE).await.expect("the server is at work");
}

/// Runs a future in two runtimes one after the other, then in two side by side
fn in_runtimes<F: Future<Output = ()> + Send + 'static>(future: impl Fn() -> F) {
    for _ in 0..2 {
        runtime().block_on(future());
    }
    let (one, two) = (runtime(), runtime());
    let (first, second) = (one.spawn(future()), two.spawn(future()));
    one.block_on(second).expect("the second runtime's call");
    two.block_on(first).expect("the first runtime's call");
}

#[test]
fn runtimes_share_nothing() {
    let outer = runtime();
    let server = outer.block_on(greeter!().start());
    in_runtimes(|| call(server.address()));
}

#[test]
fn runtimes_share_nothing_with_etcd_either() {
    let outer = runtime();
    let etcd = outer.block_on(registry::etcd());
    let _server = outer.block_on(async {
        let server = greeter!().register("hello.rpc", &etcd.endpoint()).start().await;
        registry::until_registered(&etcd, "hello.rpc", Duration::from_secs(5), |all| all.len() == 1).await;
        server
    });
    in_runtimes(|| call_by_name(etcd.endpoint()));
}

#[test]
fn a_channel_outlives_the_runtime_it_was_built_in_without_a_panic() {
    let outer = runtime();
    let server = outer.block_on(greeter!().start());
    let inner = runtime();
    let channel = inner.block_on(async {
        let channel = over([server.address()]);
        greet(GreeterClient::new(channel.clone()), DEADLINE).await.unwrap();
        channel
    });
    drop(inner);
    // Its tasks are gone: a call fails, in time.
    outer.block_on(greet(GreeterClient::new(channel), DEADLINE)).unwrap_err();
}
