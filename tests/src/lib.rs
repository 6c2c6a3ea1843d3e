//! What the suites share

pub mod etcd;
