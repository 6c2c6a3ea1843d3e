//! A range of keys as requests name it

use std::ops::Bound;

use bytes::Bytes;

/// The keys that `key` and `range_end` of a request stand for
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    start: Bytes,
    end: End,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    /// The one key `start`.
    Single,
    /// Keys below this one.
    Before(Bytes),
    /// Every key from `start`.
    Never,
}

impl Span {
    /// etcd's rules: no end is one key, an end of one zero byte is no bound
    pub(crate) fn new(key: &Bytes, range_end: &Bytes) -> Self {
        let end = match &range_end[..] {
            [] => End::Single,
            [0] => End::Never,
            _ => End::Before(range_end.clone()),
        };
        Self { start: key.clone(), end }
    }

    /// The same for a watch, where no key at all is the smallest one; it holds nothing of the request
    pub(crate) fn of_watch(key: &Bytes, range_end: &Bytes) -> Self {
        let key: &[u8] = if key.is_empty() { &[0] } else { key };
        Self::new(&Bytes::copy_from_slice(key), &Bytes::copy_from_slice(range_end))
    }

    pub(crate) fn start(&self) -> &Bytes {
        &self.start
    }

    pub(crate) fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            End::Single => key == self.start,
            End::Before(end) => self.start <= key && key < &end[..],
            End::Never => self.start <= key,
        }
    }

    /// Whether no key can be in it
    pub(crate) fn is_empty(&self) -> bool {
        matches!(&self.end, End::Before(end) if *end <= self.start)
    }

    /// Bounds for an ordered map; must not be asked of an empty span
    pub(crate) fn bounds(&self) -> (Bound<&[u8]>, Bound<&[u8]>) {
        let start = Bound::Included(&self.start[..]);
        let end = match &self.end {
            End::Single => Bound::Included(&self.start[..]),
            End::Before(end) => Bound::Excluded(&end[..]),
            End::Never => Bound::Unbounded,
        };
        (start, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(key: &'static [u8], end: &'static [u8]) -> Span {
        Span::new(&Bytes::from_static(key), &Bytes::from_static(end))
    }

    #[test]
    fn no_end_is_one_key_and_a_zero_byte_is_no_bound() {
        assert!(span(b"a", b"").contains(b"a") && !span(b"a", b"").contains(b"aa"));
        assert!(span(b"a", b"\0").contains(b"zz") && !span(b"a", b"\0").contains(b"A"));
        assert!(span(b"a", b"c").contains(b"bb") && !span(b"a", b"c").contains(b"c"));
    }

    #[test]
    fn a_range_that_ends_before_it_starts_is_empty() {
        assert!(span(b"b", b"a").is_empty() && span(b"b", b"b").is_empty());
        assert!(!span(b"b", b"").is_empty() && !span(b"b", b"\0").is_empty());
    }

    #[test]
    fn a_watch_without_a_key_starts_at_the_smallest() {
        let all = Span::of_watch(&Bytes::new(), &Bytes::from_static(b"\0"));
        assert!(all.contains(b"\0") && all.contains(b"z"));
    }
}
