//! Steady calls, and what became of each

use std::{
    fmt,
    future::Future,
    time::{Duration, Instant},
};

use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
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
    pub async fn one_after_the_other<F>(self, mut call: impl FnMut() -> F) -> Load
    where
        F: Future<Output = Result<String, Status>>,
    {
        let mut tick = interval(self.gap());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut calls = Vec::new();
        for _ in 0..self.calls() {
            tick.tick().await;
            calls.push(Call::make(call()).await);
        }
        Load { calls, held_up: Duration::ZERO }
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
