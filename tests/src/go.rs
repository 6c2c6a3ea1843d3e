//! Peers written in Go, in processes of their own: go-zero's server and client, and a default grpc-go server
//!
//! The program is `tests/interop`; what its processes print is described there.

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::Duration,
};

use callsign::instance::Address;
use rustix::process::Signal;

use crate::{process::Owned, registry, wait};

/// The program, built by the first test of the process that asks for it; `None`, with the reason on stderr, without Go
///
/// A macro, because cargo tells the directory for such things to integration tests only.
#[macro_export]
macro_rules! go {
    () => {
        $crate::go::Go::built_in(env!("CARGO_TARGET_TMPDIR"))
    };
}

/// Until a process has registered and listens. It looks at etcd first and its runtime is big.
const START: Duration = Duration::from_secs(20);

/// The program of `tests/interop`
#[derive(Debug)]
pub struct Go {
    program: PathBuf,
}

impl Go {
    /// Builds it in `directory`; without Go it says that the test is left out
    ///
    /// # Panics
    ///
    /// If there is no Go and `CALLSIGN_REQUIRE_GO` is `1`, or if it does not build.
    pub fn built_in(directory: &str) -> Option<&'static Self> {
        static BUILT: OnceLock<Go> = OnceLock::new();
        if registry::on_path("go") {
            return Some(BUILT.get_or_init(|| Self { program: build(Path::new(directory)) }));
        }
        let required = env::var_os("CALLSIGN_REQUIRE_GO").is_some_and(|value| value == "1");
        assert!(!required, "no go on PATH, and CALLSIGN_REQUIRE_GO=1");
        registry::skip("no go on PATH");
        None
    }

    /// A go-zero server that is not started yet, to be registered as `service` in the etcd at `host`
    pub fn server(&self, service: &str, host: &str) -> GoCommand {
        self.command("server").option("--etcd", host).option("--key", service)
    }

    /// A go-zero client of `service` that is not started yet; by default it makes one call
    pub fn client(&self, service: &str, host: &str) -> GoCommand {
        self.command("client").option("--etcd", host).option("--key", service)
    }

    /// A grpc-go server without options, with the echo service
    pub async fn grpc_server(&self) -> GoProcess {
        self.command("grpc-server").listening().await
    }

    fn command(&self, task: &str) -> GoCommand {
        let mut command = Command::new(&self.program);
        command.arg(task);
        GoCommand(command)
    }
}

/// Go's own cache makes this a matter of a second or two, but for the first time.
fn build(directory: &Path) -> PathBuf {
    let program = directory.join("interop");
    let mut go = Command::new("go");
    go.args([OsStr::new("build"), OsStr::new("-o"), program.as_os_str(), OsStr::new(".")]);
    let built = go.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/interop")).status();
    assert!(built.expect("go is on PATH").success(), "tests/interop does not build");
    program
}

/// A process that is not started yet
#[derive(Debug)]
pub struct GoCommand(Command);

impl GoCommand {
    /// `Etcd.ID` of its configuration
    pub fn id(self, id: i64) -> Self {
        self.option("--id", id)
    }

    /// How many calls a client makes, and how far they are apart
    pub fn calls(self, calls: u32, gap: Duration) -> Self {
        self.option("--calls", calls).option("--gap", format!("{}ms", gap.as_millis()))
    }

    /// Starts it
    pub fn start(mut self) -> GoProcess {
        let child = self.0.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it is built");
        let mut process = GoProcess { child: Owned(child), lines: Lines::default() };
        process.child.on_lines(process.lines.writer());
        process
    }

    /// Starts a server and waits until it listens, which go-zero does after it has registered
    pub async fn listening(self) -> GoProcess {
        let process = self.start();
        wait::until("the Go server listens", START, || process.lines.first("listening ")).await;
        process
    }

    fn option(mut self, name: &str, value: impl ToString) -> Self {
        self.0.arg(name).arg(value.to_string());
        self
    }
}

/// A running process; killed when dropped
#[derive(Debug)]
pub struct GoProcess {
    child: Owned,
    lines: Lines,
}

impl GoProcess {
    /// Where a server listens
    ///
    /// # Panics
    ///
    /// If it is a client.
    pub fn address(&self) -> Address {
        let address = self.lines.first("listening ").expect("a server that listens");
        address.parse().expect("it prints an address")
    }

    /// Who answered a client's calls so far, in order
    pub fn answers(&self) -> Vec<String> {
        self.lines.all("answer ")
    }

    /// Why a client's calls failed so far
    pub fn errors(&self) -> Vec<String> {
        self.lines.all("error ")
    }

    /// Waits until a client's call made after this one was answered by `server`
    ///
    /// # Panics
    ///
    /// If none was within `bound`.
    pub async fn until_answered_by(&self, server: &Address, bound: Duration) {
        let (seen, server) = (self.answers().len(), server.to_string());
        wait::until(&format!("{server} answers go-zero"), bound, || {
            self.answers()[seen..].contains(&server).then_some(())
        })
        .await;
    }

    /// SIGKILL; returns when it is gone
    pub fn kill9(&mut self) {
        self.child.kill9();
    }

    /// SIGTERM
    pub fn sigterm(&self) {
        self.child.signal(Signal::TERM);
    }

    /// Waits until it has ended by itself
    pub async fn exited(&mut self, bound: Duration) -> ExitStatus {
        self.child.exited(bound).await
    }

    /// Waits until a client has made its calls and all that it printed was read
    pub async fn done(&mut self, bound: Duration) {
        let status = self.exited(bound).await;
        assert!(status.success(), "{status}");
        wait::until("its output is read", bound, || self.lines.ended().then_some(())).await;
    }
}

/// What a process has printed
#[derive(Debug, Default)]
struct Lines(Arc<Mutex<Vec<String>>>);

impl Lines {
    fn writer(&self) -> impl FnMut(String) + Send + 'static {
        let lines = Arc::clone(&self.0);
        move |line| lines.lock().unwrap_or_else(PoisonError::into_inner).push(line)
    }

    fn all(&self, word: &str) -> Vec<String> {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().filter_map(|line| line.strip_prefix(word)).map(str::to_owned).collect()
    }

    fn first(&self, word: &str) -> Option<String> {
        self.all(word).into_iter().next()
    }

    /// Whether the output was read to its end
    fn ended(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}
