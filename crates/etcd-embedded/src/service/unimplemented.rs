//! Says by name which call is not implemented

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use http::{HeaderValue, Request, Response};
use tonic::Status;
use tower::{Layer, Service};

/// A layer around all services, those that are not there included
#[derive(Clone, Copy, Debug)]
pub(crate) struct NameUnimplemented;

#[derive(Clone, Debug)]
pub(crate) struct Named<S>(S);

impl<S> Layer<S> for NameUnimplemented {
    type Service = Named<S>;

    fn layer(&self, inner: S) -> Named<S> {
        Named(inner)
    }
}

impl<S, Q, A> Service<Request<Q>> for Named<S>
where
    S: Service<Request<Q>, Response = Response<A>, Future: Send + 'static>,
{
    type Response = Response<A>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<A>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let uri = request.uri().clone();
        let answer = self.0.call(request);
        Box::pin(async move {
            let mut answer = answer.await?;
            let headers = answer.headers_mut();
            // tonic's own refusal has no message; ours have one.
            let unnamed = !headers.contains_key(Status::GRPC_MESSAGE);
            if unnamed && headers.get(Status::GRPC_STATUS).is_some_and(|code| code == "12") {
                let text = format!("etcd-embedded: {} is not implemented", uri.path());
                if let Ok(text) = HeaderValue::try_from(text) {
                    headers.insert(Status::GRPC_MESSAGE, text);
                }
            }
            Ok(answer)
        })
    }
}
