//! Three real etcd members, each behind a proxy of ours: what is under test sees them through the proxies only
//!
//! Faults are made to the processes (kill, freeze, wipe) or to the way to them ([`Cluster::proxy`]). The truth is read
//! past the proxies, from a member that runs, by a linearizable read.

use std::{collections::BTreeSet, time::Duration};

use tokio::time::timeout;

use crate::{etcd::EtcdProcess, proxy::Proxy, wait};

/// For an election, or for a member to come back, on a busy machine
const SETTLED: Duration = Duration::from_secs(20);

/// A member that runs answers its metrics at once.
const METRICS: Duration = Duration::from_secs(2);

/// A cluster of three members; dropping it kills them
#[derive(Debug)]
pub struct Cluster {
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    // First, so that nobody is let through to a port that may be another's.
    proxy: Proxy,
    etcd: EtcdProcess,
    condition: Condition,
}

/// What was done to a member
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It runs
    Running,
    /// SIGSTOP: it neither reads nor answers
    Frozen,
    /// SIGKILL, and its port refuses
    Dead,
}

/// What sessions leave behind in etcd, and on the way to it
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Traces {
    /// Leases that live
    pub leases: BTreeSet<i64>,
    /// Watches that all members serve
    pub watchers: u64,
    /// Connections through the proxies
    pub connections: usize,
}

impl Cluster {
    /// Starts three members and waits until each of them answers
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// The same with more of etcd's options, for each member
    pub async fn start_with(options: &[&str]) -> Self {
        Self::behind_proxies(EtcdProcess::start_three_with(options).await).await
    }

    /// The same over TLS, as these options tell; the truth is read in plaintext
    pub async fn start_tls(options: &[&str]) -> Self {
        Self::behind_proxies(EtcdProcess::start_three_tls(options).await).await
    }

    async fn behind_proxies(etcds: [EtcdProcess; 3]) -> Self {
        let mut members = Vec::new();
        for etcd in etcds {
            let proxy = Proxy::to(etcd.secure_endpoint()).await;
            members.push(Member { proxy, etcd, condition: Condition::Running });
        }
        Self { members }
    }

    /// From now on a login is needed: root's, or that of `user`, who may read and write what begins with one of
    /// `prefixes`
    pub async fn enable_auth(&self, user: &str, password: &str, prefixes: &[&str]) {
        self.running().enable_auth().await;
        self.as_root(&["role", "add", user]).await;
        for prefix in prefixes {
            self.as_root(&["role", "grant-permission", user, "readwrite", "--prefix=true", prefix]).await;
        }
        self.as_root(&["user", "add", &format!("{user}:{password}")]).await;
        self.as_root(&["user", "grant-role", user, user]).await;
    }

    /// `etcdctl` with root's name and password, once authentication is enabled
    pub async fn as_root(&self, arguments: &[&str]) -> String {
        let login = ["--user", "root:root"];
        self.running().etcdctl(login.iter().chain(arguments)).await
    }

    /// How many members there are
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Never: there are three
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// `host:port` of each proxy: what a session is given
    pub fn hosts(&self) -> Vec<String> {
        self.members.iter().map(|member| member.proxy.endpoint()).collect()
    }

    /// The way to a member
    pub fn proxy(&self, member: usize) -> &Proxy {
        &self.members[member].proxy
    }

    /// All ways
    pub fn proxies(&self) -> impl Iterator<Item = &Proxy> {
        self.members.iter().map(|member| &member.proxy)
    }

    /// The member itself, past its proxy
    pub fn etcd(&self, member: usize) -> &EtcdProcess {
        &self.members[member].etcd
    }

    /// What was done to a member
    pub fn condition(&self, member: usize) -> Condition {
        self.members[member].condition
    }

    /// Members in this condition
    pub fn those(&self, condition: Condition) -> Vec<usize> {
        (0..self.len()).filter(|&member| self.condition(member) == condition).collect()
    }

    /// A member that runs
    ///
    /// # Panics
    ///
    /// If none does.
    pub fn running(&self) -> &EtcdProcess {
        let running = self.members.iter().find(|member| member.condition == Condition::Running);
        &running.expect("a member runs").etcd
    }

    /// SIGKILL; its port refuses from then on
    pub async fn kill(&mut self, member: usize) {
        let member = &mut self.members[member];
        member.etcd.kill9();
        member.condition = Condition::Dead;
        member.proxy.refuse().await;
    }

    /// SIGTERM; its port refuses from the time on at which it has ended
    pub async fn terminate(&mut self, member: usize) {
        let member = &mut self.members[member];
        member.etcd.terminate().await;
        member.condition = Condition::Dead;
        member.proxy.refuse().await;
    }

    /// SIGKILL to all three
    pub async fn kill_all(&mut self) {
        for member in 0..self.len() {
            self.kill(member).await;
        }
    }

    /// Starts members that were killed on their ports and data, and waits until they answer; their proxies heal
    ///
    /// # Panics
    ///
    /// If they do not: those that run must be a majority then.
    pub async fn revive(&mut self, members: impl IntoIterator<Item = usize>) {
        let members: Vec<_> = members.into_iter().collect();
        for &member in &members {
            self.members[member].etcd.launch();
        }
        for &member in &members {
            let member = &mut self.members[member];
            assert!(member.etcd.until_ready().await, "etcd did not come back: {}", member.etcd.log());
            member.condition = Condition::Running;
            member.proxy.heal();
        }
    }

    /// Removes the data of all members, as a cluster set up anew with its old configuration has none; all must be dead
    pub fn wipe_all(&mut self) {
        for member in &mut self.members {
            member.etcd.wipe();
        }
    }

    /// SIGSTOP; the kernel still accepts connections for it
    pub async fn freeze(&mut self, member: usize) {
        self.members[member].etcd.stop().await;
        self.members[member].condition = Condition::Frozen;
    }

    /// SIGCONT
    pub fn thaw(&mut self, member: usize) {
        self.members[member].etcd.cont();
        self.members[member].condition = Condition::Running;
    }

    /// Everything is well again: the dead are revived, the frozen thawed, the ways open
    pub async fn heal(&mut self) {
        for member in self.those(Condition::Frozen) {
            self.thaw(member);
        }
        self.revive(self.those(Condition::Dead)).await;
        self.proxies().for_each(Proxy::heal);
    }

    /// Refuses new sessions at all members but one, so that whoever comes now is connected to that one
    ///
    /// [`heal`](Self::heal) or [`Proxy::heal`] lets them in again.
    pub async fn only(&self, member: usize) {
        for other in (0..self.len()).filter(|other| *other != member) {
            self.proxy(other).refuse().await;
        }
    }

    /// The member that leads, once there is one
    pub async fn leader(&self) -> usize {
        wait::within("a leader is elected", SETTLED, async {
            loop {
                for member in self.those(Condition::Running) {
                    if self.metric(member, "etcd_server_is_leader", "").await == Some(1) {
                        return member;
                    }
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        })
        .await
    }

    /// A member that follows
    pub async fn follower(&self) -> usize {
        let leader = self.leader().await;
        let running = self.those(Condition::Running);
        running.into_iter().find(|member| *member != leader).expect("two members run")
    }

    /// Keys with this prefix and their values, by a linearizable read
    pub async fn pairs(&self, prefix: &str) -> Vec<(String, String)> {
        self.running().pairs(prefix).await
    }

    /// What sessions have left behind in etcd and on the way to it
    pub async fn traces(&self) -> Traces {
        Traces {
            leases: self.running().leases().await.into_iter().collect(),
            watchers: self.total("etcd_debugging_mvcc_watcher_total", "").await,
            connections: self.proxies().map(Proxy::open).sum(),
        }
    }

    /// Requests of a method (`Range`, `LeaseGrant`) that the running members have taken since they were started
    pub async fn requests(&self, method: &str) -> u64 {
        self.total("grpc_server_started_total", &format!("grpc_method=\"{method}\"")).await
    }

    async fn total(&self, name: &str, label: &str) -> u64 {
        let mut total = 0;
        for member in self.those(Condition::Running) {
            total += self.metric(member, name, label).await.unwrap_or_default();
        }
        total
    }

    async fn metric(&self, member: usize, name: &str, label: &str) -> Option<u64> {
        timeout(METRICS, self.etcd(member).metric(name, label)).await.ok().flatten()
    }
}
