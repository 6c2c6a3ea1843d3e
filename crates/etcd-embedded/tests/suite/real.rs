//! Real etcds, shared by the tests of one run

use std::{
    env,
    ffi::OsStr,
    fs, io,
    io::Write as _,
    net::TcpListener,
    path::PathBuf,
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Mutex, Once, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

/// A program that dies with its value and, as values in statics are never dropped, with this process, whatever ends that
#[derive(Debug)]
pub(crate) struct Kept(Child);

/// Runs the program until stdin ends, then kills it and removes what it leaves behind.
const KEEPER: &str = r#"
trap '' INT TERM
"$@" </dev/null &
program=$!
cat >/dev/null
kill -9 $program 2>/dev/null
wait $program 2>/dev/null
if [ -n "$DIR" ]; then rm -rf "$DIR"; fi
"#;

impl Kept {
    /// The shell that keeps a program; arguments are the program and its own
    pub(crate) fn command() -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "sh"]).env("DIR", "");
        command
    }

    pub(crate) fn spawn(command: &mut Command) -> io::Result<Self> {
        command.stdin(Stdio::piped()).spawn().map(Self)
    }

    pub(crate) fn stdout(&mut self) -> ChildStdout {
        self.0.stdout.take().expect("it is piped, and asked for once")
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        // It has nothing else to do, and if waiting fails it is gone.
        let _ = self.0.wait();
    }
}

/// One etcd of one member on ports from the OS, its data in a fresh temp dir
#[derive(Debug)]
pub(crate) struct Etcd {
    port: u16,
    _process: Kept,
}

/// From start to the first answer; an election alone takes about a second.
const READY: Duration = Duration::from_secs(20);

/// Etcds that a test has left as good as new: without keys, leases, users.
static IDLE: Mutex<Vec<Etcd>> = Mutex::new(Vec::new());

impl Etcd {
    /// One that no other test uses at the time, None without an `etcd` on PATH
    pub(crate) async fn take() -> Option<Self> {
        let idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        if idle.is_some() { idle } else { Self::start().await }
    }

    /// For the next test; one that a failed test used is not given back, but dropped
    pub(crate) fn give_back(self) {
        IDLE.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }

    /// A new one at revision 1, None without an `etcd` on PATH
    pub(crate) async fn start() -> Option<Self> {
        Self::start_with(&[]).await
    }

    /// A new one with more options
    pub(crate) async fn start_with(options: &[&str]) -> Option<Self> {
        if !available("etcd") {
            return None;
        }
        // A port found free can be taken before etcd binds it: another pair then.
        for _ in 0..5 {
            let mut etcd = Self::spawn(options).expect("the temp dir is writable");
            if etcd.is_ready().await {
                return Some(etcd);
            }
        }
        panic!("etcd did not start");
    }

    /// `127.0.0.1:port`
    pub(crate) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn spawn(options: &[&str]) -> io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("etcd-embedded-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = env::temp_dir().join(name);
        fs::create_dir_all(&dir)?;
        let (port, peer_port) = free_ports()?;
        let client = format!("http://127.0.0.1:{port}");
        let peer = format!("http://127.0.0.1:{peer_port}");
        let log = fs::File::create(dir.join("log"))?;
        let mut command = Kept::command();
        command
            .args(["etcd", "--name", "test", "--logger", "zap", "--data-dir"])
            .arg(dir.join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("test={peer}")])
            .args(options)
            .env("DIR", dir)
            .stdout(log.try_clone()?)
            .stderr(log);
        Ok(Self { port, _process: Kept::spawn(&mut command)? })
    }

    async fn is_ready(&mut self) -> bool {
        let deadline = Instant::now() + READY;
        while Instant::now() < deadline {
            if healthy(&self.endpoint()).await {
                return true;
            }
            sleep(Duration::from_millis(20)).await;
        }
        false
    }
}

/// Whether a real program is there; says so once if not, and fails if it must be
pub(crate) fn available(program: &str) -> bool {
    static SAID: Once = Once::new();
    let path = env::var_os("PATH").unwrap_or_default();
    if env::split_paths(&path).map(|dir: PathBuf| dir.join(program)).any(|file| file.is_file()) {
        return true;
    }
    let required = env::var_os("CALLSIGN_REQUIRE_ETCD").is_some_and(|value| value == OsStr::new("1"));
    assert!(!required, "CALLSIGN_REQUIRE_ETCD=1, but there is no {program} on PATH");
    // Not by a macro, whose output a passing test does not show.
    SAID.call_once(|| {
        let text = "etcd-embedded: no real etcd on PATH, so it was compared with nothing";
        let _ = writeln!(io::stderr(), "{text}");
    });
    false
}

fn free_ports() -> io::Result<(u16, u16)> {
    // Both are held before either is let go, so they differ.
    let (client, peer) = (TcpListener::bind("127.0.0.1:0")?, TcpListener::bind("127.0.0.1:0")?);
    Ok((client.local_addr()?.port(), peer.local_addr()?.port()))
}

/// Whether the member has a leader: etcd's own health endpoint says so over plain HTTP
async fn healthy(endpoint: &str) -> bool {
    let ask = async {
        let mut socket = TcpStream::connect(endpoint).await?;
        socket.write_all(b"GET /health HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await?;
        io::Result::Ok(answer.contains("\"health\":\"true\""))
    };
    matches!(timeout(Duration::from_secs(1), ask).await, Ok(Ok(true)))
}
