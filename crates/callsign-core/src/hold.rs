//! Which endpoints stay in use although discovery has removed them
//!
//! A registry that says "gone" of one instance is believed. One that says so of many at once has more likely lost its
//! memory than its servers: a leader that wakes and revokes healthy leases, a data directory that was wiped, a key prefix
//! deleted by hand. Then the endpoints that still answer are *held*: in use, until they stop answering, come back, or have
//! been away for too long.
//!
//! Whether a removal is one of many is known only when the others have followed. Until then a removed endpoint stands
//! *aside*: it takes no calls, but its connection is kept for one window, and when the removals turn out to be many it is
//! taken back with all the others. So it makes no difference whether instances vanish at once or one by one.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Follows what discovery lists, and decides who is held
///
/// Endpoints are told apart by their numbers, as in [`Candidate`](crate::policy::Candidate). Changes come by
/// [`insert`](Self::insert), [`remove`](Self::remove) and [`lost`](Self::lost); nothing is decided before
/// [`decide`](Self::decide), so that many changes that came together are judged together.
#[derive(Debug)]
pub struct Hold {
    window: Duration,
    /// How many discovery lists now.
    listed: usize,
    /// Those of the last window, and those that are still kept.
    removed: HashMap<u64, Removed>,
    /// Listed ones that came within the last window: each makes up for one that was removed.
    added: HashMap<u64, Instant>,
    /// When a list began to come in where nobody was listed and nobody missed: it makes up for nobody.
    first: Option<Instant>,
    /// An event of holding is under way.
    holding: bool,
}

#[derive(Debug)]
struct Removed {
    at: Instant,
    stands: Stands,
}

/// What becomes of an endpoint that discovery has removed
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stands {
    /// It drains: it does not answer, or its time is over
    Gone,
    /// No new calls, but its connection is kept: it may yet be held
    Aside,
    /// Calls go on to be sent to it
    Held,
}

/// What is new with [`Hold::decide`]; what becomes of each endpoint is told by [`Hold::stands`]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// How many more are held
    pub held: usize,
    /// Why, if they are the first
    pub began: Option<Vanished>,
    /// Whether the last held endpoint has ceased to be one since the last decision
    pub ended: bool,
}

/// What vanished from discovery within a window
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vanished {
    /// Instances that are gone and that no new one makes up for
    pub missing: usize,
    /// Instances that there were
    pub of: usize,
}

/// An endpoint is held for at most this many windows, counted from its removal.
const WINDOWS: u32 = 3;
/// A hold is to end: nobody wants servers called for ever that the registry has long forgotten.
const LONGEST: Duration = Duration::from_secs(3600);
/// Fewer are never many, unless they were all.
const FEW: usize = 3;
/// What comes this soon after the first one belongs to the first list: a long one comes in parts, each decided on.
const FIRST_LIST: Duration = Duration::from_secs(1);

impl Hold {
    /// Removals within `window` of each other are judged together; zero holds nobody, and an hour is the longest
    pub fn new(window: Duration) -> Self {
        Self {
            window: window.min(LONGEST),
            listed: 0,
            removed: HashMap::new(),
            added: HashMap::new(),
            first: None,
            holding: false,
        }
    }

    /// Whether anybody can ever be held
    pub fn is_on(&self) -> bool {
        !self.window.is_zero()
    }

    /// Discovery lists an endpoint that it did not list before
    pub fn insert(&mut self, endpoint: u64, now: Instant) {
        self.listed += 1;
        let first = *self.first.get_or_insert(now);
        let late = now.saturating_duration_since(first) >= FIRST_LIST;
        if self.removed.remove(&endpoint).is_none() && late {
            self.added.insert(endpoint, now);
        }
    }

    /// Discovery does not list an endpoint any more; `answers` if it is ready for calls
    pub fn remove(&mut self, endpoint: u64, answers: bool, now: Instant) {
        self.listed = self.listed.saturating_sub(1);
        self.added.remove(&endpoint);
        if self.is_on() {
            let stands = if answers { Stands::Aside } else { Stands::Gone };
            self.removed.insert(endpoint, Removed { at: now, stands });
        }
    }

    /// An endpoint is not wanted any more although discovery lists it: nobody's loss, and nobody's gain
    pub fn forget(&mut self, endpoint: u64) {
        self.listed = self.listed.saturating_sub(1);
        self.added.remove(&endpoint);
    }

    /// A removed endpoint does not answer any more, whatever the reason
    pub fn lost(&mut self, endpoint: u64) {
        if let Some(removed) = self.removed.get_mut(&endpoint) {
            removed.stands = Stands::Gone;
        }
    }

    /// What becomes of a removed endpoint, as last decided
    pub fn stands(&self, endpoint: u64) -> Stands {
        self.removed.get(&endpoint).map_or(Stands::Gone, |removed| removed.stands)
    }

    /// Judges what has changed; also to be called when it is [`due`](Self::due)
    pub fn decide(&mut self, now: Instant) -> Decision {
        self.expire(now);
        let mut decision = Decision::default();
        if let Some(vanished) = self.vanished(now) {
            decision.held = self.take_back();
            decision.began = Some(vanished).filter(|_| !self.holding && decision.held > 0);
        }
        let holding = self.removed.values().any(|removed| removed.stands == Stands::Held);
        decision.ended = self.holding && !holding;
        self.holding = holding;
        if self.listed == 0 && self.removed.is_empty() {
            self.first = None;
        }
        decision
    }

    /// When time alone changes something
    pub fn due(&self) -> Option<Instant> {
        let kept = self.removed.values().filter(|removed| removed.stands != Stands::Gone);
        kept.filter_map(|removed| removed.at.checked_add(removed.span(self.window))).min()
    }

    /// Forgets what was longer ago than it counts
    fn expire(&mut self, now: Instant) {
        let ago = |at| now.saturating_duration_since(at);
        self.added.retain(|_, at| ago(*at) < self.window);
        self.removed.retain(|_, removed| ago(removed.at) < removed.span(self.window));
    }

    /// What vanished within the window that ends now, if it is more than discovery is believed
    fn vanished(&self, now: Instant) -> Option<Vanished> {
        let recent = |removed: &&Removed| now.saturating_duration_since(removed.at) < self.window;
        let missing = self.removed.values().filter(recent).count().saturating_sub(self.added.len());
        let vanished = Vanished { missing, of: self.listed + missing };
        let all = self.listed == 0 && missing > 0;
        let many = missing >= FEW && missing * 3 > vanished.of;
        (all || many).then_some(vanished)
    }

    /// Holds all who stand aside; how many
    fn take_back(&mut self) -> usize {
        let aside = self.removed.values_mut().filter(|removed| removed.stands == Stands::Aside);
        aside.map(|removed| removed.stands = Stands::Held).count()
    }
}

impl Removed {
    /// How long it counts, from its removal
    fn span(&self, window: Duration) -> Duration {
        if self.stands == Stands::Held { window.saturating_mul(WINDOWS) } else { window }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, ops::Range};

    use super::*;

    const WINDOW: Duration = Duration::from_secs(15);
    const NOBODY: [u64; 0] = [];

    #[test]
    fn who_is_not_wanted_any_more_has_not_vanished() {
        let mut test = service(10);
        (0..9).for_each(|endpoint| test.hold.forget(endpoint));
        assert_eq!(test.change(0..0, 0..0).began, None);
        assert_eq!(test.change(0..0, 9..10).held, [9], "but the last that is wanted can still vanish");
    }

    /// A hold with a clock of its own
    struct Test {
        hold: Hold,
        now: Instant,
        /// What stood how after the last decision.
        stood: BTreeMap<u64, Stands>,
    }

    /// A decision and what it changed, endpoint by endpoint
    #[derive(Debug, PartialEq)]
    struct Outcome {
        held: Vec<u64>,
        /// No longer kept, and not listed either.
        over: Vec<u64>,
        began: Option<Vanished>,
        ended: bool,
    }

    #[allow(clippy::disallowed_methods, reason = "any instant will do as the zero of a test")]
    fn zero() -> Instant {
        Instant::now()
    }

    /// A service of `n` instances: its first list
    fn service(n: u64) -> Test {
        let mut test = Test { hold: Hold::new(WINDOW), now: zero(), stood: BTreeMap::new() };
        let outcome = test.change(0..n, 0..0);
        assert_eq!(outcome, Outcome { held: vec![], over: vec![], began: None, ended: false });
        test.now += FIRST_LIST;
        test
    }

    impl Test {
        /// Everything in one batch
        fn change(&mut self, inserted: Range<u64>, removed: Range<u64>) -> Outcome {
            for endpoint in inserted {
                self.stood.remove(&endpoint);
                self.hold.insert(endpoint, self.now);
            }
            for endpoint in removed {
                self.stood.insert(endpoint, Stands::Aside);
                self.hold.remove(endpoint, true, self.now);
            }
            self.decide()
        }

        fn remove(&mut self, endpoint: u64) -> Outcome {
            self.change(0..0, endpoint..endpoint + 1)
        }

        fn insert(&mut self, endpoint: u64) -> Outcome {
            self.change(endpoint..endpoint + 1, 0..0)
        }

        fn after(&mut self, wait: Duration) -> Outcome {
            self.now += wait;
            self.decide()
        }

        fn decide(&mut self) -> Outcome {
            let Decision { held, began, ended } = self.hold.decide(self.now);
            let mut outcome = Outcome { held: vec![], over: vec![], began, ended };
            for (endpoint, stood) in &mut self.stood {
                match (std::mem::replace(stood, self.hold.stands(*endpoint)), *stood) {
                    (Stands::Aside, Stands::Held) => outcome.held.push(*endpoint),
                    (Stands::Aside | Stands::Held, Stands::Gone) => outcome.over.push(*endpoint),
                    (before, after) => assert_eq!(before, after),
                }
            }
            assert_eq!(outcome.held.len(), held);
            outcome
        }

        fn keeps(&self, endpoint: u64) -> bool {
            self.hold.stands(endpoint) != Stands::Gone
        }
    }

    fn numbers(range: Range<u64>) -> Vec<u64> {
        range.collect()
    }

    #[test]
    fn many_are_held_and_a_few_are_let_go() {
        for (n, removed, held) in [
            (1, 1, true),
            (2, 1, false),
            (2, 2, true),
            (3, 1, false),
            (3, 2, false),
            (3, 3, true),
            (8, 2, false),
            (8, 3, true),
            (9, 3, false),
            (20, 6, false),
            (20, 7, true),
            (20, 20, true),
            (100, 33, false),
            (100, 34, true),
            (100, 100, true),
        ] {
            let decision = service(n).change(0..0, 0..removed);
            let vanished = Vanished { missing: removed as usize, of: n as usize };
            assert_eq!(decision.held, if held { numbers(0..removed) } else { vec![] }, "{removed} of {n}");
            assert_eq!(decision.began, held.then_some(vanished), "{removed} of {n}");
            assert_eq!((decision.over, decision.ended), (vec![], false));
        }
    }

    #[test]
    fn those_that_vanished_first_are_taken_back_when_the_others_follow() {
        for (n, many) in [(1, 1), (2, 2), (3, 3), (4, 3), (20, 7), (100, 34)] {
            let mut test = service(n);
            for endpoint in 0..n {
                let held = test.remove(endpoint).held;
                test.now += Duration::from_millis(50);
                let expected = match endpoint + 1 {
                    vanished if vanished < many => vec![],
                    vanished if vanished == many => numbers(0..many),
                    _ => vec![endpoint],
                };
                assert_eq!(held, expected, "{} of {n}", endpoint + 1);
            }
        }
    }

    #[test]
    fn one_event_of_holding_begins_once_and_ends_once() {
        let mut test = service(20);
        let began: Vec<_> = (0..20).filter_map(|endpoint| test.remove(endpoint).began).collect();
        assert_eq!(began, [Vanished { missing: 7, of: 20 }]);
        let ended = (0..20).filter(|endpoint| {
            test.hold.lost(*endpoint);
            test.decide().ended
        });
        assert_eq!(ended.collect::<Vec<_>>(), [19]);
        assert!(!test.decide().ended);
    }

    #[test]
    fn removals_further_apart_than_a_window_are_not_judged_together() {
        let mut test = service(20);
        for endpoint in 0..19 {
            assert_eq!(test.remove(endpoint).held, NOBODY);
            // Two within any 15 s.
            test.now += Duration::from_secs(8);
        }
        assert_eq!(test.remove(19).held, [18, 19], "the set is empty: those of the last window");
    }

    #[test]
    fn a_removed_endpoint_stands_aside_for_a_window_and_is_held_for_three() {
        let mut test = service(20);
        test.remove(0);
        assert!(test.keeps(0));
        assert_eq!(test.hold.due(), Some(test.now + WINDOW));
        let removed = test.now;
        assert_eq!(test.after(WINDOW - Duration::from_millis(1)).over, NOBODY);
        assert_eq!(test.after(Duration::from_millis(1)).over, [0]);
        assert!(!test.keeps(0) && test.hold.due().is_none());

        test.change(0..0, 1..8);
        assert_eq!(test.hold.due(), Some(removed + 4 * WINDOW), "held since the end of the first window");
        let last = test.after(3 * WINDOW - Duration::from_millis(1));
        assert_eq!((last.over, last.ended), (vec![], false));
        let last = test.after(Duration::from_millis(1));
        assert_eq!((last.over, last.ended), (numbers(1..8), true));
    }

    #[test]
    fn three_windows_count_from_each_removal() {
        let mut test = service(3);
        for endpoint in 0..3 {
            test.remove(endpoint);
            test.now += Duration::from_secs(5);
        }
        // 15 s after the first removal.
        assert_eq!(test.after(Duration::from_secs(29)).over, NOBODY);
        for (wait, over) in [(1, 0), (5, 1), (5, 2)] {
            let decision = test.after(Duration::from_secs(wait));
            assert_eq!((decision.over, decision.ended), (vec![over], over == 2));
        }
    }

    #[test]
    fn an_endpoint_that_does_not_answer_counts_and_is_never_held() {
        let mut test = service(4);
        test.hold.remove(0, false, test.now);
        test.remove(1);
        test.hold.lost(1);
        assert_eq!(test.remove(2).held, [2], "three of four have vanished, and one of them answers");
        assert!(!test.keeps(0) && !test.keeps(1));
        test.hold.lost(2);
        assert_eq!(test.hold.due(), None, "time changes nothing for those that are gone");
    }

    #[test]
    fn an_endpoint_that_is_listed_again_is_an_endpoint_like_any_other() {
        let mut test = service(3);
        test.change(0..0, 0..3);
        for endpoint in 0..3 {
            let decision = test.insert(endpoint);
            assert_eq!((decision.over, decision.ended), (vec![], endpoint == 2));
            assert!(!test.keeps(endpoint));
        }
        // Nothing is left of the event: neither a count nor a time.
        assert!(test.hold.removed.is_empty() && test.hold.due().is_none());
        assert_eq!(test.remove(0).held, NOBODY);
        assert_eq!(test.remove(1).held, NOBODY);
        test.insert(0);
        test.insert(1);
        assert_eq!(test.after(3 * WINDOW).over, NOBODY);
    }

    #[test]
    fn those_that_come_back_in_time_were_never_missed() {
        let mut test = service(20);
        for endpoint in 0..20 {
            assert_eq!(test.remove(endpoint).held, NOBODY);
            test.insert(endpoint);
        }
    }

    #[test]
    fn a_rolling_deployment_holds_nobody() {
        for n in [1_u64, 2, 3, 20, 100] {
            for surge in [1, n.div_ceil(4)] {
                let mut first = service(n);
                let mut last = service(n);
                for old in (0..n).step_by(surge as usize) {
                    let old = old..(old + surge).min(n);
                    let new = old.start + 1000..old.end + 1000;
                    assert_eq!(first.change(new.clone(), 0..0).held, NOBODY);
                    assert_eq!(
                        first.change(0..0, old.clone()).held,
                        NOBODY,
                        "new ones first, {surge} of {n}"
                    );
                    if surge == 1 && n > 1 {
                        assert_eq!(last.change(0..0, old).held, NOBODY);
                        assert_eq!(last.change(new, 0..0).held, NOBODY, "old ones first, {surge} of {n}");
                    }
                    first.now += Duration::from_millis(700);
                    last.now += Duration::from_millis(700);
                }
            }
        }
    }

    #[test]
    fn a_set_that_is_replaced_at_once_holds_nobody() {
        for n in [1, 3, 20] {
            assert_eq!(service(n).change(n..2 * n, 0..n).held, NOBODY);
        }
        let half = service(20).change(20..30, 0..20);
        assert_eq!(half.held, numbers(0..20), "ten of twenty are missing");
        assert_eq!(half.began, Some(Vanished { missing: 10, of: 20 }));
    }

    #[test]
    fn a_first_list_makes_up_for_nobody() {
        let mut test = service(20);
        assert_eq!(test.change(0..0, 0..7).held, numbers(0..7), "a moment after the first list");
    }

    /// A pool applies a long list a few thousand at a time.
    #[test]
    fn no_part_of_a_first_list_makes_up_for_anybody() {
        let mut test = Test { hold: Hold::new(WINDOW), now: zero(), stood: BTreeMap::new() };
        for part in [0..40, 40..80, 80..100] {
            test.change(part, 0..0);
            test.now += Duration::from_millis(50);
        }
        assert_eq!(test.change(0..0, 0..40).held, numbers(0..40));
        // Nor does any of the next one, once all are gone and forgotten.
        test.change(0..0, 40..100);
        test.after(3 * WINDOW);
        for part in [200..240, 240..300] {
            test.change(part, 0..0);
        }
        assert_eq!(test.change(0..0, 200..240).held, numbers(200..240));
    }

    #[test]
    fn an_endpoint_that_came_back_makes_up_for_nobody_else() {
        let mut test = service(20);
        test.change(0..0, 0..7);
        test.change(0..7, 0..0);
        assert_eq!(test.change(0..0, 7..14).held, numbers(7..14));
    }

    #[test]
    fn a_newcomer_is_one_of_the_others_after_a_window() {
        let mut test = service(3);
        test.change(3..6, 0..0);
        test.now += WINDOW;
        assert_eq!(test.change(0..0, 0..3).held, numbers(0..3), "three of six");
    }

    #[test]
    fn a_newcomer_that_is_removed_makes_up_for_nobody() {
        let mut test = service(6);
        test.change(10..13, 0..0);
        test.change(0..0, 10..13);
        assert_eq!(test.remove(0).held, vec![0, 10, 11, 12], "four of nine");
    }

    #[test]
    fn what_vanishes_while_others_are_held_is_judged_by_the_same_rule() {
        let mut test = service(20);
        test.change(0..0, 0..7);
        test.now += 2 * WINDOW;
        let decision = test.remove(7);
        assert_eq!((decision.held, decision.began), (vec![], None), "one of thirteen");
        assert_eq!(test.change(0..0, 8..12).held, numbers(7..12), "five of thirteen");
        assert_eq!(test.after(WINDOW).over, numbers(0..7));
    }

    #[test]
    fn a_window_of_zero_holds_nobody_and_remembers_nothing() {
        let mut hold = Hold::new(Duration::ZERO);
        let now = zero();
        hold.insert(0, now);
        hold.decide(now);
        hold.insert(1, now);
        hold.remove(0, true, now);
        hold.remove(1, true, now);
        assert!(!hold.is_on() && hold.stands(0) == Stands::Gone);
        assert_eq!(hold.decide(now), Decision::default());
        assert!(hold.removed.is_empty() && hold.added.is_empty());
    }

    #[test]
    fn the_longest_window_is_an_hour() {
        let mut hold = Hold::new(Duration::MAX);
        let now = zero();
        hold.insert(0, now);
        hold.decide(now);
        hold.remove(0, true, now);
        assert_eq!(hold.decide(now).held, 1);
        let end = now + 3 * Duration::from_secs(3600);
        assert_eq!(hold.due(), Some(end));
        assert!(hold.decide(end).ended);
        assert_eq!(hold.stands(0), Stands::Gone);
    }
}
