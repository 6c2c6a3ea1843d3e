//! The service `KV`

use tonic::{Request, Response, Status};

use super::{Service, fits};
use crate::{
    proto::etcdserverpb::{
        CompactionRequest, CompactionResponse, DeleteRangeRequest, DeleteRangeResponse, PutRequest,
        PutResponse, RangeRequest, RangeResponse, TxnRequest, TxnResponse, kv_server::Kv,
    },
    store::Need,
};

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Kv for Service {
    async fn range(&self, request: Request<RangeRequest>) -> Answer<RangeResponse> {
        self.answer(request, Need::Keys, |store, _, request| store.range(&request)).await
    }

    async fn put(&self, request: Request<PutRequest>) -> Answer<PutResponse> {
        self.answer(request, Need::Keys, |store, _, request| {
            fits(&request)?;
            store.put(&request)
        })
        .await
    }

    async fn delete_range(&self, request: Request<DeleteRangeRequest>) -> Answer<DeleteRangeResponse> {
        self.answer(request, Need::Keys, |store, _, request| {
            fits(&request)?;
            store.delete(&request)
        })
        .await
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Answer<TxnResponse> {
        self.answer(request, Need::Keys, |store, _, request| {
            fits(&request)?;
            store.txn(&request)
        })
        .await
    }

    async fn compact(&self, request: Request<CompactionRequest>) -> Answer<CompactionResponse> {
        self.answer(request, Need::GoodToken, |store, _, request| store.compact(&request)).await
    }
}
