//! Servers in processes of their own, to be killed, stopped and started again

use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use callsign::instance::Address;
use rustix::process::{Pid, Resource, Signal, WaitOptions, getrlimit, kill_process, setrlimit, waitpid};
use tokio::sync::mpsc;

use crate::{ports::Port, service::Manner, wait};

/// The greeter binary of this package, to be started
///
/// A macro, because cargo tells the path of a binary to integration tests only.
#[macro_export]
macro_rules! greeter {
    () => {
        $crate::process::Greeter::new(env!("CARGO_BIN_EXE_greeter"))
    };
}

/// What a process needs to print its first line on a busy machine
const START: Duration = Duration::from_secs(10);

/// A greeter process that is not started yet; see [`greeter!`](crate::greeter)
///
/// A clone starts another one with the same options.
#[derive(Clone, Debug)]
pub struct Greeter {
    binary: String,
    listen: SocketAddr,
    arguments: Vec<String>,
    variables: Vec<(&'static str, String)>,
}

impl Greeter {
    /// With the binary's defaults: a port of its own, not registered
    pub fn new(binary: &str) -> Self {
        let listen = ([127, 0, 0, 1], 0).into();
        Self { binary: binary.to_owned(), listen, arguments: Vec::new(), variables: Vec::new() }
    }

    /// Listens there instead of on a port of its own
    pub fn listen(self, address: &Address) -> Self {
        let listen = address.authority().parse().expect("an IP address and a port");
        Self { listen, ..self }
    }

    /// Registers as `service` in the etcd at `hosts`
    pub fn register(mut self, service: &str, hosts: &str) -> Self {
        self.variables.push(("CALLSIGN_ETCD", hosts.to_owned()));
        self.option("--service", service)
    }

    /// Finds this as the address of its pod
    pub fn pod_ip(mut self, ip: &str) -> Self {
        self.variables.push(("POD_IP", ip.to_owned()));
        self
    }

    /// Time to live of its registration
    pub fn ttl(self, ttl: Duration) -> Self {
        self.option("--ttl", ttl.as_secs())
    }

    /// Its instance id; by default a random one
    pub fn id(self, id: i64) -> Self {
        self.option("--id", id)
    }

    /// Has gRPC's health service, which says `serving` or `not-serving` until [`Process::tell`] changes it
    pub fn health(self, status: &str) -> Self {
        self.option("--health", status)
    }

    /// How long it takes to greet; 2 ms by default
    pub fn delay(self, delay: Duration) -> Self {
        self.option("--delay-ms", delay.as_millis())
    }

    /// Tells clients to reconnect after this time
    pub fn max_connection_age(self, age: Duration) -> Self {
        self.option("--max-connection-age-ms", age.as_millis())
    }

    /// Receive window of its connections and streams, in bytes
    pub fn window(self, bytes: u32) -> Self {
        self.option("--window", bytes)
    }

    fn option(mut self, name: &str, value: impl ToString) -> Self {
        self.arguments.extend([name.to_owned(), value.to_string()]);
        self
    }

    /// Starts it and waits until it listens
    pub async fn start(self) -> Process {
        let port = Port::at(self.listen);
        let mut command = Command::new(self.binary);
        command.args(["--listen", &port.address().to_string()]);
        command.args(self.arguments).envs(self.variables).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().expect("the greeter is built");
        // Owned before anything can fail, so that it dies whatever happens.
        let nowhere = Address::from(SocketAddr::from(([0; 4], 0)));
        let (sender, lines) = mpsc::unbounded_channel();
        let mut process = Process { child: Owned(child), address: nowhere, lines, _port: port };
        // Read on when nobody listens: the pipe must not fill up.
        process.child.on_lines(move |line| drop(sender.send(line)));
        let listening = process.until_line(START, |line| line.starts_with("listening ")).await;
        process.address = listening["listening ".len()..].parse().expect("the greeter prints an address");
        process
    }
}

/// A running server process; killed when dropped
#[derive(Debug)]
pub struct Process {
    child: Owned,
    address: Address,
    /// What it has printed and nobody has waited for yet
    lines: mpsc::UnboundedReceiver<String>,
    /// Also while it is dead: another one can be started there.
    _port: Port,
}

impl Process {
    /// Where it listens
    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// Waits until it prints a line that meets `condition`; lines are looked at once
    ///
    /// # Panics
    ///
    /// If it prints none within `bound`.
    pub async fn until_line(&mut self, bound: Duration, condition: impl Fn(&str) -> bool) -> String {
        wait::within("the process prints what is waited for", bound, async {
            loop {
                let line = self.lines.recv().await.expect("the process runs");
                if condition(&line) {
                    return line;
                }
            }
        })
        .await
    }

    /// Writes a line to its input
    pub fn tell(&mut self, line: &str) {
        let input = self.child.0.stdin.as_mut().expect("stdin is piped");
        writeln!(input, "{line}").expect("the process reads");
    }

    /// Answers like this from here on; returns when it does
    pub async fn turn(&mut self, manner: Manner) {
        self.tell(&manner.to_string());
        let told = format!("answers {manner}");
        self.until_line(START, |line| line == told).await;
    }

    /// How many greetings it was asked for so far
    pub async fn calls(&mut self) -> u64 {
        self.tell("calls");
        let line = self.until_line(START, |line| line.starts_with("calls ")).await;
        line["calls ".len()..].parse().expect("a number")
    }

    /// SIGKILL; returns when it is gone
    pub fn kill9(&mut self) {
        self.child.kill9();
    }

    /// SIGTERM
    pub fn sigterm(&self) {
        self.child.signal(Signal::TERM);
    }

    /// SIGINT, as ctrl-c sends it
    pub fn sigint(&self) {
        self.child.signal(Signal::INT);
    }

    /// SIGSTOP; returns when all its threads stand still
    pub async fn sigstop(&self) {
        freeze(&self.child.0).await;
    }

    /// SIGCONT
    pub fn sigcont(&self) {
        self.child.signal(Signal::CONT);
    }

    /// Waits until it has ended by itself
    pub async fn exited(&mut self, bound: Duration) -> ExitStatus {
        self.child.exited(bound).await
    }
}

/// Lets this process, and those that it starts from here on, have so many descriptors
///
/// # Panics
///
/// If the system does not.
pub fn allow_descriptors(count: u64) {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < count) {
        limit.current = Some(count);
        setrlimit(Resource::Nofile, limit).expect("within the hard limit");
    }
}

/// A child process; killed when dropped
#[derive(Debug)]
pub(crate) struct Owned(pub(crate) Child);

impl Owned {
    /// SIGKILL; returns when it is gone
    pub(crate) fn kill9(&mut self) {
        // The only error is that it is gone already, which is what was asked for.
        let _ = self.0.kill();
        self.0.wait().expect("a child can be waited for");
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("the process runs");
    }

    /// Waits until it has ended by itself
    pub(crate) async fn exited(&mut self, bound: Duration) -> ExitStatus {
        let ended = || self.0.try_wait().expect("a child can be waited for");
        wait::until("the process ends", bound, ended).await
    }

    /// Hands over each line of its output, from a thread, so that it never blocks on a full pipe and needs no runtime
    ///
    /// `on_line` is dropped when the output has ended.
    pub(crate) fn on_lines(&mut self, mut on_line: impl FnMut(String) + Send + 'static) {
        let stdout = BufReader::new(self.0.stdout.take().expect("stdout is piped"));
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).for_each(&mut on_line));
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// SIGSTOP to a child; returns when all its threads stand still
pub(crate) async fn freeze(child: &Child) {
    let pid = Pid::from_child(child);
    kill_process(pid, Signal::STOP).expect("the process runs");
    // The system tells the parent when the last thread has stopped; until then it may still answer.
    let options = WaitOptions::UNTRACED | WaitOptions::NOHANG;
    wait::until("the process stands still", START, || {
        let changed = waitpid(Some(pid), options).expect("the process is ours");
        changed.filter(|(_, status)| status.stopped()).map(drop)
    })
    .await;
}
