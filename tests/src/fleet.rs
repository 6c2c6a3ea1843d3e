//! Servers that register through a cluster, and clients that call them all the time
//!
//! Servers are processes of their own. A client is a session, a channel found through it under a steady load, and a
//! view of the same discovery; beside them one more view has a session of its own. Chaos and the fault table do
//! something to the [`Cluster`] or to the servers and then ask the
//! [checker](crate::checker).

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use callsign::{Etcd, EtcdChannel, EtcdOptions, discover::EtcdDiscover};

use crate::{
    checker::{Evidence, Life, Observed},
    cluster::Cluster,
    load::{Steady, Tally, greet},
    pb::greeter_client::GreeterClient,
    process::{Greeter, Process},
    wait,
};

/// A server that is told to leave waits a second for its clients, and drains for five at most.
const LEFT: Duration = Duration::from_secs(15);

/// A server that wakes has to find out that its lease is gone before it is counted on.
const AWAKE: Duration = Duration::from_secs(2);

/// What a fleet consists of
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the servers run: `greeter!()`
    pub greeter: Greeter,
    /// Under which name they register (`hello.rpc`)
    pub service: String,
    /// How many servers (3)
    pub servers: usize,
    /// Of their registrations (5 s)
    pub ttl: Duration,
    /// How many clients (1)
    pub clients: usize,
    /// Calls a second of each client (100)
    pub rate: u32,
    /// Of each call (2 s)
    pub deadline: Duration,
    /// Where the servers find etcd, if not where the clients do
    pub server_hosts: Option<Vec<String>>,
    /// What stands before the hosts of etcd, `user:password@` (nothing)
    pub login: String,
    /// What stands behind them, `?tls_ca=FILE` (nothing)
    pub options: String,
}

impl Plan {
    /// Three servers with a TTL of 5 s, and a client that makes 100 calls a second with deadlines of 2 s
    pub fn new(greeter: Greeter) -> Self {
        Self {
            greeter,
            service: "hello.rpc".to_owned(),
            servers: 3,
            ttl: Duration::from_secs(5),
            clients: 1,
            rate: 100,
            deadline: Duration::from_secs(2),
            server_hosts: None,
            login: String::new(),
            options: String::new(),
        }
    }

    /// The etcd at `hosts` as a text, for the environment or to be parsed
    pub fn etcd(&self, hosts: &[String]) -> String {
        format!("{}{}{}", self.login, hosts.join(","), self.options)
    }

    /// A session that connects when it is needed
    pub fn session(&self, hosts: &[String]) -> Etcd {
        let options: EtcdOptions = self.etcd(hosts).parse().expect("a valid text");
        Etcd::connect_lazy(options).expect("valid options")
    }
}

/// The servers, the clients and one more view
#[derive(Debug)]
pub struct Fleet {
    plan: Plan,
    hosts: Vec<String>,
    servers: Vec<Server>,
    clients: Vec<Client>,
    observer: Observed,
}

#[derive(Debug)]
struct Server {
    process: Process,
    lives: Vec<Life>,
}

/// A session, a channel under load and a view
#[derive(Debug)]
pub struct Client {
    /// The session, which channel and view share
    pub session: Etcd,
    /// The channel
    pub channel: EtcdChannel,
    /// What its discovery has told
    pub view: Observed,
    /// Its calls
    pub load: Steady,
}

impl Client {
    /// Finds `service` through `hosts`, waits until an endpoint is ready and begins to call
    pub async fn start(name: &str, hosts: &[String], plan: &Plan) -> Self {
        let session = plan.session(hosts);
        let channel = EtcdChannel::builder(&plan.service).etcd(&session);
        let channel = channel.connect_timeout(LEFT).connect().await.expect("servers are registered");
        let discover = EtcdDiscover::new(&session, plan.service.as_str()).expect("a valid name");
        let view = Observed::of(name, discover);
        let (client, deadline) = (GreeterClient::new(channel.clone()), plan.deadline);
        let load = Steady::start(plan.rate, move || greet(client.clone(), deadline));
        Self { session, channel, view, load }
    }
}

/// A session that connects when it is needed, as nobody and in plaintext
pub fn session(hosts: &[String]) -> Etcd {
    Etcd::connect_lazy(EtcdOptions::new(hosts)).expect("the proxies' addresses are valid")
}

impl Fleet {
    /// Starts the servers, which register in the etcd at `hosts`, waits until all are seen, and starts the clients
    pub async fn start(hosts: Vec<String>, plan: Plan) -> Self {
        let discover = EtcdDiscover::new(&plan.session(&hosts), plan.service.as_str()).expect("a valid name");
        let observer = Observed::of("observer", discover);
        let mut fleet = Self { plan, hosts, servers: Vec::new(), clients: Vec::new(), observer };
        for _ in 0..fleet.plan.servers {
            fleet.add_server().await;
        }
        fleet.until_seen().await;
        for number in 0..fleet.plan.clients {
            let client = Client::start(&format!("client {number}"), &fleet.hosts, &fleet.plan).await;
            fleet.clients.push(client);
        }
        fleet.until_seen().await;
        fleet
    }

    /// The plan it was started by
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What a server runs, registered as planned; more options can be given
    pub fn greeter(&self) -> Greeter {
        let Plan { greeter, service, ttl, server_hosts, .. } = &self.plan;
        let hosts = server_hosts.as_ref().unwrap_or(&self.hosts);
        greeter.clone().register(service, &self.plan.etcd(hosts)).ttl(*ttl)
    }

    /// Starts one more server; its number
    pub async fn add_server(&mut self) -> usize {
        self.add(self.greeter()).await
    }

    /// The same with other options: begin with [`greeter`](Self::greeter)
    pub async fn add(&mut self, greeter: Greeter) -> usize {
        let process = greeter.start().await;
        let lives = vec![born(&process, Instant::now())];
        self.servers.push(Server { process, lives });
        self.servers.len() - 1
    }

    /// How many servers there are, dead ones included
    pub fn servers(&self) -> usize {
        self.servers.len()
    }

    /// Where a server listens
    pub fn address(&self, server: usize) -> String {
        self.servers[server].process.address().to_string()
    }

    /// Whether a server runs and is not frozen
    pub fn is_living(&self, server: usize) -> bool {
        self.servers[server].lives.last().is_some_and(|life| life.until.is_none())
    }

    /// SIGKILL
    pub fn kill(&mut self, server: usize) {
        self.servers[server].dies();
        self.servers[server].process.kill9();
    }

    /// SIGSTOP
    pub async fn freeze(&mut self, server: usize) {
        self.servers[server].dies();
        self.servers[server].process.sigstop().await;
    }

    /// SIGCONT
    pub fn thaw(&mut self, server: usize) {
        let server = &mut self.servers[server];
        server.process.sigcont();
        server.lives.push(born(&server.process, Instant::now() + AWAKE));
    }

    /// SIGTERM; returns when it has drained and ended
    pub async fn terminate(&mut self, server: usize) {
        self.dismiss(server);
        self.left(server).await;
    }

    /// SIGTERM
    pub fn dismiss(&mut self, server: usize) {
        self.servers[server].dies();
        self.servers[server].process.sigterm();
    }

    /// Waits until a server that was dismissed has ended
    pub async fn left(&mut self, server: usize) {
        self.servers[server].process.exited(LEFT).await;
    }

    /// Starts a server that was killed or terminated again at its address
    pub async fn restart(&mut self, server: usize) {
        self.restart_as(server, self.greeter()).await;
    }

    /// The same with other options
    pub async fn restart_as(&mut self, server: usize, greeter: Greeter) {
        let server = &mut self.servers[server];
        server.process = greeter.listen(&server.process.address()).start().await;
        server.lives.push(born(&server.process, Instant::now()));
    }

    /// The clients
    pub fn clients(&self) -> &[Client] {
        &self.clients
    }

    /// All views: that of each client, and one that has a session of its own
    pub fn views(&self) -> impl Iterator<Item = &Observed> {
        self.clients.iter().map(|client| &client.view).chain([&self.observer])
    }

    /// Addresses of the servers that live
    pub fn living(&self) -> BTreeSet<String> {
        (0..self.servers.len())
            .filter(|&server| self.is_living(server))
            .map(|server| self.address(server))
            .collect()
    }

    /// Who was there, and how long
    pub fn lives(&self) -> Vec<Life> {
        self.servers.iter().flat_map(|server| server.lives.iter().cloned()).collect()
    }

    /// What etcd, the servers and the views say now
    pub async fn evidence(&self, cluster: &Cluster) -> Evidence {
        self.beside(cluster.pairs(&format!("{}/", self.plan.service)).await)
    }

    /// The same beside keys and values that were read elsewhere
    pub fn beside(&self, truth: Vec<(String, String)>) -> Evidence {
        let views = self.views().map(|view| (view.name().to_owned(), view.addresses())).collect();
        Evidence { living: self.living(), truth, views }
    }

    /// What became of all calls so far
    pub fn tally(&self) -> Tally {
        self.clients.iter().map(|client| client.load.tally()).fold(Tally::default(), Tally::and)
    }

    /// Ends the load and then the clients and views; what became of the calls, and the servers, which go on
    pub async fn end_clients(self) -> (Tally, Servers) {
        let mut tally = Tally::default();
        for client in self.clients {
            let Client { load, .. } = client;
            tally = tally.and(load.stop().await);
        }
        (tally, Servers(self.servers))
    }

    /// Waits until all views show all that live
    async fn until_seen(&self) {
        let living = self.living();
        let what = format!("all views show {living:?}");
        let seen = || self.views().all(|view| view.addresses() == living).then_some(());
        wait::until(&what, LEFT, seen).await;
    }
}

/// The servers of a fleet whose clients have ended
#[derive(Debug)]
pub struct Servers(Vec<Server>);

impl Servers {
    /// SIGTERM to all that live; returns when they have ended
    pub async fn terminate(mut self) {
        let living = || |server: &&mut Server| server.lives.last().is_some_and(|life| life.until.is_none());
        for server in self.0.iter_mut().filter(living()) {
            server.process.sigterm();
        }
        for server in self.0.iter_mut().filter(living()) {
            server.process.exited(LEFT).await;
        }
    }
}

fn born(process: &Process, from: Instant) -> Life {
    Life { address: process.address().to_string(), from, until: None }
}

impl Server {
    fn dies(&mut self) {
        if let Some(life) = self.lives.last_mut() {
            life.until.get_or_insert_with(Instant::now);
        }
    }
}
