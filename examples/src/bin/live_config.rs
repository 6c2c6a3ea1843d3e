//! A value in etcd that changes what a program does while it runs
//!
//!     cargo run -p callsign-examples --bin live_config
//!     cargo run -p callsign-examples --bin live_config -- --greeting Hi --every-ms 200
//!
//! (without a `protoc`: `cargo xtask run live_config ...`)
//!
//! The first one greets, the second one changes how, and ends. `etcdctl put config/hello '{"greeting":"Hi","every_ms":200}'`
//! does the same. etcd is the cluster named by `CALLSIGN_ETCD` (hosts, login, TLS: see the README), else 127.0.0.1:2379.

use std::{error::Error, pin::pin, time::Duration};

use callsign::{Etcd, EtcdOptions};
use lexopt::prelude::*;
use serde::{Deserialize, Serialize};
use tokio_stream::StreamExt;

const KEY: &str = "config/hello";

/// What can be changed; what a value leaves out is as it is here
#[derive(Debug, Deserialize, Serialize)]
#[serde(default)]
struct Config {
    greeting: String,
    every_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { greeting: "Hello".to_owned(), every_ms: 1_000 }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let etcd = Etcd::connect(EtcdOptions::from_env()).await?;
    if let Some(config) = from_command_line()? {
        return Ok(etcd.put_value(KEY, &config).await?);
    }

    let mut config = Config::default();
    let mut live = etcd.watch_value::<Config>(KEY)?;
    let pause = |config: &Config| tokio::time::sleep(Duration::from_millis(config.every_ms.max(10)));
    // One pause for all rounds: changes, however often they come, put no greeting off.
    let mut pausing = pin!(pause(&config));
    loop {
        tokio::select! {
            Some(value) = live.next() => match value {
                Ok(Some(value)) => config = value,
                // Deleted, perhaps because etcd came back empty: what was good before is better than the defaults.
                Ok(None) => println!("{KEY} is not there; going on as before"),
                // A typing error in etcd changes nothing either.
                Err(error) => println!("{error}; going on as before"),
            },
            () = &mut pausing => {
                println!("{}!", config.greeting);
                pausing.set(pause(&config));
            }
        }
    }
}

/// The value to put, if there is one
fn from_command_line() -> Result<Option<Config>, lexopt::Error> {
    let mut put = None;
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        let config = put.get_or_insert_with(Config::default);
        match argument {
            Long("greeting") => config.greeting = arguments.value()?.string()?,
            Long("every-ms") => config.every_ms = arguments.value()?.parse()?,
            other => return Err(other.unexpected()),
        }
    }
    Ok(put)
}
