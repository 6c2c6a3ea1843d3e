//! The messages and stubs of etcd's API, generated from `proto/`
//!
//! Generated code is kept in the repository, so that users of the crate need no `protoc`. `tests/generated.rs` compares
//! it with what the generator makes today.
#![allow(missing_docs, unreachable_pub, dead_code, clippy::all, clippy::use_self, reason = "generated")]

#[rustfmt::skip]
pub mod authpb;
#[rustfmt::skip]
pub mod etcdserverpb;
#[rustfmt::skip]
pub mod mvccpb;
