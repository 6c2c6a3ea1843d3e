//! Who plays, and how faults are made to them

use std::{
    env,
    time::{Duration, Instant},
};

use callsign_tests::{
    channel::UpdateLog,
    checker::{Evidence, Observed},
    cluster::{Cluster, Traces},
    fleet::{Client, Fleet, Plan},
    load::Tally,
    process::Greeter,
    proxy::Proxy,
};

use crate::schedule::{Fault, Hit, How, Kind, Round, Targets, Who};

/// How many servers register
const INSTANCES: usize = 20;

/// How many clients call, and how often in a second each
const CLIENTS: usize = 5;
const RATE: u32 = 20;

/// Long enough that an instance which is told to leave, or killed, often has a call in flight
const ANSWER: Duration = Duration::from_millis(50);

/// Of the registrations; short, so that the dead are soon gone and an hour has many faults
pub(crate) const TTL: Duration = Duration::from_secs(5);

/// A member that stands still for longer may cost leases: an old leader that wakes revokes what it has not seen renewed
/// (etcd before 3.4.31), and a lease was renewed up to a third of its TTL ago when the pause began.
const COSTS_LEASES: Duration = Duration::from_millis(2_500);

/// An old leader that wakes revokes leases as late as this: 7 s, etcd's time for its own requests.
const REVOKED: Duration = Duration::from_secs(8);

/// An instance that reaches no member for longer may lose its lease: it was renewed up to a third of the TTL ago, and the
/// next attempt comes up to 3 s after healing.
const COSTS_ITS_LEASE: Duration = Duration::from_millis(1_000);

/// Someone's own way to each member
#[derive(Debug)]
struct Ways(Vec<Proxy>);

impl Ways {
    async fn to(cluster: &Cluster) -> Self {
        let mut proxies = Vec::new();
        for member in 0..cluster.len() {
            proxies.push(Proxy::to(cluster.etcd(member).endpoint()).await);
        }
        Self(proxies)
    }

    fn hosts(&self) -> Vec<String> {
        self.0.iter().map(Proxy::endpoint).collect()
    }

    fn those(&self, through: Option<usize>) -> impl Iterator<Item = &Proxy> {
        self.0
            .iter()
            .enumerate()
            .filter(move |(member, _)| through.is_none_or(|only| only == *member))
            .map(|(_, way)| way)
    }
}

/// A server that was killed
#[derive(Clone, Debug)]
pub(crate) struct Killed {
    /// Where it listened
    pub(crate) address: String,
    /// Before the signal was sent
    pub(crate) from: Instant,
    /// When it was gone
    pub(crate) until: Instant,
}

/// Which living instance may leave views, and since when: `None` is any
#[derive(Clone, Debug)]
pub(crate) struct Excuse {
    pub(crate) address: Option<String>,
    pub(crate) from: Instant,
    pub(crate) until: Option<Instant>,
}

/// A client, and what its channel has said about endpoints
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) client: Client,
    pub(crate) log: UpdateLog,
    ways: Ways,
}

/// Cluster, servers and clients
#[derive(Debug)]
pub(crate) struct Stage {
    pub(crate) cluster: Cluster,
    pub(crate) fleet: Fleet,
    pub(crate) callers: Vec<Caller>,
    /// By instance: its server's number in the fleet, which changes when it moves
    servers: Vec<usize>,
    ways: Vec<Ways>,
    pub(crate) killed: Vec<Killed>,
    pub(crate) excuses: Vec<Excuse>,
    /// How long after healing the faults of this round may still take living instances out of etcd
    pub(crate) aftermath: Duration,
}

impl Stage {
    /// Starts cluster and servers; clients come with [`add_callers`](Self::add_callers)
    pub(crate) async fn start() -> Self {
        let program = env::current_exe().expect("this program has a path").with_file_name("greeter");
        let greeter = Greeter::new(program.to_str().expect("the path is UTF-8")).delay(ANSWER);
        let plan = Plan { servers: 0, clients: 0, rate: RATE, ttl: TTL, ..Plan::new(greeter) };
        let cluster = Cluster::start().await;
        let fleet = Fleet::start(cluster.hosts(), plan).await;
        let (callers, servers, ways) = (Vec::new(), Vec::new(), Vec::new());
        let mut stage = Self {
            cluster,
            fleet,
            callers,
            servers,
            ways,
            killed: Vec::new(),
            excuses: Vec::new(),
            aftermath: Duration::ZERO,
        };
        for instance in 0..INSTANCES {
            stage.ways.push(Ways::to(&stage.cluster).await);
            let server = stage.fleet.add(stage.greeter(instance)).await;
            stage.servers.push(server);
        }
        stage
    }

    /// Starts the clients, once servers are registered
    pub(crate) async fn add_callers(&mut self) {
        for number in 0..CLIENTS {
            let ways = Ways::to(&self.cluster).await;
            let client = Client::start(&format!("client {number}"), &ways.hosts(), self.fleet.plan()).await;
            let log = UpdateLog::new(client.channel.updates());
            self.callers.push(Caller { client, log, ways });
        }
    }

    pub(crate) fn targets(&self) -> Targets {
        Targets { members: self.cluster.len(), instances: INSTANCES, clients: CLIENTS }
    }

    /// The instance's server, to be started: its hosts are its own ways
    fn greeter(&self, instance: usize) -> Greeter {
        let plan = self.fleet.plan();
        plan.greeter.clone().register(&plan.service, &self.ways[instance].hosts().join(",")).ttl(plan.ttl)
    }

    fn address(&self, instance: usize) -> String {
        self.fleet.address(self.servers[instance])
    }

    /// What can be seen now
    pub(crate) async fn evidence(&self) -> Evidence {
        let mut evidence = self.fleet.evidence(&self.cluster).await;
        let views = self.callers.iter().map(|caller| &caller.client.view);
        evidence.views.extend(views.map(|view| (view.name().to_owned(), view.addresses())));
        evidence
    }

    /// All views
    pub(crate) fn views(&self) -> impl Iterator<Item = &Observed> {
        self.fleet.views().chain(self.callers.iter().map(|caller| &caller.client.view))
    }

    /// What sessions have in etcd, and on the way to it
    pub(crate) async fn traces(&self) -> Traces {
        let own = self.ways.iter().chain(self.callers.iter().map(|caller| &caller.ways));
        let open: usize = own.flat_map(|ways| &ways.0).map(Proxy::open).sum();
        let traces = self.cluster.traces().await;
        Traces { connections: traces.connections + open, ..traces }
    }

    /// Ends the load and the clients; what became of all calls
    pub(crate) async fn end_callers(&mut self) -> Vec<Tally> {
        let mut tallies = Vec::new();
        for Caller { client, log, ways } in self.callers.drain(..) {
            let Client { load, .. } = client;
            tallies.push(load.stop().await);
            drop((log, ways));
        }
        tallies
    }

    /// Makes the faults of a round, each at its time, and ends each; returns when all is healed
    pub(crate) async fn play(&mut self, round: &Round) {
        let start = tokio::time::Instant::now();
        let mut steps: Vec<_> = round.0.iter().map(|(offset, fault)| (*offset, true, *fault)).collect();
        let ends = |(offset, fault): &(Duration, Fault)| *offset + fault.lasting;
        let last = round.0.iter().map(ends).max().unwrap_or_default();
        steps.extend(round.0.iter().map(|pair| {
            // Waiting until an instance has left must not make another fault longer.
            let waits = matches!(pair.1.kind, Kind::RestartInstance(_));
            (if waits { last } else { ends(pair) }, false, pair.1)
        }));
        // Stable: a fault without a length begins before it ends.
        steps.sort_by_key(|(at, ..)| *at);
        for (at, begins, fault) in steps {
            tokio::time::sleep_until(start + at).await;
            if begins {
                self.excuse(&fault, round).await;
                self.begin(&fault).await;
            } else {
                self.end(&fault).await;
            }
        }
        self.cluster.heal().await;
    }

    /// Notes which living instances the fault itself may take out of etcd
    async fn excuse(&mut self, fault: &Fault, round: &Round) {
        let address = match fault.kind {
            _ if self.freezes_a_leader(fault).await => {
                self.aftermath = self.aftermath.max(REVOKED);
                None
            }
            Kind::Wipe | Kind::DeleteKey(_) | Kind::DeleteAll | Kind::Revoke(_) => None,
            Kind::Way { of: Who::Instance(instance), through, .. }
                if round.is_of_members() || through.is_none() && fault.lasting > COSTS_ITS_LEASE =>
            {
                self.aftermath = self.aftermath.max(TTL);
                Some(self.address(instance))
            }
            _ => return,
        };
        self.excuses.push(Excuse { address, from: Instant::now(), until: None });
    }

    /// Whether a leader stands still for so long that it may revoke leases when it wakes
    async fn freezes_a_leader(&self, fault: &Fault) -> bool {
        fault.lasting > COSTS_LEASES
            && match fault.kind {
                Kind::Leader | Kind::AllMembers | Kind::Quorum { frozen: true, .. } => true,
                Kind::Member(member, Hit::Freeze) => self.cluster.leader().await == member,
                _ => false,
            }
    }

    async fn begin(&mut self, fault: &Fault) {
        match fault.kind {
            Kind::Member(member, Hit::Kill) => self.cluster.kill(member).await,
            Kind::Member(member, Hit::Terminate) => self.cluster.terminate(member).await,
            Kind::Member(member, Hit::Freeze) => self.cluster.freeze(member).await,
            Kind::Leader => {
                let leader = self.cluster.leader().await;
                self.cluster.freeze(leader).await;
            }
            Kind::Quorum { spared, frozen } => {
                for member in (0..self.cluster.len()).filter(|member| *member != spared) {
                    if frozen { self.cluster.freeze(member).await } else { self.cluster.kill(member).await }
                }
            }
            Kind::AllMembers => {
                for member in 0..self.cluster.len() {
                    self.cluster.freeze(member).await;
                }
            }
            Kind::Wipe => {
                self.cluster.kill_all().await;
                self.cluster.wipe_all();
            }
            Kind::Compact | Kind::DeleteKey(_) | Kind::DeleteAll | Kind::Revoke(_) => {
                self.on_store(fault.kind).await;
            }
            Kind::Way { of, through, how } => self.obstruct(of, through, how).await,
            Kind::KillInstance { instance, .. } => self.kill(instance),
            Kind::RestartInstance(instance) => self.fleet.dismiss(self.servers[instance]),
        }
    }

    async fn end(&mut self, fault: &Fault) {
        match fault.kind {
            Kind::Way { of, .. } => self.ways(of).those(None).for_each(Proxy::heal),
            Kind::KillInstance { instance, elsewhere: true } => {
                self.servers[instance] = self.fleet.add(self.greeter(instance)).await;
            }
            Kind::KillInstance { instance, elsewhere: false } => self.come_back(instance).await,
            Kind::RestartInstance(instance) => {
                self.fleet.left(self.servers[instance]).await;
                self.come_back(instance).await;
            }
            _ if fault.is_of_members() => self.cluster.heal().await,
            _ => {}
        }
    }

    /// What an operator does
    async fn on_store(&self, kind: Kind) {
        let (etcd, prefix) = (self.cluster.running(), format!("{}/", self.fleet.plan().service));
        match kind {
            Kind::DeleteKey(nth) => {
                let pairs = etcd.pairs(&prefix).await;
                if let Some((key, _)) = pairs.get(nth % pairs.len().max(1)) {
                    etcd.delete(key).await;
                }
            }
            Kind::DeleteAll => drop(etcd.delete_all(&prefix).await),
            Kind::Revoke(nth) => {
                let mut leases = etcd.leases().await;
                leases.sort_unstable();
                if let Some(lease) = leases.get(nth % leases.len().max(1)) {
                    etcd.revoke(*lease).await;
                }
            }
            _ => {
                // What is forgotten has to be something.
                etcd.put("chaos", "compact").await;
                etcd.compact().await;
            }
        }
    }

    fn ways(&self, of: Who) -> &Ways {
        match of {
            Who::Client(client) => &self.callers[client].ways,
            Who::Instance(instance) => &self.ways[instance],
        }
    }

    async fn obstruct(&self, of: Who, through: Option<usize>, how: How) {
        for way in self.ways(of).those(through) {
            match how {
                How::BlackHole => way.hold(),
                How::Reset => {
                    way.reset().await;
                    way.heal();
                }
                How::Refuse => way.refuse().await,
                How::Delay(delay) => way.delay(delay),
            }
        }
    }

    fn kill(&mut self, instance: usize) {
        let (address, from) = (self.address(instance), Instant::now());
        self.fleet.kill(self.servers[instance]);
        self.killed.push(Killed { address, from, until: Instant::now() });
    }

    /// At its address; its former key may end before its new one is there
    async fn come_back(&mut self, instance: usize) {
        let (address, from) = (Some(self.address(instance)), Instant::now());
        self.fleet.restart_as(self.servers[instance], self.greeter(instance)).await;
        let until = Some(Instant::now() + Duration::from_secs(1));
        self.excuses.push(Excuse { address, from, until });
    }
}
