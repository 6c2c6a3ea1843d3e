//! The etcd that a task uses: a cluster that runs already, or a child

use std::{
    env, fs,
    io::{Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    Result,
    family::{Family, Id, until},
    ports, program,
};

/// Where an etcd can be had
#[derive(Debug)]
pub(crate) enum Etcd {
    /// Hosts of a running cluster, comma separated
    Cluster(String),
    /// A program to start
    Program(PathBuf),
}

const MISSING: &str = "\
no etcd found. Either
  - install one, so that `etcd` is on PATH (Debian, Ubuntu: apt-get install etcd-server; macOS: brew install etcd), or
  - name a running cluster: CALLSIGN_ETCD=127.0.0.1:2379 cargo xtask demo";

/// Loading a dozen megabytes from a cold disk and electing itself takes a second or two.
const START: Duration = Duration::from_secs(5);

impl Etcd {
    /// `CALLSIGN_ETCD`, else the `etcd` on PATH
    pub(crate) fn find() -> Result<Self> {
        match env::var("CALLSIGN_ETCD") {
            Ok(hosts) if !hosts.trim().is_empty() => Ok(Self::Cluster(hosts)),
            _ => program::on_path("etcd").map(Self::Program).ok_or_else(|| MISSING.into()),
        }
    }

    /// Its hosts, once it answers
    pub(crate) fn start(&self, family: &mut Family) -> Result<String> {
        match self {
            Self::Cluster(hosts) => Ok(hosts.clone()),
            Self::Program(program) => start(program, family),
        }
    }
}

fn start(program: &Path, family: &mut Family) -> Result<String> {
    let ports = ports::free(2)?;
    let [client, peer] = [ports[0], ports[1]].map(|port| format!("http://127.0.0.1:{port}"));
    let mut command = Command::new(program);
    command.arg("--name=etcd").arg("--data-dir").arg(family.directory().join("etcd"));
    command.arg("--listen-client-urls").arg(&client).arg("--advertise-client-urls").arg(&client);
    command.arg("--listen-peer-urls").arg(&peer).arg("--initial-advertise-peer-urls").arg(&peer);
    command.arg(format!("--initial-cluster=etcd={peer}"));
    let id = family.spawn("etcd", &mut command)?;
    wait(family, id, ports[0])?;
    Ok(format!("127.0.0.1:{}", ports[0]))
}

fn wait(family: &mut Family, id: Id, port: u16) -> Result {
    let mut ended = false;
    let deadline = Instant::now() + START;
    let settled = until(deadline, || {
        ended = family.child(id).is_none_or(|etcd| !matches!(etcd.try_wait(), Ok(None)));
        ended || is_healthy(port)
    });
    if settled && !ended {
        return Ok(());
    }
    let why = if ended { "ended at once".to_owned() } else { format!("does not answer after {START:?}") };
    let log = fs::read_to_string(family.log_of("etcd")).unwrap_or_default();
    let lines: Vec<_> = log.lines().collect();
    let tail = lines[lines.len().saturating_sub(5)..].join("\n  ");
    Err(format!("etcd {why}; its last words:\n  {tail}").into())
}

/// Whether etcd has a leader and takes writes, by its own word
fn is_healthy(port: u16) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.contains(r#""health":"true""#))
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_etcd_that_ends_at_once_is_reported_with_its_last_words() {
        let mut family = Family::new("xtask-test").unwrap();
        let program = family.directory().join("broken-etcd");
        fs::write(&program, "#!/bin/sh\necho the disk is full >&2\nexit 1\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let error = Etcd::Program(program).start(&mut family).unwrap_err().to_string();
        assert_eq!(error, "etcd ended at once; its last words:\n  the disk is full");
    }

    #[test]
    fn an_etcd_on_path_starts_and_answers() {
        let Some(program) = program::on_path("etcd") else { return };
        let mut family = Family::new("xtask-test").unwrap();
        let hosts = Etcd::Program(program).start(&mut family).unwrap();
        assert!(TcpStream::connect(hosts).is_ok());
    }
}
