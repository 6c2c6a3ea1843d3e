//! Users, the role root, tokens

use tonic::Code;

use super::{both, refusal, refused};
use crate::{
    client::{Client, get, put, watch_prefix},
    proto::etcdserverpb::{
        AuthDisableRequest, AuthEnableRequest, AuthRoleAddRequest, AuthRoleListRequest, AuthUserAddRequest,
        AuthUserChangePasswordRequest, AuthUserDeleteRequest, AuthUserGetRequest, AuthUserGrantRoleRequest,
        AuthUserListRequest, AuthUserRevokeRoleRequest, AuthenticateRequest, CompactionRequest,
        LeaseGrantRequest, LeaseLeasesRequest, LeaseRevokeRequest, LeaseTimeToLiveRequest, MemberListRequest,
        PutRequest, StatusRequest,
    },
};

fn user(name: &str, password: &str) -> AuthUserAddRequest {
    AuthUserAddRequest { name: name.into(), password: password.into(), ..AuthUserAddRequest::default() }
}

fn grant(user: &str, role: &str) -> AuthUserGrantRoleRequest {
    AuthUserGrantRoleRequest { user: user.into(), role: role.into() }
}

fn role(name: &str) -> AuthRoleAddRequest {
    AuthRoleAddRequest { name: name.into() }
}

/// Makes root, enables auth, logs in
async fn enable(client: &mut Client) {
    client.send(user("root", "secret")).await.unwrap();
    client.send(role("root")).await.unwrap();
    client.send(grant("root", "root")).await.unwrap();
    client.send(AuthEnableRequest {}).await.unwrap();
    client.login("root", "secret").await.unwrap();
}

both! {
    #[fresh] async fn auth_needs_a_root_that_is_root(client: Client) {
        let answer = client.send(AuthEnableRequest {}).await;
        let text = "etcdserver: root user does not exist";
        assert_eq!(refusal(answer), refused(Code::FailedPrecondition, text));
        client.send(user("root", "secret")).await.unwrap();
        let text = "etcdserver: root user does not have root role";
        assert_eq!(refusal(client.send(AuthEnableRequest {}).await), refused(Code::FailedPrecondition, text));
        let text = "etcdserver: role name not found";
        let answer = client.send(grant("root", "other")).await;
        assert_eq!(refusal(answer), refused(Code::FailedPrecondition, text));
        // The role root need not be there to be granted.
        client.send(grant("root", "root")).await.unwrap();
        client.send(grant("root", "root")).await.unwrap();
        client.send(role("root")).await.unwrap();
        let text = "etcdserver: role name already exists";
        assert_eq!(refusal(client.send(role("root")).await), refused(Code::FailedPrecondition, text));
        client.send(AuthEnableRequest {}).await.unwrap();
        // Enabling twice asks root, as any change does.
        let text = "etcdserver: user name is empty";
        assert_eq!(refusal(client.send(AuthEnableRequest {}).await), refused(Code::InvalidArgument, text));
    }

    #[fresh] async fn without_auth_nobody_logs_in(client: Client) {
        let login = AuthenticateRequest { name: "root".into(), password: "secret".into() };
        let text = "etcdserver: authentication is not enabled";
        assert_eq!(refusal(client.send(login).await), refused(Code::FailedPrecondition, text));
    }

    #[fresh] async fn with_auth_keys_need_a_good_token(client: Client) {
        client.send(put("k", "1")).await.unwrap();
        enable(&mut client).await;
        assert_eq!(client.send(get("k")).await.unwrap().count, 1);
        client.send(put("k", "2")).await.unwrap();
        let nobody = client.with_token(None);
        let text = "etcdserver: user name is empty";
        let expected = refused(Code::InvalidArgument, text);
        assert_eq!(refusal(nobody.send(get("k")).await), expected);
        assert_eq!(refusal(nobody.send(put("k", "2")).await), expected);
        assert_eq!(refusal(nobody.send(AuthUserListRequest {}).await), expected);
        let stranger = client.with_token(Some("abc.1".into()));
        let expected = refused(Code::Unauthenticated, "etcdserver: invalid auth token");
        assert_eq!(refusal(stranger.send(get("k")).await), expected);
        assert_eq!(refusal(stranger.send(put("k", "2")).await), expected);
        assert_eq!(refusal(stranger.send(LeaseGrantRequest { ttl: 60, id: 0 }).await), expected);
        let login = AuthenticateRequest { name: "root".into(), password: "wrong".into() };
        let text = "etcdserver: authentication failed, invalid user ID or password";
        assert_eq!(refusal(nobody.send(login).await), refused(Code::InvalidArgument, text));
    }

    #[fresh] async fn leases_and_members_need_no_token_until_keys_are_touched(client: Client) {
        enable(&mut client).await;
        let nobody = client.with_token(None);
        let id = nobody.send(LeaseGrantRequest { ttl: 60, id: 0 }).await.unwrap().id;
        assert_eq!(nobody.keep_alive().keep(id).await.ttl, 60);
        nobody.send(LeaseTimeToLiveRequest { id, keys: false }).await.unwrap();
        nobody.send(LeaseLeasesRequest {}).await.unwrap();
        nobody.send(MemberListRequest::default()).await.unwrap();
        nobody.send(StatusRequest {}).await.unwrap();
        let stranger = client.with_token(Some("abc.1".into()));
        stranger.send(MemberListRequest::default()).await.unwrap();
        stranger.send(LeaseLeasesRequest {}).await.unwrap();
        assert_eq!(stranger.keep_alive().keep(id).await.ttl, 60);
        let invalid = refused(Code::Unauthenticated, "etcdserver: invalid auth token");
        assert_eq!(refusal(stranger.send(LeaseRevokeRequest { id }).await), invalid);
        let compact = CompactionRequest { revision: 1, physical: false };
        assert_eq!(refusal(stranger.send(compact).await), invalid);
        nobody.send(compact).await.unwrap();
        client.send(PutRequest { lease: id, ..put("k", "1") }).await.unwrap();
        let text = "etcdserver: user name is empty";
        let answer = nobody.send(LeaseRevokeRequest { id }).await;
        assert_eq!(refusal(answer), refused(Code::InvalidArgument, text));
        client.send(LeaseRevokeRequest { id }).await.unwrap();
    }

    #[fresh] async fn a_watch_without_a_good_token_is_refused_in_its_stream(client: Client) {
        enable(&mut client).await;
        let mut watch = client.watch();
        watch.created(watch_prefix("k/")).await;
        for (token, code, text) in [
            (Some("abc.1".to_owned()), "Unauthenticated", "etcdserver: invalid auth token"),
            (None, "InvalidArgument", "etcdserver: user name is empty"),
        ] {
            let mut watch = client.with_token(token).watch();
            watch.create(watch_prefix("k/"));
            let refused = watch.next().await;
            assert!(refused.created && refused.canceled);
            let reason = format!("rpc error: code = {code} desc = {text}");
            assert_eq!((refused.watch_id, refused.cancel_reason), (-1, reason));
        }
        client.send(put("k/a", "1")).await.unwrap();
        assert_eq!(watch.events(1).await.len(), 1);
    }

    #[fresh] async fn a_user_without_a_role_may_log_in_and_ask_for_itself(client: Client) {
        client.send(user("bob", "b")).await.unwrap();
        enable(&mut client).await;
        let root = client.clone();
        client.login("bob", "b").await.unwrap();
        let expected = refused(Code::PermissionDenied, "etcdserver: permission denied");
        assert_eq!(refusal(client.send(get("k")).await), expected);
        assert_eq!(refusal(client.send(put("k", "1")).await), expected);
        assert_eq!(refusal(client.send(AuthUserListRequest {}).await), expected);
        assert!(client.send(AuthUserGetRequest { name: "bob".into() }).await.unwrap().roles.is_empty());
        let answer = client.send(AuthUserGetRequest { name: "root".into() }).await;
        assert_eq!(refusal(answer), expected);
        let mut watch = client.watch();
        watch.create(watch_prefix("k/"));
        let reason = "rpc error: code = PermissionDenied desc = etcdserver: permission denied";
        assert_eq!(watch.next().await.cancel_reason, reason);
        root.send(grant("bob", "root")).await.unwrap();
        client.login("bob", "b").await.unwrap();
        client.send(put("k", "1")).await.unwrap();
    }

    #[fresh] async fn users_are_managed(client: Client) {
        client.send(user("bob", "b")).await.unwrap();
        let expected = |text| refused(Code::FailedPrecondition, text);
        let exists = "etcdserver: user name already exists";
        assert_eq!(refusal(client.send(user("bob", "b")).await), expected(exists));
        let answer = client.send(user("", "b")).await;
        assert_eq!(refusal(answer), refused(Code::InvalidArgument, "etcdserver: user name is empty"));
        let unknown = expected("etcdserver: user name not found");
        let name = || "eve".to_owned();
        assert_eq!(refusal(client.send(AuthUserGetRequest { name: name() }).await), unknown);
        assert_eq!(refusal(client.send(AuthUserDeleteRequest { name: name() }).await), unknown);
        let change = AuthUserChangePasswordRequest { name: name(), password: "x".into(), ..Default::default() };
        assert_eq!(refusal(client.send(change).await), unknown);
        assert_eq!(refusal(client.send(grant("eve", "root")).await), unknown);
        let revoke = |name: &str| AuthUserRevokeRoleRequest { name: name.into(), role: "root".into() };
        assert_eq!(refusal(client.send(revoke("eve")).await), unknown);
        let not_granted = expected("etcdserver: role is not granted to the user");
        assert_eq!(refusal(client.send(revoke("bob")).await), not_granted);
        enable(&mut client).await;
        assert_eq!(client.send(AuthUserListRequest {}).await.unwrap().users, ["bob", "root"]);
        assert_eq!(client.send(AuthRoleListRequest {}).await.unwrap().roles, ["root"]);
        let root = client.send(AuthUserGetRequest { name: "root".into() }).await.unwrap();
        assert_eq!(root.roles, ["root"]);
        let managed = refused(Code::InvalidArgument, "etcdserver: invalid auth management");
        let answer = client.send(AuthUserDeleteRequest { name: "root".into() }).await;
        assert_eq!(refusal(answer), managed);
        assert_eq!(refusal(client.send(revoke("root")).await), managed);
        client.send(AuthUserDeleteRequest { name: "bob".into() }).await.unwrap();
        client.send(AuthDisableRequest {}).await.unwrap();
        let nobody = client.with_token(None);
        nobody.send(put("k", "1")).await.unwrap();
    }

    #[fresh] async fn a_changed_password_ends_tokens_and_the_old_password(client: Client) {
        client.send(user("bob", "b")).await.unwrap();
        enable(&mut client).await;
        client.send(grant("bob", "root")).await.unwrap();
        let mut bob = client.clone();
        bob.login("bob", "b").await.unwrap();
        bob.send(put("k", "1")).await.unwrap();
        let change = AuthUserChangePasswordRequest { name: "bob".into(), password: "c".into(), ..Default::default() };
        client.send(change).await.unwrap();
        let expected = refused(Code::Unauthenticated, "etcdserver: invalid auth token");
        assert_eq!(refusal(bob.send(put("k", "1")).await), expected);
        assert!(bob.login("bob", "b").await.is_err());
        bob.login("bob", "c").await.unwrap();
        bob.send(put("k", "1")).await.unwrap();
    }
}
