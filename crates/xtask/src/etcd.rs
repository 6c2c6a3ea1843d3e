//! The etcd that a task uses: a cluster that runs already, or a child

use std::{
    env, fs,
    io::{self, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    Result, cargo,
    family::{Family, Id, until},
    ports, program,
};

/// Where an etcd can be had
#[derive(Debug)]
pub(crate) enum Etcd {
    /// A running cluster, as a line that the library reads
    Cluster(String),
    /// A program to start
    Program(PathBuf),
    /// `etcd-embedded`, which cargo builds
    Embedded,
}

/// Loading a dozen megabytes from a cold disk and electing itself takes a second or two.
const START: Duration = Duration::from_secs(5);

impl Etcd {
    /// `CALLSIGN_ETCD`, if it answers; where that is not set, the `etcd` on PATH; where there is none, the embedded one
    pub(crate) fn find() -> Result<Self> {
        let hosts = env::var_os("CALLSIGN_ETCD").unwrap_or_default();
        let hosts = hosts.into_string().map_err(|_| "CALLSIGN_ETCD is not UTF-8")?;
        if listed(&hosts).next().is_none() {
            return Ok(program::on_path("etcd").map_or(Self::Embedded, Self::Program));
        }
        probe(&hosts)?;
        Ok(Self::Cluster(hosts))
    }

    /// Its hosts, once it answers
    pub(crate) fn start(&self, family: &mut Family) -> Result<String> {
        match self {
            Self::Cluster(hosts) => Ok(hosts.clone()),
            Self::Program(program) => start(program, family),
            Self::Embedded => start_embedded(&cargo::built("etcd-embedded")?, family),
        }
    }
}

/// The hosts in a line as the library reads it, which may have a login before them and options behind
pub(crate) fn shown(line: &str) -> &str {
    let line = line.trim();
    let line = line.strip_prefix("etcd:///").unwrap_or(line);
    let place = line.split_once('?').map_or(line, |(place, _)| place);
    place.rsplit_once('@').map_or(place, |(_, hosts)| hosts)
}

/// Empty items count for nothing, as in the library
fn listed(line: &str) -> impl Iterator<Item = &str> {
    shown(line).split(',').map(str::trim).filter(|host| !host.is_empty())
}

/// Whether one of the hosts is an etcd that works: a demo without would only say that no server came
fn probe(hosts: &str) -> Result {
    let mut causes = Vec::new();
    for host in listed(hosts) {
        // Whom to trust is in the options: the programs will find out.
        if host.starts_with("https://") {
            return Ok(());
        }
        match ask(host.strip_prefix("http://").unwrap_or(host)) {
            Ok(answer) if is_healthy(&answer) => return Ok(()),
            Ok(_) => causes.push(format!("\n  {host}: answers, but not as a healthy etcd does")),
            // What a read timeout is called depends on the system.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                causes.push(format!("\n  {host}: no answer"));
            }
            Err(error) => causes.push(format!("\n  {host}: {error}")),
        }
    }
    Err(format!("no etcd answers at CALLSIGN_ETCD={}:{}", shown(hosts), causes.concat()).into())
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
    let host = format!("127.0.0.1:{}", ports[0]);
    wait(family, id, || ask(&host).is_ok_and(|answer| is_healthy(&answer)))?;
    Ok(host)
}

fn start_embedded(program: &Path, family: &mut Family) -> Result<String> {
    let host = format!("127.0.0.1:{}", ports::free(1)?[0]);
    let id = family.spawn("etcd", Command::new(program).args(["--listen", &host]))?;
    let log = family.log_of("etcd");
    wait(family, id, || fs::read_to_string(&log).is_ok_and(|log| log.starts_with("listening on")))?;
    Ok(host)
}

fn wait(family: &mut Family, id: Id, answers: impl Fn() -> bool) -> Result {
    let mut ended = false;
    let deadline = Instant::now() + START;
    let settled = until(deadline, || {
        ended = family.child(id).is_none_or(|etcd| !matches!(etcd.try_wait(), Ok(None)));
        ended || answers()
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

/// What `host:port` says of its health
fn ask(host: &str) -> io::Result<String> {
    let address = host.to_socket_addrs()?.next().ok_or(io::ErrorKind::NotFound)?;
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(b"GET /health HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

/// Whether that is an etcd that has a leader and takes writes
fn is_healthy(answer: &str) -> bool {
    answer.contains(r#""health":"true""#)
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::test;

    #[test]
    fn a_cluster_where_nobody_answers_is_named_with_the_cause() {
        // The kernel accepts for it, and nobody answers.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mute = listener.local_addr().unwrap();
        let error = probe(&format!("http://{mute}, no-port")).unwrap_err().to_string();
        assert!(error.starts_with("no etcd answers at CALLSIGN_ETCD="), "{error}");
        assert!(error.contains(&format!("{mute}: no answer")) && error.contains("no-port: "), "{error}");
    }

    #[test]
    fn a_login_is_not_shown_and_not_taken_for_a_host() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mute = listener.local_addr().unwrap();
        for line in [
            format!("etcd:///root:s3,cret@{mute}?namespace=/service"),
            format!("root:s3,cret@{mute}?tls_ca=/etc/ca.pem"),
        ] {
            let error = probe(&line).unwrap_err().to_string();
            assert!(error.contains(&format!("{mute}: no answer")), "{error}");
            assert!(!error.contains("s3") && !error.contains("cret") && !error.contains('?'), "{error}");
        }
        probe(&format!("root:s3cret@https://{mute}")).unwrap();
    }

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
        let Some(program) = program::on_path("etcd") else {
            assert!(!test::is_etcd_required(), "no etcd on PATH, and CALLSIGN_REQUIRE_ETCD=1");
            return eprintln!("skipped: it needs etcd on PATH");
        };
        let mut family = Family::new("xtask-test").unwrap();
        let hosts = Etcd::Program(program).start(&mut family).unwrap();
        probe(&hosts).unwrap();
    }
}
