//! The service `Lease`

use tonic::{Request, Response, Status, Streaming};

use super::{Service, delayed::Delayed, keepalive::KeepAlives};
use crate::{
    proto::etcdserverpb::{
        LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseLeasesRequest,
        LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseTimeToLiveRequest,
        LeaseTimeToLiveResponse, lease_server::Lease,
    },
    store::{Need, Refused},
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Lease for Service {
    async fn lease_grant(&self, request: Request<LeaseGrantRequest>) -> Answer<LeaseGrantResponse> {
        self.answer(request, Need::GoodToken, |store, now, request| store.grant(now, &request)).await
    }

    async fn lease_revoke(&self, request: Request<LeaseRevokeRequest>) -> Answer<LeaseRevokeResponse> {
        // What revoking needs depends on the lease.
        let token = super::token(request.metadata()).map(str::to_owned);
        self.answer(request, Need::GoodToken, |store, now, request| {
            if store.holds_keys(request.id) {
                store.auth.authorize(now, token.as_deref(), Need::Keys)?;
            }
            store.revoke(request.id)
        })
        .await
    }

    type LeaseKeepAliveStream = Delayed<KeepAlives>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Answer<Self::LeaseKeepAliveStream> {
        self.0.faults.wait().await;
        let answers = KeepAlives::new(request.into_inner(), self.0.clone());
        Ok(Response::new(Delayed::new(answers, self.0.clone())))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Answer<LeaseTimeToLiveResponse> {
        self.answer(request, Need::Nothing, |store, now, request| {
            Ok::<_, Refused>(store.time_to_live(now, &request))
        })
        .await
    }

    async fn lease_leases(&self, request: Request<LeaseLeasesRequest>) -> Answer<LeaseLeasesResponse> {
        self.answer(request, Need::Nothing, |store, _, _| Ok(store.leases())).await
    }
}
