//! The endpoints that calls pick from: one immutable set, made anew whenever it changes

use std::sync::Arc;

use callsign_core::policy::{Candidate, Pick, Policy};
use tokio::time::Instant;

use super::options::{Asked, Options};
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

    /// Whether a call may go there as far as its caller is concerned
    fn is_permitted(&self, options: &Options) -> bool {
        options.permit(&self.endpoint.address)
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

    /// Picks an endpoint and takes a stream of it
    pub(super) fn pick(&self, asked: Asked<'_>) -> Result<Picked, Unpicked> {
        let now = Instant::now().into_std();
        let options = asked.options;
        let picked = match options.pinned() {
            // What has just handed the call back is asked again: there is no other.
            Some(_) => self.permitted(options).find_map(|target| target.take(now)),
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
        let picked = self.pick_for(&mut call, options).or_else(|| {
            // Another endpoint if there is one, else the same one again.
            asked.avoid?;
            call.avoid = None;
            self.pick_for(&mut call, options)
        });
        picked.or_else(|| self.pick_spare(&call, options))
    }

    /// The targets that a call may go to as far as its caller is concerned: for one that is pinned they may be ejected
    fn permitted(&self, options: &Options) -> impl Iterator<Item = &Target> {
        let count = if options.pinned().is_some() { self.targets.len() } else { self.usable + self.spares };
        self.targets[..count].iter().filter(|target| target.is_permitted(options))
    }

    fn pick_for(&self, call: &mut Pick<'_>, options: &Options) -> Option<Picked> {
        let usable = &self.candidates[..self.usable];
        // Others pick at the same time: what the policy chose may be full a moment later. Each turn of this loop but the
        // last means that somebody else got a stream.
        for _ in 0..=usable.len() {
            let chosen = (self.picker)(usable, call)?;
            let target = self.targets.get(chosen)?;
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

    /// The first of the spares that takes it: a failing endpoint may answer, a full one does not
    fn pick_spare(&self, call: &Pick<'_>, options: &Options) -> Option<Picked> {
        // Policies know one excluded endpoint, and several may have its address: then one of the others is usable still.
        let first = if options.excluded().is_some() { 0 } else { self.usable };
        let mut spares = first..self.usable + self.spares;
        spares.find_map(|spare| {
            let target = &self.targets[spare];
            let allowed = call.allows(&self.candidates[spare]) && target.is_permitted(options);
            if allowed { target.take(call.now) } else { None }
        })
    }
}
