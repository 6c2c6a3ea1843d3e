//! The endpoints of a channel by discovery's keys: made, renewed, held and let go

use std::{
    collections::HashMap,
    hash::Hash,
    sync::Arc,
    time::{Duration, Instant},
};

use callsign_core::{
    hold::{Decision, Hold, Stands},
    load::Load,
};
use tokio::sync::mpsc;

use super::{
    book::{Book, Standing},
    selection::Selected,
};
use crate::{
    attention::Attention,
    connection,
    endpoint::{self, Endpoint, Event, Handle},
    instance::Instance,
    metrics::ChannelMeters,
};

/// What endpoints are made with
#[derive(Debug)]
pub(super) struct EndpointConfig {
    pub(super) connection: connection::Config,
    pub(super) meters: Arc<ChannelMeters>,
    pub(super) attention: Arc<Attention>,
}

/// Every endpoint that is not let go of: those that are selected, and removed ones that keep their connections
pub(super) struct Members<K> {
    listed: HashMap<K, Member>,
    /// They are looked at whenever anything happens, the others are not.
    removed: HashMap<K, Member>,
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
            hold: Hold::new(hold_window),
            config,
            next_number: 0,
        }
    }

    /// `instance` is to be connected to, which may be known; a new endpoint tells `reporter` what becomes of it
    pub(super) fn insert(
        &mut self,
        key: K,
        (instance, authority): Selected,
        book: &mut Book,
        reporter: &mpsc::UnboundedSender<Event>,
        now: Instant,
    ) {
        let is_same = |known: &Member| known.instance.address == instance.address;
        if let Some(member) = self.listed.get_mut(&key).filter(|known| is_same(known)) {
            if is_anew(&member.instance, &instance) {
                member.handle.renew();
                book.renew(member.number);
            }
            book.describe(member.number, &instance.metadata);
            member.instance = instance;
            return;
        }
        if self.removed.get(&key).is_some_and(is_same)
            && let Some(member) = self.removed.remove(&key)
        {
            member.handle.renew();
            book.renew(member.number);
            self.hold.insert(member.number, now);
            book.set_standing(member.number, Standing::Listed);
            book.describe(member.number, &instance.metadata);
            self.listed.insert(key, Member { instance, ..member });
            return;
        }
        // Another address under the same key is another endpoint.
        self.let_go(&key, book, now);
        let number = self.next_number;
        self.next_number += 1;
        let (address, load) = (instance.address.clone(), Arc::new(Load::new(now)));
        let scheme = self.config.connection.transport.scheme();
        let attention = Arc::clone(&self.config.attention);
        let meters = self.config.meters.endpoint(&address);
        let endpoint = Arc::new(Endpoint { number, address, authority, scheme, load, attention, meters });
        book.add(Arc::clone(&endpoint), instance.metadata.clone());
        let handle = endpoint::spawn(endpoint, self.config.connection.clone(), reporter.clone());
        self.hold.insert(number, now);
        self.listed.insert(key, Member { number, instance, handle });
    }

    /// Discovery has removed `key`: no new calls, unless it turns out to be one of many
    pub(super) fn remove(&mut self, key: &K, book: &mut Book, now: Instant) {
        let Some((key, member)) = self.listed.remove_entry(key) else { return };
        let kept = self.hold.is_on() && book.answers(member.number);
        self.hold.remove(member.number, kept, now);
        if kept {
            member.handle.keep_only();
            self.removed.insert(key, member);
        } else {
            book.set_standing(member.number, Standing::Leaving);
        }
    }

    /// `key` is not to be connected to any more, although discovery lists it: nothing to hold on to
    pub(super) fn forgo(&mut self, key: &K, book: &mut Book) {
        if let Some(member) = self.listed.remove(key) {
            self.hold.forget(member.number);
            book.set_standing(member.number, Standing::Leaving);
        }
        self.let_go_removed(key, book);
    }

    /// Drains an endpoint, whatever else is removed
    fn let_go(&mut self, key: &K, book: &mut Book, now: Instant) {
        if let Some(member) = self.listed.remove(key) {
            self.hold.remove(member.number, false, now);
            book.set_standing(member.number, Standing::Leaving);
        }
        self.let_go_removed(key, book);
    }

    fn let_go_removed(&mut self, key: &K, book: &mut Book) {
        if let Some(member) = self.removed.remove(key) {
            self.hold.lost(member.number);
            book.set_standing(member.number, Standing::Leaving);
        }
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
    use crate::instance::Address;

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
