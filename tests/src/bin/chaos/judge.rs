//! What was violated, and which calls failed
//!
//! Every call that fails counts, but for those that were in flight on an instance when that was killed (SIGKILL): the
//! status names the instance's address, the call ended after the signal was sent, and it was started before the caller's
//! own channel reported the endpoint lost, at most a second after the process was gone.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use callsign::{Address, EndpointState};
use callsign_tests::{
    channel::UpdateLog,
    checker::{CONVERGED, Life, Observed, Violation, removed_while_living},
};
use tonic::Status;

use crate::stage::{Excuse, Killed, TTL};

/// What a busy machine may add
const MORE: Duration = Duration::from_secs(2);

/// A channel that has not seen by then that its endpoint is gone is at fault.
const NOTICED: Duration = Duration::from_secs(1);

/// When violations of one round are late
#[derive(Debug)]
pub(crate) struct Deadlines {
    healed: Instant,
    /// Whether etcd itself was out of order
    disturbed: bool,
    /// Since when each violation is there
    since: BTreeMap<String, Instant>,
}

impl Deadlines {
    /// Of a round that is healed now
    pub(crate) fn new(healed: Instant, disturbed: bool) -> Self {
        Self { healed, disturbed, since: BTreeMap::new() }
    }

    /// Those violations that should not be there any more
    pub(crate) fn late(&mut self, wrong: Vec<Violation>, lives: &[Life], now: Instant) -> Vec<Violation> {
        let subjects: Vec<_> = wrong.iter().map(subject).collect();
        self.since.retain(|subject, _| subjects.contains(subject));
        let mut late = Vec::new();
        for (violation, subject) in wrong.into_iter().zip(subjects) {
            let since = *self.since.entry(subject).or_insert(now);
            if now > self.until(&violation, since, lives) {
                late.push(violation);
            }
        }
        late
    }

    fn until(&self, violation: &Violation, since: Instant, lives: &[Life]) -> Instant {
        let (Violation::DeadKey { address, .. } | Violation::SeveralKeys { address, .. }) = violation else {
            // What became wrong later, as a key that lapsed, has as long from then on.
            return self.healed.max(since) + CONVERGED;
        };
        let died = lives.iter().filter(|life| life.address == *address).filter_map(|life| life.until).max();
        match died {
            Some(died) if !self.disturbed => died.max(self.healed - TTL) + TTL + MORE,
            _ => self.healed + 2 * TTL + Duration::from_secs(5) + MORE,
        }
    }
}

/// What a violation is about: the same for as long as that is wrong
pub(crate) fn subject(violation: &Violation) -> String {
    match violation {
        Violation::KeyMissing { address } => format!("no key {address}"),
        Violation::SeveralKeys { address, .. } => format!("keys {address}"),
        Violation::DeadKey { key, .. } => format!("dead {key}"),
        Violation::ViewDiffers { view, .. } => format!("view {view}"),
        other => other.to_string(),
    }
}

/// Living instances that left the view since its `seen` removals, and that nothing excuses; and when
pub(crate) fn removed(
    view: &Observed,
    seen: &mut usize,
    lives: &[Life],
    excuses: &[Excuse],
) -> Vec<(Instant, Violation)> {
    let removals = view.removals();
    let new = removals.iter().skip(*seen).filter(|(at, address)| !is_excused(excuses, *at, address));
    let judged = new.flat_map(|removal| {
        let wrong = removed_while_living(view.name(), std::slice::from_ref(removal), lives, &[]);
        wrong.into_iter().map(|wrong| (removal.0, wrong))
    });
    let judged = judged.collect();
    *seen = removals.len();
    judged
}

fn is_excused(excuses: &[Excuse], at: Instant, address: &str) -> bool {
    excuses.iter().any(|excuse| {
        excuse.address.as_ref().is_none_or(|only| only == address)
            && at >= excuse.from
            && excuse.until.is_none_or(|until| at <= until)
    })
}

/// Whether a call was in flight on an instance when that was killed
pub(crate) fn was_in_flight(
    (started, took, status): &(Instant, Duration, Status),
    killed: &[Killed],
    log: &UpdateLog,
) -> bool {
    killed.iter().any(|killed| {
        status.message().contains(&killed.address)
            && *started + *took >= killed.from
            && *started <= lost(killed, log)
    })
}

/// When the channel said that the endpoint of a killed instance is lost, or should have
fn lost(killed: &Killed, log: &UpdateLog) -> Instant {
    let limit = killed.until + NOTICED;
    let Ok(address) = killed.address.parse::<Address>() else { return limit };
    let states = log.states(&address, killed.from);
    let lost = states.iter().find(|(_, state)| *state != EndpointState::Ready).map(|(at, _)| *at);
    lost.map_or(limit, |lost| lost.min(limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn dead_key() -> Violation {
        Violation::DeadKey { key: "s/1".to_owned(), address: "a:1".to_owned() }
    }

    #[test]
    fn a_dead_instances_key_has_its_ttl_and_longer_after_an_outage() {
        let healed = Instant::now() + 100 * SECOND;
        let lives =
            [Life { address: "a:1".to_owned(), from: healed - 50 * SECOND, until: Some(healed - SECOND) }];
        let late = |disturbed: bool, after: u32| {
            Deadlines::new(healed, disturbed).late(vec![dead_key()], &lives, healed + after * SECOND).len()
        };
        assert_eq!((late(false, 6), late(false, 7)), (0, 1));
        assert_eq!((late(true, 17), late(true, 18)), (0, 1));
    }

    #[test]
    fn a_view_has_its_time_from_healing_or_from_when_it_became_wrong() {
        let healed = Instant::now();
        let wrong = || {
            vec![Violation::ViewDiffers {
                view: "v".to_owned(),
                missing: Vec::new(),
                extra: vec!["a:1".to_owned()],
            }]
        };
        let mut deadlines = Deadlines::new(healed, false);
        assert_eq!(deadlines.late(wrong(), &[], healed + 6 * SECOND), []);
        assert_eq!(deadlines.late(Vec::new(), &[], healed + 8 * SECOND), []);
        assert_eq!(deadlines.late(wrong(), &[], healed + 9 * SECOND), [], "it was well meanwhile");
        assert_eq!(deadlines.late(wrong(), &[], healed + 16 * SECOND), []);
        assert_eq!(deadlines.late(wrong(), &[], healed + 17 * SECOND).len(), 1);
    }

    #[test]
    fn an_excuse_is_for_its_instance_and_its_time() {
        let from = Instant::now();
        let excuse = |address: Option<&str>, until: Option<Instant>| Excuse {
            address: address.map(str::to_owned),
            from,
            until,
        };
        let at = from + SECOND;
        assert!(is_excused(&[excuse(None, None)], at, "a:1"));
        assert!(is_excused(&[excuse(Some("a:1"), Some(at))], at, "a:1"));
        assert!(!is_excused(&[excuse(Some("b:2"), None)], at, "a:1"));
        assert!(!is_excused(&[excuse(None, Some(from))], at, "a:1"));
    }

    #[tokio::test]
    async fn a_failed_call_is_forgiven_if_it_names_the_killed_and_was_in_flight_then() {
        let from = Instant::now() + 10 * SECOND;
        let killed = [Killed { address: "127.0.0.1:9".to_owned(), from, until: from + SECOND / 10 }];
        let log = UpdateLog::new(tokio_stream::pending());
        let told = |started: Instant, took: Duration, message: &str| {
            was_in_flight(&(started, took, Status::unavailable(message)), &killed, &log)
        };
        assert!(told(from - SECOND, 2 * SECOND, "127.0.0.1:9: connection lost"));
        assert!(!told(from - SECOND, 2 * SECOND, "127.0.0.1:8: connection lost"), "another instance");
        assert!(!told(from - 2 * SECOND, SECOND, "127.0.0.1:9: connection lost"), "it ended before");
        assert!(
            !told(from + 2 * SECOND, SECOND, "127.0.0.1:9: connection lost"),
            "it should have been known"
        );
    }
}
