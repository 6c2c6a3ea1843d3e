//! The binary, served to the real etcdctl

use std::{
    io::{BufRead, BufReader, Read, Write},
    process::{ChildStdout, Command, Stdio},
};

use crate::real::{Kept, available};

/// The binary on a port of its own
struct Binary {
    endpoint: String,
    _process: Kept,
}

impl Binary {
    fn start() -> Self {
        let mut command = Kept::command();
        command.args([env!("CARGO_BIN_EXE_etcd-embedded"), "--listen", "127.0.0.1:0"]);
        let mut process = Kept::spawn(command.stdout(Stdio::piped())).unwrap();
        let line = Lines(BufReader::new(process.stdout())).next();
        let endpoint = line.strip_prefix("listening on ").expect("it says where").to_owned();
        Self { endpoint, _process: process }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoint]).args(args);
        command
    }

    /// What etcdctl prints; panics if it fails
    fn ctl(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// One that goes on until it is dropped
    fn follow(&self, args: &[&str]) -> (Lines, Kept) {
        let mut command = Kept::command();
        command.env("ETCDCTL_API", "3").args(["etcdctl", "--endpoints", &self.endpoint]).args(args);
        let mut process = Kept::spawn(command.stdout(Stdio::piped())).unwrap();
        (Lines(BufReader::new(process.stdout())), process)
    }
}

struct Lines(BufReader<ChildStdout>);

impl Lines {
    fn next(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }
}

/// The id in `lease 694d8... granted with TTL(60s)`
fn lease_id(text: &str) -> &str {
    text.split(' ').nth(1).expect("an id")
}

#[test]
fn etcdctl_puts_gets_and_deletes() {
    if !available("etcdctl") {
        return;
    }
    let etcd = Binary::start();
    assert_eq!(etcd.ctl(&["put", "k/a", "1"]), "OK\n");
    etcd.ctl(&["put", "k/b", "2"]);
    etcd.ctl(&["put", "l", "3"]);
    assert_eq!(etcd.ctl(&["get", "--prefix", "k/"]), "k/a\n1\nk/b\n2\n");
    assert_eq!(etcd.ctl(&["del", "--prefix", "k/"]), "2\n");
}

#[test]
fn etcdctl_watches() {
    if !available("etcdctl") {
        return;
    }
    let etcd = Binary::start();
    etcd.ctl(&["put", "k/a", "1"]);
    // From the first write on, so that it does not matter when the watch comes.
    let (mut watch, _process) = etcd.follow(&["watch", "--prefix", "k/", "--rev", "2"]);
    etcd.ctl(&["del", "k/a"]);
    let told: Vec<_> = std::iter::repeat_with(|| watch.next()).take(5).collect();
    assert_eq!(told, ["PUT", "k/a", "1", "DELETE", "k/a"]);
}

#[test]
fn etcdctl_grants_keeps_and_revokes_leases() {
    if !available("etcdctl") {
        return;
    }
    let etcd = Binary::start();
    let granted = etcd.ctl(&["lease", "grant", "60"]);
    assert!(granted.ends_with("granted with TTL(60s)\n"), "{granted}");
    let id = lease_id(&granted);
    etcd.ctl(&["put", "k", "1", "--lease", id]);
    let left = etcd.ctl(&["lease", "timetolive", id, "--keys"]);
    assert!(left.contains("granted with TTL(60s)") && left.contains("attached keys([k])"), "{left}");
    let (mut kept, _process) = etcd.follow(&["lease", "keep-alive", id]);
    assert_eq!(kept.next(), format!("lease {id} keepalived with TTL(60)"));
    assert_eq!(etcd.ctl(&["lease", "list"]), format!("found 1 leases\n{id}\n"));
    assert_eq!(etcd.ctl(&["lease", "revoke", id]), format!("lease {id} revoked\n"));
    assert_eq!(etcd.ctl(&["get", "k"]), "");
}

#[test]
fn etcdctl_runs_transactions() {
    if !available("etcdctl") {
        return;
    }
    let etcd = Binary::start();
    etcd.ctl(&["put", "k", "1"]);
    let mut txn = etcd.command(&["txn"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    txn.stdin.take().unwrap().write_all(b"value(\"k\") = \"1\"\n\nput k 2\nget k\n\nput k 3\n\n").unwrap();
    let mut told = String::new();
    txn.stdout.take().unwrap().read_to_string(&mut told).unwrap();
    assert!(txn.wait().unwrap().success());
    assert_eq!(told, "SUCCESS\n\nOK\n\nk\n2\n");
}

#[test]
fn etcdctl_asks_for_members_status_and_health() {
    if !available("etcdctl") {
        return;
    }
    let etcd = Binary::start();
    let members = etcd.ctl(&["member", "list"]);
    assert!(members.contains(&format!("started, embedded, http://{0}, http://{0}, false", etcd.endpoint)));
    let status = etcd.ctl(&["endpoint", "status"]);
    assert!(status.starts_with(&etcd.endpoint) && status.contains("3.4.23"), "{status}");
    etcd.ctl(&["endpoint", "health"]);
}

#[test]
fn etcdctl_logs_in() {
    if !available("etcdctl") {
        return;
    }
    let etcd = Binary::start();
    etcd.ctl(&["user", "add", "root:secret"]);
    etcd.ctl(&["role", "add", "root"]);
    etcd.ctl(&["user", "grant-role", "root", "root"]);
    assert_eq!(etcd.ctl(&["auth", "enable"]), "Authentication Enabled\n");
    assert_eq!(etcd.ctl(&["--user", "root:secret", "put", "k", "1"]), "OK\n");
    assert!(!etcd.command(&["put", "k", "1"]).output().unwrap().status.success());
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    if !available("etcdctl") {
        return;
    }
    let etcd = Binary::start();
    for (args, text) in [
        (&["defrag"][..], "/etcdserverpb.Maintenance/Defragment is not implemented"),
        (&["role", "add", "other"], "any role but root is not implemented"),
    ] {
        let output = etcd.command(args).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(text), "{said}");
    }
}

#[test]
fn a_wrong_argument_and_a_taken_port_are_told() {
    let etcd = Binary::start();
    let run = |args: &[&str]| Command::new(env!("CARGO_BIN_EXE_etcd-embedded")).args(args).output().unwrap();
    let output = run(&["--listen", &etcd.endpoint]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("cannot listen on"), "{said}");
    assert_eq!(run(&["--nonsense"]).status.code(), Some(2));
}
