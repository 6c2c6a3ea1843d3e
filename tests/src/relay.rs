//! A gRPC relay that decides call by call what becomes of it

use std::{collections::HashMap, convert::Infallible, future::pending, sync::Arc};

use http::{Request, Response};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tonic::{
    Status,
    body::Body,
    service::Routes,
    transport::{Channel, Endpoint, Server},
};
use tower::{Service, ServiceExt, service_fn};

use crate::service::prompt;

/// Passes calls to one server, each as its method is treated when it comes; dropped, it and its connections are gone
///
/// A [`Proxy`](crate::proxy::Proxy) sees bytes, and so treats all that is on a connection alike.
#[derive(Debug)]
pub struct Relay {
    endpoint: String,
    treated: watch::Sender<Treated>,
    task: JoinHandle<()>,
}

/// What becomes of calls
#[derive(Clone, Debug)]
pub enum Treatment {
    /// Passed on, and answered
    Pass,
    /// Kept until it is treated in another way
    Hold,
    /// Passed on; the answer is lost
    Lose,
    /// Answered with this, and not passed on
    Refuse(Status),
}

type Treated = HashMap<&'static str, Treatment>;

impl Relay {
    /// A relay to `target`, `host:port`, on a port of its own, which passes everything on
    pub async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let endpoint = listener.local_addr().expect("it is bound").to_string();
        let channel =
            Endpoint::from_shared(format!("http://{target}")).expect("a valid target").connect_lazy();
        let (treated, _) = watch::channel(Treated::new());
        let treatments = Arc::new(treated.clone());
        let service = service_fn(move |request: Request<_>| {
            let (channel, treatments) = (channel.clone(), treatments.subscribe());
            async move { Ok::<_, Infallible>(relay(request.map(Body::new), channel, treatments).await) }
        });
        let routes = Routes::from(Routes::default().into_axum_router().fallback_service(service));
        let task = tokio::spawn(async move {
            let server = Server::builder().add_routes(routes);
            server.serve_with_incoming(prompt(listener)).await.expect("it listens");
        });
        Self { endpoint, treated, task }
    }

    /// `127.0.0.1:port`
    pub fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    /// From now on calls of `method`, such as `LeaseGrant`, are treated like this; streams that are open stay as they are
    pub fn treat(&self, method: &'static str, treatment: Treatment) {
        self.treated.send_modify(|treated| drop(treated.insert(method, treatment)));
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn relay(
    request: Request<Body>,
    channel: Channel,
    mut treatments: watch::Receiver<Treated>,
) -> Response<Body> {
    let method = request.uri().path().rsplit('/').next().unwrap_or_default().to_owned();
    let treatment = loop {
        let treatment = treatments.borrow_and_update().get(method.as_str()).cloned();
        match treatment.unwrap_or(Treatment::Pass) {
            Treatment::Hold => {
                if treatments.changed().await.is_err() {
                    return Status::unavailable("the relay ends").into_http();
                }
            }
            settled => break settled,
        }
    };
    if let Treatment::Refuse(status) = treatment {
        return status.into_http();
    }
    let answer = pass(request, channel).await;
    if let Treatment::Lose = treatment {
        pending::<()>().await;
    }
    answer
}

async fn pass(request: Request<Body>, mut channel: Channel) -> Response<Body> {
    let answered = async { channel.ready().await?.call(request).await };
    answered.await.unwrap_or_else(|error| Status::unavailable(error.to_string()).into_http())
}
