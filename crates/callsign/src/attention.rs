//! How calls wake the task that looks after their endpoints

use std::{
    sync::atomic::{AtomicU8, Ordering::SeqCst},
    task::{Context, Poll},
};

use atomic_waker::AtomicWaker;

/// Whether somebody looks at the endpoints from time to time, or has to be woken for it
///
/// A channel that nobody calls has no timer: its pool sleeps until a call begins.
#[derive(Debug, Default)]
pub(crate) struct Attention {
    state: AtomicU8,
    waker: AtomicWaker,
}

const AWAKE: u8 = 0;
const ASLEEP: u8 = 1;
const CALLED: u8 = 2;

impl Attention {
    /// A call has begun: costs a load while somebody is awake
    pub(crate) fn stir(&self) {
        // The statistics are written with less order than this: hence one more look after falling asleep.
        if self.state.load(SeqCst) == ASLEEP {
            self.call();
        }
    }

    /// A look is due at once
    pub(crate) fn call(&self) {
        if self.state.swap(CALLED, SeqCst) != CALLED {
            self.waker.wake();
        }
    }

    /// Looks no more until a call begins; false if it does not since before, or was called again
    pub(crate) fn sleep(&self) -> bool {
        self.state.compare_exchange(AWAKE, ASLEEP, SeqCst, SeqCst).is_ok()
    }

    /// Looks again from time to time
    pub(crate) fn wake_up(&self) {
        let _ = self.state.compare_exchange(ASLEEP, AWAKE, SeqCst, SeqCst);
    }

    /// Ready once after each [`call`](Self::call), or several
    pub(crate) fn poll_called(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.waker.register(cx.waker());
        match self.state.compare_exchange(CALLED, AWAKE, SeqCst, SeqCst) {
            Ok(_) => Poll::Ready(()),
            Err(_) => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin, task::Waker};

    use super::*;

    #[test]
    fn calls_wake_who_sleeps_and_leave_who_is_awake_alone() {
        let attention = Attention::default();
        let mut cx = Context::from_waker(Waker::noop());
        attention.stir();
        assert!(attention.poll_called(&mut cx).is_pending());
        assert!(attention.sleep() && !attention.sleep());
        attention.wake_up();
        attention.stir();
        assert!(attention.poll_called(&mut cx).is_pending());
        attention.sleep();
        attention.stir();
        assert!(!attention.sleep());
        assert!(attention.poll_called(&mut cx).is_ready(), "called once is not forgotten by falling asleep");
        assert!(attention.poll_called(&mut cx).is_pending());
        attention.call();
        assert!(attention.poll_called(&mut cx).is_ready(), "whoever is awake can be called, too");
    }

    #[tokio::test]
    async fn who_waits_is_woken() {
        let attention = Attention::default();
        attention.sleep();
        let mut called = pin!(poll_fn(|cx| attention.poll_called(cx)));
        tokio::select! {
            biased;
            () = &mut called => panic!("nobody has called"),
            () = async { attention.stir() } => {}
        }
        called.await;
    }
}
