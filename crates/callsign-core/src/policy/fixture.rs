//! Endpoints for the tests of policies: made-up times, made-up answers

use std::{cmp::Reverse, collections::BinaryHeap, sync::Arc, time::Duration};

use super::*;

/// Candidates that are as busy as a test makes them
pub(crate) struct Fleet {
    candidates: Vec<Candidate>,
    zero: Instant,
}

/// What an endpoint does with a call
pub(crate) enum Answer {
    After(Duration),
    Fails(Duration),
    Never,
}

/// Streams a connection allows
const STREAMS: u32 = 1_000_000;

impl Fleet {
    pub(crate) fn new(count: usize) -> Self {
        Self::weighted(&vec![1; count])
    }

    /// Endpoints 0, 1, 2... with these weights and names of their own
    pub(crate) fn weighted(weights: &[u32]) -> Self {
        #[allow(clippy::disallowed_methods, reason = "any instant will do as the zero of a test")]
        let zero = Instant::now();
        let candidate = |(number, &weight): (usize, &u32)| {
            let streams = Arc::new(Streams::default());
            streams.set_limit(STREAMS);
            Candidate::new(number as u64, Arc::new(Load::new(zero)), streams)
                .with_weight(weight)
                .with_name(format!("10.0.{}.{}:80", number / 256, number % 256))
        };
        Self { candidates: weights.iter().enumerate().map(candidate).collect(), zero }
    }

    pub(crate) fn zero(&self) -> Instant {
        self.zero
    }

    pub(crate) fn candidates(&self) -> &[Candidate] {
        &self.candidates
    }

    pub(crate) fn in_flight(&self) -> Vec<u32> {
        self.candidates.iter().map(Candidate::in_flight).collect()
    }

    pub(crate) fn start(&self, index: usize, calls: usize) {
        (0..calls).for_each(|_| self.candidates[index].load.start(self.zero));
    }

    /// No more streams there
    pub(crate) fn fill(&self, index: usize) {
        self.candidates[index].streams.set_limit(0);
    }

    /// And again
    pub(crate) fn empty(&self, index: usize) {
        self.candidates[index].streams.set_limit(STREAMS);
    }

    pub(crate) fn remove(&mut self, index: usize) {
        self.candidates.remove(index);
    }

    pub(crate) fn reverse(&mut self) {
        self.candidates.reverse();
    }

    /// All have this name
    pub(crate) fn rename(&mut self, name: &str) {
        self.candidates = self.candidates.drain(..).map(|candidate| candidate.with_name(name)).collect();
    }

    pub(crate) fn picks<P: Policy>(&self, policy: &P, picks: usize) -> Vec<Option<usize>> {
        self.picks_seeded(policy, picks, 7)
    }

    pub(crate) fn picks_seeded<P: Policy>(&self, policy: &P, picks: usize, seed: u64) -> Vec<Option<usize>> {
        let plan = policy.plan(&self.candidates);
        let mut random = fastrand::Rng::with_seed(seed);
        let mut pick = |_| policy.pick(&plan, &self.candidates, &mut Pick::new(&mut random, self.zero));
        (0..picks).map(&mut pick).collect()
    }

    /// How many of the picks were each candidate's
    pub(crate) fn shares(&self, policy: impl Policy, picks: usize) -> Vec<usize> {
        self.shares_with(policy, picks, |_| {})
    }

    /// The same for calls of which something is known
    pub(crate) fn shares_with(
        &self,
        policy: impl Policy,
        picks: usize,
        know: impl Fn(&mut Pick<'_>),
    ) -> Vec<usize> {
        let mut shares = vec![0; self.candidates.len()];
        self.pick_with(policy, picks, know, |index| shares[index] += 1);
        shares
    }

    /// Begins calls that do not end
    pub(crate) fn hold(&self, policy: impl Policy, calls: usize) {
        self.hold_with(policy, calls, |_| {});
    }

    pub(crate) fn hold_with(&self, policy: impl Policy, calls: usize, know: impl Fn(&mut Pick<'_>)) {
        self.pick_with(policy, calls, know, |index| self.start(index, 1));
    }

    fn pick_with(
        &self,
        policy: impl Policy,
        picks: usize,
        know: impl Fn(&mut Pick<'_>),
        mut on_pick: impl FnMut(usize),
    ) {
        let plan = policy.plan(&self.candidates);
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..picks {
            let mut call = Pick::new(&mut random, self.zero);
            know(&mut call);
            policy.pick(&plan, &self.candidates, &mut call).into_iter().for_each(&mut on_pick);
        }
    }

    /// Serves calls that begin one after the other, whoever answers them when; how many each endpoint got
    pub(crate) fn serve(
        &self,
        policy: impl Policy,
        calls: usize,
        every: Duration,
        answer: impl Fn(usize, &mut fastrand::Rng) -> Answer,
    ) -> Vec<usize> {
        let plan = policy.plan(&self.candidates);
        let mut random = fastrand::Rng::with_seed(7);
        let mut shares = vec![0; self.candidates.len()];
        let mut under_way: BinaryHeap<Reverse<(Instant, Instant, usize, bool)>> = BinaryHeap::new();
        let mut now = self.zero;
        for _ in 0..calls {
            now += every;
            while under_way.peek().is_some_and(|next| next.0.0 <= now) {
                let Some(Reverse((ends, began, index, fails))) = under_way.pop() else { break };
                end(&self.candidates[index].load, began, ends, fails);
            }
            let picked = policy.pick(&plan, &self.candidates, &mut Pick::new(&mut random, now));
            let index = picked.expect("there is room everywhere");
            shares[index] += 1;
            self.candidates[index].load.start(now);
            match answer(index, &mut random) {
                Answer::After(time) => under_way.push(Reverse((now + time, now, index, false))),
                Answer::Fails(time) => under_way.push(Reverse((now + time, now, index, true))),
                Answer::Never => {}
            }
        }
        shares
    }
}

fn end(load: &Load, began: Instant, ends: Instant, fails: bool) {
    load.answered((!fails).then(|| ends - began), ends);
    if fails {
        load.failed(ends);
    } else {
        load.succeeded();
    }
    load.finish();
}
