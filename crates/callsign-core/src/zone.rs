//! Whether only the endpoints that are near take calls

/// Whether those of the preferred zone take all calls: at least one of them, and half of those that there are, is usable
///
/// `listed` endpoints say that they are in the zone, and `usable` of these take calls now. Where fewer than half are left,
/// all endpoints of all zones take part, so that the rest of a zone does not get the load of the whole one: Envoy's panic
/// threshold of 50 %. A zone in which nobody is listed prefers nobody.
///
/// ```
/// use callsign_core::zone;
///
/// assert!(zone::suffices(2, 4));
/// assert!(!zone::suffices(1, 4), "the others help");
/// assert!(!zone::suffices(0, 0), "nobody is near");
/// ```
pub fn suffices(usable: usize, listed: usize) -> bool {
    // Not doubled: that could overflow.
    usable > 0 && usable >= listed.div_ceil(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_a_zone_is_enough_and_less_is_not() {
        for (listed, enough) in [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (100, 50)] {
            assert!(suffices(enough, listed), "{enough} of {listed}");
            assert!(!suffices(enough - 1, listed), "{} of {listed}", enough - 1);
        }
    }

    #[test]
    fn a_zone_without_anybody_is_no_zone() {
        assert!(!suffices(0, 0));
        assert!(!suffices(0, 1));
    }

    #[test]
    fn more_usable_than_listed_is_enough() {
        assert!(suffices(3, 1), "held endpoints are usable and not listed any more");
        assert!(suffices(usize::MAX, usize::MAX));
    }
}
