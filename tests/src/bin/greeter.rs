//! A server process of the suites: the greeter and the echo service, with knobs

use std::{error::Error, time::Duration};

use callsign::{RegistrationState, Serve};
use callsign_tests::service::{Calls, Hello, Manner, prompt, router};
use lexopt::prelude::*;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tonic::transport::Server;
use tonic_health::{
    ServingStatus,
    server::{HealthReporter, HealthService},
};

struct Options {
    listen: String,
    service: Option<String>,
    delay: Duration,
    max_connection_age: Option<Duration>,
    window: Option<u32>,
    ttl: Option<Duration>,
    id: Option<i64>,
    /// What the health service says at first; none without it
    health: Option<ServingStatus>,
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
            id: None,
            health: None,
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
                Long("id") => options.id = Some(arguments.value()?.parse()?),
                Long("health") => {
                    options.health =
                        Some(arguments.value()?.parse_with(|value| status(value).ok_or("no status"))?);
                }
                other => return Err(other.unexpected()),
            }
        }
        Ok(options)
    }
}

fn status(value: &str) -> Option<ServingStatus> {
    match value {
        "serving" => Some(ServingStatus::Serving),
        "not-serving" => Some(ServingStatus::NotServing),
        _ => None,
    }
}

#[tokio::main(worker_threads = 2)]
async fn main() -> Result<(), Box<dyn Error>> {
    let told = end_with_parent();
    let options = Options::parse()?;
    let listener = TcpListener::bind(&options.listen).await?;
    let address = listener.local_addr()?;
    let mut server = Server::builder()
        .initial_stream_window_size(options.window)
        .initial_connection_window_size(options.window);
    if let Some(age) = options.max_connection_age {
        server = server.max_connection_age(age);
    }
    let hello = Hello::new(address.to_string(), options.delay);
    let mut router = router(server, hello.clone(), &Calls::default());
    let reporter = HealthReporter::new();
    if let Some(status) = options.health {
        reporter.set_service_status("", status).await;
        let service = HealthService::from_health_reporter(reporter.clone());
        router = router.add_service(tonic_health::pb::health_server::HealthServer::new(service));
    }
    tokio::spawn(obey(hello, reporter.clone(), told));
    println!("listening {address}");
    let Some(service) = options.service else {
        return Ok(router.serve_with_incoming(prompt(listener)).await?);
    };
    let mut serve = Serve::new(service).listener(listener);
    if let Some(ttl) = options.ttl {
        serve = serve.ttl(ttl);
    }
    if let Some(id) = options.id {
        serve = serve.id(id);
    }
    if options.health.is_some() {
        serve = serve.health(reporter);
    }
    let printed = tokio::spawn(print(serve.state()));
    serve.run(router).await?;
    Ok(printed.await?)
}

/// Prints each state of the registration as a line `registration <state>`, to the last
async fn print(mut state: watch::Receiver<RegistrationState>) {
    loop {
        let line = match &*state.borrow_and_update() {
            RegistrationState::Granting { cause: None } => "granting".to_owned(),
            RegistrationState::Granting { cause: Some(cause) } => format!("granting: {cause}"),
            RegistrationState::Registered { lease, .. } => format!("registered {lease:x}"),
            RegistrationState::Lost { cause } => format!("lost {cause:?}"),
            RegistrationState::Paused => "paused".to_owned(),
            RegistrationState::Deregistered => "deregistered".to_owned(),
            other => format!("{other:?}"),
        };
        println!("registration {line}");
        if state.changed().await.is_err() {
            return;
        }
    }
}

/// Does what it is told: to report another health, to answer in another manner, to say how many calls have come in
async fn obey(hello: Hello, reporter: HealthReporter, mut told: mpsc::UnboundedReceiver<String>) {
    while let Some(line) = told.recv().await {
        if let Some(status) = status(&line) {
            reporter.set_service_status("", status).await;
        } else if let Ok(manner) = line.parse::<Manner>() {
            hello.turn(manner);
            println!("answers {manner}");
        } else if line == "calls" {
            println!("calls {}", hello.calls());
        }
    }
}

/// Ends this process when the test that started it is gone, however it went; passes on the lines that it says
fn end_with_parent() -> mpsc::UnboundedReceiver<String> {
    let (sender, lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            // Who does not listen yet needs nothing.
            let _ = sender.send(line);
        }
        std::process::exit(1);
    });
    lines
}
