//! Deadlines, however far away

use std::time::Duration;

use tokio::time::Instant;

/// A time that far from now, or as far as a clock goes
pub(crate) fn far(now: Instant, time: Duration) -> Instant {
    // The second is tokio's own idea of "never": thirty years.
    now.checked_add(time).unwrap_or_else(|| now + Duration::from_secs(86_400 * 365 * 30))
}
