//! What is registered, checked before anything is asked of etcd

use std::{net::IpAddr, time::Duration};

use tokio::sync::watch;

use super::{
    Form, RegisterError, Registration, RegistrationState, id,
    key::Key,
    machine::{Machine, Phase},
    report::Report,
};
use crate::{
    etcd::{Etcd, ServiceName},
    instance::Address,
};

/// etcd's own floor at its default election timeout: it grants no less.
const MIN_TTL: Duration = Duration::from_secs(2);

/// Below this an election or a pause of etcd's leader costs the lease.
const SAFE_TTL: Duration = Duration::from_secs(5);

/// What is registered for how long, but not where: a server knows these before it has bound
#[derive(Debug)]
pub(crate) struct Terms {
    /// Without the namespace, which is the session's
    service: ServiceName,
    /// Of the key; in the grpc layout that is the address
    id: i64,
    /// In seconds, as etcd wants it
    ttl: i64,
    form: Form,
    /// Where its state is shown
    state: watch::Sender<RegistrationState>,
    /// Whether it begins with the key in etcd, or paused
    present: bool,
}

impl Terms {
    pub(crate) fn new(
        service: &str,
        id: Option<i64>,
        ttl: Duration,
        form: Form,
    ) -> Result<Self, RegisterError> {
        let service = ServiceName::parse(service)?;
        form.check(id)?;
        let id = id.unwrap_or_else(id::random);
        if id <= 0 {
            return Err(RegisterError::Id { id });
        }
        let state = watch::Sender::new(RegistrationState::Granting { cause: None });
        Ok(Self { service, id, ttl: seconds(ttl)?, form, state, present: true })
    }

    #[cfg(feature = "server")]
    pub(crate) fn shown_in(self, state: watch::Sender<RegistrationState>) -> Self {
        Self { state, ..self }
    }

    #[cfg(feature = "server")]
    pub(crate) fn present(self, present: bool) -> Self {
        Self { present, ..self }
    }

    /// Registers in the background, however long that takes
    pub(crate) fn start(self, etcd: &Etcd, address: &Address) -> Result<Registration, RegisterError> {
        self.begin(Phase::Granting, etcd, address)
    }

    /// Registers in the background; a first attempt that fails is the end, and [told](Registration::failed)
    pub(crate) fn attempt(self, etcd: &Etcd, address: &Address) -> Result<Registration, RegisterError> {
        self.begin(Phase::First, etcd, address)
    }

    fn begin(self, phase: Phase, etcd: &Etcd, address: &Address) -> Result<Registration, RegisterError> {
        published(address)?;
        let (key, value) = self.form.pair_of(&self.service, self.id, address)?;
        let key = etcd.namespace().key(&key);
        let report = Report::new(key.clone(), self.state);
        let (machine, wisher) =
            Machine::new(etcd.clone(), Key::new(key, value), self.ttl, report, self.present);
        Ok(machine.spawn(phase, wisher))
    }
}

/// Checks that an instance at `address` can be registered
pub(crate) fn published(address: &Address) -> Result<(), RegisterError> {
    if address.port() == 0 || is_unspecified(address) {
        return Err(RegisterError::Address { address: address.clone() });
    }
    // The value has no scheme: it would be lost unsaid.
    if address.is_https() {
        return Err(RegisterError::Https { address: address.clone() });
    }
    Ok(())
}

fn is_unspecified(address: &Address) -> bool {
    address.host().parse().is_ok_and(|ip: IpAddr| ip.is_unspecified())
}

fn seconds(ttl: Duration) -> Result<i64, RegisterError> {
    if ttl < MIN_TTL {
        return Err(RegisterError::Ttl { ttl });
    }
    if ttl < SAFE_TTL {
        tracing::warn!(?ttl, "a TTL under 5 s is lost when etcd elects a leader or pauses");
    }
    let up = u64::from(ttl.subsec_nanos() > 0);
    // etcd's own ceiling; no process outlives it.
    Ok(i64::try_from(ttl.as_secs().saturating_add(up)).unwrap_or(i64::MAX).min(9_000_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ttl_is_rounded_up_to_seconds() {
        assert_eq!(seconds(Duration::from_millis(5001)).unwrap(), 6);
        assert_eq!(seconds(Duration::from_secs(15)).unwrap(), 15);
        assert_eq!(seconds(Duration::MAX).unwrap(), 9_000_000_000);
    }
}
