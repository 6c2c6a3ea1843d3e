//! What is around any policy: zone preference before it picks, slow start after

use std::{sync::Arc, time::Duration};

use callsign_core::{
    policy::Pick,
    slow_start::{self, Freshness},
    zone,
};

/// The preference and the window, off by default
#[derive(Clone, Debug, Default)]
pub(super) struct Around {
    pub(super) zone: Option<Arc<str>>,
    /// Zero is off.
    pub(super) slow_start: Duration,
}

impl Around {
    /// Whether an endpoint is in the preferred zone
    pub(super) fn is_near(&self, zone: Option<&str>) -> bool {
        self.zone.as_deref().is_some_and(|near| Some(near) == zone)
    }

    /// Those of the usable that take part, and those that do not; `listed` endpoints are near, usable or not
    pub(super) fn take_part<T>(
        &self,
        usable: Vec<T>,
        listed: usize,
        zone: impl Fn(&T) -> Option<&str>,
    ) -> (Vec<T>, Vec<T>) {
        let near = usable.iter().filter(|one| self.is_near(zone(one))).count();
        if zone::suffices(near, listed) {
            usable.into_iter().partition(|one| self.is_near(zone(one)))
        } else {
            (usable, Vec::new())
        }
    }

    /// Whether an endpoint that was picked takes the call, or another is to be picked
    pub(super) fn accepts(&self, fresh: &Freshness, call: &mut Pick<'_>) -> bool {
        if self.slow_start.is_zero() {
            return true;
        }
        let Some(since) = fresh.since() else { return true };
        let age = call.now.saturating_duration_since(since);
        age >= self.slow_start || call.random.f64() < slow_start::chance(age, self.slow_start)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    type Sides = (Vec<&'static str>, Vec<&'static str>);

    fn take_part(near: &str, usable: &[&'static str], listed: usize) -> Sides {
        let around = Around { zone: Some(near.into()), ..Around::default() };
        around.take_part(usable.to_vec(), listed, |zone| Some(*zone).filter(|zone| !zone.is_empty()))
    }

    #[test]
    fn those_who_are_near_take_part_alone_while_they_are_enough() {
        assert_eq!(take_part("a", &["a", "b", "a", ""], 4), (vec!["a", "a"], vec!["b", ""]));
        assert_eq!(take_part("a", &["a", "b", ""], 4), (vec!["a", "b", ""], vec![]));
        assert_eq!(take_part("c", &["a", "b"], 0), (vec!["a", "b"], vec![]), "nobody is there");
        let all = Around::default().take_part(vec!["a", "b"], 0, |zone| Some(*zone));
        assert_eq!(all, (vec!["a", "b"], vec![]), "no zone is preferred");
    }

    #[test]
    fn who_is_fresh_is_accepted_in_proportion_to_its_age_and_by_default_always() {
        let (mut fresh, now) = (Freshness::default(), Instant::now());
        fresh.on_connected(now);
        let slow = Around { slow_start: Duration::from_secs(100), ..Around::default() };
        let accepted = |around: &Around, age| {
            let mut random = fastrand::Rng::with_seed(7);
            let mut call = Pick::new(&mut random, now + Duration::from_secs(age));
            (0..10_000).filter(|_| around.accepts(&fresh, &mut call)).count()
        };
        assert!((800..1200).contains(&accepted(&slow, 0)));
        assert!((4800..5200).contains(&accepted(&slow, 50)));
        assert_eq!(accepted(&slow, 100), 10_000);
        assert_eq!(accepted(&Around::default(), 0), 10_000);
        let mut random = fastrand::Rng::with_seed(7);
        assert!(slow.accepts(&Freshness::default(), &mut Pick::new(&mut random, now)));
    }
}
