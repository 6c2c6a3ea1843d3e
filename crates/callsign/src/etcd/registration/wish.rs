//! What a registration is asked for: to be in etcd, or out of it for a while

use std::{future::pending, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{LossCause, RegistrationState, report::Progress};

/// As long as a first attempt to register may take: hosts that are frozen cost 2 s each.
const SETTLE: Duration = Duration::from_secs(5);

/// Whether the key is to be in etcd
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(super) present: bool,
    /// Counts changes: who waits for a wish must not take an earlier one's fulfilment for it
    number: u64,
}

/// The handle's end
#[derive(Clone, Debug)]
pub(crate) struct Wisher(watch::Sender<Wish>);

impl Wisher {
    pub(super) fn new(present: bool) -> (Self, Followed) {
        let (sender, receiver) = watch::channel(Wish { present, number: 0 });
        (Self(sender), Followed(receiver))
    }

    /// Wishes for it, and returns at once
    pub(crate) fn wish(&self, present: bool) {
        self.0.send_if_modified(|wish| {
            let changes = wish.present != present;
            *wish = Wish { present, number: wish.number + u64::from(changes) };
            changes
        });
    }

    /// Wishes for it, and waits until etcd has confirmed it, within 5 s
    pub(super) async fn fulfil(
        &self,
        present: bool,
        mut state: watch::Receiver<RegistrationState>,
        mut progress: watch::Receiver<Progress>,
    ) -> Result<(), Unfulfilled> {
        self.wish(present);
        let (wish, mut wishes) = (*self.0.borrow(), self.0.subscribe());
        let deadline = Instant::now() + SETTLE;
        loop {
            let judged = judge(wish, &state.borrow_and_update(), &progress.borrow_and_update());
            if let Some(judged) = judged {
                return judged;
            }
            if *wishes.borrow_and_update() != wish {
                return Err(Unfulfilled::Overruled);
            }
            let news = async {
                tokio::select! {
                    changed = state.changed() => changed,
                    changed = progress.changed() => changed,
                    changed = wishes.changed() => changed,
                }
            };
            match timeout_at(deadline, news).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(Unfulfilled::Ended),
                Err(_) => return Err(Unfulfilled::Late(progress.borrow().failure.clone())),
            }
        }
    }
}

/// The machine's end
#[derive(Debug)]
pub(super) struct Followed(watch::Receiver<Wish>);

impl Followed {
    /// What is wished for now; `changed` tells of what comes later
    pub(super) fn current(&mut self) -> Wish {
        *self.0.borrow_and_update()
    }

    pub(super) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // Nobody is left to wish for anything: the end is near, and told otherwise.
            pending::<()>().await;
        }
    }
}

/// How far the machine is with the wishes
#[derive(Clone, Debug, Default)]
pub(super) struct Fulfilled(Option<u64>);

impl Fulfilled {
    pub(super) fn up_to(wish: Wish) -> Self {
        Self(Some(wish.number))
    }

    fn covers(&self, wish: Wish) -> bool {
        self.0.is_some_and(|number| number >= wish.number)
    }
}

/// Why a wish is not fulfilled
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unfulfilled {
    /// With the last thing that went wrong
    Late(Option<String>),
    Overwritten,
    Overruled,
    Ended,
}

/// What became of a wish; `None` while that is open
fn judge(wish: Wish, state: &RegistrationState, progress: &Progress) -> Option<Result<(), Unfulfilled>> {
    use RegistrationState::{Deregistered, Lost, Paused, Registered};
    match state {
        Lost { cause: LossCause::Overwritten } => Some(Err(Unfulfilled::Overwritten)),
        Deregistered => Some(Err(Unfulfilled::Ended)),
        Registered { .. } if wish.present && progress.fulfilled.covers(wish) => Some(Ok(())),
        Paused if !wish.present && progress.fulfilled.covers(wish) => Some(Ok(())),
        _ => None,
    }
}

/// Why a registration is not paused, or not resumed
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PauseError {
    /// etcd has not confirmed it within 5 s: it goes on in the background, watch the state
    #[error("{key}: etcd has not confirmed within 5 s that the instance is {wished}: {cause}")]
    Unconfirmed {
        /// The key
        key: String,
        /// What was asked for: `paused` or `resumed`
        wished: &'static str,
        /// What went wrong last
        cause: String,
    },
    /// Another instance with this id has the key: register anew to take it over
    #[error("{key} was taken by another instance")]
    Overwritten {
        /// The key
        key: String,
    },
    /// The opposite was asked for before etcd had confirmed this
    #[error("{key}: the opposite was asked for meanwhile")]
    Overruled {
        /// The key
        key: String,
    },
    /// The registration is over
    #[error("{key} is no longer registered")]
    Ended {
        /// The key
        key: String,
    },
}

impl PauseError {
    pub(super) fn new(key: &str, present: bool, why: Unfulfilled) -> Self {
        let key = key.to_owned();
        match why {
            Unfulfilled::Late(cause) => Self::Unconfirmed {
                key,
                wished: if present { "resumed" } else { "paused" },
                cause: cause.unwrap_or_else(|| "no answer yet".to_owned()),
            },
            Unfulfilled::Overwritten => Self::Overwritten { key },
            Unfulfilled::Overruled => Self::Overruled { key },
            Unfulfilled::Ended => Self::Ended { key },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Waker};

    use super::*;

    /// What waits for `present` while the machine is in `state` and has fulfilled the first wish
    async fn outcome(present: bool, state: RegistrationState) -> Result<(), Unfulfilled> {
        let (wisher, mut followed) = Wisher::new(true);
        let fulfilled = Fulfilled::up_to(followed.current());
        let (_state, states) = watch::channel(state);
        let (_progress, progress) = watch::channel(Progress { fulfilled, failure: Some("why".to_owned()) });
        wisher.fulfil(present, states, progress).await
    }

    fn registered() -> RegistrationState {
        RegistrationState::Registered { lease: 1, ttl: SETTLE }
    }

    #[tokio::test(start_paused = true)]
    async fn a_wish_ends_in_every_state() {
        let late = || Err(Unfulfilled::Late(Some("why".to_owned())));
        let granting = || RegistrationState::Granting { cause: None };
        let lost = |cause| RegistrationState::Lost { cause };
        for present in [true, false] {
            assert_eq!(outcome(present, granting()).await, late());
            assert_eq!(outcome(present, lost(LossCause::Unconfirmed)).await, late());
            let overwritten = outcome(present, lost(LossCause::Overwritten)).await;
            assert_eq!(overwritten, Err(Unfulfilled::Overwritten));
            let ended = outcome(present, RegistrationState::Deregistered).await;
            assert_eq!(ended, Err(Unfulfilled::Ended));
        }
        assert_eq!(outcome(true, registered()).await, Ok(()));
        assert_eq!(outcome(false, registered()).await, late());
    }

    #[tokio::test(start_paused = true)]
    async fn the_fulfilment_of_an_earlier_wish_is_not_taken_for_that_of_a_later_one() {
        let (wisher, mut followed) = Wisher::new(true);
        let fulfilled = Fulfilled::up_to(followed.current());
        // Paused and resumed before the machine looked: it may be taking the key away just now.
        wisher.wish(false);
        let (_state, states) = watch::channel(registered());
        let (shown, progress) = watch::channel(Progress { fulfilled, failure: None });
        let mut resuming = Box::pin(wisher.fulfil(true, states, progress));
        assert!(resuming.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
        shown.send_modify(|progress| progress.fulfilled = Fulfilled::up_to(followed.current()));
        assert_eq!(resuming.await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_overruled_hears_of_it_at_once() {
        let (wisher, _followed) = Wisher::new(true);
        let (_state, states) = watch::channel(registered());
        let (_progress, progress) = watch::channel(Progress::default());
        let start = Instant::now();
        let overruled = async {
            tokio::task::yield_now().await;
            wisher.wish(true);
        };
        let (paused, ()) = tokio::join!(wisher.fulfil(false, states, progress), overruled);
        assert_eq!((paused, start.elapsed()), (Err(Unfulfilled::Overruled), Duration::ZERO));
    }
}
