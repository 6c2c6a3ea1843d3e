//! One thing's part in a gauge that is a sum

use metrics::Gauge;

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
