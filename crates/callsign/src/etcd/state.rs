//! What a session shows and logs of the host it uses

use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::request::RequestError;
use crate::{instance::Address, metrics::SessionMeters};

/// Where a session stands, as its last request or stream has found it
///
/// Which host answers, or that none does, is said of reads, writes and watches; keepalives go over a connection of their
/// own. The login is the whole session's: while its last one was refused that is shown, whoever asked for it, and even
/// where an older token still does, until a login succeeds. A session that nobody uses asks nothing, and notices nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionState {
    /// No host has answered yet
    Connecting,
    /// This host has answered last
    Connected {
        /// The host
        host: Address,
    },
    /// No host answers; each was tried since the last answer, and they are tried again when they are needed
    Disconnected {
        /// What went wrong last
        cause: String,
    },
    /// etcd answers and refuses the login: the password or the user has to be corrected. Tried again every 30 s, as long as
    /// somebody needs it
    Refused {
        /// What etcd said
        cause: String,
    },
}

/// The visible state; logs its changes, once each
#[derive(Debug)]
pub(super) struct Report {
    found: Mutex<Found>,
    state: watch::Sender<SessionState>,
}

/// What the state comes of
#[derive(Debug)]
struct Found {
    /// How the hosts are; never [`SessionState::Refused`]
    hosts: SessionState,
    /// What etcd said, if the last login was refused
    refused: Option<String>,
    meters: SessionMeters,
}

impl Found {
    fn state(&self) -> SessionState {
        match &self.refused {
            // Where no host answers, none refuses.
            Some(cause) if !matches!(self.hosts, SessionState::Disconnected { .. }) => {
                SessionState::Refused { cause: cause.clone() }
            }
            _ => self.hosts.clone(),
        }
    }
}

impl Report {
    pub(super) fn new() -> Self {
        let state = SessionState::Connecting;
        let mut meters = SessionMeters::new();
        meters.on_state(&state);
        let found = Found { hosts: state.clone(), refused: None, meters };
        Self { found: Mutex::new(found), state: watch::Sender::new(state) }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<SessionState> {
        self.state.subscribe()
    }

    /// `host` has answered, after `last` went wrong with another one
    pub(super) fn on_answered(&self, host: &Address, last: Option<&RequestError>) {
        // Asked first: this is called for each answer, and nearly none is news.
        let known = matches!(&self.found().hosts, SessionState::Connected { host: known } if known == host);
        if !known {
            self.change(last, |found| found.hosts = SessionState::Connected { host: host.clone() });
        }
    }

    /// Each host has failed since the last answer
    pub(super) fn on_disconnected(&self, cause: &RequestError) {
        let hosts = SessionState::Disconnected { cause: cause.to_string() };
        self.change(None, |found| found.hosts = hosts);
    }

    /// etcd has refused the login
    pub(super) fn on_refused(&self, cause: &str) {
        self.change(None, |found| {
            found.refused = Some(cause.to_owned());
            found.meters.on_refused();
            // Who refuses has answered.
            if matches!(found.hosts, SessionState::Disconnected { .. }) {
                found.hosts = SessionState::Connecting;
            }
        });
    }

    /// A login has succeeded
    pub(super) fn on_logged_in(&self) {
        self.change(None, |found| found.refused = None);
    }

    fn found(&self) -> MutexGuard<'_, Found> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, last: Option<&RequestError>, change: impl FnOnce(&mut Found)) {
        let mut found = self.found();
        change(&mut found);
        let state = found.state();
        // Under the lock, so that states are shown in the order in which they came.
        let former = self.state.borrow().clone();
        log(&former, &state, last);
        if state != former {
            found.meters.on_change(&former, &state);
            self.state.send_replace(state);
        }
    }
}

fn log(former: &SessionState, state: &SessionState, last: Option<&RequestError>) {
    use SessionState::{Connected, Connecting, Disconnected, Refused};
    match (former, state) {
        (Connected { host: from }, Connected { host }) if from != host => {
            let cause = last.map(tracing::field::display);
            tracing::info!(%from, to = %host, cause, "moved to another etcd host");
        }
        (Connected { .. }, Connected { .. }) | (_, Connecting) => {}
        (_, Connected { host }) => tracing::info!(%host, "connected to etcd"),
        (Disconnected { .. }, Disconnected { cause }) => tracing::debug!(cause, "still no etcd host answers"),
        (_, Disconnected { cause }) => tracing::warn!(cause, "no etcd host answers; trying again"),
        (Refused { .. }, Refused { cause }) => tracing::debug!(cause, "etcd still refuses the login"),
        (_, Refused { cause }) => tracing::warn!(cause, "etcd refuses the login; trying again slowly"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(host: &str) -> Address {
        host.parse().unwrap()
    }

    #[test]
    fn a_state_lasts_until_the_next_one() {
        let report = Report::new();
        let mut state = report.subscribe();
        let error = RequestError::host(&host("a:1"), "gone");
        report.on_answered(&host("a:1"), None);
        assert_eq!(*state.borrow_and_update(), SessionState::Connected { host: host("a:1") });
        report.on_answered(&host("a:1"), None);
        assert!(!state.has_changed().unwrap(), "the same host is no news");
        report.on_answered(&host("b:1"), Some(&error));
        assert_eq!(*state.borrow_and_update(), SessionState::Connected { host: host("b:1") });
        report.on_disconnected(&error);
        assert_eq!(*state.borrow_and_update(), SessionState::Disconnected { cause: "etcd a:1: gone".into() });
        report.on_refused("wrong password");
        assert_eq!(*state.borrow_and_update(), SessionState::Refused { cause: "wrong password".into() });
    }

    /// It was `Connected` again at the next answer to an older token, and `Refused` at the next login, for ever
    #[test]
    fn a_refused_login_is_shown_until_one_succeeds_whatever_an_older_token_reaches() {
        let report = Report::new();
        let mut state = report.subscribe();
        report.on_answered(&host("a:1"), None);
        report.on_refused("wrong password");
        let refused = SessionState::Refused { cause: "wrong password".into() };
        assert_eq!(*state.borrow_and_update(), refused);
        report.on_answered(&host("a:1"), None);
        report.on_answered(&host("b:1"), None);
        report.on_refused("wrong password");
        assert!(!state.has_changed().unwrap());
        report.on_disconnected(&RequestError::host(&host("b:1"), "gone"));
        assert!(matches!(*state.borrow_and_update(), SessionState::Disconnected { .. }));
        report.on_answered(&host("a:1"), None);
        assert_eq!(*state.borrow_and_update(), refused);
        report.on_logged_in();
        assert_eq!(*state.borrow_and_update(), SessionState::Connected { host: host("a:1") });
    }

    #[test]
    fn who_refuses_a_login_is_there() {
        let report = Report::new();
        report.on_disconnected(&RequestError::host(&host("a:1"), "gone"));
        report.on_refused("wrong password");
        assert!(matches!(*report.subscribe().borrow(), SessionState::Refused { .. }));
        report.on_logged_in();
        assert_eq!(*report.subscribe().borrow(), SessionState::Connecting);
    }
}
