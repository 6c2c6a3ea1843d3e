//! A server process of the suites: the greeter and the echo service, with knobs

use std::{error::Error, io::Read, time::Duration};

use callsign::Serve;
use callsign_tests::service::{Calls, Hello, router};
use lexopt::prelude::*;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

struct Options {
    listen: String,
    service: Option<String>,
    delay: Duration,
    max_connection_age: Option<Duration>,
    window: Option<u32>,
    ttl: Option<Duration>,
}

impl Options {
    fn parse() -> Result<Self, lexopt::Error> {
        let mut options = Self {
            listen: "127.0.0.1:0".to_owned(),
            service: None,
            delay: Duration::from_millis(2),
            max_connection_age: None,
            window: None,
            ttl: None,
        };
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("listen") => options.listen = arguments.value()?.string()?,
                Long("service") => options.service = Some(arguments.value()?.string()?),
                Long("delay-ms") => options.delay = Duration::from_millis(arguments.value()?.parse()?),
                Long("max-connection-age-ms") => {
                    options.max_connection_age = Some(Duration::from_millis(arguments.value()?.parse()?));
                }
                Long("window") => options.window = Some(arguments.value()?.parse()?),
                Long("ttl") => options.ttl = Some(Duration::from_secs(arguments.value()?.parse()?)),
                other => return Err(other.unexpected()),
            }
        }
        Ok(options)
    }
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    end_with_parent();
    let options = Options::parse()?;
    let listener = TcpListener::bind(&options.listen).await?;
    let address = listener.local_addr()?;
    let mut server = Server::builder()
        .initial_stream_window_size(options.window)
        .initial_connection_window_size(options.window);
    if let Some(age) = options.max_connection_age {
        server = server.max_connection_age(age);
    }
    let router = router(server, Hello { name: address.to_string(), delay: options.delay }, &Calls::default());
    println!("listening {address}");
    let Some(service) = options.service else {
        return Ok(router.serve_with_incoming(TcpListenerStream::new(listener)).await?);
    };
    let mut serve = Serve::new(service).listener(listener);
    if let Some(ttl) = options.ttl {
        serve = serve.ttl(ttl);
    }
    Ok(serve.run(router).await?)
}

/// Ends this process when the test that started it is gone, however it went
fn end_with_parent() {
    std::thread::spawn(|| {
        let mut parent = std::io::stdin();
        while parent.read(&mut [0; 64]).is_ok_and(|read| read > 0) {}
        std::process::exit(1);
    });
}
