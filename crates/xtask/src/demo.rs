//! `cargo xtask demo`: two servers, one balanced channel, a SIGKILL and a restart
//!
//! The client leads: it counts its calls and prints a line that starts with `@` when it is time to kill or restart the
//! server. So its phases are its own, however late we act.

use std::{
    io::{BufRead, BufReader},
    process::{ChildStdout, Command, Stdio, id},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use crate::{
    Result, cargo,
    etcd::{Etcd, shown},
    family::{Family, Id},
    ports,
};

/// 10 s of calls; the rest is for starting, for connecting and for a machine that is busy.
const LIMIT: Duration = Duration::from_secs(18);

/// A server waits 1 s for clients to notice that it leaves.
const STOP: Duration = Duration::from_millis(1_900);

pub(crate) fn run() -> Result {
    // Before the build: who has named an etcd that does not answer should not wait for it.
    let etcd = Etcd::find()?;
    build(&etcd)?;
    let deadline = Instant::now() + LIMIT;
    let mut family = Family::new("callsign-demo")?;
    let outcome = play(&mut family, &etcd, deadline);
    if outcome.is_err() {
        family.keep_directory();
    }
    outcome
}

fn build(etcd: &Etcd) -> Result {
    let mut packages = vec!["--package", "callsign-examples"];
    if matches!(etcd, Etcd::Embedded) {
        println!("no etcd on PATH: using the embedded one");
        packages.extend(["--package", "etcd-embedded"]);
    }
    cargo::run(["build", "--bins"].into_iter().chain(packages))
}

fn play(family: &mut Family, etcd: &Etcd, deadline: Instant) -> Result {
    let hosts = etcd.start(family)?;
    println!("etcd                {}", shown(&hosts));
    let service = service(etcd);
    let mut stage = Stage { family, hosts, service, servers: Vec::new() };
    for port in ports::free(2)? {
        let address = format!("127.0.0.1:{port}");
        let server = stage.start_server(&address)?;
        stage.servers.push((address, server));
    }
    let outcome = stage.run_client(deadline);
    let servers: Vec<_> = stage.servers.iter().map(|(_, server)| *server).collect();
    stage.family.stop(&servers, STOP);
    outcome
}

/// A cluster of one's own has nobody else's `hello.rpc`; another one may
fn service(etcd: &Etcd) -> String {
    match etcd {
        Etcd::Program(_) | Etcd::Embedded => "hello.rpc".to_owned(),
        Etcd::Cluster(_) => format!("hello-demo-{}.rpc", id()),
    }
}

/// Who plays
struct Stage<'a> {
    family: &'a mut Family,
    hosts: String,
    service: String,
    /// The first one is the one to be killed.
    servers: Vec<(String, Id)>,
}

impl Stage<'_> {
    fn start_server(&mut self, address: &str) -> Result<Id> {
        let mut server = Command::new(cargo::built("hello_server")?);
        server.args(["--listen", address, "--service", &self.service]).env("CALLSIGN_ETCD", &self.hosts);
        let id = self.family.spawn(&format!("server-{address}"), &mut server)?;
        println!("hello_server        --listen {address} --service {}", self.service);
        Ok(id)
    }

    /// Runs the client to its end and does what it asks for
    fn run_client(&mut self, deadline: Instant) -> Result {
        let mut client = Command::new(cargo::built("demo_client")?);
        client.args(["--service", &self.service, "--killed", &self.servers[0].0]);
        client.env("CALLSIGN_ETCD", &self.hosts).stdout(Stdio::piped());
        let client = self.family.spawn_with(&mut client)?;
        let output = self.family.child(client).and_then(|child| child.stdout.take());
        let lines = lines(output.ok_or("the client has no output")?);
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => self.on_line(&line)?,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!("no end in sight after {LIMIT:?}").into());
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        match self.family.wait(client, deadline) {
            Some(status) if status.success() => Ok(()),
            Some(status) => {
                Err(format!("the demo failed (client: {status}; etcd: {})", shown(&self.hosts)).into())
            }
            None => Err("the client closed its output and does not end".into()),
        }
    }

    fn on_line(&mut self, line: &str) -> Result {
        let (address, server) = self.servers[0].clone();
        match line {
            "@kill" => {
                self.family.kill(server);
                println!("SIGKILL             {address}");
            }
            "@restart" => self.servers[0].1 = self.start_server(&address)?,
            line => println!("{line}"),
        }
        Ok(())
    }
}

/// The client's lines, as they come; the thread ends with the client
fn lines(output: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(std::result::Result::ok);
        // A failed send means that nobody waits for the demo any more.
        lines.into_iter().try_for_each(|line| sender.send(line)).ok();
    });
    receiver
}
