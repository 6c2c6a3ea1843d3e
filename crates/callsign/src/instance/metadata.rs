//! What an instance says about itself

use std::{fmt, sync::Arc};

use super::address::shown;

/// Weight, zone, version and free pairs of an instance
///
/// Empty unless the instance was written in [`Layout::Grpc`](super::Layout::Grpc) or made by hand. Cheap to clone: one
/// `Arc`, or nothing. Every `Metadata` is within bounds: 64 free pairs, keys of 128 bytes, values of 1 KiB, 4 KiB in all,
/// no control characters. Where others wrote more, the pairs beyond the bounds are left out.
///
/// ```
/// use callsign::instance::Metadata;
///
/// let metadata = Metadata::new().with_weight(5).with_zone("eu-1")?.with("team", "greetings")?;
/// assert_eq!((metadata.weight(), metadata.zone(), metadata.version()), (5, Some("eu-1"), None));
/// assert_eq!(metadata.get("team"), Some("greetings"));
/// assert!(metadata.with("team", "a\nb").is_err(), "control characters could forge a line of a log");
/// # Ok::<(), callsign::instance::MetadataError>(())
/// ```
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Metadata(Option<Arc<Fields>>);

#[derive(Clone, PartialEq, Eq)]
struct Fields {
    weight: u32,
    zone: Option<Box<str>>,
    version: Option<Box<str>>,
    /// Sorted by key
    pairs: Vec<(Box<str>, Box<str>)>,
}

impl Default for Fields {
    fn default() -> Self {
        Self { weight: DEFAULT_WEIGHT, zone: None, version: None, pairs: Vec::new() }
    }
}

/// What an instance counts that says nothing else
const DEFAULT_WEIGHT: u32 = 1;

pub(super) const WEIGHT: &str = "weight";
pub(super) const ZONE: &str = "zone";
pub(super) const VERSION: &str = "version";

/// Every client keeps the metadata of all instances: 100 000 of them must fit.
const MAX_PAIRS: usize = 64;
const MAX_KEY: usize = 128;
const MAX_VALUE: usize = 1024;
const MAX_TOTAL: usize = 4096;

impl Metadata {
    /// Nothing said: weight 1, no zone, no version, no pairs
    pub fn new() -> Self {
        Self::default()
    }

    /// How much of the load it wants, in proportion to the others; 1 by default
    pub fn weight(&self) -> u32 {
        self.0.as_ref().map_or(DEFAULT_WEIGHT, |fields| fields.weight)
    }

    /// Where it runs, for clients that prefer what is near
    pub fn zone(&self) -> Option<&str> {
        self.0.as_ref()?.zone.as_deref()
    }

    /// Which version of the program it is
    pub fn version(&self) -> Option<&str> {
        self.0.as_ref()?.version.as_deref()
    }

    /// The value of a free pair
    pub fn get(&self, key: &str) -> Option<&str> {
        let position = self.position(key).ok()?;
        Some(&self.pairs()[position].1)
    }

    /// The free pairs, sorted by key
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.pairs().iter().map(|(key, value)| (&**key, &**value))
    }

    /// Whether nothing is said
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The same with another weight
    pub fn with_weight(mut self, weight: u32) -> Self {
        self.edit(|fields| fields.weight = weight);
        self
    }

    /// The same with another zone; an empty one is none
    ///
    /// # Errors
    ///
    /// [`MetadataError`] if it is beyond the bounds.
    pub fn with_zone(mut self, zone: &str) -> Result<Self, MetadataError> {
        self.set_zone(zone)?;
        Ok(self)
    }

    /// The same with another version; an empty one is none
    ///
    /// # Errors
    ///
    /// [`MetadataError`] if it is beyond the bounds.
    pub fn with_version(mut self, version: &str) -> Result<Self, MetadataError> {
        self.set_version(version)?;
        Ok(self)
    }

    /// The same with one more free pair, or another value for a known key
    ///
    /// # Errors
    ///
    /// [`MetadataError`] if it is beyond the bounds, or if the key is `weight`, `zone` or `version`.
    pub fn with(mut self, key: &str, value: &str) -> Result<Self, MetadataError> {
        self.set(key, value)?;
        Ok(self)
    }

    pub(super) fn set_zone(&mut self, zone: &str) -> Result<(), MetadataError> {
        let zone = self.checked(ZONE, zone, self.zone())?;
        self.edit(|fields| fields.zone = zone);
        Ok(())
    }

    pub(super) fn set_version(&mut self, version: &str) -> Result<(), MetadataError> {
        let version = self.checked(VERSION, version, self.version())?;
        self.edit(|fields| fields.version = version);
        Ok(())
    }

    /// Adds a free pair; what is refused changes nothing
    pub(super) fn set(&mut self, key: &str, value: &str) -> Result<(), MetadataError> {
        check_key(key)?;
        check_value(key, value)?;
        let known = self.position(key);
        if known.is_err() && self.pairs().len() == MAX_PAIRS {
            return Err(MetadataError::TooMany);
        }
        let (former, added) = known.map_or((0, key.len()), |position| (self.pairs()[position].1.len(), 0));
        self.check_total(former, added + value.len())?;
        self.edit(|fields| match known {
            Ok(position) => fields.pairs[position].1 = value.into(),
            Err(position) => fields.pairs.insert(position, (key.into(), value.into())),
        });
        Ok(())
    }

    /// Where the key is, or would be
    fn position(&self, key: &str) -> Result<usize, usize> {
        self.pairs().binary_search_by(|(known, _)| (**known).cmp(key))
    }

    fn pairs(&self) -> &[(Box<str>, Box<str>)] {
        self.0.as_ref().map_or(&[], |fields| &fields.pairs)
    }

    /// A zone or a version within the bounds
    fn checked(
        &self,
        key: &str,
        value: &str,
        former: Option<&str>,
    ) -> Result<Option<Box<str>>, MetadataError> {
        check_value(key, value)?;
        self.check_total(former.map_or(0, str::len), value.len())?;
        Ok((!value.is_empty()).then(|| value.into()))
    }

    fn check_total(&self, less: usize, more: usize) -> Result<(), MetadataError> {
        let texts = self.zone().into_iter().chain(self.version());
        let pairs: usize = self.iter().map(|(key, value)| key.len() + value.len()).sum();
        let total = texts.map(str::len).sum::<usize>() + pairs;
        if total - less + more > MAX_TOTAL { Err(MetadataError::TooLarge) } else { Ok(()) }
    }

    fn edit(&mut self, edit: impl FnOnce(&mut Fields)) {
        let mut fields = self.0.take().map_or_else(Fields::default, Arc::unwrap_or_clone);
        edit(&mut fields);
        fields.pairs.shrink_to_fit();
        // One way to say nothing, so that equal ones are equal.
        self.0 = (fields != Fields::default()).then(|| Arc::new(fields));
    }
}

fn check_key(key: &str) -> Result<(), MetadataError> {
    let bad = |reason| Err(MetadataError::Key { key: shown(key), reason });
    if key.is_empty() {
        return bad("it is empty");
    }
    if [WEIGHT, ZONE, VERSION].contains(&key) {
        return bad("it has a method of its own");
    }
    if key.len() > MAX_KEY {
        return bad("it is longer than 128 bytes");
    }
    if key.chars().any(char::is_control) {
        return bad("it has control characters");
    }
    Ok(())
}

fn check_value(key: &str, value: &str) -> Result<(), MetadataError> {
    let bad = |reason| Err(MetadataError::Value { key: shown(key), reason });
    if value.len() > MAX_VALUE {
        return bad("it is longer than 1 KiB");
    }
    if value.chars().any(char::is_control) {
        return bad("it has control characters");
    }
    Ok(())
}

impl fmt::Debug for Metadata {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let weight = (self.weight() != DEFAULT_WEIGHT).then(|| self.weight());
        let texts = [(ZONE, self.zone()), (VERSION, self.version())];
        let texts = texts.into_iter().filter_map(|(key, value)| Some((key, value?)));
        f.debug_map()
            .entries(weight.map(|weight| (WEIGHT, weight)))
            .entries(texts)
            .entries(self.iter())
            .finish()
    }
}

/// Why something cannot be metadata
///
/// It was refused before anything was sent. Say less, or say it elsewhere: metadata is for a few short facts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// A key that cannot be one: use another one
    #[error("bad metadata key \"{key}\": {reason}")]
    Key {
        /// The key, escaped and cut
        key: String,
        /// What is wrong with it
        reason: &'static str,
    },
    /// A value that cannot be one: use another one
    #[error("bad metadata value of \"{key}\": {reason}")]
    Value {
        /// The key, escaped and cut
        key: String,
        /// What is wrong with its value
        reason: &'static str,
    },
    /// There are too many free pairs
    #[error("more than 64 pairs of metadata")]
    TooMany,
    /// All keys and values together are too long
    #[error("metadata of more than 4 KiB")]
    TooLarge,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_there_and_the_rest_is_the_default() {
        let nothing = Metadata::new();
        assert_eq!((nothing.weight(), nothing.zone(), nothing.version()), (1, None, None));
        assert_eq!((nothing.iter().len(), nothing.is_empty()), (0, true));
        let some = nothing.with("b", "2").unwrap().with("a", "1").unwrap().with("b", "3").unwrap();
        assert_eq!(some.iter().collect::<Vec<_>>(), [("a", "1"), ("b", "3")]);
        assert_eq!((some.get("b"), some.get("c"), some.get("weight")), (Some("3"), None, None));
        let all = some.with_weight(0).with_zone("z").unwrap().with_version("v").unwrap();
        assert_eq!((all.weight(), all.zone(), all.version(), all.iter().len()), (0, Some("z"), Some("v"), 2));
    }

    #[test]
    fn saying_the_default_is_saying_nothing() {
        let nothing =
            Metadata::new().with_weight(2).with_weight(1).with_zone("z").unwrap().with_zone("").unwrap();
        assert!(nothing.is_empty());
        assert_eq!(nothing, Metadata::new());
    }

    #[test]
    fn a_clone_is_changed_alone() {
        let one = Metadata::new().with("a", "1").unwrap();
        let other = one.clone().with("a", "2").unwrap();
        assert_eq!((one.get("a"), other.get("a")), (Some("1"), Some("2")));
    }

    #[test]
    fn what_is_beyond_the_bounds_is_refused() {
        let refused = |key: &str, value: &str| Metadata::new().with(key, value).unwrap_err().to_string();
        for key in ["weight", "zone", "version"] {
            assert!(refused(key, "1").contains("method of its own"));
        }
        assert!(refused("", "x").contains("empty"));
        assert!(refused("a\nb", "x").contains(r#"key "a\nb": it has control"#));
        assert!(refused(&"k".repeat(MAX_KEY + 1), "x").contains("128 bytes"));
        assert!(refused("a", "\u{1b}[2J").contains("value of \"a\": it has control"));
        assert!(refused("a", &"v".repeat(MAX_VALUE + 1)).contains("1 KiB"));
        assert!(Metadata::new().with_zone("a\0").is_err() && Metadata::new().with_version("\u{85}").is_err());
        assert!(Metadata::new().with(&"k".repeat(MAX_KEY), &"v".repeat(MAX_VALUE)).is_ok());
    }

    #[test]
    fn the_whole_is_bounded_too() {
        let full = (0..MAX_PAIRS).try_fold(Metadata::new(), |all, number| all.with(&number.to_string(), "x"));
        let full = full.unwrap();
        assert_eq!(full.clone().with("one more", "x"), Err(MetadataError::TooMany));
        assert!(full.with("0", "y").is_ok(), "a known key is no more");

        let long = "v".repeat(MAX_VALUE - 1);
        let full =
            ["a", "b", "c"].into_iter().try_fold(Metadata::new(), |all, key| all.with(key, &long)).unwrap();
        let full = full.with_zone(&"z".repeat(MAX_VALUE)).unwrap();
        assert_eq!(full.clone().with_version("v"), Err(MetadataError::TooLarge));
        assert_eq!(full.clone().with("d", ""), Err(MetadataError::TooLarge));
        assert!(full.with("a", "shorter").unwrap().with("d", "x").is_ok());
    }

    #[test]
    fn it_is_shown_as_a_map_on_one_line() {
        let metadata = Metadata::new().with_weight(5).with_zone("z\"").unwrap().with("a", "1").unwrap();
        assert_eq!(format!("{metadata:?}"), r#"{"weight": 5, "zone": "z\"", "a": "1"}"#);
    }
}
