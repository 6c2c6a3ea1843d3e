//! A TCP proxy whose connections can be cut or held

use std::{net::SocketAddr, pin::pin, time::Duration};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

use crate::wait;

/// Passes bytes to one target, or to nobody; ends with its drop
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    gate: watch::Sender<Gate>,
    admitted: watch::Sender<usize>,
    made: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Gate {
    Open,
    Held,
    Cut,
}

impl Proxy {
    /// A proxy to `target` on a port of its own
    pub async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("the listener is bound");
        let (gate, seen) = watch::channel(Gate::Open);
        let (admitted, limit) = watch::channel(usize::MAX);
        let (count, made) = watch::channel(0);
        let task = tokio::spawn(async move {
            for number in 0.. {
                let Ok((client, _)) = listener.accept().await else { return };
                count.send_replace(number + 1);
                // Who is not admitted finds the gate held, and closed with all others.
                let admitted = number < *limit.borrow();
                tokio::spawn(pass(client, admitted, target.clone(), seen.clone()));
            }
        });
        Self { address, gate, admitted, made, task }
    }

    /// Passes on the first `connections` that were ever made and keeps those that come later on hold
    pub fn admit(&self, connections: usize) {
        self.admitted.send_replace(connections);
    }

    /// `127.0.0.1:port`
    pub fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// Waits until as many connections were ever made
    pub async fn until_made(&self, connections: usize) {
        let mut made = self.made.clone();
        let made = made.wait_for(|made| *made >= connections);
        wait::within("the proxy is connected to", Duration::from_secs(5), made).await.expect("it accepts");
    }

    /// Closes all connections, and new ones at once; returns when they are closed
    pub async fn cut(&self) {
        self.gate.send_replace(Gate::Cut);
        // The accepting task keeps one receiver.
        let closed = || (self.gate.receiver_count() == 1).then_some(());
        wait::until("the proxy has cut all connections", Duration::from_secs(5), closed).await;
    }

    /// Keeps all connections open and passes nothing on, like a host that is frozen
    pub fn hold(&self) {
        self.gate.send_replace(Gate::Held);
    }

    /// Lets connections and what was held through again
    pub fn heal(&self) {
        self.gate.send_replace(Gate::Open);
    }
}

async fn pass(mut client: TcpStream, admitted: bool, target: String, mut gate: watch::Receiver<Gate>) {
    let Ok(mut server) = TcpStream::connect(target).await else { return };
    let mut copy = pin!(copy_bidirectional(&mut client, &mut server));
    loop {
        let open = match *gate.borrow_and_update() {
            Gate::Cut => return,
            Gate::Held => false,
            Gate::Open => admitted,
        };
        tokio::select! {
            _ = &mut copy, if open => return,
            changed = gate.changed() => if changed.is_err() { return },
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.gate.send_replace(Gate::Cut);
    }
}
