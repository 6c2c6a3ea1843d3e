//! Servers in processes of their own, to be killed, stopped and started again

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use callsign::instance::Address;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tokio::sync::mpsc;

use crate::wait;

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
    arguments: Vec<String>,
    variables: Vec<(&'static str, String)>,
}

impl Greeter {
    /// With the binary's defaults: a port of its own, not registered
    pub fn new(binary: &str) -> Self {
        Self { binary: binary.to_owned(), arguments: Vec::new(), variables: Vec::new() }
    }

    /// Listens there instead of on a port of its own
    pub fn listen(self, address: &Address) -> Self {
        self.option("--listen", address)
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
        let mut command = Command::new(self.binary);
        command.args(self.arguments).envs(self.variables).stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().expect("the greeter is built");
        // Owned before anything can fail, so that it dies whatever happens.
        let mut process = Process { child, address: Address::from(std::net::SocketAddr::from(([0; 4], 0))) };
        let mut lines = process.lines();
        process.address = wait::within("the greeter listens", START, async {
            while let Some(line) = lines.recv().await {
                if let Some(address) = line.strip_prefix("listening ") {
                    return address.parse().expect("the greeter prints an address");
                }
            }
            panic!("the greeter ended before it listened");
        })
        .await;
        process
    }
}

/// A running server process; killed when dropped
#[derive(Debug)]
pub struct Process {
    child: Child,
    address: Address,
}

impl Process {
    /// Where it listens
    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// SIGKILL; returns when it is gone
    pub fn kill9(&mut self) {
        // The only error is that it is gone already, which is what was asked for.
        let _ = self.child.kill();
        self.child.wait().expect("a child can be waited for");
    }

    /// SIGTERM
    pub fn sigterm(&self) {
        self.signal(Signal::TERM);
    }

    /// SIGINT, as ctrl-c sends it
    pub fn sigint(&self) {
        self.signal(Signal::INT);
    }

    /// SIGSTOP; returns when all its threads stand still
    pub async fn sigstop(&self) {
        freeze(&self.child).await;
    }

    /// SIGCONT
    pub fn sigcont(&self) {
        self.signal(Signal::CONT);
    }

    /// Waits until it has ended by itself
    pub async fn exited(&mut self, bound: Duration) -> ExitStatus {
        let child = &mut self.child;
        wait::until("the process ends", bound, || child.try_wait().expect("a child can be waited for")).await
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the process runs");
    }

    /// Its output; read by a thread, so that it never blocks on a full pipe and needs no runtime
    fn lines(&mut self) -> mpsc::UnboundedReceiver<String> {
        let stdout = BufReader::new(self.child.stdout.take().expect("stdout is piped"));
        let (sender, lines) = mpsc::unbounded_channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // Read on when nobody listens: the pipe must not fill up.
                let _ = sender.send(line);
            }
        });
        lines
    }
}

impl Drop for Process {
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
