//! The endpoints that calls pick from: one immutable set, made anew whenever it changes

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use callsign_core::policy::{Candidate, LeastRequest, Pick, Policy};
use tokio::time::Instant;

use super::options::{Asked, Options};
use crate::{
    connection::{OpenStream, Sender},
    endpoint::{Endpoint, InFlight},
};

/// A policy, whatever its plan is
pub(super) struct Balancer(Box<Planner>);

type Planner = dyn Fn(&[Candidate]) -> Picker + Send + Sync;

/// A policy with the plan for one set of candidates
type Picker = Box<dyn Fn(&[Candidate], &mut Pick<'_>) -> Option<usize> + Send + Sync>;

impl Balancer {
    pub(super) fn new(policy: impl Policy) -> Self {
        let policy = Arc::new(policy);
        Self(Box::new(move |candidates| {
            // Else one panic of a policy would end the pool, and with it the whole channel. A policy that another
            // panic has left half changed panics again at worst.
            let planned = catch_unwind(AssertUnwindSafe(|| picker(Arc::clone(&policy), candidates)));
            planned.unwrap_or_else(|_| {
                tracing::error!(
                    "the policy panicked over a set of endpoints: least_request picks from that set"
                );
                picker(Arc::new(LeastRequest::new()), candidates)
            })
        }))
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
    pub(super) weight: u32,
    pub(super) zone: Option<Arc<str>>,
}

impl Target {
    fn candidate(&self) -> Candidate {
        let Self { endpoint, sender, weight, zone } = self;
        Candidate::new(endpoint.number, Arc::clone(&endpoint.load), Arc::clone(sender.streams()))
            .with_weight(*weight)
            .with_name(endpoint.authority.as_str())
            .with_zone(zone.clone())
    }

    /// Whether a call may go there as far as its caller is concerned
    fn is_permitted(&self, options: &Options) -> bool {
        options.permit(&self.endpoint.address)
    }

    /// Takes a stream, if there is one
    fn take(&self, now: std::time::Instant) -> Option<Picked> {
        let stream = self.sender.try_open()?;
        Some(Picked { stream, in_flight: self.endpoint.start(now) })
    }
}

/// The endpoints that are ready, twice in the same order: as policies see them and as calls use them
pub(super) struct Ready {
    candidates: Vec<Candidate>,
    targets: Vec<Target>,
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
    pub(super) fn new(balancer: &Balancer, targets: impl Iterator<Item = Target>) -> Self {
        let targets: Vec<_> = targets.collect();
        let candidates: Vec<_> = targets.iter().map(Target::candidate).collect();
        let picker = (balancer.0)(&candidates);
        Self { candidates, targets, picker }
    }

    pub(super) fn empty() -> Self {
        Self { candidates: Vec::new(), targets: Vec::new(), picker: Box::new(|_, _| None) }
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
            Some(_) => self.permitted(asked.options).find_map(|target| target.take(now)),
            None => self.pick_by_policy(asked, now),
        };
        picked.ok_or_else(|| {
            // A connection that takes no more streams is lost already, only not yet published as such.
            let open = self.permitted(options).any(|target| target.sender.streams().limit() > 0);
            if open { Unpicked::AllFull } else { Unpicked::NoneReady }
        })
    }

    fn pick_by_policy(&self, asked: Asked<'_>, now: std::time::Instant) -> Option<Picked> {
        let mut random = fastrand::Rng::new();
        let mut call = Pick::new(&mut random, now);
        (call.avoid, call.key, call.headers) = (asked.avoid, asked.options.key(), &asked.headers);
        if asked.options.excluded().is_some() {
            let excluded = self.targets.iter().find(|target| !target.is_permitted(asked.options));
            call.excluded = excluded.map(|target| target.endpoint.number);
        }
        self.pick_for(&mut call, asked.options).or_else(|| {
            // Another endpoint if there is one, else the same one again.
            asked.avoid?;
            call.avoid = None;
            self.pick_for(&mut call, asked.options)
        })
    }

    /// The targets that a call may go to as far as its caller is concerned
    fn permitted(&self, options: &Options) -> impl Iterator<Item = &Target> {
        self.targets.iter().filter(|target| target.is_permitted(options))
    }

    fn pick_for(&self, call: &mut Pick<'_>, options: &Options) -> Option<Picked> {
        // Others pick at the same time: what the policy chose may be full a moment later. Each turn of this loop but the
        // last means that somebody else got a stream.
        for _ in 0..=self.candidates.len() {
            let chosen = (self.picker)(&self.candidates, call)?;
            let target = self.targets.get(chosen)?;
            if call.avoid == Some(target.endpoint.number) {
                return None;
            }
            if !target.is_permitted(options) {
                // Policies know one excluded endpoint; several may have its address.
                let mut all = self.candidates.iter().zip(&self.targets);
                return all.find_map(|(candidate, target)| {
                    let allowed = call.allows(candidate) && target.is_permitted(options);
                    if allowed { target.take(call.now) } else { None }
                });
            }
            if let Some(picked) = target.take(call.now) {
                return Some(picked);
            }
        }
        None
    }
}
