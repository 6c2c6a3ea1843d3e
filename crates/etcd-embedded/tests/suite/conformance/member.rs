//! The cluster and the member, and what is not there

use super::both;
use crate::{
    client::Client,
    proto::etcdserverpb::{AlarmRequest, MemberListRequest, StatusRequest},
};

both! {
    async fn a_cluster_of_one_lists_its_member_with_a_client_url(client: Client) {
        let answer = client.send(MemberListRequest::default()).await.unwrap();
        let header = answer.header.unwrap();
        let [member] = &answer.members[..] else { panic!("{answer:?}") };
        assert_eq!((member.id, header.revision), (header.member_id, 0));
        assert!(!member.name.is_empty() && !member.is_learner);
        assert!(member.client_ur_ls[0].starts_with("http://127.0.0.1:"));
        assert!(member.peer_ur_ls[0].starts_with("http://"));
    }

    async fn the_member_is_its_own_leader(client: Client) {
        let status = client.send(StatusRequest {}).await.unwrap();
        let header = status.header.unwrap();
        assert_eq!(status.leader, header.member_id);
        assert_eq!(status.version, "3.4.23");
        assert!(status.raft_term == header.raft_term && status.raft_index >= status.raft_applied_index);
        assert!(header.revision > 0 && status.db_size >= status.db_size_in_use);
    }

    async fn there_is_no_alarm(client: Client) {
        let answer = client.send(AlarmRequest::default()).await.unwrap();
        assert_eq!((answer.alarms.len(), answer.header), (0, None));
    }
}
