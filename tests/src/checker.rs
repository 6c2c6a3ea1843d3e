//! What must hold while etcd fails and after it has healed, and what shows that it does not
//!
//! The judgements are pure: [`Evidence::violations`], [`removed_while_living`], [`outstayed`], [`left_behind`] and
//! [`failed_calls`] take what was observed and say what is wrong with it. [`Observed`] does the observing.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use callsign::discover::EtcdDiscover;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;
use tower::discover::Change;

use crate::{cluster::Traces, load::Tally};

/// How soon after healing all must be well; the time is an idle machine's, and 2 s are for a busy one.
pub const CONVERGED: Duration = Duration::from_secs(5 + 2);

/// How long one instance was there
#[derive(Clone, Debug)]
pub struct Life {
    /// Where it listens
    pub address: String,
    /// When it was registered
    pub from: Instant,
    /// When it was killed, frozen or told to leave
    pub until: Option<Instant>,
}

/// Something that must not be
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A living instance is not in etcd
    KeyMissing {
        /// Where it listens
        address: String,
    },
    /// An instance is in etcd more than once
    SeveralKeys {
        /// Where it listens
        address: String,
        /// Its keys
        keys: Vec<String>,
    },
    /// A key of nobody who lives
    DeadKey {
        /// The key
        key: String,
        /// Its value's address, or its value
        address: String,
    },
    /// A discovery shows something else than a linearizable read
    ViewDiffers {
        /// Whose view
        view: String,
        /// In etcd, and not in the view
        missing: Vec<String>,
        /// In the view, and not in etcd
        extra: Vec<String>,
    },
    /// A living instance left a view
    LivingRemoved {
        /// Whose view
        view: String,
        /// Where it listens
        address: String,
    },
    /// A dead instance stayed in a view for too long
    DeadStayed {
        /// Whose view
        view: String,
        /// Where it listened
        address: String,
        /// How long it was there after its death
        stayed: Duration,
    },
    /// Calls failed
    CallsFailed {
        /// How many
        failed: usize,
        /// The first of them
        told: String,
    },
    /// Tasks, connections, watchers or leases have another number than before
    LeftBehind {
        /// Of what
        what: &'static str,
        /// How many there were
        before: usize,
        /// How many there are
        after: usize,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::KeyMissing { address } => write!(f, "{address} lives and has no key"),
            Self::SeveralKeys { address, keys } => write!(f, "{address} has several keys: {keys:?}"),
            Self::DeadKey { key, address } => write!(f, "{key} = {address} is the key of nobody who lives"),
            Self::ViewDiffers { view, missing, extra } => {
                write!(f, "view {view} differs from etcd: it lacks {missing:?} and has {extra:?} besides")
            }
            Self::LivingRemoved { view, address } => write!(f, "{address} lives and left view {view}"),
            Self::DeadStayed { view, address, stayed } => {
                write!(f, "{address} was dead for {stayed:?} and still in view {view}")
            }
            Self::CallsFailed { told, .. } => f.write_str(told),
            Self::LeftBehind { what, before, after } => write!(f, "{what}: {before} before, {after} now"),
        }
    }
}

/// What etcd, the fleet and the views say at one time
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// Addresses of the instances that live
    pub living: BTreeSet<String>,
    /// Keys and values under the service, by a linearizable read
    pub truth: Vec<(String, String)>,
    /// Names of the views, and the addresses in each
    pub views: Vec<(String, BTreeSet<String>)>,
}

impl Evidence {
    /// What is wrong: every living instance has one key, nobody else has one, and every view shows just those
    pub fn violations(&self) -> Vec<Violation> {
        let mut keys = BTreeMap::<String, Vec<String>>::new();
        for (key, value) in &self.truth {
            keys.entry(address_of(value)).or_default().push(key.clone());
        }
        let mut violations = Vec::new();
        let missing = self.living.iter().filter(|address| !keys.contains_key(*address));
        violations.extend(missing.map(|address| Violation::KeyMissing { address: address.clone() }));
        for (address, keys) in &keys {
            let address = address.clone();
            if !self.living.contains(&address) {
                violations.push(Violation::DeadKey { key: keys[0].clone(), address });
            } else if keys.len() > 1 {
                violations.push(Violation::SeveralKeys { address, keys: keys.clone() });
            }
        }
        let truth: BTreeSet<_> = keys.into_keys().collect();
        violations.extend(self.views.iter().filter_map(|(view, seen)| differs(view, seen, &truth)));
        violations
    }
}

/// What is wrong with a view beside the truth
fn differs(view: &str, seen: &BTreeSet<String>, truth: &BTreeSet<String>) -> Option<Violation> {
    let (missing, extra): (Vec<_>, Vec<_>) =
        (truth.difference(seen).cloned().collect(), seen.difference(truth).cloned().collect());
    let same = missing.is_empty() && extra.is_empty();
    (!same).then(|| Violation::ViewDiffers { view: view.to_owned(), missing, extra })
}

/// The address in a value of either layout; the value itself if it is of neither
fn address_of(value: &str) -> String {
    // An address needs no escapes, so the text of the one field will do.
    let json = value.starts_with('{').then(|| value.split_once("\"Addr\":\"")).flatten();
    let address = json.and_then(|(_, rest)| rest.split('"').next());
    address.unwrap_or(value).to_owned()
}

/// Living instances that left a view, outside of the times in which the fault takes living instances out of etcd
pub fn removed_while_living(
    view: &str,
    removals: &[(Instant, String)],
    lives: &[Life],
    excused: &[(Instant, Option<Instant>)],
) -> Vec<Violation> {
    let is_excused = |at: Instant| {
        excused.iter().any(|(from, until)| at >= *from && until.is_none_or(|until| at <= until))
    };
    let lived = |at: Instant, address: &str| {
        lives.iter().any(|life| {
            life.address == address && at >= life.from && life.until.is_none_or(|until| at < until)
        })
    };
    let wrong = removals.iter().filter(|(at, address)| !is_excused(*at) && lived(*at, address));
    wrong
        .map(|(_, address)| Violation::LivingRemoved { view: view.to_owned(), address: address.clone() })
        .collect()
}

/// Dead instances that are in a view at `now`, more than `bound` after they died, or after etcd has healed since
pub fn outstayed(
    view: &str,
    seen: &BTreeSet<String>,
    lives: &[Life],
    healed: Option<Instant>,
    now: Instant,
    bound: Duration,
) -> Vec<Violation> {
    let mut violations = Vec::new();
    for address in seen {
        let of = || lives.iter().filter(|life| life.address == *address);
        if of().any(|life| life.until.is_none()) {
            continue;
        }
        let Some(died) = of().filter_map(|life| life.until).max() else { continue };
        let stayed = now.saturating_duration_since(healed.map_or(died, |healed| healed.max(died)));
        if stayed > bound {
            violations.push(Violation::DeadStayed {
                view: view.to_owned(),
                address: address.clone(),
                stayed,
            });
        }
    }
    violations
}

/// What sessions have left behind beyond what was there before, or lack
pub fn left_behind(before: &Traces, after: &Traces) -> Vec<Violation> {
    let watchers = |traces: &Traces| usize::try_from(traces.watchers).unwrap_or(usize::MAX);
    [
        ("leases", before.leases.len(), after.leases.len()),
        ("watchers", watchers(before), watchers(after)),
        ("connections", before.connections, after.connections),
    ]
    .into_iter()
    .filter_map(|(what, before, after)| changed(what, before, after))
    .collect()
}

/// A number that is not what it was
pub fn changed(what: &'static str, before: usize, after: usize) -> Option<Violation> {
    (before != after).then_some(Violation::LeftBehind { what, before, after })
}

/// How long what has ended may take to be gone, or to stand still: a connection to a dead peer is given up within 13 s, and a
/// removed endpoint's drains first.
pub const SETTLED: Duration = Duration::from_secs(20);

/// Looks again until nothing is wrong; what still is after [`SETTLED`]
pub async fn until_none(look: impl AsyncFn() -> Vec<Violation>) -> Vec<Violation> {
    let since = Instant::now();
    loop {
        let wrong = look().await;
        if wrong.is_empty() || since.elapsed() > SETTLED {
            return wrong;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Calls that failed
pub fn failed_calls(tally: &Tally) -> Option<Violation> {
    let (failed, told) = (tally.failed.len(), tally.to_string());
    (failed > 0).then_some(Violation::CallsFailed { failed, told })
}

/// One a line
pub fn listed(violations: &[Violation]) -> String {
    violations.iter().map(|violation| format!("\n  {violation}")).collect()
}

/// What a discovery has told, and when; ends with its drop
#[derive(Debug)]
pub struct Observed {
    name: String,
    told: Arc<Mutex<Told>>,
    task: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Told {
    addresses: BTreeSet<String>,
    changes: usize,
    removals: Vec<(Instant, String)>,
}

impl Observed {
    /// Follows `discover` under a name that is told when something is wrong
    pub fn of(name: impl Into<String>, mut discover: EtcdDiscover) -> Self {
        let told = Arc::new(Mutex::new(Told::default()));
        let writer = Arc::clone(&told);
        let task = tokio::spawn(async move {
            while let Some(Ok(change)) = discover.next().await {
                lock(&writer).on_change(change);
            }
        });
        Self { name: name.into(), told, task }
    }

    /// Its name
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The addresses now
    pub fn addresses(&self) -> BTreeSet<String> {
        lock(&self.told).addresses.clone()
    }

    /// How many changes were told, inserts of known addresses included
    pub fn changes(&self) -> usize {
        lock(&self.told).changes
    }

    /// What left, and when
    pub fn removals(&self) -> Vec<(Instant, String)> {
        lock(&self.told).removals.clone()
    }
}

impl Told {
    fn on_change<S>(&mut self, change: Change<callsign::Address, S>) {
        self.changes += 1;
        match change {
            Change::Insert(address, _) => drop(self.addresses.insert(address.to_string())),
            Change::Remove(address) => {
                self.addresses.remove(&address.to_string());
                self.removals.push((Instant::now(), address.to_string()));
            }
        }
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn lock(told: &Mutex<Told>) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn set(addresses: &[&str]) -> BTreeSet<String> {
        addresses.iter().map(ToString::to_string).collect()
    }

    fn evidence(living: &[&str], truth: &[(&str, &str)], seen: &[&str]) -> Evidence {
        let truth = truth.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
        Evidence { living: set(living), truth, views: vec![("v".to_owned(), set(seen))] }
    }

    fn life(address: &str, from: Instant, until: Option<Instant>) -> Life {
        Life { address: address.to_owned(), from, until }
    }

    #[test]
    fn one_key_an_instance_in_either_layout_is_well() {
        let grpc = r#"{"Op":0,"Addr":"b:2","Metadata":null}"#;
        let well = evidence(&["a:1", "b:2"], &[("s/1", "a:1"), ("s/2", grpc)], &["a:1", "b:2"]);
        assert_eq!(well.violations(), []);
    }

    #[test]
    fn a_missing_a_second_and_a_dead_key_are_told() {
        let wrong =
            evidence(&["a:1", "b:2"], &[("s/1", "a:1"), ("s/2", "a:1"), ("s/3", "c:3")], &["a:1", "c:3"]);
        let [missing, several, dead] = &wrong.violations()[..] else { panic!("{:?}", wrong.violations()) };
        assert_eq!(*missing, Violation::KeyMissing { address: "b:2".to_owned() });
        let keys = vec!["s/1".to_owned(), "s/2".to_owned()];
        assert_eq!(*several, Violation::SeveralKeys { address: "a:1".to_owned(), keys });
        assert_eq!(*dead, Violation::DeadKey { key: "s/3".to_owned(), address: "c:3".to_owned() });
    }

    #[test]
    fn a_view_that_lacks_or_keeps_something_is_told() {
        let violations =
            evidence(&["a:1", "b:2"], &[("s/1", "a:1"), ("s/2", "b:2")], &["a:1", "c:3"]).violations();
        let (missing, extra) = (vec!["b:2".to_owned()], vec!["c:3".to_owned()]);
        assert_eq!(violations, [Violation::ViewDiffers { view: "v".to_owned(), missing, extra }]);
    }

    #[test]
    fn a_removal_counts_while_its_instance_lives_and_nothing_excuses_it() {
        let start = Instant::now();
        let removals = [(start + 3 * SECOND, "a:1".to_owned())];
        let told = |life: Life, excused: &[(Instant, Option<Instant>)]| {
            removed_while_living("v", &removals, &[life], excused).len()
        };
        assert_eq!(told(life("a:1", start, None), &[]), 1);
        assert_eq!(told(life("a:1", start, Some(start + 4 * SECOND)), &[]), 1);
        assert_eq!(told(life("a:1", start, Some(start + 2 * SECOND)), &[]), 0, "it was dead");
        assert_eq!(told(life("a:1", start + 4 * SECOND, None), &[]), 0, "it was not born");
        assert_eq!(told(life("a:1", start, None), &[(start + 2 * SECOND, None)]), 0);
        assert_eq!(
            told(life("a:1", start, None), &[(start, Some(start + 2 * SECOND))]),
            1,
            "excused before only"
        );
    }

    #[test]
    fn the_dead_stay_for_their_time_and_no_longer() {
        let start = Instant::now();
        let died = [life("a:1", start, Some(start + SECOND))];
        let told = |lives: &[Life], healed: Option<Duration>, now: u32| {
            let healed = healed.map(|after| start + after);
            outstayed("v", &set(&["a:1"]), lives, healed, start + now * SECOND, 7 * SECOND).len()
        };
        assert_eq!((told(&died, None, 8), told(&died, None, 9)), (0, 1));
        assert_eq!((told(&died, Some(20 * SECOND), 27), told(&died, Some(20 * SECOND), 28)), (0, 1));
        let again = [died[0].clone(), life("a:1", start + 2 * SECOND, None)];
        assert_eq!(told(&again, None, 100), 0, "there is a new one at its address");
    }

    #[test]
    fn what_is_left_behind_is_told_by_its_kind() {
        let before = Traces { leases: BTreeSet::from([1, 2]), watchers: 3, connections: 4 };
        // Another lease is as good as the one before.
        let same = Traces { leases: BTreeSet::from([1, 5]), ..before.clone() };
        assert_eq!(left_behind(&before, &same), []);
        let more = Traces { leases: BTreeSet::from([1, 2, 3]), watchers: 4, connections: 5 };
        let what: Vec<_> = left_behind(&before, &more).iter().map(ToString::to_string).collect();
        assert_eq!(
            what,
            ["leases: 2 before, 3 now", "watchers: 3 before, 4 now", "connections: 4 before, 5 now"]
        );
        assert_eq!(left_behind(&more, &before).len(), 3, "less is wrong, too");
        assert_eq!((changed("tasks", 1, 1), changed("tasks", 1, 2).is_some()), (None, true));
    }

    #[test]
    fn a_failed_call_is_told_with_its_status() {
        let mut tally = Tally { calls: 9, ..Tally::default() };
        assert_eq!(failed_calls(&tally), None);
        tally.failed.push((Instant::now(), SECOND, Status::unavailable("gone")));
        let told = failed_calls(&tally).unwrap().to_string();
        assert!(told.contains("1 of 9 calls failed") && told.contains("gone"), "{told}");
    }
}
