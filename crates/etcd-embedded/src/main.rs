//! `etcd-embedded --listen 127.0.0.1:2379`: an etcd in memory, for `etcdctl` and for trying things out

use std::process::ExitCode;

use etcd_embedded::EmbeddedEtcd;

const USAGE: &str = "usage: etcd-embedded [--listen ADDRESS]   (127.0.0.1:2379; port 0 takes a free one)";

#[tokio::main]
async fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let listen = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => "127.0.0.1:2379",
        ["--listen", address] => address,
        ["-h" | "--help"] => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match EmbeddedEtcd::start(listen).await {
        Ok(etcd) => {
            println!("listening on {}", etcd.endpoint());
            // Nothing is kept, so a signal may end it at any time.
            std::future::pending().await
        }
        Err(error) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            eprintln!("{error} on {listen}: {cause}");
            ExitCode::FAILURE
        }
    }
}
