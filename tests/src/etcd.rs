//! An etcd as a child process, for one test: the real one, or the embedded one

mod requests;

use std::{
    env,
    ffi::OsStr,
    fs, io,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use crate::{ports::Port, process::freeze, wait};

/// What stands for etcd
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// `etcd` on PATH
    Real,
    /// The program of `etcd-embedded`, which this package builds as well: one member, and nothing outlives it
    Embedded,
}

/// One member of an etcd cluster, by default its only one, on ports from the OS, its data in a fresh temp dir
///
/// Dropping it kills the process and removes the directory.
#[derive(Debug)]
pub struct EtcdProcess {
    program: Program,
    dir: PathBuf,
    client_port: Port,
    peer_port: Port,
    /// Where it tells its health and counts, beside the client port: a real one that speaks TLS
    metrics_port: Option<Port>,
    /// Where it speaks TLS beside the client port, which stays plain for the harness: members of a cluster with TLS
    secure_port: Option<Port>,
    /// What it is told beyond where it is
    options: Vec<String>,
    child: Option<Child>,
    /// Whether only root may ask, in all members of the cluster alike
    guarded: Arc<AtomicBool>,
}

/// From start to the first answer; an election alone takes about a second.
const READY: Duration = Duration::from_secs(20);

impl EtcdProcess {
    /// Starts an etcd and waits until it answers
    pub async fn start(program: Program) -> Self {
        Self::start_with(program, &[]).await
    }

    /// The same with more options, which the embedded one does not have
    pub async fn start_with(program: Program, options: &[&str]) -> Self {
        let mut etcd = Self::member(program);
        if program == Program::Real {
            etcd.options = vec!["--initial-cluster".to_owned(), etcd.named_peer()];
        }
        etcd.options.extend(options.iter().map(ToString::to_string));
        etcd.launch();
        etcd.comes_up().await
    }

    /// Starts a real etcd that speaks TLS, as these options tell it
    pub async fn start_tls(options: &[String]) -> Self {
        let mut etcd = Self::member(Program::Real);
        let metrics = Port::any();
        etcd.options = vec![
            "--initial-cluster".to_owned(),
            etcd.named_peer(),
            format!("--listen-metrics-urls=http://{}", metrics.address()),
        ];
        etcd.metrics_port = Some(metrics);
        etcd.options.extend_from_slice(options);
        etcd.launch();
        etcd.comes_up().await
    }

    /// Starts a cluster of three real members and waits until each of them answers
    pub async fn start_three() -> [Self; 3] {
        Self::start_three_with(&[]).await
    }

    /// The same with more options, for each member
    pub async fn start_three_with(options: &[&str]) -> [Self; 3] {
        Self::start_members(options, false).await
    }

    /// The same, where each member speaks TLS as well, at its [`secure_endpoint`](Self::secure_endpoint)
    pub async fn start_three_tls(options: &[&str]) -> [Self; 3] {
        Self::start_members(options, true).await
    }

    async fn start_members(options: &[&str], secure: bool) -> [Self; 3] {
        let mut members = [(); 3].map(|()| {
            let mut member = Self::member(Program::Real);
            member.secure_port = secure.then(Port::any);
            member
        });
        let cluster = members.each_ref().map(Self::named_peer).join(",");
        let guarded = Arc::<AtomicBool>::default();
        for member in &mut members {
            member.options = vec!["--initial-cluster".to_owned(), cluster.clone()];
            member.options.extend(options.iter().map(ToString::to_string));
            member.guarded = Arc::clone(&guarded);
            member.launch();
        }
        // Each waits for the others.
        let [a, b, c] = members.map(Self::comes_up);
        tokio::join!(a, b, c).into()
    }

    fn member(program: Program) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("callsign-etcd-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = env::temp_dir().join(name);
        fs::create_dir_all(&dir).expect("the temp dir is writable");
        Self {
            program,
            dir,
            client_port: Port::any(),
            peer_port: Port::any(),
            metrics_port: None,
            secure_port: None,
            options: Vec::new(),
            child: None,
            guarded: Arc::default(),
        }
    }

    /// Its name and where its peers find it
    fn named_peer(&self) -> String {
        format!("{}=http://{}", self.peer_port.number(), self.peer_port.address())
    }

    /// `127.0.0.1:port`
    pub fn endpoint(&self) -> String {
        self.client_port.address().to_string()
    }

    /// `127.0.0.1:port` for sessions under test: where it speaks TLS, if it does beside its plain port
    pub fn secure_endpoint(&self) -> String {
        self.secure_port.as_ref().unwrap_or(&self.client_port).address().to_string()
    }

    /// The same, or where else it speaks plain HTTP
    fn plain_endpoint(&self) -> String {
        self.metrics_port.as_ref().unwrap_or(&self.client_port).address().to_string()
    }

    /// Kills the process at once; its ports, and the real one's data, are kept for [`restart`](Self::restart)
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may be dead already, which is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, upon which a leader hands over; returns when the process has ended
    pub async fn terminate(&mut self) {
        let child = self.child.as_mut().expect("the process runs");
        kill_process(Pid::from_child(child), Signal::TERM).expect("the process is ours");
        wait::until("etcd ends", READY, || child.try_wait().expect("it is a child")).await;
        self.child = None;
    }

    /// Starts it again on the same ports and data, and waits until it answers
    pub async fn restart(&mut self) {
        self.launch();
        assert!(self.until_ready().await, "etcd did not come back: {}", self.log());
    }

    /// Removes all data, as a broken disk does; the process must have been killed
    pub fn wipe(&mut self) {
        assert!(self.child.is_none(), "a running etcd cannot be wiped");
        // The embedded one has lost its data already.
        if self.program == Program::Real {
            fs::remove_dir_all(self.dir.join("data")).expect("the data dir can be removed");
        }
    }

    /// Freezes the process: it neither reads nor answers, the kernel still accepts connections for it
    pub async fn stop(&self) {
        freeze(self.running()).await;
    }

    /// Wakes a frozen process
    pub fn cont(&self) {
        kill_process(Pid::from_child(self.running()), Signal::CONT).expect("the process is ours");
    }

    fn running(&self) -> &Child {
        self.child.as_ref().expect("the process runs")
    }

    /// Runs `etcdctl` against it and returns what it printed; panics if that fails
    pub async fn etcdctl<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let mut command = tokio::process::Command::new("etcdctl");
        command.arg("--endpoints").arg(self.endpoint()).args(args);
        let output =
            command.env("ETCDCTL_API", "3").kill_on_drop(true).output().await.expect("etcdctl is on PATH");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "etcdctl failed: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// What one of its counters stands at, all its labels that contain `label` together; the embedded one has none
    pub async fn metric(&self, name: &str, label: &str) -> Option<u64> {
        if self.program == Program::Embedded {
            return None;
        }
        let metrics = http_get(&self.plain_endpoint(), "/metrics").await.expect("a running etcd answers");
        let lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(label));
        Some(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64)
    }

    /// What the process has logged since it was last started
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Waits until it answers for the first time
    async fn comes_up(mut self) -> Self {
        assert!(self.until_ready().await, "{:?} etcd did not start: {}", self.program, self.log());
        self
    }

    /// Starts it again without waiting: one of several members that answer only together
    pub fn launch(&mut self) {
        self.kill9();
        self.child = Some(self.spawn());
    }

    /// Waits until it answers, after [`launch`](Self::launch); false if it ended or does not answer in time
    pub async fn until_ready(&mut self) -> bool {
        let deadline = Instant::now() + READY;
        while Instant::now() < deadline {
            let exited = self.child.as_mut().is_some_and(|child| !matches!(child.try_wait(), Ok(None)));
            if exited {
                return false;
            }
            if self.is_ready().await {
                return true;
            }
            sleep(Duration::from_millis(20)).await;
        }
        false
    }

    async fn is_ready(&self) -> bool {
        match self.program {
            Program::Real => healthy(&self.plain_endpoint()).await,
            Program::Embedded => self.log().contains("listening on"),
        }
    }

    fn spawn(&self) -> Child {
        let mut command = match self.program {
            Program::Real => self.real(),
            Program::Embedded => self.embedded(),
        };
        let log = fs::File::create(self.dir.join("log")).expect("the temp dir is writable");
        let errors = log.try_clone().expect("descriptors are left");
        let spawned = command.args(&self.options).stdin(Stdio::null()).stdout(log).stderr(errors).spawn();
        spawned.unwrap_or_else(|error| panic!("{} does not start: {error}", command.get_program().display()))
    }

    fn real(&self) -> Command {
        let scheme = if self.metrics_port.is_some() { "https" } else { "http" };
        let client = format!("{scheme}://{}", self.client_port.address());
        let secure = self.secure_port.as_ref().map(|port| format!(",https://{}", port.address()));
        let listen = format!("{client}{}", secure.unwrap_or_default());
        let peer = format!("http://{}", self.peer_port.address());
        let mut command = Command::new("etcd");
        command
            .args(["--name", &self.peer_port.number().to_string(), "--logger", "zap"])
            .arg("--data-dir")
            .arg(self.dir.join("data"))
            .args(["--listen-client-urls", &listen, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .env_remove("ETCDCTL_API");
        command
    }

    fn embedded(&self) -> Command {
        let mut command = Command::new(embedded_program());
        command.args(["--listen", &self.endpoint()]);
        command
    }

    /// Where it keeps data and log
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for EtcdProcess {
    fn drop(&mut self) {
        self.kill9();
        // A directory that stays behind harms nobody.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Beside the directory of the running test: cargo tells the path of a binary to integration tests of its package only
fn embedded_program() -> PathBuf {
    let test = env::current_exe().expect("the system knows what runs");
    let built = test.ancestors().nth(2).expect("tests are two levels deep in the target directory");
    let program = built.join(format!("embedded_etcd{}", env::consts::EXE_SUFFIX));
    let hint = "not built: cargo build --package callsign-tests --bin embedded_etcd";
    assert!(program.is_file(), "{} is {hint}", program.display());
    program
}

/// Whether the member has a leader: etcd's own health endpoint says so over plain HTTP
async fn healthy(endpoint: &str) -> bool {
    let asked = timeout(Duration::from_secs(1), http_get(endpoint, "/health")).await;
    matches!(asked, Ok(Ok(answer)) if answer.contains("\"health\":\"true\""))
}

async fn http_get(endpoint: &str, path: &str) -> io::Result<String> {
    let mut socket = TcpStream::connect(endpoint).await?;
    socket.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use crate::registry;

    #[tokio::test]
    async fn data_outlives_a_kill_and_not_a_wipe() {
        let Some(mut etcd) = registry::real(registry::PERSISTENCE).await else { return };
        etcd.put("a", "1").await;
        etcd.kill9();
        etcd.restart().await;
        assert_eq!(etcd.pairs("").await, [("a".to_owned(), "1".to_owned())]);
        etcd.kill9();
        etcd.wipe();
        etcd.restart().await;
        assert_eq!(etcd.pairs("").await, []);
    }

    #[tokio::test]
    async fn three_members_are_one_cluster() {
        let Some([a, _, c]) = registry::three_members().await else { return };
        a.put("a", "1").await;
        assert_eq!(c.pairs("").await, [("a".to_owned(), "1".to_owned())]);
    }
}
