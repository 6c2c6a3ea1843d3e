//! Waiting for a condition, with a bound

use std::{
    future::Future,
    pin::pin,
    task::{Context, Waker},
    time::{Duration, Instant},
};

/// How often a condition is looked at that nobody announces
const LOOK: Duration = Duration::from_millis(5);

/// Waits until `condition` gives a value
///
/// # Panics
///
/// If it gave none within `bound`; the message says `what` was waited for.
pub async fn until<T>(what: &str, bound: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < bound, "not within {bound:?}: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Waits until a count that has begun has stood still for half a second; what it came to
///
/// # Panics
///
/// If it did not within 20 s; the message says `what` was waited for.
pub async fn settled(what: &str, count: impl Fn() -> u64) -> u64 {
    let (mut last, mut since) = (count(), Instant::now());
    until(what, Duration::from_secs(20), || {
        if count() != last {
            (last, since) = (count(), Instant::now());
        }
        (last > 0 && since.elapsed() > Duration::from_millis(500)).then_some(last)
    })
    .await
}

/// Polls `future` once and asserts that it waits
///
/// # Panics
///
/// If it was ready; the message says `what` should have waited.
pub fn assert_waits<F: Future + Unpin>(what: &str, future: &mut F) {
    let waits = pin!(future).poll(&mut Context::from_waker(Waker::noop())).is_pending();
    assert!(waits, "{what} should wait");
}

/// What `future` came to, and how long that took
pub async fn timed<T>(future: impl Future<Output = T>) -> (T, Duration) {
    let start = Instant::now();
    let value = future.await;
    (value, start.elapsed())
}

/// The value of a future that needs no more than `bound`
///
/// # Panics
///
/// If it needs longer; the message says `what` hung.
pub async fn within<T>(what: &str, bound: Duration, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(bound, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {bound:?}: {what}"),
    }
}
