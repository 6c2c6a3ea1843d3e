//! An instance that a channel balances over: one task connects, reconnects and drains

use std::{convert::Infallible, sync::Arc, time::Duration};

use callsign_core::{backoff::Backoff, ejection::MOST_FAILURES, load::Load};
use http::uri::{Authority, Scheme};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};
use tonic::Code;

use crate::{
    attention::Attention,
    connection::{self, Closed, Sender},
    instance::Address,
    metrics::EndpointMeters,
    outcome::{Outcome, Verdict},
    trace::Trace,
};

/// Where an endpoint stands
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EndpointState {
    /// Known, and no attempt to connect was made yet
    Idle,
    /// An attempt to connect is under way
    Connecting,
    /// The peer's HTTP/2 SETTINGS were read: calls are sent
    Ready,
    /// The last attempt failed; the next one waits
    Backoff,
    /// Removed: no new calls, those in flight go on
    Draining,
    /// Removed, and its connection closed; the last state of an endpoint, seen in updates only
    Gone,
}

impl std::fmt::Display for EndpointState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Connecting => "connecting",
            Self::Ready => "ready",
            Self::Backoff => "in backoff",
            Self::Draining => "draining",
            Self::Gone => "gone",
        })
    }
}

/// What calls and policies know of an endpoint; survives its connections
#[derive(Debug)]
pub(crate) struct Endpoint {
    /// Unique within the channel.
    pub(crate) number: u64,
    pub(crate) address: Address,
    /// `:authority` of its calls.
    pub(crate) authority: Authority,
    /// `:scheme` of its calls.
    pub(crate) scheme: Scheme,
    pub(crate) load: Arc<Load>,
    /// Of whoever judges it by its load.
    pub(crate) attention: Arc<Attention>,
    pub(crate) meters: EndpointMeters,
}

impl Endpoint {
    /// Counts a call as in flight until the guard is dropped; `None` if the endpoint is on trial, and others were faster
    pub(crate) fn start(self: &Arc<Self>, now: std::time::Instant) -> Option<InFlight> {
        let is_let_in = self.load.start(now);
        let in_flight = InFlight {
            endpoint: Arc::clone(self),
            started: now,
            waiting: true,
            code: Some(Code::Cancelled),
            trace: Trace::default(),
        };
        if !is_let_in {
            in_flight.untaken();
            return None;
        }
        self.attention.stir();
        self.meters.picked();
        Some(in_flight)
    }

    /// A call does not wait for its response any more: on trial that is for the pool to judge, and lets another one in
    fn on_trial_call(&self) {
        if self.load.is_on_trial() {
            self.attention.call();
        }
    }
}

/// A call in flight
///
/// Dropped, it has been given up by its caller: neither a success nor a failure.
#[derive(Debug)]
pub(crate) struct InFlight {
    endpoint: Arc<Endpoint>,
    started: std::time::Instant,
    /// Whether the response has yet to begin.
    waiting: bool,
    /// What it is told to have ended with if it is dropped now; `None`: nothing is told.
    code: Option<Code>,
    /// The call's, which is told the same.
    trace: Trace,
}

impl InFlight {
    /// The endpoint it is in flight to
    pub(crate) fn endpoint(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }

    /// Has the call's span say where it was sent, and in the end what it ended with
    pub(crate) fn trace(&mut self, trace: &Trace) {
        trace.sent_to(&self.endpoint.address);
        self.trace = trace.clone();
    }

    /// The response has begun; `outcome` if it has ended with that
    pub(crate) fn answered(&mut self, outcome: Option<Outcome>) {
        self.waiting = false;
        let now = Instant::now().into_std();
        let latency = now.saturating_duration_since(self.started);
        self.endpoint.meters.answered(latency);
        // Who fails at once is not fast.
        let counts = outcome.is_none_or(|outcome| outcome.verdict == Verdict::Success);
        self.endpoint.load.answered(counts.then_some(latency), now);
        self.endpoint.on_trial_call();
    }

    /// The call has ended
    pub(crate) fn ended(mut self, outcome: Outcome) {
        self.code = Some(outcome.code);
        let Endpoint { load, attention, .. } = &*self.endpoint;
        match outcome.verdict {
            Verdict::Success => load.succeeded(),
            Verdict::Failure => {
                let in_a_row = load.failed(Instant::now().into_std());
                if in_a_row == MOST_FAILURES {
                    attention.call();
                }
            }
            Verdict::Nothing => {}
        }
        self.endpoint.on_trial_call();
    }

    /// The endpoint has not taken the call
    pub(crate) fn untaken(mut self) {
        (self.waiting, self.code) = (false, None);
        self.endpoint.load.untaken();
        self.endpoint.on_trial_call();
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let load = &self.endpoint.load;
        if self.waiting {
            let now = Instant::now().into_std();
            load.given_up(now.saturating_duration_since(self.started), now);
            self.endpoint.on_trial_call();
        }
        load.finish();
        if let Some(code) = self.code {
            self.endpoint.meters.ended(code);
            self.trace.ended(code);
        }
    }
}

/// A change of an endpoint's state, told to its channel
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) endpoint: u64,
    pub(crate) state: EndpointState,
    /// With `Ready`.
    pub(crate) sender: Option<Sender>,
    /// Why the last connection or attempt ended.
    pub(crate) cause: Option<Arc<str>>,
}

/// The owner of an endpoint's task; dropping it drains the endpoint
#[derive(Debug)]
pub(crate) struct Handle {
    /// Whether the endpoint is to connect again when its connection ends; each message is news.
    wanted: watch::Sender<bool>,
    _removed: oneshot::Sender<Infallible>,
}

impl Handle {
    /// The server behind the endpoint has registered anew: a backoff ends, a connection is left alone
    pub(crate) fn renew(&self) {
        self.wanted.send_replace(true);
    }

    /// The endpoint keeps the connection that it has, and makes no other until it is [renewed](Self::renew)
    pub(crate) fn keep_only(&self) {
        self.wanted.send_replace(false);
    }
}

/// Starts the endpoint's task
pub(crate) fn spawn(
    endpoint: Arc<Endpoint>,
    config: connection::Config,
    events: mpsc::UnboundedSender<Event>,
) -> Handle {
    let (handle, removed) = oneshot::channel();
    let (wanted, wishes) = watch::channel(true);
    let worker = Worker { endpoint, config, events, wanted: wishes, failures: 0, drivers: JoinSet::new() };
    tokio::spawn(worker.run(removed));
    Handle { wanted, _removed: handle }
}

/// Attempts start at least this far apart: a server that accepts and hangs up at once is not dialled in a loop.
const SPACING: Duration = Duration::from_millis(100);
/// A connection lost this soon after its attempt began, without a single response, counts as a failed attempt.
const SHORT_LIVED: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Worker {
    endpoint: Arc<Endpoint>,
    config: connection::Config,
    events: mpsc::UnboundedSender<Event>,
    wanted: watch::Receiver<bool>,
    /// Attempts that failed in a row.
    failures: u32,
    /// Of the present connection, and of those that still drain.
    drivers: JoinSet<()>,
}

impl Worker {
    async fn run(mut self, mut removed: oneshot::Receiver<Infallible>) {
        tokio::select! {
            biased;
            _ = &mut removed => {}
            // Dropped with the connection in it, which drains.
            never = self.keep_connected() => match never {},
        }
        self.report(EndpointState::Draining, None, None);
        // A driver ends when its connection's last call has.
        while self.drivers.join_next().await.is_some() {}
        self.report(EndpointState::Gone, None, None);
    }

    async fn keep_connected(&mut self) -> Infallible {
        self.report(EndpointState::Connecting, None, None);
        loop {
            let started = Instant::now();
            let cause = match connection::connect(&self.endpoint.address, &self.config).await {
                Ok((connection, driver)) => {
                    while self.drivers.try_join_next().is_some() {}
                    self.drivers.spawn(driver);
                    self.report(EndpointState::Ready, Some(connection.sender().clone()), None);
                    let closed = connection.closed().await;
                    // What registered while we were connected to it is what we have lost.
                    self.wanted.mark_unchanged();
                    let useless = started.elapsed() < SHORT_LIVED && !connection.has_answered();
                    self.on_closed(closed, useless)
                }
                Err(error) => {
                    self.failures = self.failures.saturating_add(1);
                    error.to_string().into()
                }
            };
            self.pause(started, cause).await;
            // Else whoever wanted its connection alone hears that it has ended, and lets go of this task.
            if self.wanted.wait_for(|wanted| *wanted).await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    fn on_closed(&mut self, closed: Closed, useless: bool) -> Arc<str> {
        let (cause, failed) = match closed {
            Closed::GoAway { cause, calm } => {
                if calm {
                    self.calm();
                }
                (cause, false)
            }
            Closed::Lost(cause) => (cause, useless),
            Closed::Drained => ("drained".into(), false),
        };
        self.failures = if failed { self.failures.saturating_add(1) } else { 0 };
        cause
    }

    /// The server minds our pings: all connections from here on send fewer
    fn calm(&mut self) {
        let calmed = self.config.keep_alive.calmed();
        if calmed != self.config.keep_alive {
            let endpoint = &self.endpoint.address;
            tracing::warn!(%endpoint, keep_alive = ?calmed, "the server minds pings: sending them less often");
            self.config.keep_alive = calmed;
        }
    }

    /// Waits until the next attempt may start, counted from the start of the last one
    async fn pause(&mut self, started: Instant, cause: Arc<str>) {
        let wait = Backoff::CONNECTION.wait(self.failures, &mut fastrand::Rng::new());
        let next = started + wait.max(SPACING);
        if self.failures == 0 || next <= Instant::now() {
            self.report(EndpointState::Connecting, None, Some(cause));
            return sleep_until(next).await;
        }
        self.report(EndpointState::Backoff, None, Some(cause));
        tokio::select! {
            () = sleep_until(next) => {}
            // An error means that the handle is gone, and with it this task.
            Ok(()) = self.wanted.changed() => self.failures = 0,
        }
        self.report(EndpointState::Connecting, None, None);
    }

    fn report(&self, state: EndpointState, sender: Option<Sender>, cause: Option<Arc<str>>) {
        // Without a channel nobody wants to know any more.
        let _ = self.events.send(Event { endpoint: self.endpoint.number, state, sender, cause });
    }
}
