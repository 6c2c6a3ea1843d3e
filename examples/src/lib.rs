//! The greeting service, as tonic generates it from `proto/hello.proto`
//!
//! The programs to copy from are in `src/bin`: `hello_server.rs` and `hello_client.rs`, and without a service of their own
//! `registry.rs` and `live_config.rs`.

/// The protobuf package `pb`: messages, client and server of `Greeter`
#[allow(missing_docs, unused_qualifications, reason = "generated")]
pub mod pb {
    tonic::include_proto!("pb");
}

/// The README's code compiles: it is run as doc tests of this package, which has the generated types.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
