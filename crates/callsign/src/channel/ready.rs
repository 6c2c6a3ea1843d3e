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
}

/// The endpoints that are ready: as policies see them, if they may be picked, and as calls use them
pub(super) struct Ready {
    /// As many of the `targets`, in the same order.
    candidates: Vec<Candidate>,
    /// First those that may be picked, then the others: for calls that want one of them and no other.
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
    /// `usable` may be picked, `others` are ready as well
    pub(super) fn new(balancer: &Balancer, usable: Vec<Target>, others: Vec<Target>) -> Self {
        let candidates: Vec<_> = usable.iter().map(Target::candidate).collect();
        let targets = [usable, others].into_iter().flatten().collect();
        let picker = (balancer.0)(&candidates);
        Self { candidates, targets, picker }
    }

    pub(super) fn empty() -> Self {
        Self { candidates: Vec::new(), targets: Vec::new(), picker: Box::new(|_, _| None) }
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
            let chosen = (self.picker)(&self.candidates, call)?;
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
}
