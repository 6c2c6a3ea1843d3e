//! A real etcd as a child process, for one test

use std::{
    fs, io,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

/// One member of an etcd cluster, by default its only one, on ports from the OS, its data in a fresh temp dir
///
/// Dropping it kills the process and removes the directory.
#[derive(Debug)]
pub struct EtcdProcess {
    dir: PathBuf,
    client_port: u16,
    peer_port: u16,
    /// What it is told beyond where it is
    options: Vec<String>,
    child: Option<Child>,
}

/// From start to the first answer; an election alone takes about a second.
const READY: Duration = Duration::from_secs(20);

impl EtcdProcess {
    /// Starts an etcd and waits until it answers
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// The same with more options
    pub async fn start_with(options: &[&str]) -> Self {
        // A port found free can be taken before etcd binds it: another pair then.
        for _ in 0..5 {
            let mut etcd = Self::member(free_ports());
            etcd.options = vec!["--initial-cluster".to_owned(), etcd.named_peer()];
            etcd.options.extend(options.iter().map(ToString::to_string));
            if etcd.try_restart().await {
                return etcd;
            }
        }
        panic!("etcd did not start: is it on PATH?");
    }

    /// Starts a cluster of three members and waits until each of them answers
    pub async fn start_three() -> [Self; 3] {
        for _ in 0..5 {
            let [a, b, c, d, e, f] = free_ports();
            let mut members = [[a, b], [c, d], [e, f]].map(Self::member);
            let cluster = members.each_ref().map(Self::named_peer).join(",");
            for member in &mut members {
                member.options = vec!["--initial-cluster".to_owned(), cluster.clone()];
                member.child = Some(member.spawn().expect("etcd is on PATH"));
            }
            let [a, b, c] = &mut members;
            // Each waits for the others.
            if let (true, true, true) = tokio::join!(a.until_ready(), b.until_ready(), c.until_ready()) {
                return members;
            }
        }
        panic!("etcd did not start: is it on PATH?");
    }

    fn member([client_port, peer_port]: [u16; 2]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("callsign-etcd-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir).expect("the temp dir is writable");
        Self { dir, client_port, peer_port, options: Vec::new(), child: None }
    }

    /// Its name and where its peers find it
    fn named_peer(&self) -> String {
        format!("{}=http://127.0.0.1:{}", self.peer_port, self.peer_port)
    }

    /// `127.0.0.1:port`
    pub fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// Kills the process at once; data and ports are kept for [`restart`](Self::restart)
    pub fn kill9(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may be dead already, which is what is wanted.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again on the same ports and data, and waits until it answers
    pub async fn restart(&mut self) {
        assert!(self.try_restart().await, "etcd did not come back: {}", self.log());
    }

    /// Removes all data, as a broken disk does; the process must have been killed
    pub fn wipe(&mut self) {
        assert!(self.child.is_none(), "a running etcd cannot be wiped");
        fs::remove_dir_all(self.dir.join("data")).expect("the data dir can be removed");
    }

    /// Freezes the process: it neither reads nor answers, the kernel still accepts connections for it
    pub fn stop(&self) {
        self.signal(Signal::STOP);
    }

    /// Wakes a frozen process
    pub fn cont(&self) {
        self.signal(Signal::CONT);
    }

    /// Runs `etcdctl` against it and returns what it printed; panics if that fails
    pub async fn etcdctl<S: AsRef<str>>(&self, args: impl IntoIterator<Item = S>) -> String {
        let mut command = tokio::process::Command::new("etcdctl");
        command
            .arg("--endpoints")
            .arg(self.endpoint())
            .args(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        let output =
            command.env("ETCDCTL_API", "3").kill_on_drop(true).output().await.expect("etcdctl is on PATH");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "etcdctl failed: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// From now on only `--user=root:root` may do anything but ask for leases
    pub async fn enable_auth(&self) {
        self.etcdctl(["user", "add", "root:root"]).await;
        self.etcdctl(["user", "grant-role", "root", "root"]).await;
        self.etcdctl(["auth", "enable"]).await;
    }

    /// Puts a value that is too long for a command line
    pub async fn put_large(&self, key: &str, value: &[u8]) {
        let mut command = tokio::process::Command::new("etcdctl");
        command.arg("--endpoints").arg(self.endpoint()).args(["put", key]).env("ETCDCTL_API", "3");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn().expect("etcdctl is on PATH");
        let mut stdin = child.stdin.take().expect("stdin is piped");
        stdin.write_all(value).await.expect("etcdctl reads its value");
        drop(stdin);
        assert!(child.wait().await.expect("a child can be waited for").success(), "etcdctl put failed");
    }

    /// What one of its counters stands at, all its labels that contain `label` together
    pub async fn metric(&self, name: &str, label: &str) -> u64 {
        let metrics = http_get(&self.endpoint(), "/metrics").await.expect("a running etcd answers");
        let lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(label));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum::<f64>() as u64
    }

    /// What the process has logged so far
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    async fn try_restart(&mut self) -> bool {
        self.kill9();
        self.child = Some(self.spawn().expect("etcd is on PATH"));
        self.until_ready().await
    }

    async fn until_ready(&mut self) -> bool {
        let deadline = Instant::now() + READY;
        while Instant::now() < deadline {
            let exited = self.child.as_mut().is_some_and(|child| !matches!(child.try_wait(), Ok(None)));
            if exited {
                return false;
            }
            if healthy(&self.endpoint()).await {
                return true;
            }
            sleep(Duration::from_millis(20)).await;
        }
        false
    }

    fn spawn(&self) -> io::Result<Child> {
        let client = format!("http://127.0.0.1:{}", self.client_port);
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("log"))?;
        Command::new("etcd")
            .args(["--name", &self.peer_port.to_string(), "--logger", "zap"])
            .arg("--data-dir")
            .arg(self.dir.join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(&self.options)
            .env_remove("ETCDCTL_API")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("the process runs");
        kill_process(Pid::from_child(child), signal).expect("the process is ours");
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

fn free_ports<const N: usize>() -> [u16; N] {
    // All are held before any is let go, so they differ.
    let listeners = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").expect("a free port"));
    listeners.map(|listener| listener.local_addr().expect("it is bound").port())
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
    use crate::real;

    #[tokio::test]
    async fn data_outlives_a_kill_and_not_a_wipe() {
        let Some(mut etcd) = real::etcd().await else { return };
        etcd.etcdctl(["put", "a", "1"]).await;
        etcd.kill9();
        etcd.restart().await;
        assert_eq!(etcd.etcdctl(["get", "a", "--print-value-only"]).await, "1\n");
        etcd.kill9();
        etcd.wipe();
        etcd.restart().await;
        assert_eq!(etcd.etcdctl(["get", "a"]).await, "");
    }

    #[tokio::test]
    async fn three_members_are_one_cluster() {
        let Some([a, _, c]) = real::three_etcds().await else { return };
        a.etcdctl(["put", "a", "1"]).await;
        assert_eq!(c.etcdctl(["get", "a", "--print-value-only"]).await, "1\n");
    }
}
