//! A TCP proxy whose connections can be cut

use std::{net::SocketAddr, time::Duration};

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
    open: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// A proxy to `target` on a port of its own
    pub async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("the listener is bound");
        let (open, gate) = watch::channel(true);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, target.clone(), gate.clone()));
            }
        });
        Self { address, open, task }
    }

    /// `127.0.0.1:port`
    pub fn endpoint(&self) -> String {
        self.address.to_string()
    }

    /// Closes all connections, and new ones at once; returns when they are closed
    pub async fn cut(&self) {
        self.open.send_replace(false);
        // The accepting task keeps one receiver.
        let closed = || (self.open.receiver_count() == 1).then_some(());
        wait::until("the proxy has cut all connections", Duration::from_secs(5), closed).await;
    }

    /// Lets connections through again
    pub fn heal(&self) {
        self.open.send_replace(true);
    }
}

async fn pass(mut client: TcpStream, target: String, mut gate: watch::Receiver<bool>) {
    if !*gate.borrow_and_update() {
        return;
    }
    let Ok(mut server) = TcpStream::connect(target).await else { return };
    tokio::select! {
        _ = copy_bidirectional(&mut client, &mut server) => {}
        _ = gate.wait_for(|open| !open) => {}
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.open.send_replace(false);
    }
}
