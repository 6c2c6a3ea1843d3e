//! What a scripted server has seen and said

use std::sync::Arc;

use tokio::sync::watch;

/// Every stream that came in, in the order of their HEADERS; clones share it
#[derive(Clone, Debug)]
pub struct Record(Arc<watch::Sender<State>>);

#[derive(Debug, Default)]
struct State {
    calls: Vec<Taken>,
    /// The last stream id of the GOAWAY sent on a connection
    goaways: Vec<(usize, u32)>,
    /// The connection of each SETTINGS frame that the client has applied
    applied: Vec<usize>,
    /// The connection of each PING that the client has sent
    pings: Vec<usize>,
}

/// One stream that came in
#[derive(Clone, Debug)]
pub struct Taken {
    /// Number of the connection, from 0
    pub connection: usize,
    /// Id of the stream
    pub stream: u32,
    /// What was sent of the body
    pub body: Vec<u8>,
    /// Whether the client ended it
    pub ended: bool,
    /// Error code with which the client reset it
    pub reset: Option<u32>,
    /// What the server said about it
    pub fate: Fate,
    /// How many streams of its connection were open when it came, itself included
    pub open: usize,
}

/// What a server said about a stream
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nothing yet: it may be at work on it
    Open,
    /// It answered, with a response or a reset
    Answered,
    /// It did not process it: REFUSED_STREAM
    Refused,
    /// It did not process it: above the last id of a GOAWAY
    Excluded,
}

impl Taken {
    /// Whether the server may have processed it
    pub fn is_processed(&self) -> bool {
        matches!(self.fate, Fate::Open | Fate::Answered)
    }

    /// Whether its body contains `marker`, with which a test tells calls apart
    pub fn is_call(&self, marker: &str) -> bool {
        self.body.windows(marker.len()).any(|window| window == marker.as_bytes())
    }

    pub(super) fn is(&self, connection: usize, stream: u32) -> bool {
        self.connection == connection && self.stream == stream
    }
}

impl Default for Record {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(State::default())))
    }
}

impl Record {
    /// Every stream so far
    pub fn calls(&self) -> Vec<Taken> {
        self.0.borrow().calls.clone()
    }

    /// How often the call with `marker` in its body came in
    pub fn times_sent(&self, marker: &str) -> usize {
        self.calls().iter().filter(|call| call.is_call(marker)).count()
    }

    /// How often the call with `marker` in its body may have been processed
    pub fn times_processed(&self, marker: &str) -> usize {
        self.calls().iter().filter(|call| call.is_call(marker) && call.is_processed()).count()
    }

    /// Waits until `condition` gives a value
    pub async fn until<T>(&self, mut condition: impl FnMut(&[Taken]) -> Option<T>) -> T {
        let mut changes = self.0.subscribe();
        loop {
            if let Some(value) = condition(&changes.borrow_and_update().calls) {
                return value;
            }
            changes.changed().await.expect("the record holds the sender");
        }
    }

    /// Waits until the client has applied so many SETTINGS frames on a connection
    pub(super) async fn until_applied(&self, connection: usize, frames: usize) {
        let applied = |state: &State| state.applied.iter().filter(|at| **at == connection).count();
        let mut changes = self.0.subscribe();
        let met = changes.wait_for(|state| applied(state) >= frames).await;
        met.expect("the record holds the sender");
    }

    /// Waits until the client has sent so many PINGs on a connection
    pub(super) async fn until_pinged(&self, connection: usize, pings: usize) {
        let sent = |state: &State| state.pings.iter().filter(|at| **at == connection).count();
        let mut changes = self.0.subscribe();
        let met = changes.wait_for(|state| sent(state) >= pings).await;
        met.expect("the record holds the sender");
    }

    pub(super) fn on_ping(&self, connection: usize) {
        self.0.send_modify(|state| state.pings.push(connection));
    }

    pub(super) fn on_applied(&self, connection: usize) {
        self.0.send_modify(|state| state.applied.push(connection));
    }

    pub(super) fn on_headers(&self, connection: usize, stream: u32, ended: bool) {
        self.0.send_modify(|state| {
            let excluded = state.goaways.iter().any(|(at, last)| *at == connection && stream > *last);
            let fate = if excluded { Fate::Excluded } else { Fate::Open };
            let is_open = |call: &&Taken| {
                call.connection == connection && call.fate == Fate::Open && call.reset.is_none()
            };
            let open = 1 + state.calls.iter().filter(is_open).count();
            state.calls.push(Taken { connection, stream, body: Vec::new(), ended, reset: None, fate, open });
        });
    }

    pub(super) fn on_data(&self, connection: usize, stream: u32, data: &[u8], ended: bool) {
        self.on_stream(connection, stream, |call| {
            call.body.extend(data);
            call.ended |= ended;
        });
    }

    pub(super) fn on_reset(&self, connection: usize, stream: u32, code: u32) {
        self.on_stream(connection, stream, |call| call.reset = Some(code));
    }

    pub(super) fn on_answer(&self, connection: usize, stream: u32, fate: Fate) {
        self.on_stream(connection, stream, |call| call.fate = fate);
    }

    pub(super) fn on_goaway(&self, connection: usize, last: u32) {
        self.0.send_modify(|state| {
            state.goaways.push((connection, last));
            let above = |call: &&mut Taken| call.connection == connection && call.stream > last;
            state.calls.iter_mut().filter(above).for_each(|call| call.fate = Fate::Excluded);
        });
    }

    fn on_stream(&self, connection: usize, stream: u32, change: impl FnOnce(&mut Taken)) {
        self.0.send_modify(|state| {
            if let Some(call) = state.calls.iter_mut().find(|call| call.is(connection, stream)) {
                change(call);
            }
        });
    }
}
