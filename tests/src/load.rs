//! Steady calls, and what became of each

use std::{
    fmt,
    future::Future,
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
    time::{Interval, MissedTickBehavior, interval, timeout},
};
use tonic::{
    Request, Status,
    body::Body,
    client::GrpcService,
    codegen::{Body as HttpBody, Bytes, StdError},
};

use crate::{
    pb::{HelloRequest, greeter_client::GreeterClient},
    service::who,
};

/// A deadline that is not kept by the client is noticed this much later
const GRACE: Duration = Duration::from_secs(1);

/// One greeting under a deadline; says who answered
pub async fn greet<T>(mut client: GreeterClient<T>, deadline: Duration) -> Result<String, Status>
where
    T: GrpcService<Body, Error: Into<StdError>>,
    T::ResponseBody: HttpBody<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
{
    let mut request = Request::new(HelloRequest { name: "load".to_owned() });
    request.set_timeout(deadline);
    let call = client.say_hello(request);
    match timeout(deadline + GRACE, call).await {
        Ok(reply) => Ok(who(reply?.get_ref())),
        Err(_) => {
            Err(Status::internal(format!("the client kept a call longer than {deadline:?} + {GRACE:?}")))
        }
    }
}

/// One call and what became of it
#[derive(Debug)]
pub struct Call {
    /// When it was handed to the client
    pub started: Instant,
    /// When its result was there
    pub ended: Instant,
    /// Who answered, or why nobody did
    pub result: Result<String, Status>,
}

impl Call {
    async fn make(call: impl Future<Output = Result<String, Status>>) -> Self {
        let started = Instant::now();
        let result = call.await;
        Self { started, ended: Instant::now(), result }
    }
}

/// How many calls a second, for how long
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Calls a second
    pub rate: u32,
    /// For how long
    pub lasting: Duration,
}

impl Pace {
    /// 200 calls a second for 12 s: 2 400 calls
    pub const FULL: Self = Self { rate: 200, lasting: Duration::from_secs(12) };

    /// How many calls that makes
    pub fn calls(self) -> u32 {
        self.rate * self.lasting.as_secs() as u32 + self.rate * self.lasting.subsec_millis() / 1000
    }

    fn gap(self) -> Duration {
        Duration::from_secs(1) / self.rate
    }

    /// Starts calls at this pace, whatever becomes of the earlier ones
    pub async fn open_loop<F>(self, mut call: impl FnMut() -> F) -> Load
    where
        F: Future<Output = Result<String, Status>> + Send + 'static,
    {
        let mut tick = interval(self.gap());
        let mut running = JoinSet::new();
        let mut held_up = Duration::ZERO;
        for _ in 0..self.calls() {
            held_up = held_up.max(tick.tick().await.elapsed());
            running.spawn(Call::make(call()));
        }
        Load { calls: running.join_all().await, held_up }.sorted()
    }

    /// One call after the other, at most at this pace
    pub async fn one_after_the_other<F>(self, call: impl FnMut() -> F) -> Load
    where
        F: Future<Output = Result<String, Status>> + Send + 'static,
    {
        self.at_a_time(1, call).await
    }

    /// So many calls at a time, the next ones when all of them have ended, at most at this pace
    pub async fn at_a_time<F>(self, width: u32, mut call: impl FnMut() -> F) -> Load
    where
        F: Future<Output = Result<String, Status>> + Send + 'static,
    {
        let mut tick = interval(self.gap() * width);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut calls = Vec::new();
        for _ in 0..self.calls() / width {
            tick.tick().await;
            let together: JoinSet<_> = (0..width).map(|_| Call::make(call())).collect();
            calls.extend(together.join_all().await);
        }
        Load { calls, held_up: Duration::ZERO }.sorted()
    }
}

/// So many callers, each of which calls again as soon as its call has ended, for some time
pub async fn closed_loop<F>(
    callers: usize,
    lasting: Duration,
    call: impl Fn() -> F + Clone + Send + 'static,
) -> Load
where
    F: Future<Output = Result<String, Status>> + Send + 'static,
{
    let end = Instant::now() + lasting;
    let callers: JoinSet<_> = (0..callers).map(|_| one_caller(end, call.clone())).collect();
    Load { calls: callers.join_all().await.into_iter().flatten().collect(), held_up: Duration::ZERO }.sorted()
}

async fn one_caller<F>(end: Instant, call: impl Fn() -> F) -> Vec<Call>
where
    F: Future<Output = Result<String, Status>>,
{
    let mut calls = Vec::new();
    while Instant::now() < end {
        calls.push(Call::make(call()).await);
    }
    calls
}

/// A load without an end: calls at a steady pace until it is told to stop
///
/// It keeps the calls that failed and counts the others, so it can go on for hours. Ends with its drop.
#[derive(Debug)]
pub struct Steady {
    so_far: watch::Receiver<Tally>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// What became of the calls of a [`Steady`] load so far
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Calls that have ended
    pub calls: u64,
    /// When a call was started that failed, how long it took, and why
    pub failed: Vec<(Instant, Duration, Status)>,
    /// The longest that a call took
    pub slowest: Duration,
    /// How late a call was started at most: a machine this busy misses deadlines by itself
    pub held_up: Duration,
}

impl Steady {
    /// Starts `rate` calls a second, whatever becomes of the earlier ones
    pub fn start<F>(rate: u32, call: impl FnMut() -> F + Send + 'static) -> Self
    where
        F: Future<Output = Result<String, Status>> + Send + 'static,
    {
        let (tell, so_far) = watch::channel(Tally::default());
        let (stop, stopped) = watch::channel(false);
        let tick = interval(Duration::from_secs(1) / rate);
        Self { so_far, stop, task: tokio::spawn(steady(tick, call, tell, stopped)) }
    }

    /// What became of the calls so far
    pub fn tally(&self) -> Tally {
        self.so_far.borrow().clone()
    }

    /// Starts no more calls and waits for those under way
    pub async fn stop(mut self) -> Tally {
        self.stop.send_replace(true);
        // It panics only if a call does, which is told here.
        (&mut self.task).await.expect("no call panics");
        self.tally()
    }
}

impl Drop for Steady {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn steady<F>(
    mut tick: Interval,
    mut call: impl FnMut() -> F,
    tell: watch::Sender<Tally>,
    mut stopped: watch::Receiver<bool>,
) where
    F: Future<Output = Result<String, Status>> + Send + 'static,
{
    // A stall is no reason for a burst: a caller who was held up calls once, too.
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            due = tick.tick() => {
                tell.send_modify(|tally| tally.held_up = tally.held_up.max(due.elapsed()));
                running.spawn(Call::make(call()));
            }
            Some(ended) = running.join_next() => count(&tell, ended.expect("no call panics")),
            _ = stopped.changed() => break,
        }
    }
    while let Some(ended) = running.join_next().await {
        count(&tell, ended.expect("no call panics"));
    }
}

fn count(tell: &watch::Sender<Tally>, call: Call) {
    let took = call.ended - call.started;
    tell.send_modify(|tally| {
        tally.calls += 1;
        tally.slowest = tally.slowest.max(took);
        tally.failed.extend(call.result.err().map(|status| (call.started, took, status)));
    });
}

impl Tally {
    /// Both together
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.calls += other.calls;
        self.failed.extend(other.failed);
        self.slowest = self.slowest.max(other.slowest);
        self.held_up = self.held_up.max(other.held_up);
        self
    }
}

impl fmt::Display for Tally {
    /// The failures, the first few of them in detail
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} calls failed", self.failed.len(), self.calls)?;
        write!(f, "; slowest {:?}, held up {:?} at most", self.slowest, self.held_up)?;
        for (at, took, status) in self.failed.iter().take(8) {
            write!(f, "\n  {:?} ago, after {took:?}: {status}", at.elapsed())?;
        }
        Ok(())
    }
}

/// What became of many calls, in the order in which they started
#[derive(Debug)]
pub struct Load {
    /// The calls
    pub calls: Vec<Call>,
    /// How late a call was started at most: a machine this busy misses deadlines by itself
    pub held_up: Duration,
}

impl Load {
    fn sorted(mut self) -> Self {
        self.calls.sort_by_key(|call| call.started);
        self
    }

    /// The calls that failed
    pub fn failed(&self) -> Vec<&Call> {
        self.calls.iter().filter(|call| call.result.is_err()).collect()
    }

    /// Part of the calls started in `from..to` that `server` answered, 0 to 1
    ///
    /// # Panics
    ///
    /// If there were no calls in that time.
    pub fn share(&self, server: &str, from: Instant, to: Instant) -> f64 {
        let calls: Vec<_> = self.calls.iter().filter(|call| (from..to).contains(&call.started)).collect();
        assert!(!calls.is_empty(), "no call between the two times");
        let answered =
            calls.iter().filter(|call| call.result.as_ref().is_ok_and(|who| who == server)).count();
        answered as f64 / calls.len() as f64
    }

    /// Part of all calls that `server` answered, 0 to 1
    pub fn share_of(&self, server: &str) -> f64 {
        let answered = self.calls.iter().filter(|call| call.result.as_ref().is_ok_and(|who| who == server));
        answered.count() as f64 / self.calls.len() as f64
    }

    /// The time that half of the calls that `server` answered took at most
    ///
    /// # Panics
    ///
    /// If it answered none.
    pub fn median_latency(&self, server: &str) -> Duration {
        let answered = self.calls.iter().filter(|call| call.result.as_ref().is_ok_and(|who| who == server));
        let mut took: Vec<_> = answered.map(|call| call.ended - call.started).collect();
        let middle = took.len() / 2;
        *took.select_nth_unstable(middle).1
    }

    /// Asserts that there were as many calls as planned and that none failed
    ///
    /// # Panics
    ///
    /// If that does not hold; the message lists the failures.
    pub fn assert_none_failed(&self, pace: Pace) {
        assert_eq!(self.calls.len(), pace.calls() as usize);
        assert!(self.failed().is_empty(), "{self}");
    }
}

impl fmt::Display for Load {
    /// The failures, the first few of them in detail
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed = self.failed();
        write!(f, "{} of {} calls failed", failed.len(), self.calls.len())?;
        write!(f, "; the test itself was held up for {:?} at most", self.held_up)?;
        let Some(first) = self.calls.first() else { return Ok(()) };
        for call in failed.iter().take(8) {
            let (at, took) = (call.started - first.started, call.ended - call.started);
            write!(f, "\n  at {at:?}, after {took:?}: {:?}", call.result.as_ref().err())?;
        }
        Ok(())
    }
}
