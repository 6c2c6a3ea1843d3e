//! The registry without a server or a channel: register, look, watch, list, deregister
//!
//!     cargo run -p callsign-examples --bin registry -- --service hello.rpc --address 127.0.0.1:9090
//!
//! (without a `protoc`: `cargo xtask run registry --service hello.rpc --address 127.0.0.1:9090`)
//!
//! etcd is the cluster named by `CALLSIGN_ETCD` (hosts, login, TLS: see the README), else 127.0.0.1:2379. Start several of them with
//! different addresses and watch them see each other; ctrl-c ends one.

use std::{error::Error, net::SocketAddr, pin::pin};

use callsign::{Address, Etcd, EtcdOptions, Registration};
use lexopt::prelude::*;
use tokio_stream::{StreamExt, wrappers::WatchStream};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let Options { service, address } = Options::from_command_line()?;
    let etcd = Etcd::connect(EtcdOptions::from_env()).await?;

    // Register: returns when the key is in etcd, and keeps it there whatever becomes of etcd.
    let registration = Registration::builder(&etcd, &service, address).register().await?;

    // What callbacks on start and stop are elsewhere: a stream of states. It ends after the last one.
    let mut states = WatchStream::new(registration.state());
    let callbacks = tokio::spawn(async move {
        while let Some(state) = states.next().await {
            println!("{state}");
        }
    });

    // Get a service, and list all of them.
    println!("now: {} of {service}", etcd.instances(&service).await?.len());
    println!("services: {}", etcd.services().await?.join(", "));

    // Watch: the next list is an `await`, and stopping is a drop. (`etcd.watch` alone gives the single changes.)
    let mut lists = etcd.watch(&service)?.snapshots();
    // One wait for all rounds, and asked before the lists: a ctrl-c while a list is printed counts too.
    let mut stop = pin!(tokio::signal::ctrl_c());
    loop {
        tokio::select! {
            biased;
            stop = &mut stop => break stop?,
            Some(instances) = lists.next() => {
                let shown: Vec<_> = instances.iter().map(|instance| instance.address.to_string()).collect();
                println!("{service}: {}", shown.join(", "));
            }
        }
    }
    drop(lists);

    // Deregister: returns when the key is gone. A dropped registration does the same in the background.
    registration.deregister().await?;
    callbacks.await?;
    Ok(())
}

struct Options {
    service: String,
    address: Address,
}

impl Options {
    fn from_command_line() -> Result<Self, lexopt::Error> {
        let address = SocketAddr::from(([127, 0, 0, 1], 9090)).into();
        let mut options = Self { service: "hello.rpc".to_owned(), address };
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("service") => options.service = arguments.value()?.string()?,
                Long("address") => options.address = arguments.value()?.parse()?,
                other => return Err(other.unexpected()),
            }
        }
        Ok(options)
    }
}
