//! Machines that stand still: what depends on deadlines is tried again there

use std::{future::Future, panic::resume_unwind, time::Duration};

use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
    time::{MissedTickBehavior, interval, sleep},
};

/// How often a scenario is tried
const TRIES: u32 = 5;
/// A machine that stands still for longer lets deadlines of half a second pass by itself
const STALL: Duration = Duration::from_millis(100);

/// One scenario at a time: beside each other their calls take several times as long, and more are in flight at a fault
static ALONE: Mutex<()> = Mutex::const_new(());

/// Runs `scenario` beside no other, and once more if it fails while this machine stood still for 100 ms: four times at most, and each time it says so
///
/// For scenarios that allow a few failed calls with deadlines of half a second. What fails on a steady machine has failed.
///
/// # Panics
///
/// As the last try does.
pub async fn on_a_steady_machine<F>(scenario: impl Fn() -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let _alone = ALONE.lock().await;
    for more in (0..TRIES).rev() {
        let watch = Watch::start();
        let Err(failed) = tokio::spawn(scenario()).await else { return };
        // Whoever ends a stall may be first to run: the watch has yet to see how late it is.
        sleep(STALL / 5).await;
        let stall = *watch.longest.borrow();
        if more == 0 || stall < STALL {
            resume_unwind(failed.into_panic());
        }
        println!("tried again: this machine stood still for {stall:?}");
    }
}

/// How late a task of this runtime was at most
struct Watch {
    longest: watch::Receiver<Duration>,
    task: JoinHandle<()>,
}

impl Watch {
    fn start() -> Self {
        let (tell, longest) = watch::channel(Duration::ZERO);
        let task = tokio::spawn(async move {
            let mut tick = interval(STALL / 10);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                let late = tick.tick().await.elapsed();
                tell.send_if_modified(|longest| {
                    let is_longer = late > *longest;
                    *longest = late.max(*longest);
                    is_longer
                });
            }
        });
        Self { longest, task }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

    use super::*;

    // One thread: what holds it up holds up the watch, too.
    #[tokio::test]
    async fn what_a_stall_has_failed_is_tried_again() {
        static TRIED: AtomicU32 = AtomicU32::new(0);
        on_a_steady_machine(|| async {
            if TRIED.fetch_add(1, Relaxed) == 0 {
                let began = std::time::Instant::now();
                while began.elapsed() < STALL * 3 {
                    std::hint::spin_loop();
                }
                tokio::time::sleep(STALL).await;
                panic!("for the test");
            }
        })
        .await;
        assert_eq!(TRIED.load(Relaxed), 2);
    }
}
