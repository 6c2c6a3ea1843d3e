//! What the suites in `tests/tests` stand on
//!
//! | module | gives |
//! | --- | --- |
//! | [`pb`], [`echo`] | the generated code of `proto/hello.proto` and `tests/proto/echo.proto` |
//! | [`service`] | the two services, and a server of them in this process |
//! | [`process`] | the same server in a process of its own, to be killed and stopped |
//! | [`mod@go`] | go-zero and grpc-go in processes of their own |
//! | [`registry`], [`etcd`] | an etcd, real or embedded, and what is in it |
//! | [`ports`] | ports that stay ours while nobody listens on them |
//! | [`proxy`] | a TCP proxy whose connections can be held, delayed, cut, reset and refused |
//! | [`cluster`] | three real etcd members behind such proxies |
//! | [`fleet`] | servers that register through a cluster, and clients that call them all the time |
//! | [`checker`] | what must hold while etcd fails and after it has healed |
//! | [`lines`] | what is logged in a thread |
//! | [`front`] | TLS in front of any of these servers |
//! | [`certificates`] | a CA and what it has signed, in files that can be replaced |
//! | [`view`] | what a discovery has told so far |
//! | [`load`] | steady calls and what became of each |
//! | [`channel`] | channels over a list of addresses; what they said about their endpoints, and when |
//! | [`scripted`] | an HTTP/2 server whose frames are written by hand |
//! | [`bare`] | a gRPC server on bare `h2`, which sees heads as they came and answers as told |
//! | [`matrix`] | the calls that are made to it |
//! | [`peers`] | listeners that are no gRPC server at all |
//! | [`wait`] | waiting for a condition, with a bound |
//!
//! Suites that kill and stop processes need signals: they are empty elsewhere than on unix.

/// The tutorial's greeter, generated
#[allow(missing_docs, unused_qualifications, reason = "generated")]
pub mod pb {
    tonic::include_proto!("pb");
}

/// Calls of all four shapes, generated
#[allow(missing_docs, unused_qualifications, reason = "generated")]
pub mod echo {
    tonic::include_proto!("test");
}

pub mod ports;
#[cfg(unix)]
pub mod process;
pub mod service;

pub mod certificates;
#[cfg(unix)]
pub mod etcd;
pub mod front;
#[cfg(unix)]
pub mod go;
pub mod proxy;
#[cfg(unix)]
pub mod registry;
pub mod view;

#[cfg(unix)]
pub mod checker;
#[cfg(unix)]
pub mod cluster;
#[cfg(unix)]
pub mod fleet;
pub mod lines;

pub mod channel;
pub mod load;

pub mod bare;
pub mod peers;
pub mod relay;
pub mod scripted;

pub mod matrix;

pub mod stall;
pub mod wait;
