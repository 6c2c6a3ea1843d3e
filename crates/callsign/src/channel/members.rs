//! The endpoints of a channel by discovery's keys: made, renewed, held and let go

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    sync::Arc,
    time::{Duration, Instant},
};

use callsign_core::{
    hold::{Decision, Hold, Stands},
    load::Load,
};
use http::uri::Authority;
use tokio::sync::mpsc;

use super::shared::{Book, Standing};
use crate::{
    connection,
    endpoint::{self, Endpoint, Event, Handle},
    instance::{Address, Instance},
    metrics::ChannelMeters,
};

/// What endpoints are made with
#[derive(Debug)]
pub(super) struct EndpointConfig {
    pub(super) connection: connection::Config,
    /// Instead of each endpoint's address.
    pub(super) authority: Option<Authority>,
    pub(super) meters: Arc<ChannelMeters>,
}

/// Every endpoint that is not let go of: those that discovery lists, and removed ones that keep their connections
pub(super) struct Members<K> {
    listed: HashMap<K, Member>,
    /// They are looked at whenever anything happens, the others are not.
    removed: HashMap<K, Member>,
    /// Listed ones that cannot be used, which was said.
    skipped: HashSet<K>,
    hold: Hold,
    config: EndpointConfig,
    next_number: u64,
}

struct Member {
    number: u64,
    /// As discovery has told it last
    instance: Instance,
    /// Its drop drains the endpoint.
    handle: Handle,
}

impl<K: Hash + Eq> Members<K> {
    pub(super) fn new(config: EndpointConfig, hold_window: Duration) -> Self {
        Self {
            listed: HashMap::new(),
            removed: HashMap::new(),
            skipped: HashSet::new(),
            hold: Hold::new(hold_window),
            config,
            next_number: 0,
        }
    }

    /// Discovery lists `instance`, which may be known; a new endpoint tells `reporter` what becomes of it
    pub(super) fn insert(
        &mut self,
        key: K,
        instance: Instance,
        book: &mut Book,
        reporter: &mpsc::UnboundedSender<Event>,
        now: Instant,
    ) {
        let is_same = |known: &Member| known.instance.address == instance.address;
        if let Some(member) = self.listed.get_mut(&key).filter(|known| is_same(known)) {
            if is_anew(&member.instance, &instance) {
                member.handle.renew();
            }
            book.describe(member.number, &instance.metadata);
            member.instance = instance;
            return;
        }
        if self.removed.get(&key).is_some_and(is_same)
            && let Some(member) = self.removed.remove(&key)
        {
            member.handle.renew();
            self.hold.insert(member.number, now);
            book.set_standing(member.number, Standing::Listed);
            book.describe(member.number, &instance.metadata);
            self.listed.insert(key, Member { instance, ..member });
            return;
        }
        // Another address under the same key is another endpoint. The old one goes also when the new one cannot be used:
        // discovery does not list it any more.
        self.let_go(&key, book, now);
        let authority = match self.authority(&instance.address) {
            Ok(authority) => authority,
            Err(reason) => {
                // Not with each registration anew.
                if self.skipped.insert(key) {
                    tracing::warn!(address = %instance.address, reason, "instance skipped");
                }
                return;
            }
        };
        self.skipped.remove(&key);
        let number = self.next_number;
        self.next_number += 1;
        let (address, load) = (instance.address.clone(), Arc::new(Load::new(now)));
        let meters = self.config.meters.endpoint(&address);
        let endpoint = Arc::new(Endpoint { number, address, authority, load, meters });
        book.add(Arc::clone(&endpoint), instance.metadata.clone());
        let handle = endpoint::spawn(endpoint, self.config.connection.clone(), reporter.clone());
        self.hold.insert(number, now);
        self.listed.insert(key, Member { number, instance, handle });
    }

    /// The `:authority` of calls to `address`, or why there can be none
    fn authority(&self, address: &Address) -> Result<Authority, String> {
        if address.is_https() {
            // Going on in plaintext would be a silent downgrade.
            return Err("TLS is not supported yet".into());
        }
        match &self.config.authority {
            Some(authority) => Ok(authority.clone()),
            None => Authority::try_from(address.authority())
                .map_err(|error| format!("not a valid authority: {error}")),
        }
    }

    /// Discovery has removed `key`: no new calls, unless it turns out to be one of many
    pub(super) fn remove(&mut self, key: &K, book: &mut Book, now: Instant) {
        let Some((key, member)) = self.listed.remove_entry(key) else {
            self.skipped.remove(key);
            return;
        };
        let kept = self.hold.is_on() && book.answers(member.number);
        self.hold.remove(member.number, kept, now);
        if kept {
            member.handle.keep_only();
            self.removed.insert(key, member);
        } else {
            book.set_standing(member.number, Standing::Leaving);
        }
    }

    /// Drains an endpoint, whatever else is removed
    fn let_go(&mut self, key: &K, book: &mut Book, now: Instant) {
        let member = if let Some(listed) = self.listed.remove(key) {
            self.hold.remove(listed.number, false, now);
            listed
        } else if let Some(removed) = self.removed.remove(key) {
            self.hold.lost(removed.number);
            removed
        } else {
            return;
        };
        book.set_standing(member.number, Standing::Leaving);
    }

    /// Judges the changes since the last time together: removed endpoints are held, or drain
    pub(super) fn settle(&mut self, service: &str, book: &mut Book, now: Instant) {
        for member in self.removed.values().filter(|member| !book.answers(member.number)) {
            self.hold.lost(member.number);
        }
        let decision = self.hold.decide(now);
        self.removed.retain(|_, member| {
            let stands = self.hold.stands(member.number);
            let held = stands == Stands::Held;
            book.set_standing(member.number, if held { Standing::Held } else { Standing::Leaving });
            stands != Stands::Gone
        });
        tell(service, decision);
    }

    /// When [`settle`](Self::settle) is next called for, though nothing may have changed
    pub(super) fn due(&self) -> Option<Instant> {
        self.hold.due()
    }
}

fn tell(service: &str, decision: Decision) {
    if let Some(vanished) = decision.began {
        tracing::warn!(
            service,
            vanished = vanished.missing,
            of = vanished.of,
            held = decision.held,
            "too many instances vanished at once: those that still answer are held"
        );
    } else if decision.held > 0 {
        tracing::debug!(service, held = decision.held, "more endpoints are held");
    }
    if decision.ended {
        tracing::info!(service, "no endpoint is held any more");
    }
}

/// Whether the server behind a known key has registered anew
///
/// A lower revision is news, too: in an etcd that was wiped a restarted server has one, under whatever id. That an older
/// instance is shown since a newer one has left looks the same, and costs an attempt to connect at most. Where there are
/// no revisions every insert is news.
fn is_anew(known: &Instance, instance: &Instance) -> bool {
    let (before, now) = (known.mod_revision, instance.mod_revision);
    now == 0 || now != before
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_revision_is_news_of_the_server_whatever_its_id() {
        let instance = |id: &str, mod_revision| {
            let address = Address::new("h", 1).unwrap();
            Instance { id: id.into(), mod_revision, ..Instance::new(address) }
        };
        let is_anew = |before, now| super::is_anew(&before, &now);
        assert!(is_anew(instance("a", 5), instance("a", 6)) && is_anew(instance("a", 5), instance("b", 6)));
        assert!(!is_anew(instance("a", 5), instance("a", 5)), "only the metadata is another");
        assert!(is_anew(instance("a", 5000), instance("a", 3)), "etcd was wiped");
        assert!(is_anew(instance("a", 5000), instance("b", 3)), "etcd was wiped and the server restarted");
        assert!(is_anew(instance("a", 0), instance("a", 0)), "a list of one's own has no revisions");
    }
}
