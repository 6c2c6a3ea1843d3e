//! What callsign counts and measures, for whoever listens
//!
//! Everything goes through the [`metrics`](https://docs.rs/metrics) facade: install a recorder (that of
//! `metrics-exporter-prometheus`, for example) *before* the channel, the session or the registration is made. Each of them
//! asks for its handles once, so that a call costs a branch a metric when nobody listens and allocates nothing when somebody
//! does; who comes later hears nothing of those that are there already.
//!
//! ```
//! // metrics_exporter_prometheus::PrometheusBuilder::new().install()?;
//! callsign::metrics::describe(); // so that the exporter can say what the names mean
//! // let channel = EtcdChannel::connect("hello.rpc").await?;
//! ```
//!
//! The names are in one table, [`TABLE`]. They are global, as the facade is: gauges are sums over all channels, sessions and
//! registrations of the process that have the same labels, and what is dropped takes its part out again.
//!
//! | label | says |
//! | --- | --- |
//! | `service` | how the channel calls what is behind it: the name in etcd, the target, or [`name`](crate::channel::ChannelBuilder::name). Of a registration what its key in etcd begins with |
//! | `endpoint` | `host:port`; `none` for calls that ended before an endpoint took them |
//! | `code` | gRPC's name of the status: `OK`, `UNAVAILABLE`... A call that its caller has dropped is `CANCELLED` |
//! | `state`, `reason`, `cause` | listed with the metric |
//! | `name` | of a discovery: the service, or the key of a live value |
//!
//! An endpoint that is gone leaves its counters behind: the facade forgets none.

mod calls;
mod endpoints;
#[cfg(feature = "etcd")]
mod etcd;
mod share;

use ::metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, SharedString, with_recorder};

pub(crate) use self::{
    calls::{ChannelMeters, EndpointMeters, Replay, code_name},
    endpoints::EndpointGauges,
};
#[cfg(feature = "etcd")]
pub(crate) use self::{
    etcd::{DiscoveryMeters, RegistrationMeters, SessionMeters, instances, skipped_keys},
    share::Share,
};

/// A row of the [`TABLE`]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metric {
    /// What it is called; ends with its unit, and with `_total` if it only grows
    pub name: &'static str,
    /// What can be done with it
    pub kind: Kind,
    /// What its numbers are
    pub unit: Unit,
    /// The labels that each of its series has
    pub labels: &'static [&'static str],
    /// What it says
    pub description: &'static str,
}

/// What kind of metric it is
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// It only grows
    Counter,
    /// It goes up and down
    Gauge,
    /// A distribution
    Histogram,
}

/// What a metric's numbers are
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unit {
    /// A number of things
    Count,
    /// A time
    Seconds,
}

/// A constant for each row, and the table of all.
macro_rules! table {
    ($($row:ident: $kind:ident of $unit:ident, $name:literal [$($label:literal)*], $description:literal;)*) => {
        $(const $row: Metric = Metric {
            name: $name,
            kind: Kind::$kind,
            unit: Unit::$unit,
            labels: &[$($label),*],
            description: $description,
        };)*

        /// Every metric that callsign has
        ///
        /// | name | kind | labels | |
        /// | --- | --- | --- | --- |
        $(#[doc = concat!(
            "| `", $name, "` | ", stringify!($kind), " | ", $("`", $label, "` ",)* "| ", $description, " |"
        )])*
        pub const TABLE: &[Metric] = &[$($row),*];
    };
}

table! {
    CALLS: Counter of Count, "callsign_calls_total" ["service" "endpoint" "code"],
        "Calls that have ended; one that was sent again counts once";
    LATENCY: Histogram of Seconds, "callsign_call_latency_seconds" ["service" "endpoint"],
        "From the pick to the response headers";
    PICKS: Counter of Count, "callsign_picks_total" ["service" "endpoint"],
        "Calls given to an endpoint, those that it handed back included";
    REPLAYS: Counter of Count, "callsign_replays_total" ["service" "reason"],
        "Calls sent again, by reason: unsent (the connection was closing) or refused (by the server, unprocessed)";
    WAITING: Gauge of Count, "callsign_waiting_calls" ["service"],
        "Calls that wait for an endpoint or for a stream";
    ENDPOINTS: Gauge of Count, "callsign_endpoints" ["service" "state"],
        "Endpoints by state: idle, connecting, ready, backoff or draining";
    HELD: Gauge of Count, "callsign_held_endpoints" ["service"],
        "Endpoints that are called although discovery has removed them, because too many vanished at once";
    EJECTED: Gauge of Count, "callsign_ejected_endpoints" ["service"],
        "Endpoints that are ready, and to which no call is sent since they are silent or fail";
    EJECTIONS: Counter of Count, "callsign_ejections_total" ["service" "reason"],
        "Endpoints ejected, by reason: silent, consecutive_failures or success_rate";
    DISCOVERIES: Gauge of Count, "callsign_discoveries" ["name" "state"],
        "Services and values that are followed, by state: listing, watching or resuming";
    LISTS: Counter of Count, "callsign_discovery_lists_total" ["name"],
        "Lists read from etcd: the first, and one whenever changes could have been missed";
    RESUMES: Counter of Count, "callsign_discovery_resumes_total" ["name"],
        "Watches that went on where the one before was interrupted, without a list";
    SKIPPED: Counter of Count, "callsign_discovery_skipped_keys_total" ["name"],
        "Keys that are no instance, each as often as it is warned of";
    INSTANCES: Gauge of Count, "callsign_discovery_instances" ["name"],
        "Instances that discovery knows";
    SESSIONS: Gauge of Count, "callsign_sessions" ["state"],
        "Sessions with etcd by state: connecting, connected, disconnected or refused";
    LOGINS_REFUSED: Counter of Count, "callsign_session_logins_refused_total" [],
        "Logins that etcd has refused";
    MOVES: Counter of Count, "callsign_session_moves_total" [],
        "Changes of the etcd host that a session uses";
    REGISTRATIONS: Gauge of Count, "callsign_registrations" ["service" "state"],
        "Registrations by state: granting, registered, lost or paused";
    GRANTS: Counter of Count, "callsign_registration_grants_total" ["service"],
        "Leases that etcd has granted";
    LOSSES: Counter of Count, "callsign_registration_losses_total" ["service" "cause"],
        "Registrations lost, by cause: lease_ended, key_deleted, overwritten or unconfirmed";
}

/// Tells the recorder what the metrics of the [`TABLE`] mean and what their units are
///
/// To be called once, after the recorder was installed. Without it everything is counted all the same.
pub fn describe() {
    with_recorder(|recorder| {
        for Metric { name, kind, unit, description, .. } in TABLE {
            let unit = Some(match unit {
                Unit::Count => ::metrics::Unit::Count,
                Unit::Seconds => ::metrics::Unit::Seconds,
            });
            let (name, description) = ((*name).into(), (*description).into());
            match kind {
                Kind::Counter => recorder.describe_counter(name, unit, description),
                Kind::Gauge => recorder.describe_gauge(name, unit, description),
                Kind::Histogram => recorder.describe_histogram(name, unit, description),
            }
        }
    });
}

/// How all of them are filtered, by recorders that do.
static METADATA: Metadata<'static> = Metadata::new("callsign", Level::INFO, Some(module_path!()));

impl Metric {
    fn counter(&self, values: impl IntoIterator<Item = SharedString>) -> Counter {
        with_recorder(|recorder| recorder.register_counter(&self.key(values), &METADATA))
    }

    fn gauge(&self, values: impl IntoIterator<Item = SharedString>) -> Gauge {
        with_recorder(|recorder| recorder.register_gauge(&self.key(values), &METADATA))
    }

    fn histogram(&self, values: impl IntoIterator<Item = SharedString>) -> Histogram {
        with_recorder(|recorder| recorder.register_histogram(&self.key(values), &METADATA))
    }

    fn key(&self, values: impl IntoIterator<Item = SharedString>) -> Key {
        let labels = self.labels.iter().zip(values).map(|(label, value)| Label::new(*label, value));
        Key::from_parts(self.name, labels.collect::<Vec<_>>())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique_and_end_as_their_kind_and_unit_want() {
        let names: HashSet<_> = TABLE.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), TABLE.len());
        for metric in TABLE {
            let Metric { name, kind, unit, .. } = metric;
            assert!(name.starts_with("callsign_"), "{name}");
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            assert_eq!(name.ends_with("_seconds"), *unit == Unit::Seconds, "{name}");
        }
    }
}
