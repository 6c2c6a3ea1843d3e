//! The examples as a newcomer runs them, against an etcd

// The servers are told to stop by a signal.
#![cfg(unix)]

use std::{collections::BTreeSet, process::Stdio, time::Duration};

use callsign_tests::{etcd::EtcdProcess, registry, wait};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};

const SERVICE: &str = "hello.rpc";
const BOUND: Duration = Duration::from_secs(10);

/// Killed when dropped
fn example(binary: &str, etcd: &EtcdProcess, arguments: &[&str]) -> Child {
    let mut command = Command::new(binary);
    command.args(arguments).env("CALLSIGN_ETCD", etcd.endpoint()).env_remove("RUST_LOG");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    command.spawn().expect("the example is built")
}

fn lines(child: &mut Child) -> Lines<BufReader<ChildStdout>> {
    BufReader::new(child.stdout.take().expect("stdout is piped")).lines()
}

/// The first line of which `found` says so
async fn line(lines: &mut Lines<BufReader<ChildStdout>>, what: &str, found: impl Fn(&str) -> bool) -> String {
    wait::within(what, BOUND, async {
        while let Some(line) = lines.next_line().await.expect("lines are UTF-8") {
            if found(&line) {
                return line;
            }
        }
        panic!("the example ended before {what}");
    })
    .await
}

/// Tells it to stop, as the terminal does, and waits until it has ended well
async fn ctrl_c(child: &mut Child) {
    let pid = child.id().expect("it runs").to_string();
    let told = Command::new("sh").arg("-c").arg("kill -INT \"$1\"").args(["kill", &pid]).status();
    assert!(told.await.expect("sh runs").success());
    let status = wait::within("the example ends", BOUND, child.wait()).await.expect("it is ours");
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn hello_client_shows_who_of_the_hello_servers_answered_and_no_error_when_one_is_stopped() {
    let etcd = registry::etcd().await;
    let server = || {
        let arguments = ["--listen", "127.0.0.1:0", "--service", SERVICE];
        example(env!("CARGO_BIN_EXE_hello_server"), &etcd, &arguments)
    };
    let mut servers = [server(), server()];
    let addresses = registry::until_registered(&etcd, SERVICE, BOUND, |all| all.len() == 2).await;
    let mut log = lines(&mut servers[0]);
    let serving = line(&mut log, "the server says where it is", |line| line.contains("serving")).await;
    let here = addresses.iter().find(|address| serving.contains(*address));
    let here = here.unwrap_or_else(|| panic!("none of {addresses:?} in {serving:?}"));

    let arguments = ["--service", SERVICE, "--rate", "100", "--name", "Newcomer"];
    let mut client = example(env!("CARGO_BIN_EXE_hello_client"), &etcd, &arguments);
    let mut output = lines(&mut client);
    let mut missing: BTreeSet<_> =
        addresses.iter().map(|address| format!("Hello Newcomer from {address}")).collect();
    while !missing.is_empty() {
        let greeting = line(&mut output, "both have answered", |line| missing.contains(line)).await;
        missing.remove(&greeting);
    }

    ctrl_c(&mut servers[0]).await;
    let left = registry::registered(&etcd, SERVICE).await;
    assert!(left.len() == 1 && left[0] != *here, "{left:?}");

    // Everything that the client has printed by now, and one second more.
    for _ in 0..100 {
        let next = line(&mut output, "greetings go on", |line| !line.contains("INFO")).await;
        assert!(next.starts_with("Hello Newcomer from "), "{next}");
    }
}

#[tokio::test]
async fn registries_see_each_other_come_and_go() {
    let etcd = registry::etcd().await;
    let registry = |address| example(env!("CARGO_BIN_EXE_registry"), &etcd, &["--address", address]);
    let mut first = registry("10.0.0.1:80");
    let mut seen = lines(&mut first);
    line(&mut seen, "itself", |line| line == "hello.rpc: 10.0.0.1:80").await;
    let mut second = registry("10.0.0.2:80");
    let mut said = lines(&mut second);
    let mut missing =
        BTreeSet::from(["registered under lease ", "now: 2 of hello.rpc", "services: hello.rpc"]);
    while !missing.is_empty() {
        let known = |line: &str| missing.iter().copied().find(|known| line.starts_with(known));
        let said = line(&mut said, "what it is told", |line| known(line).is_some()).await;
        let said = known(&said);
        missing.retain(|known| Some(*known) != said);
    }
    let both = |line: &str| line.contains("10.0.0.1:80") && line.contains("10.0.0.2:80");
    line(&mut seen, "both", both).await;
    // From its first list on, it hears a ctrl-c.
    line(&mut said, "both", both).await;
    ctrl_c(&mut second).await;
    line(&mut said, "the last callback", |line| line == "deregistered").await;
    line(&mut seen, "itself alone", |line| line == "hello.rpc: 10.0.0.1:80").await;
    assert_eq!(registry::registered(&etcd, SERVICE).await, ["10.0.0.1:80"]);
}

#[tokio::test]
async fn a_value_changes_what_a_program_does() {
    let etcd = registry::etcd().await;
    let live_config = |arguments: &[&str]| example(env!("CARGO_BIN_EXE_live_config"), &etcd, arguments);
    let mut greeter = live_config(&[]);
    let mut greetings = lines(&mut greeter);
    line(&mut greetings, "the default", |line| line == "Hello!").await;
    let put = async |arguments: &[&str]| {
        let status = wait::within("it is put", BOUND, live_config(arguments).wait()).await;
        assert!(status.expect("it is ours").success());
    };
    put(&["--greeting", "Servus", "--every-ms", "10"]).await;
    line(&mut greetings, "the new greeting", |line| line == "Servus!").await;
    etcd.put("config/hello", "no JSON").await;
    line(&mut greetings, "a complaint", |line| line.starts_with("bad value of config/hello")).await;
    line(&mut greetings, "the greeting stays", |line| line == "Servus!").await;
    etcd.delete("config/hello").await;
    line(&mut greetings, "a notice", |line| line.starts_with("config/hello is not there")).await;
    line(&mut greetings, "the greeting stays", |line| line == "Servus!").await;
}
