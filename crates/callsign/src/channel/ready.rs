//! The endpoints that calls pick from: one immutable set, made anew whenever it changes

use std::sync::Arc;

use callsign_core::policy::{Candidate, Pick, Policy};
use tokio::time::Instant;

use crate::{
    connection::{OpenStream, Sender},
    endpoint::{Endpoint, InFlight},
};

/// A policy, whatever its plan is
pub(super) struct Balancer(Box<dyn Fn(&[Candidate]) -> Picker + Send + Sync>);

/// A policy with the plan for one set of candidates
type Picker = Box<dyn Fn(&[Candidate], &mut Pick<'_>) -> Option<usize> + Send + Sync>;

impl Balancer {
    pub(super) fn new(policy: impl Policy) -> Self {
        let policy = Arc::new(policy);
        Self(Box::new(move |candidates| {
            let (policy, plan) = (Arc::clone(&policy), policy.plan(candidates));
            Box::new(move |candidates, call| policy.pick(&plan, candidates, call))
        }))
    }
}

/// An endpoint that is ready, and what discovery says of it
pub(super) struct Target {
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) sender: Sender,
    /// Its address as `host:port`.
    pub(super) name: Arc<str>,
    pub(super) weight: u32,
    pub(super) zone: Option<Arc<str>>,
}

impl Target {
    fn candidate(&self) -> Candidate {
        let Self { endpoint, sender, name, weight, zone } = self;
        Candidate::new(endpoint.number, Arc::clone(&endpoint.load), Arc::clone(sender.streams()))
            .with_weight(*weight)
            .with_name(Arc::clone(name))
            .with_zone(zone.clone())
    }

    /// Takes a call, if there is room
    fn take(&self, now: std::time::Instant) -> Option<Picked> {
        let stream = self.sender.try_open()?;
        Some(Picked { stream, in_flight: self.endpoint.start(now)? })
    }
}

/// The endpoints that are ready, twice in the same order: as policies see them and as calls use them
///
/// First those that policies pick from, then the spares, for calls that none of those can take, then all others, for calls
/// that want this one and no other.
pub(super) struct Ready {
    candidates: Vec<Candidate>,
    targets: Vec<Target>,
    usable: usize,
    spares: usize,
    picker: Picker,
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
    pub(super) fn new(
        balancer: &Balancer,
        usable: Vec<Target>,
        spares: Vec<Target>,
        others: Vec<Target>,
    ) -> Self {
        let counts = (usable.len(), spares.len());
        let targets: Vec<_> = [usable, spares, others].into_iter().flatten().collect();
        let candidates: Vec<_> = targets.iter().map(Target::candidate).collect();
        let picker = (balancer.0)(&candidates[..counts.0]);
        Self { candidates, targets, usable: counts.0, spares: counts.1, picker }
    }

    pub(super) fn empty() -> Self {
        let (candidates, targets) = (Vec::new(), Vec::new());
        Self { candidates, targets, usable: 0, spares: 0, picker: Box::new(|_, _| None) }
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
        let picked = picked.or_else(|| self.pick_spare(&call));
        picked.ok_or_else(|| {
            // A connection that takes no more streams is lost already, only not yet published as such.
            let open = self.candidates.iter().any(Candidate::is_open);
            if open { Unpicked::AllFull } else { Unpicked::NoneReady }
        })
    }

    fn pick_for(&self, call: &mut Pick<'_>) -> Option<Picked> {
        let usable = &self.candidates[..self.usable];
        // Others pick at the same time: what the policy chose may be full a moment later. Each turn of this loop but the
        // last means that somebody else got a stream.
        for _ in 0..=usable.len() {
            let chosen = (self.picker)(usable, call)?;
            let target = self.targets.get(chosen)?;
            if call.avoid == Some(target.endpoint.number) {
                return None;
            }
            if let Some(picked) = target.take(call.now) {
                return Some(picked);
            }
        }
        None
    }

    /// The first of the spares that takes it: a failing endpoint may answer, a full one does not
    fn pick_spare(&self, call: &Pick<'_>) -> Option<Picked> {
        let spares = self.usable..self.usable + self.spares;
        let mut allowed = spares.filter(|&spare| call.allows(&self.candidates[spare]));
        allowed.find_map(|spare| self.targets[spare].take(call.now))
    }
}
