//! One thing's part in a gauge that is a sum

use metrics::{Gauge, SharedString};

use super::Metric;

/// What one thing adds to a gauge; its drop takes that out again
#[derive(Debug)]
pub(crate) struct Share {
    gauge: Gauge,
    value: usize,
}

impl Share {
    pub(super) fn new(gauge: Gauge) -> Self {
        Self { gauge, value: 0 }
    }

    pub(crate) fn value(&self) -> usize {
        self.value
    }

    pub(crate) fn set(&mut self, value: usize) {
        self.gauge.increment(value as f64 - self.value as f64);
        self.value = value;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Counts something in the state that it is in, by a gauge whose last label is the state
#[cfg(feature = "etcd")]
#[derive(Debug)]
pub(super) struct Standing {
    metric: Metric,
    label: Option<SharedString>,
    state: Option<&'static str>,
    counted: Option<Share>,
}

#[cfg(feature = "etcd")]
impl Standing {
    /// With `label`, if it has one before the state
    pub(super) fn new(metric: Metric, label: Option<SharedString>) -> Self {
        Self { metric, label, state: None, counted: None }
    }

    /// It is in this state now, or not counted any more
    pub(super) fn set(&mut self, state: Option<&'static str>) {
        if self.state == state {
            return;
        }
        self.state = state;
        self.counted = state.map(|state| {
            let labels = self.label.clone().into_iter().chain([state.into()]);
            let mut share = Share::new(self.metric.gauge(labels));
            share.set(1);
            share
        });
    }
}
