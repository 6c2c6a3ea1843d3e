//! What is around any policy: zone preference before it picks, slow start after

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use callsign_core::{
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

    /// How much of its share an endpoint takes by now
    pub(super) fn share(&self, fresh: &Freshness, now: Instant) -> f64 {
        let Some(since) = fresh.since().filter(|_| !self.slow_start.is_zero()) else { return 1.0 };
        slow_start::share(now.saturating_duration_since(since), self.slow_start)
    }
}

#[cfg(test)]
mod tests {
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
    fn who_is_fresh_has_less_than_its_share_where_there_is_a_slow_start() {
        let (mut fresh, now) = (Freshness::default(), Instant::now());
        let slow = Around { slow_start: Duration::from_secs(100), ..Around::default() };
        let is = |share: f64, expected: f64| assert!((share - expected).abs() < 1e-9, "{share}");
        is(slow.share(&fresh, now), 1.0);
        fresh.on_connected(now);
        is(slow.share(&fresh, now + Duration::from_secs(50)), 0.5);
        is(Around::default().share(&fresh, now), 1.0);
    }
}
