//! The endpoints that calls pick from: one immutable set, made anew whenever it changes

use std::sync::Arc;

use callsign_core::{
    policy::{Candidate, Pick, Policy},
    slow_start::{self, Freshness},
};
use tokio::time::Instant;

use super::around::Around;
use crate::{
    connection::{OpenStream, Sender},
    endpoint::{Endpoint, InFlight},
};

/// A policy, whatever its plan is, and what is around it
pub(super) struct Balancer {
    plan: Planner,
    pub(super) around: Around,
}

type Planner = Box<dyn Fn(&[Candidate]) -> Picker + Send + Sync>;

/// A policy with the plan for one set of candidates
type Picker = Box<dyn Fn(&[Candidate], &mut Pick<'_>) -> Option<usize> + Send + Sync>;

impl Balancer {
    pub(super) fn new(policy: impl Policy) -> Self {
        let policy = Arc::new(policy);
        let plan = move |candidates: &[Candidate]| -> Picker {
            let (policy, plan) = (Arc::clone(&policy), policy.plan(candidates));
            Box::new(move |candidates, call| policy.pick(&plan, candidates, call))
        };
        Self { plan: Box::new(plan), around: Around::default() }
    }

    /// The same policy with this around it
    pub(super) fn within(self, around: Around) -> Self {
        Self { around, ..self }
    }
}

/// An endpoint that is ready, and what discovery says of it
pub(super) struct Target {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) sender: Sender,
    pub(super) weight: u32,
    pub(super) zone: Option<Arc<str>>,
    /// Since when its server is, for slow start.
    pub(super) fresh: Freshness,
}

impl Target {
    fn candidate(&self) -> Candidate {
        let Self { endpoint, sender, weight, zone, .. } = self;
        Candidate::new(endpoint.number, Arc::clone(&endpoint.load), Arc::clone(sender.streams()))
            .with_weight(*weight)
            .with_name(endpoint.authority.as_str())
            .with_zone(zone.clone())
    }
}

/// The endpoints that are ready: as policies see them, if they take part, and as calls use them
pub(super) struct Ready {
    /// As many of the `targets`, in the same order.
    candidates: Vec<Candidate>,
    /// First those that take part, then the others.
    targets: Vec<Target>,
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
    /// Those that are ready; `near` endpoints are in the preferred zone, ready or not
    pub(super) fn new(balancer: &Balancer, targets: impl Iterator<Item = Target>, near: usize) -> Self {
        let around = balancer.around.clone();
        let (mut targets, others) =
            around.take_part(targets.collect(), near, |target: &Target| target.zone.as_deref());
        let candidates: Vec<_> = targets.iter().map(Target::candidate).collect();
        targets.extend(others);
        let picker = (balancer.plan)(&candidates);
        Self { candidates, targets, picker, around }
    }

    pub(super) fn empty() -> Self {
        let (candidates, targets) = (Vec::new(), Vec::new());
        Self { candidates, targets, picker: Box::new(|_, _| None), around: Around::default() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }

    /// Picks an endpoint and takes a stream of it; `avoid` has just handed the call back
    pub(super) fn pick(&self, avoid: Option<u64>) -> Result<Picked, Unpicked> {
        let now = Instant::now().into_std();
        let mut random = fastrand::Rng::new();
        let mut call = Pick::new(&mut random, now);
        call.avoid = avoid;
        let picked = self.pick_for(&mut call).or_else(|| {
            // Another endpoint if there is one, else the same one again.
            avoid?;
            call.avoid = None;
            self.pick_for(&mut call)
        });
        picked.ok_or_else(|| {
            // A connection that takes no more streams is lost already, only not yet published as such.
            let open = self.candidates.iter().any(Candidate::is_open);
            if open { Unpicked::AllFull } else { Unpicked::NoneReady }
        })
    }

    fn pick_for(&self, call: &mut Pick<'_>) -> Option<Picked> {
        // Others pick at the same time: what the policy chose may be full a moment later. Each turn of this loop but the
        // last means that somebody else got a stream.
        for _ in 0..=self.candidates.len() {
            let chosen = self.choose(call)?;
            let Target { endpoint, sender, .. } = self.targets.get(chosen)?;
            if call.avoid == Some(endpoint.number) {
                return None;
            }
            if let Some(stream) = sender.try_open() {
                return Some(Picked { stream, in_flight: endpoint.start(call.now) });
            }
        }
        None
    }

    /// The policy's choice; one that has just come often makes way for another
    fn choose(&self, call: &mut Pick<'_>) -> Option<usize> {
        let chosen = (self.picker)(&self.candidates, call)?;
        // Who avoids one already is not choosy.
        if call.avoid.is_some() {
            return Some(chosen);
        }
        let now = call.now;
        let share =
            |index| self.targets.get(index).map(|target: &Target| self.around.share(&target.fresh, now));
        let its = share(chosen)?;
        // As good as any other can be.
        if its >= 1.0 {
            return Some(chosen);
        }
        let draw = call.random.f64();
        call.avoid = self.targets.get(chosen).map(|target| target.endpoint.number);
        let other = (self.picker)(&self.candidates, call);
        call.avoid = None;
        let other = other.filter(|other| slow_start::makes_way(its, share(*other).unwrap_or(its), draw));
        Some(other.unwrap_or(chosen))
    }
}
