//! Which of the instances that discovery lists are connected to
//!
//! Those whose scheme is the channel's, which the user's rule accepts, and which are in the subset. What becomes of their
//! endpoints is for [`Members`](super::members::Members): it sees nothing but them.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    hash::Hash,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use callsign_core::subset::Subset;
use http::uri::Authority;

use crate::instance::{Address, Instance};

/// The user's rule
pub(super) type Accept = Box<dyn Fn(&Instance) -> bool + Send + Sync>;

/// Who may be connected to
pub(super) struct Rules {
    /// Whether the channel speaks TLS.
    pub(super) encrypted: bool,
    pub(super) accept: Option<Accept>,
    /// Instead of each instance's address.
    pub(super) authority: Option<Authority>,
}

/// What discovery lists, and who of that is connected to
///
/// Changes come by [`insert`](Self::insert) and [`remove`](Self::remove). What they come to is told by
/// [`settle`](Self::settle) for all that came together: a list that begins to come in moves no subset to and fro.
pub(super) struct Selection<K> {
    rules: Rules,
    subset: Option<Subset>,
    /// Those that may be connected to.
    listed: HashMap<Arc<K>, Listed>,
    /// The others, which was said.
    skipped: HashMap<Arc<K>, Skipped>,
    /// By the numbers that the subset knows them by.
    numbered: HashMap<u64, Arc<K>>,
    next_number: u64,
    /// Those that were told to be connected to.
    connected: HashSet<Arc<K>>,
    /// Those of which something has changed since the last time, in order; some more than once.
    touched: Vec<Arc<K>>,
}

struct Listed {
    number: u64,
    selected: Selected,
}

/// An instance, and the `:authority` of calls to it
pub(super) type Selected = (Instance, Authority);

#[derive(PartialEq, Eq)]
struct Skipped {
    address: Address,
    reason: Reason,
}

/// Why an instance is not connected to
#[derive(PartialEq, Eq)]
enum Reason {
    /// Going on in plaintext would be a silent downgrade.
    AsksForTls,
    /// A registry never talks us out of TLS.
    AsksForPlaintext,
    NoAuthority(String),
    NotAccepted,
    Panicked,
}

/// What is to be done about one instance
pub(super) enum Step<K> {
    /// It is to be connected to, or is and has been told anew
    Connect(Arc<K>, Selected),
    /// Discovery lists it no more
    Removed(Arc<K>),
    /// It is not wanted any more, although discovery lists it
    Unwanted(Arc<K>),
}

impl<K: Hash + Eq> Selection<K> {
    pub(super) fn new(rules: Rules, subset: Option<Subset>) -> Self {
        Self {
            rules,
            subset,
            listed: HashMap::new(),
            skipped: HashMap::new(),
            numbered: HashMap::new(),
            next_number: 0,
            connected: HashSet::new(),
            touched: Vec::new(),
        }
    }

    /// Discovery lists `instance`, which may be known
    pub(super) fn insert(&mut self, key: K, instance: Instance) {
        let key = Arc::new(key);
        self.touched.push(Arc::clone(&key));
        let authority = match self.rules.judge(&instance) {
            Ok(authority) => authority,
            Err(reason) => {
                self.forget(&key);
                self.skip(key, Skipped { address: instance.address, reason });
                return;
            }
        };
        self.skipped.remove(&key);
        if let Some(known) = self.listed.get_mut(&key)
            && known.selected.0.address == instance.address
        {
            known.selected = (instance, authority);
            return;
        }
        self.forget(&key);
        let number = self.next_number;
        self.next_number += 1;
        if let Some(subset) = &mut self.subset {
            let left = subset.insert(number, instance.address.authority()).left;
            self.numbered.insert(number, Arc::clone(&key));
            self.touch(left);
        }
        self.listed.insert(key, Listed { number, selected: (instance, authority) });
    }

    /// Discovery lists an instance no more
    pub(super) fn remove(&mut self, key: &K) {
        self.skipped.remove(key);
        let gone = self.forget(key);
        self.touched.extend(gone);
    }

    /// What has changed since the last time: who comes, then who goes, so that one who moves leaves no gap
    pub(super) fn settle(&mut self) -> impl Iterator<Item = Step<K>> + use<K> {
        let (mut seen, mut come, mut gone) = (HashSet::new(), Vec::new(), Vec::new());
        for key in std::mem::take(&mut self.touched) {
            if !seen.insert(Arc::clone(&key)) {
                continue;
            }
            let listed = self.listed.get(&key);
            if let Some(Listed { selected, .. }) = listed.filter(|listed| self.is_chosen(listed)) {
                self.connected.insert(Arc::clone(&key));
                come.push(Step::Connect(key, selected.clone()));
            } else if self.skipped.contains_key(&key) || listed.is_some() {
                self.connected.remove(&key);
                gone.push(Step::Unwanted(key));
            } else if self.connected.remove(&key) {
                gone.push(Step::Removed(key));
            }
        }
        come.into_iter().chain(gone)
    }

    /// Why nobody is connected to although discovery lists some, for people
    pub(super) fn why_none(&self) -> Option<String> {
        if !self.listed.is_empty() {
            return None;
        }
        let Skipped { address, reason } = self.skipped.values().min_by_key(|skipped| &skipped.address)?;
        Some(format!("none of {} instances can be used: {address} {reason}", self.skipped.len()))
    }

    fn is_chosen(&self, Listed { number, selected: (instance, _) }: &Listed) -> bool {
        let subset = self.subset.as_ref();
        subset.is_none_or(|subset| subset.contains(*number, instance.address.authority()))
    }

    /// Takes an instance from the list, if it was there
    fn forget(&mut self, key: &K) -> Option<Arc<K>> {
        let (key, Listed { number, selected: (instance, _) }) = self.listed.remove_entry(key)?;
        if let Some(subset) = &mut self.subset {
            let joined = subset.remove(number, instance.address.authority()).joined;
            self.numbered.remove(&number);
            self.touch(joined);
        }
        Some(key)
    }

    fn touch(&mut self, moved: Option<u64>) {
        let key = moved.and_then(|number| self.numbered.get(&number));
        self.touched.extend(key.map(Arc::clone));
    }

    /// Says so, but not with each registration anew
    fn skip(&mut self, key: Arc<K>, skipped: Skipped) {
        if self.skipped.get(&key) == Some(&skipped) {
            return;
        }
        let Skipped { address, reason } = &skipped;
        match reason {
            Reason::NotAccepted => tracing::debug!(%address, "instance not accepted"),
            Reason::Panicked => tracing::error!(%address, "`accept` panicked: instance not accepted"),
            reason => tracing::warn!(%address, %reason, "instance skipped"),
        }
        self.skipped.insert(key, skipped);
    }
}

impl Rules {
    /// The `:authority` of calls to an instance, or why there are none
    fn judge(&self, instance: &Instance) -> Result<Authority, Reason> {
        let address = &instance.address;
        if address.is_https() && !self.encrypted {
            return Err(Reason::AsksForTls);
        }
        if address.is_http() && self.encrypted {
            return Err(Reason::AsksForPlaintext);
        }
        let authority = match &self.authority {
            Some(authority) => authority.clone(),
            None => Authority::try_from(address.authority())
                .map_err(|error| Reason::NoAuthority(error.to_string()))?,
        };
        let Some(accept) = &self.accept else { return Ok(authority) };
        // A rule that panics must not take the channel's task along. What it leaves behind is its own affair.
        match catch_unwind(AssertUnwindSafe(|| accept(instance))) {
            Ok(true) => Ok(authority),
            Ok(false) => Err(Reason::NotAccepted),
            Err(_) => Err(Reason::Panicked),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AsksForTls => "asks for TLS (https), and this channel speaks plaintext: give it `.tls(..)`",
            Self::AsksForPlaintext => "asks for plaintext (http), and this channel speaks TLS",
            Self::NoAuthority(error) => return write!(f, "is no valid authority: {error}"),
            Self::NotAccepted => "is not accepted",
            Self::Panicked => "is not accepted, for `accept` panicked",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, num::NonZeroUsize};

    use super::*;

    const OPEN: Rules = Rules { encrypted: false, accept: None, authority: None };

    fn selection(rules: Rules, subset: usize) -> Selection<u64> {
        Selection::new(rules, NonZeroUsize::new(subset).map(|size| Subset::new(size, 7)))
    }

    fn instance(text: &str) -> Instance {
        Instance::new(text.parse().unwrap())
    }

    fn numbered(number: u64) -> Instance {
        instance(&format!("10.0.0.{number}:80"))
    }

    /// `+` for who is to be connected to, `-` for who was removed, `x` for who is not wanted
    fn settled(selection: &mut Selection<u64>) -> Vec<String> {
        let told = |step| match step {
            Step::Connect(key, (instance, _)) => format!("+{key} {}", instance.address),
            Step::Removed(key) => format!("-{key}"),
            Step::Unwanted(key) => format!("x{key}"),
        };
        selection.settle().map(told).collect()
    }

    #[test]
    fn without_rules_everything_is_told_as_it_came() {
        let mut all = selection(OPEN, 0);
        all.insert(1, instance("a:1"));
        all.insert(2, instance("b:1"));
        assert_eq!(settled(&mut all), ["+1 a:1", "+2 b:1"]);
        all.insert(2, instance("c:1"));
        all.remove(&1);
        all.remove(&9);
        assert_eq!(settled(&mut all), ["+2 c:1", "-1"]);
        assert_eq!(settled(&mut all), [""; 0]);
    }

    #[test]
    fn what_comes_and_goes_between_two_looks_is_never_told_and_who_comes_back_is_told_anew() {
        let mut all = selection(OPEN, 0);
        all.insert(1, instance("a:1"));
        all.remove(&1);
        assert_eq!(settled(&mut all), [""; 0]);
        all.insert(1, instance("a:1"));
        settled(&mut all);
        all.remove(&1);
        all.insert(1, instance("a:1"));
        assert_eq!(settled(&mut all), ["+1 a:1"]);
    }

    #[test]
    fn a_scheme_in_the_registry_never_weakens_and_never_strengthens() {
        for (encrypted, expected) in [(false, ["+1 a:1", "+2 b:1", "x3"]), (true, ["+1 a:1", "+3 c:1", "x2"])]
        {
            let mut selection = selection(Rules { encrypted, ..OPEN }, 0);
            for (key, text) in [(1, "a:1"), (2, "http://b:1"), (3, "https://c:1")] {
                selection.insert(key, instance(text));
            }
            assert_eq!(settled(&mut selection), expected);
        }
        let mut plain = selection(OPEN, 0);
        assert_eq!(plain.why_none(), None, "nobody is listed");
        plain.insert(3, instance("https://c:1"));
        assert!(plain.why_none().unwrap().starts_with("none of 1 instances can be used: c:1 asks for TLS"));
        plain.insert(1, instance("a:1"));
        assert_eq!(plain.why_none(), None);
    }

    #[test]
    fn who_is_not_accepted_is_not_connected_and_who_is_no_longer_goes() {
        let accept = |instance: &Instance| match instance.metadata.version() {
            Some("poison") => panic!("a rule may have mistakes"),
            version => version != Some("v1"),
        };
        let mut selection = selection(Rules { accept: Some(Box::new(accept)), ..OPEN }, 0);
        let version = |version: &str| {
            let metadata = crate::Metadata::new().with_version(version).unwrap();
            Instance { metadata, ..instance("a:1") }
        };
        selection.insert(1, version("v2"));
        selection.insert(2, version("v1"));
        assert_eq!(settled(&mut selection), ["+1 a:1", "x2"]);
        selection.insert(1, version("v1"));
        assert_eq!(settled(&mut selection), ["x1"]);
        selection.insert(1, version("poison"));
        assert_eq!(settled(&mut selection), ["x1"]);
        assert!(selection.why_none().unwrap().contains("none of 2 instances"));
        selection.insert(1, version("v3"));
        selection.remove(&2);
        assert_eq!(settled(&mut selection), ["+1 a:1"]);
    }

    #[test]
    fn a_subset_is_connected_to_and_the_others_take_the_place_of_those_that_leave() {
        let mut selection = selection(OPEN, 2);
        for key in 0..5 {
            selection.insert(key, numbered(key));
        }
        let mut connected = BTreeSet::new();
        let mut apply = |steps: Vec<String>| {
            for step in &steps {
                let key: u64 = step[1..].split(' ').next().unwrap().parse().unwrap();
                if step.starts_with('+') {
                    connected.insert(key)
                } else {
                    connected.remove(&key)
                };
            }
            (steps, connected.clone())
        };
        let (steps, first) = apply(settled(&mut selection));
        assert_eq!(first.len(), 2, "a list that comes in moves nothing to and fro: {steps:?}");
        let gone = *first.first().unwrap();
        selection.remove(&gone);
        let (steps, second) = apply(settled(&mut selection));
        assert!(steps.len() == 2 && steps[0].starts_with('+') && steps[1] == format!("-{gone}"), "{steps:?}");
        selection.insert(gone, numbered(gone));
        let (steps, third) = apply(settled(&mut selection));
        let pushed = second.difference(&first).next().unwrap();
        assert!(third == first && steps.contains(&format!("x{pushed}")), "{steps:?}");
    }

    #[test]
    fn who_is_skipped_takes_no_place_in_a_subset() {
        let mut selection = selection(OPEN, 2);
        for key in 0..5 {
            selection.insert(key, instance(&format!("https://10.0.0.{key}:80")));
        }
        for key in 5..7 {
            selection.insert(key, numbered(key));
        }
        let come = settled(&mut selection).into_iter().filter(|step| step.starts_with('+'));
        assert_eq!(come.collect::<Vec<_>>(), ["+5 10.0.0.5:80", "+6 10.0.0.6:80"]);
    }
}
