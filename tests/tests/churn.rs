//! Endpoints that come and go all the time

#![cfg(target_os = "linux")]

use std::{collections::BTreeSet, fs, time::Duration};

use callsign_tests::{
    channel::{Changes, changing},
    greeter,
    load::{Pace, greet},
    pb::greeter_client::GreeterClient,
    ports::{everywhere, local},
    process, wait,
};
use tokio::{runtime::Handle, sync::Mutex, time::interval};

const ENDPOINTS: u16 = 1_000;

/// As many as stay at least, so that calls have somewhere to go
const LEFT: usize = 100;

/// A change each
const APART: Duration = Duration::from_millis(5);

/// After the last handle of a channel is gone; its connections say goodbye
const GONE: Duration = Duration::from_secs(20);

/// Descriptors are counted of a whole process.
static ALONE: Mutex<()> = Mutex::const_new(());

/// Tasks of this runtime, descriptors of this process
fn used() -> (usize, usize) {
    let descriptors = fs::read_dir("/proc/self/fd").expect("there is a /proc").count();
    (Handle::current().metrics().num_alive_tasks(), descriptors)
}

/// Adds and removes endpoints at random, without an end; all of them are there at first
async fn churn(changes: Changes, port: u16) {
    let mut there: BTreeSet<u16> = (0..ENDPOINTS).collect();
    let mut tick = interval(APART);
    loop {
        tick.tick().await;
        let number = fastrand::u16(..ENDPOINTS);
        if !there.contains(&number) {
            changes.insert(local(number, port));
            there.insert(number);
        } else if there.len() > LEFT {
            changes.remove(&local(number, port));
            there.remove(&number);
        }
    }
}

/// No call fails meanwhile, and nothing is left behind
async fn nothing_fails_for(lasting: Duration) {
    let _alone = ALONE.lock().await;
    process::allow_descriptors(4 * u64::from(ENDPOINTS));
    let server = greeter!().listen(&everywhere()).start().await;
    let port = server.address().port();
    let before = used();

    let (channel, log, changes) = changing(|builder| builder);
    for number in 0..ENDPOINTS {
        changes.insert(local(number, port));
    }
    channel.until_ready().await;
    let churning = tokio::spawn(churn(changes, port));
    let client = GreeterClient::new(channel.clone());
    let pace = Pace { rate: 200, lasting };
    let load = pace.open_loop(|| greet(client.clone(), Duration::from_secs(2))).await;
    churning.abort();
    load.assert_none_failed(pace);
    let endpoints = channel.endpoints().len();
    assert!((LEFT..ENDPOINTS.into()).contains(&endpoints), "some were removed: {endpoints}");
    assert!(used().1 > before.1 + LEFT, "each endpoint has a connection");

    drop((channel, client, log));
    let what = format!("nothing is left behind: {before:?} tasks and descriptors before");
    wait::until(&what, GONE, || {
        let (tasks, descriptors) = used();
        (tasks <= before.0 && descriptors <= before.1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_and_nothing_is_left_while_a_thousand_endpoints_come_and_go() {
    nothing_fails_for(Duration::from_secs(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "cargo xtask faults"]
async fn no_call_fails_and_nothing_is_left_while_a_thousand_endpoints_come_and_go_for_30_s() {
    nothing_fails_for(Duration::from_secs(30)).await;
}
