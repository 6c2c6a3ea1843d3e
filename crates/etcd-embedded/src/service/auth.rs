//! The service `Auth`

use tonic::{Request, Response, Status};

use super::Service;
use crate::{
    proto::etcdserverpb::{
        AuthDisableRequest, AuthDisableResponse, AuthEnableRequest, AuthEnableResponse, AuthRoleAddRequest,
        AuthRoleAddResponse, AuthRoleListRequest, AuthRoleListResponse, AuthUserAddRequest,
        AuthUserAddResponse, AuthUserChangePasswordRequest, AuthUserChangePasswordResponse,
        AuthUserDeleteRequest, AuthUserDeleteResponse, AuthUserGetRequest, AuthUserGetResponse,
        AuthUserGrantRoleRequest, AuthUserGrantRoleResponse, AuthUserListRequest, AuthUserListResponse,
        AuthUserRevokeRoleRequest, AuthUserRevokeRoleResponse, AuthenticateRequest, AuthenticateResponse,
        auth_server::Auth,
    },
    store::Need,
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Auth for Service {
    async fn auth_enable(&self, request: Request<AuthEnableRequest>) -> Answer<AuthEnableResponse> {
        self.answer(request, Need::Admin, |store, _, _| {
            store.auth.enable()?;
            Ok(AuthEnableResponse { header: store.header() })
        })
        .await
    }

    async fn auth_disable(&self, request: Request<AuthDisableRequest>) -> Answer<AuthDisableResponse> {
        self.answer(request, Need::Admin, |store, _, _| {
            store.auth.disable();
            Ok(AuthDisableResponse { header: store.header() })
        })
        .await
    }

    async fn authenticate(&self, request: Request<AuthenticateRequest>) -> Answer<AuthenticateResponse> {
        self.answer(request, Need::GoodToken, |store, now, request| {
            let token = store.authenticate(now, &request.name, &request.password)?;
            Ok(AuthenticateResponse { header: store.header(), token })
        })
        .await
    }

    async fn user_add(&self, request: Request<AuthUserAddRequest>) -> Answer<AuthUserAddResponse> {
        self.answer(request, Need::Admin, |store, _, request| {
            let no_password = request.options.is_some_and(|options| options.no_password);
            store.auth.add_user(request.name, (!no_password).then_some(request.password))?;
            Ok(AuthUserAddResponse { header: store.header() })
        })
        .await
    }

    async fn user_get(&self, request: Request<AuthUserGetRequest>) -> Answer<AuthUserGetResponse> {
        let token = super::token(request.metadata()).map(str::to_owned);
        self.answer(request, Need::GoodToken, |store, now, request| {
            // Everyone may ask for themselves.
            if !token.as_deref().is_some_and(|token| store.auth.is_token_of(token, &request.name)) {
                store.auth.authorize(now, token.as_deref(), Need::Admin)?;
            }
            Ok(AuthUserGetResponse { roles: store.auth.user(&request.name)?, header: store.header() })
        })
        .await
    }

    async fn user_list(&self, request: Request<AuthUserListRequest>) -> Answer<AuthUserListResponse> {
        self.answer(request, Need::Admin, |store, _, _| {
            Ok(AuthUserListResponse { users: store.auth.users(), header: store.header() })
        })
        .await
    }

    async fn user_delete(&self, request: Request<AuthUserDeleteRequest>) -> Answer<AuthUserDeleteResponse> {
        self.answer(request, Need::Admin, |store, _, request| {
            store.auth.delete_user(&request.name)?;
            Ok(AuthUserDeleteResponse { header: store.header() })
        })
        .await
    }

    async fn user_change_password(
        &self,
        request: Request<AuthUserChangePasswordRequest>,
    ) -> Answer<AuthUserChangePasswordResponse> {
        self.answer(request, Need::Admin, |store, _, request| {
            store.auth.change_password(&request.name, request.password)?;
            Ok(AuthUserChangePasswordResponse { header: store.header() })
        })
        .await
    }

    async fn user_grant_role(
        &self,
        request: Request<AuthUserGrantRoleRequest>,
    ) -> Answer<AuthUserGrantRoleResponse> {
        self.answer(request, Need::Admin, |store, _, request| {
            store.auth.grant_role(&request.user, &request.role)?;
            Ok(AuthUserGrantRoleResponse { header: store.header() })
        })
        .await
    }

    async fn user_revoke_role(
        &self,
        request: Request<AuthUserRevokeRoleRequest>,
    ) -> Answer<AuthUserRevokeRoleResponse> {
        self.answer(request, Need::Admin, |store, _, request| {
            store.auth.revoke_role(&request.name, &request.role)?;
            Ok(AuthUserRevokeRoleResponse { header: store.header() })
        })
        .await
    }

    async fn role_add(&self, request: Request<AuthRoleAddRequest>) -> Answer<AuthRoleAddResponse> {
        self.answer(request, Need::Admin, |store, _, request| {
            store.auth.add_role(&request.name)?;
            Ok(AuthRoleAddResponse { header: store.header() })
        })
        .await
    }

    async fn role_list(&self, request: Request<AuthRoleListRequest>) -> Answer<AuthRoleListResponse> {
        self.answer(request, Need::Admin, |store, _, _| {
            Ok(AuthRoleListResponse { roles: store.auth.roles(), header: store.header() })
        })
        .await
    }
}
