//! The messages as the server has them; a client needs no more of its insides
#![allow(missing_docs, unreachable_pub, dead_code, clippy::all, clippy::use_self, reason = "generated")]

#[rustfmt::skip]
#[path = "../../src/proto/authpb.rs"]
pub mod authpb;
#[rustfmt::skip]
#[path = "../../src/proto/etcdserverpb.rs"]
pub mod etcdserverpb;
#[rustfmt::skip]
#[path = "../../src/proto/mvccpb.rs"]
pub mod mvccpb;
