//! The endpoints that calls pick from: one immutable set, made anew whenever it changes

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use callsign_core::{
    policy::{Candidate, LeastRequest, Pick, Policy},
    slow_start::{self, Freshness},
};
use tokio::time::Instant;

use super::{
    around::Around,
    options::{Asked, Options},
};
use crate::{
    connection::{OpenStream, Sender},
    endpoint::{Endpoint, InFlight},
};

/// A policy, whatever its plan is, and what is around it
pub(super) struct Balancer {
    plan: Box<Planner>,
    pub(super) around: Around,
}

type Planner = dyn Fn(&[Candidate]) -> Picker + Send + Sync;

/// A policy with the plan for one set of candidates
type Picker = Box<dyn Fn(&[Candidate], &mut Pick<'_>) -> Option<usize> + Send + Sync>;

impl Balancer {
    pub(super) fn new(policy: impl Policy) -> Self {
        let policy = Arc::new(policy);
        let plan = move |candidates: &[Candidate]| {
            // Else one panic of a policy would end the pool, and with it the whole channel. A policy that another
            // panic has left half changed panics again at worst.
            let planned = catch_unwind(AssertUnwindSafe(|| picker(Arc::clone(&policy), candidates)));
            planned.unwrap_or_else(|_| {
                tracing::error!(
                    "the policy panicked over a set of endpoints: least_request picks from that set"
                );
                picker(Arc::new(LeastRequest::new()), candidates)
            })
        };
        Self { plan: Box::new(plan), around: Around::default() }
    }

    /// The same policy with this around it
    pub(super) fn within(self, around: Around) -> Self {
        Self { around, ..self }
    }
}

fn picker(policy: Arc<impl Policy>, candidates: &[Candidate]) -> Picker {
    let plan = policy.plan(candidates);
    Box::new(move |candidates, call| policy.pick(&plan, candidates, call))
}

/// An endpoint that is ready, and what discovery says of it
pub(super) struct Target {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) sender: Sender,
    /// Its address as `host:port`.
    pub(super) name: Arc<str>,
    pub(super) weight: u32,
    pub(super) zone: Option<Arc<str>>,
    /// Since when its server is, for slow start.
    pub(super) fresh: Freshness,
}

impl Target {
    fn candidate(&self) -> Candidate {
        let Self { endpoint, sender, name, weight, zone, .. } = self;
        Candidate::new(endpoint.number, Arc::clone(&endpoint.load), Arc::clone(sender.streams()))
            .with_weight(*weight)
            .with_name(Arc::clone(name))
            .with_zone(zone.clone())
    }

    /// Whether a call may go there as far as its caller is concerned
    fn is_permitted(&self, options: &Options) -> bool {
        options.permit(&self.endpoint.address)
    }

    /// Takes a call, if there is room and no trial turns it away
    fn take(&self, now: std::time::Instant) -> Option<Picked> {
        // Looked at first: on trial a call without a stream takes another's place for a moment, and that is news to all.
        if !self.sender.streams().has_room() {
            return None;
        }
        let (stream, in_flight) = self.endpoint.try_start(now, || self.sender.try_open())?;
        Some(Picked { stream, in_flight })
    }

    /// Takes a call that goes nowhere else, if there is room
    fn take_pinned(&self, now: std::time::Instant) -> Option<Picked> {
        let (stream, in_flight) = self.endpoint.start(now, || self.sender.try_open())?;
        Some(Picked { stream, in_flight })
    }
}

/// Those that are ready, by whether they are ejected and why
#[derive(Default)]
pub(super) struct Sorted {
    /// How many are in the preferred zone, ready or not.
    pub(super) near: usize,
    pub(super) usable: Vec<Target>,
    pub(super) failing: Vec<Target>,
    pub(super) silent: Vec<Target>,
}

/// The endpoints that are ready, twice in the same order: as policies see them and as calls use them
///
/// First those that policies pick from; then those that are in another zone than the preferred one and those that fail, for
/// calls that none of the first can take; then all others, for calls that want this one and no other.
pub(super) struct Ready {
    candidates: Vec<Candidate>,
    targets: Vec<Target>,
    /// Policies pick from those before this index,
    taking_part: usize,
    /// none before this one is ejected,
    usable: usize,
    /// and none before this one is silent.
    spare: usize,
    picker: Picker,
    around: Around,
}

/// An endpoint that takes a call, and the stream it takes it with
pub(super) struct Picked {
    pub(super) stream: OpenStream,
    pub(super) in_flight: InFlight,
}

/// Why nobody was picked
pub(super) enum Unpicked {
    NoneReady,
    AllFull,
}

impl Ready {
    /// A set with the plan that the policy makes for it
    pub(super) fn new(balancer: &Balancer, sorted: Sorted) -> Self {
        let Sorted { near, usable, failing, silent } = sorted;
        let around = balancer.around.clone();
        let (taking_part, far) = around.take_part(usable, near, |target: &Target| target.zone.as_deref());
        let usable = taking_part.len()..taking_part.len() + far.len();
        let spare = usable.end + failing.len();
        let targets: Vec<_> = [taking_part, far, failing, silent].into_iter().flatten().collect();
        let candidates: Vec<_> = targets.iter().map(Target::candidate).collect();
        let picker = (balancer.plan)(&candidates[..usable.start]);
        Self { candidates, targets, taking_part: usable.start, usable: usable.end, spare, picker, around }
    }

    pub(super) fn empty() -> Self {
        let (candidates, targets) = (Vec::new(), Vec::new());
        let (taking_part, usable, spare) = (0, 0, 0);
        let picker: Picker = Box::new(|_, _| None);
        let around = Around::default();
        Self { candidates, targets, taking_part, usable, spare, picker, around }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// Picks an endpoint and takes a stream of it
    pub(super) fn pick(&self, asked: Asked<'_>) -> Result<Picked, Unpicked> {
        let now = Instant::now().into_std();
        let options = asked.options;
        let picked = match options.pinned() {
            // What has just handed the call back is asked again: there is no other.
            Some(_) => self.permitted(options).find_map(|target| target.take_pinned(now)),
            None => self.pick_by_policy(asked, now),
        };
        picked.ok_or_else(|| {
            // A connection that takes no more streams is lost already, only not yet published as such.
            let open = self.permitted(options).any(|target| target.sender.streams().limit() > 0);
            if open { Unpicked::AllFull } else { Unpicked::NoneReady }
        })
    }

    fn pick_by_policy(&self, asked: Asked<'_>, now: std::time::Instant) -> Option<Picked> {
        let options = asked.options;
        let mut random = fastrand::Rng::new();
        let mut call = Pick::new(&mut random, now);
        (call.avoid, call.key, call.headers) = (asked.avoid, options.key(), &asked.headers);
        if options.excluded().is_some() {
            let excluded = self.targets.iter().find(|target| !target.is_permitted(options));
            call.excluded = excluded.map(|target| target.endpoint.number);
        }
        let picked =
            self.pick_for(&mut call, options).or_else(|| self.pick_far(&mut call, options)).or_else(|| {
                // Another endpoint if there is one, else the same one again.
                asked.avoid?;
                call.avoid = None;
                self.pick_for(&mut call, options)
            });
        // A failing endpoint may answer, a full one does not.
        picked.or_else(|| self.first_of(self.usable..self.spare, &call, options))
    }

    /// Any that is ready but takes no part, when those that do cannot take the call
    fn pick_far(&self, call: &mut Pick<'_>, options: &Options) -> Option<Picked> {
        // Policies know one excluded endpoint, and several may have its address: then one of the others is usable still.
        let first = if options.excluded().is_some() { 0 } else { self.taking_part };
        let start = call.random.usize(first..=self.usable);
        self.first_of((start..self.usable).chain(first..start), call, options)
    }

    /// The targets that a call may go to as far as its caller is concerned: for one that is pinned they may be ejected
    fn permitted(&self, options: &Options) -> impl Iterator<Item = &Target> {
        let count = if options.pinned().is_some() { self.targets.len() } else { self.spare };
        self.targets[..count].iter().filter(|target| target.is_permitted(options))
    }

    /// Whether a policy that leaves a call waiting could have picked somebody
    pub(super) fn has_room(&self) -> bool {
        let mut random = fastrand::Rng::new();
        let call = Pick::new(&mut random, Instant::now().into_std());
        self.candidates[..self.taking_part].iter().any(|candidate| call.allows(candidate))
    }

    fn pick_for(&self, call: &mut Pick<'_>, options: &Options) -> Option<Picked> {
        // Others pick at the same time: what the policy chose may be full a moment later. It sees that when it is asked
        // again, and if it does not, it is asked no more.
        let mut full = None;
        for _ in 0..=self.taking_part {
            let chosen = self.choose(call)?;
            if full.replace(chosen) == Some(chosen) {
                return None;
            }
            let target = self.targets[..self.taking_part].get(chosen)?;
            if call.avoid == Some(target.endpoint.number) {
                return None;
            }
            if !target.is_permitted(options) {
                return None;
            }
            if let Some(picked) = target.take(call.now) {
                return Some(picked);
            }
        }
        None
    }

    /// The policy's choice; one that has just come often makes way for another
    fn choose(&self, call: &mut Pick<'_>) -> Option<usize> {
        let (candidates, targets) = (&self.candidates[..self.taking_part], &self.targets[..self.taking_part]);
        let chosen = (self.picker)(candidates, call)?;
        // Who avoids one already is not choosy.
        if call.avoid.is_some() {
            return Some(chosen);
        }
        let now = call.now;
        let share = |index| targets.get(index).map(|target: &Target| self.around.share(&target.fresh, now));
        let its = share(chosen)?;
        // As good as any other can be.
        if its >= 1.0 {
            return Some(chosen);
        }
        let draw = call.random.f64();
        call.avoid = targets.get(chosen).map(|target| target.endpoint.number);
        let other = (self.picker)(candidates, call);
        call.avoid = None;
        let other = other.filter(|other| slow_start::makes_way(its, share(*other).unwrap_or(its), draw));
        Some(other.unwrap_or(chosen))
    }

    /// The first that takes the call
    fn first_of(
        &self,
        mut indices: impl Iterator<Item = usize>,
        call: &Pick<'_>,
        options: &Options,
    ) -> Option<Picked> {
        indices.find_map(|index| {
            let target = &self.targets[index];
            let allowed = call.allows(&self.candidates[index]) && target.is_permitted(options);
            if allowed { target.take(call.now) } else { None }
        })
    }
}
