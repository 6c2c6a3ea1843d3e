//! When changes are published

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep_until};

use super::set::Changes;
use crate::instance::Instance;

/// A rolling restart changes many instances in a row: consumers hear of it a hundred times a second at most.
const WINDOW: Duration = Duration::from_millis(10);

/// Collects changes: after a quiet time they are due at once, then when the window has passed
#[derive(Debug, Default)]
pub(super) struct Coalesce {
    changes: Changes,
    /// The end of the window that the last publication opened
    window: Option<Instant>,
}

impl Coalesce {
    /// The last change of an instance counts
    pub(super) fn add(&mut self, id: Arc<str>, instance: Option<Instance>) {
        self.changes.insert(id, instance);
    }

    /// Waits until what was collected is due: for ever if that is nothing
    pub(super) async fn due(&self) {
        if self.changes.is_empty() {
            return std::future::pending().await;
        }
        if let Some(window) = self.window {
            sleep_until(window).await;
        }
    }

    /// What was collected; opens a window
    pub(super) fn take(&mut self) -> Changes {
        self.window = Some(Instant::now() + WINDOW);
        std::mem::take(&mut self.changes)
    }

    pub(super) fn clear(&mut self) {
        self.changes.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn waited(coalesce: &Coalesce) -> Duration {
        let start = Instant::now();
        coalesce.due().await;
        start.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_change_is_due_at_once_and_what_follows_when_the_window_has_passed() {
        let mut coalesce = Coalesce::default();
        coalesce.add("a".into(), None);
        assert_eq!(waited(&coalesce).await, Duration::ZERO);
        assert_eq!(coalesce.take().len(), 1);

        coalesce.add("a".into(), None);
        coalesce.add("b".into(), None);
        coalesce.add("a".into(), None);
        assert!(waited(&coalesce).await >= WINDOW);
        assert_eq!(coalesce.take().len(), 2);

        tokio::time::advance(WINDOW * 2).await;
        coalesce.add("a".into(), None);
        assert_eq!(waited(&coalesce).await, Duration::ZERO, "quiet for longer than the window");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_never_due() {
        assert!(tokio::time::timeout(WINDOW * 10, Coalesce::default().due()).await.is_err());
    }
}
