//! Faults that answers can have

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::sleep;

/// The faults a server was asked for
#[derive(Debug, Default)]
pub(crate) struct Faults {
    delay_nanos: AtomicU64,
    /// How often it was asked to resend; every stream does so once per time.
    resends: AtomicU64,
    /// How often progress was to run ahead; every stream does so once per time.
    ahead: AtomicU64,
}

/// How many of the faults a stream has shown
#[derive(Clone, Copy, Debug)]
pub(super) struct Shown {
    resends: u64,
    ahead: u64,
}

impl Faults {
    pub(crate) fn set_delay(&self, delay: Duration) {
        let nanos = u64::try_from(delay.as_nanos()).unwrap_or(u64::MAX);
        self.delay_nanos.store(nanos, Ordering::Relaxed);
    }

    pub(super) fn delay(&self) -> Option<Duration> {
        let nanos = self.delay_nanos.load(Ordering::Relaxed);
        (nanos > 0).then(|| Duration::from_nanos(nanos))
    }

    /// Waits as long as every answer has to
    pub(super) async fn wait(&self) {
        if let Some(delay) = self.delay() {
            sleep(delay).await;
        }
    }

    pub(crate) fn add_resend(&self) {
        self.resends.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn add_ahead(&self) {
        self.ahead.fetch_add(1, Ordering::Relaxed);
    }

    /// A new stream owes nothing of the past
    pub(super) fn shown(&self) -> Shown {
        Shown { resends: self.resends.load(Ordering::Relaxed), ahead: self.ahead.load(Ordering::Relaxed) }
    }
}

impl Shown {
    /// Whether a resend is owed; asking pays
    pub(super) fn take_resend(&mut self, faults: &Faults) -> bool {
        let wanted = faults.resends.load(Ordering::Relaxed);
        std::mem::replace(&mut self.resends, wanted) != wanted
    }

    /// Whether progress is to run ahead of the next events; asking pays
    pub(super) fn take_ahead(&mut self, faults: &Faults) -> bool {
        let wanted = faults.ahead.load(Ordering::Relaxed);
        std::mem::replace(&mut self.ahead, wanted) != wanted
    }
}
