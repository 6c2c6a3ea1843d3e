//! What a session shows and logs of the host it uses

use tokio::sync::watch;

use super::request::RequestError;
use crate::instance::Address;

/// Where a session stands, as its last request or stream has found it
///
/// That of reads, writes and watches; keepalives go over a connection of their own. A session that nobody uses asks
/// nothing, and notices nothing.
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
    /// etcd answers and refuses the login: the password or the user has to be corrected. Tried again every 30 s
    Refused {
        /// What etcd said
        cause: String,
    },
}

/// The visible state; logs its changes, once each
#[derive(Debug)]
pub(super) struct Report {
    state: watch::Sender<SessionState>,
}

impl Report {
    pub(super) fn new() -> Self {
        Self { state: watch::Sender::new(SessionState::Connecting) }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<SessionState> {
        self.state.subscribe()
    }

    /// `host` has answered, after `last` went wrong with another one
    pub(super) fn on_answered(&self, host: &Address, last: Option<&RequestError>) {
        // Asked first: this is called for each answer, and nearly none is news.
        let known = matches!(&*self.state.borrow(), SessionState::Connected { host: known } if known == host);
        if known {
            return;
        }
        let former = self.state.send_replace(SessionState::Connected { host: host.clone() });
        match former {
            SessionState::Connected { host: from } => {
                let cause = last.map(tracing::field::display);
                tracing::info!(%from, to = %host, cause, "moved to another etcd host");
            }
            _ => tracing::info!(%host, "connected to etcd"),
        }
    }

    /// Each host has failed since the last answer
    pub(super) fn on_disconnected(&self, cause: &RequestError) {
        let former = self.state.send_replace(SessionState::Disconnected { cause: cause.to_string() });
        match former {
            SessionState::Disconnected { .. } => tracing::debug!(%cause, "still no etcd host answers"),
            _ => tracing::warn!(%cause, "no etcd host answers; trying again"),
        }
    }

    /// etcd has refused the login
    pub(super) fn on_refused(&self, cause: &RequestError) {
        let former = self.state.send_replace(SessionState::Refused { cause: cause.to_string() });
        match former {
            SessionState::Refused { .. } => tracing::debug!(%cause, "etcd still refuses the login"),
            _ => tracing::warn!(%cause, "etcd refuses the login; trying again slowly"),
        }
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
        report.on_refused(&error);
        assert_eq!(*state.borrow_and_update(), SessionState::Refused { cause: "etcd a:1: gone".into() });
    }
}
