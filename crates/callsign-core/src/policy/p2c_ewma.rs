//! Power of two choices on latency and calls in flight

use super::{Candidate, Pick, Policy};

/// Of two endpoints drawn at random, the one that promises the faster answer
///
/// What an endpoint promises is `latency * (calls in flight + 1)`, as in Finagle's `P2CPeakEwma`. The latency is a peak EWMA,
/// or what calls have waited there already without an answer to any, whichever is more, times a penalty for failures in a
/// row that fades within seconds (all of it in [`load`](crate::load)). Latencies within a factor of two of each other count
/// as equal, so that equal endpoints get equal shares: then fewer calls in flight win, and on a tie the one drawn first.
#[derive(Clone, Copy, Debug, Default)]
pub struct P2cEwma(());

impl P2cEwma {
    /// The policy; it has no settings
    pub fn new() -> Self {
        Self(())
    }
}

/// Latencies this close to each other are noise.
const ALIKE: f32 = 2.0;

impl Policy for P2cEwma {
    type Plan = ();

    fn plan(&self, _: &[Candidate]) {}

    fn pick(&self, (): &(), candidates: &[Candidate], call: &mut Pick<'_>) -> Option<usize> {
        let count = candidates.len();
        if count < 2 {
            return (count == 1 && call.allows(&candidates[0])).then_some(0);
        }
        let first = call.random.usize(..count);
        let second = (first + 1 + call.random.usize(..count - 1)) % count;
        match (call.allows(&candidates[first]), call.allows(&candidates[second])) {
            (true, true) => {
                let second_is_better = is_better(&candidates[second], &candidates[first], call);
                Some(if second_is_better { second } else { first })
            }
            (true, false) => Some(first),
            (false, true) => Some(second),
            // Both are full: rare, and then any endpoint with room beats waiting.
            (false, false) => {
                (1..count).map(|step| (second + step) % count).find(|&index| call.allows(&candidates[index]))
            }
        }
    }
}

fn is_better(one: &Candidate, other: &Candidate, call: &Pick<'_>) -> bool {
    let (expected, others) = (one.load().expected(call.now), other.load().expected(call.now));
    let (queue, others_queue) = ((one.in_flight() + 1) as f32, (other.in_flight() + 1) as f32);
    if expected < ALIKE * others && others < ALIKE * expected {
        return queue < others_queue;
    }
    expected * queue < others * others_queue
}
