//! The services `Cluster` and `Maintenance`, as far as clients ask one member for them

use tonic::{Request, Response, Status};

use super::{RAFT_TERM, Service};
use crate::{
    proto::etcdserverpb::{
        AlarmRequest, AlarmResponse, Member, MemberListRequest, MemberListResponse, StatusRequest,
        StatusResponse, alarm_request::AlarmAction, cluster_server::Cluster, maintenance_server::Maintenance,
    },
    store::{Need, Refused},
};

/// The etcd that this server is compared with.
const VERSION: &str = "3.4.23";

#[tonic::async_trait]
impl Cluster for Service {
    async fn member_list(
        &self,
        request: Request<MemberListRequest>,
    ) -> Result<Response<MemberListResponse>, Status> {
        let member = Member {
            id: self.0.member_id,
            name: "embedded".to_owned(),
            // It has no peers; etcd's members are never without such a URL.
            peer_ur_ls: vec![self.0.client_url.clone()],
            client_ur_ls: vec![self.0.client_url.clone()],
            is_learner: false,
        };
        // etcd's header has no revision here.
        self.answer(request, Need::Nothing, |_, _, _| {
            Ok(MemberListResponse { header: None, members: vec![member] })
        })
        .await
    }
}

#[tonic::async_trait]
impl Maintenance for Service {
    async fn alarm(&self, request: Request<AlarmRequest>) -> Result<Response<AlarmResponse>, Status> {
        self.0.faults.wait().await;
        if request.get_ref().action != AlarmAction::Get as i32 {
            return Err(Refused::Unimplemented("any action on alarms but get").into());
        }
        // etcd's answer has no header here.
        Ok(Response::new(AlarmResponse::default()))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let leader = self.0.member_id;
        self.answer(request, Need::Nothing, |store, _, _| {
            // Without raft its index can only be made up: it grows with every write.
            let index = store.revision().unsigned_abs();
            Ok(StatusResponse {
                header: store.header(),
                version: VERSION.to_owned(),
                db_size: store.size() as i64,
                db_size_in_use: store.size() as i64,
                leader,
                raft_index: index,
                raft_applied_index: index,
                raft_term: RAFT_TERM,
                ..StatusResponse::default()
            })
        })
        .await
    }
}
