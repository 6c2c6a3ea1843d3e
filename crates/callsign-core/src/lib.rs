//! The decisions of callsign, without I/O
//!
//! This crate decides; `callsign` does. It has no task, no socket and no clock of its own: `now` and the
//! random source are arguments, so every rule can be tested without waiting.
//!
//! | module | decides |
//! | --- | --- |
//! | [`policy`] | which endpoint takes a call |
//! | [`load`] | what is known of an endpoint's load |
//! | [`streams`] | whether a connection has room for one more stream |
//! | [`backoff`] | when to try again |
//! | [`keepalive`] | when to ask a silent peer whether it lives, and when to give it up |
//! | [`ejection`] | which endpoints get no calls although they are connected |
//! | [`subset`] | which instances of many a client connects to |
//! | [`zone`] | whether only the endpoints that are near take calls |
//! | [`slow_start`] | how soon an endpoint that has just come gets its full share |
//! | [`hold`] | which endpoints stay in use although discovery has removed them |

pub mod policy;

pub mod load;
pub mod streams;

pub mod backoff;
pub mod keepalive;

pub mod ejection;
pub mod hold;
pub mod slow_start;
pub mod subset;
pub mod zone;

mod sync;

#[cfg(all(test, loom))]
mod loom_tests;
