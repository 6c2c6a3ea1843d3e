//! The values in etcd: how an instance is written, and what is read as one
//!
//! What is read is told apart by value, one instance at a time, so that fleets may be mixed. See `reading` for what is
//! accepted.

mod reading;
mod writing;

pub(crate) use self::{
    reading::{Unreadable, read},
    writing::write,
};

/// How an instance is written in etcd; both are read always
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Layout {
    /// go-zero's: `<service>/<id>` -> `host:port`. It has no room for metadata
    #[default]
    GoZero,
    /// That of etcd's own naming for gRPC (`go.etcd.io/etcd/client/v3/naming`):
    /// `<service>/<address>` -> `{"Op":0,"Addr":"host:port","Metadata":{..}}`
    ///
    /// go-zero's clients would dial the whole value: use it where all readers know it.
    Grpc,
}
