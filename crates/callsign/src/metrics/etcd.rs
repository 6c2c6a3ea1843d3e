//! Of sessions, registrations and discoveries

use metrics::{Counter, SharedString};

use super::{
    DISCOVERIES, GRANTS, INSTANCES, LISTS, LOGINS_REFUSED, LOSSES, MOVES, Metric, REGISTRATIONS, RESUMES,
    SESSIONS, SKIPPED, share::Share,
};
use crate::etcd::{
    SessionState,
    discovery::DiscoveryState,
    registration::{LossCause, RegistrationState},
};

/// What is told of a session
#[derive(Debug)]
pub(crate) struct SessionMeters {
    standing: Standing,
    refused: Counter,
    moves: Counter,
}

impl SessionMeters {
    pub(crate) fn new() -> Self {
        let (refused, moves) = (LOGINS_REFUSED.counter([]), MOVES.counter([]));
        Self { standing: Standing::new(SESSIONS, None), refused, moves }
    }

    /// Where it stands now, and stood before
    pub(crate) fn on_change(&mut self, former: &SessionState, state: &SessionState) {
        use SessionState::Connected;
        if matches!((former, state), (Connected { .. }, Connected { .. })) {
            self.moves.increment(1);
        }
        self.on_state(state);
    }

    /// Where it stands
    pub(crate) fn on_state(&mut self, state: &SessionState) {
        self.standing.set(Some(match state {
            SessionState::Connecting => "connecting",
            SessionState::Connected { .. } => "connected",
            SessionState::Disconnected { .. } => "disconnected",
            SessionState::Refused { .. } => "refused",
        }));
    }

    /// etcd has refused a login
    pub(crate) fn on_refused(&self) {
        self.refused.increment(1);
    }
}

/// What is told of a registration
#[derive(Debug)]
pub(crate) struct RegistrationMeters {
    service: SharedString,
    standing: Standing,
    grants: Counter,
}

impl RegistrationMeters {
    /// Of the registration whose key is `<service>/<id>`
    pub(crate) fn new(key: &str) -> Self {
        let service = key.rsplit_once('/').map_or(key, |(service, _)| service);
        let service: SharedString = service.to_owned().into();
        let standing = Standing::new(REGISTRATIONS, Some(service.clone()));
        Self { standing, grants: GRANTS.counter([service.clone()]), service }
    }

    /// Where it stands now
    pub(crate) fn on_state(&mut self, state: &RegistrationState) {
        self.standing.set(match state {
            RegistrationState::Granting { .. } => Some("granting"),
            RegistrationState::Registered { .. } => Some("registered"),
            RegistrationState::Lost { .. } => Some("lost"),
            RegistrationState::Paused => Some("paused"),
            RegistrationState::Deregistered => None,
        });
    }

    /// etcd has granted a lease
    pub(crate) fn on_granted(&self) {
        self.grants.increment(1);
    }

    /// It was lost: rare enough to ask for the handle each time
    pub(crate) fn on_lost(&self, cause: LossCause) {
        let cause = match cause {
            LossCause::LeaseEnded => "lease_ended",
            LossCause::KeyDeleted => "key_deleted",
            LossCause::Overwritten => "overwritten",
            LossCause::Unconfirmed => "unconfirmed",
        };
        LOSSES.counter([self.service.clone(), cause.into()]).increment(1);
    }
}

/// What is told of a list and its watch
#[derive(Debug)]
pub(crate) struct DiscoveryMeters {
    standing: Standing,
    lists: Counter,
    resumes: Counter,
}

impl DiscoveryMeters {
    pub(crate) fn new(name: &str) -> Self {
        let name: SharedString = name.to_owned().into();
        let standing = Standing::new(DISCOVERIES, Some(name.clone()));
        Self { standing, lists: LISTS.counter([name.clone()]), resumes: RESUMES.counter([name]) }
    }

    /// Where it stands now
    pub(crate) fn on_state(&mut self, state: &DiscoveryState) {
        self.standing.set(Some(match state {
            DiscoveryState::Listing { .. } => "listing",
            DiscoveryState::Watching { .. } => "watching",
            DiscoveryState::Resuming { .. } => "resuming",
        }));
    }

    /// A list was read
    pub(crate) fn on_listed(&self) {
        self.lists.increment(1);
    }

    /// A watch goes on where another was interrupted
    pub(crate) fn on_resumed(&self) {
        self.resumes.increment(1);
    }
}

/// How many instances of a service are known
pub(crate) fn instances(service: &str) -> Share {
    Share::new(INSTANCES.gauge([service.to_owned().into()]))
}

/// Keys of a service that are no instance
pub(crate) fn skipped_keys(service: &str) -> Counter {
    SKIPPED.counter([service.to_owned().into()])
}

/// Counts something in the state that it is in, by a gauge whose last label is the state
#[derive(Debug)]
struct Standing {
    metric: Metric,
    label: Option<SharedString>,
    state: Option<&'static str>,
    counted: Option<Share>,
}

impl Standing {
    /// With `label`, if it has one before the state
    fn new(metric: Metric, label: Option<SharedString>) -> Self {
        Self { metric, label, state: None, counted: None }
    }

    /// It is in this state now, or not counted any more
    fn set(&mut self, state: Option<&'static str>) {
        if self.state == state {
            return;
        }
        self.state = state;
        self.counted = state.map(|state| {
            let labels = self.label.clone().into_iter().chain([state.into()]);
            let mut share = Share::new(self.metric.gauge(labels));
            share.set(1);
            share
        });
    }
}
