//! Watches: cursors over the history
//!
//! A watch holds no events. It holds the revision it has read up to, so that a slow one costs nothing and catches up,
//! and one that compaction has overtaken is told so.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{Store, header, keys::Keys, refused::Refused, span::Span};
use crate::proto::{
    etcdserverpb::{WatchCreateRequest, WatchResponse, watch_create_request::FilterType},
    mvccpb::{Event, KeyValue, event::EventType},
};

/// Events of one response, about; a revision is never split. etcd's own batch is 1000 revisions.
const BATCH: usize = 1000;

/// Bytes of one response, about, so that a stream that nobody reads holds no more.
const BATCH_BYTES: usize = 1 << 20;

/// Past responses that [`Watches::resend`] looks at.
const RESENT: usize = 3;

/// The watches of one stream
#[derive(Debug, Default)]
pub(crate) struct Watches {
    watches: BTreeMap<i64, Watch>,
    next_id: i64,
    /// Where to look first, so that one busy watch does not starve the others.
    turn: i64,
}

#[derive(Debug)]
struct Watch {
    span: Span,
    /// The first revision it has not read.
    cursor: i64,
    puts: bool,
    deletes: bool,
    prev_kv: bool,
    fragment: bool,
    /// Compaction has overtaken it. It is told nothing more, but its id stays taken until it is canceled, as in etcd.
    over: bool,
    /// Since the last tick; None if it wants no word of its progress.
    quiet: Option<bool>,
}

/// What a watch is told next
pub(crate) struct Batch {
    pub(crate) response: WatchResponse,
    /// Of keys and values, about.
    pub(crate) bytes: usize,
    /// It may be sent in parts.
    pub(crate) fragment: bool,
}

impl Watches {
    /// Adds a watch; the answer says under which id, or why not
    pub(crate) fn create(&mut self, store: &Store, request: &WatchCreateRequest) -> WatchResponse {
        match self.insert(&store.keys, request) {
            Ok(watch_id) => {
                WatchResponse { header: store.header(), watch_id, created: true, ..Default::default() }
            }
            Err(refused) => refuse_watch(store, refused.to_string()),
        }
    }

    fn insert(&mut self, keys: &Keys, request: &WatchCreateRequest) -> Result<i64, Refused> {
        let span = Span::of_watch(&request.key, &request.range_end);
        if span.is_empty() {
            return Err(Refused::EmptyWatchRange);
        }
        let id = match request.watch_id {
            0 => {
                while self.watches.contains_key(&self.next_id) {
                    self.next_id += 1;
                }
                self.next_id += 1;
                self.next_id - 1
            }
            id if self.watches.contains_key(&id) => return Err(Refused::DuplicateWatchId),
            id => id,
        };
        let filtered = |filter: FilterType| request.filters.contains(&(filter as i32));
        let watch = Watch {
            span,
            // A revision in the future is waited for, silently.
            cursor: if request.start_revision == 0 { keys.revision() + 1 } else { request.start_revision },
            puts: !filtered(FilterType::Noput),
            deletes: !filtered(FilterType::Nodelete),
            prev_kv: request.prev_kv,
            fragment: request.fragment,
            over: false,
            quiet: request.progress_notify.then_some(true),
        };
        self.watches.insert(id, watch);
        Ok(id)
    }

    /// Ends a watch; an unknown one is not answered
    pub(crate) fn cancel(&mut self, store: &Store, watch_id: i64) -> Option<WatchResponse> {
        self.watches.remove(&watch_id)?;
        Some(WatchResponse { header: store.header(), watch_id, canceled: true, ..Default::default() })
    }

    /// What one of the watches is told next; None when all are told everything
    pub(crate) fn next(&mut self, store: &Store) -> Option<Batch> {
        let (keys, turn) = (&store.keys, self.turn);
        let (later, earlier) = (turn.., ..turn);
        let mut found = self.watches.range_mut(later).find_map(|(id, watch)| watch.step(keys, *id));
        if found.is_none() {
            found = self.watches.range_mut(earlier).find_map(|(id, watch)| watch.step(keys, *id));
        }
        let batch = found?;
        self.turn = batch.response.watch_id.saturating_add(1);
        Some(batch)
    }

    /// Words of progress for the watches that want them and were told nothing since the last time
    pub(crate) fn tick(&mut self, store: &Store) -> Vec<WatchResponse> {
        let now = store.keys.revision();
        let told = self.watches.iter_mut().filter_map(|(id, watch)| {
            let was_quiet = std::mem::replace(watch.quiet.as_mut()?, true);
            // One that has not read everything would be told of a revision whose events are still to come.
            (was_quiet && watch.cursor > now).then(|| progress(store, *id))
        });
        told.collect()
    }

    /// Whether any watch wants words of progress
    pub(crate) fn want_progress(&self) -> bool {
        self.watches.values().any(|watch| watch.quiet.is_some())
    }

    /// What a confused etcd sends: old events again, and the delete of a key that never was
    pub(crate) fn resend(&self, store: &Store) -> Vec<WatchResponse> {
        let keys = &store.keys;
        let per_watch = self.watches.iter().filter(|(_, watch)| !watch.over).map(|(id, watch)| {
            let mut events: Vec<_> =
                keys.before(watch.cursor).filter_map(|kv| watch.event(keys, kv)).take(RESENT).collect();
            events.reverse();
            events.extend(watch.unknown_delete(keys));
            WatchResponse { header: store.header(), watch_id: *id, events, ..Default::default() }
        });
        per_watch.filter(|response| !response.events.is_empty()).collect()
    }
}

/// The answer to a watch that is not allowed: created and canceled at once, under no id
pub(crate) fn refuse_watch(store: &Store, cancel_reason: String) -> WatchResponse {
    let (created, canceled) = (true, true);
    WatchResponse {
        header: store.header(),
        watch_id: -1,
        created,
        canceled,
        cancel_reason,
        ..Default::default()
    }
}

/// A response that says how far a watch has come; of id -1, how far all of a stream's have
pub(crate) fn progress(store: &Store, watch_id: i64) -> WatchResponse {
    WatchResponse { header: store.header(), watch_id, ..WatchResponse::default() }
}

impl Watch {
    /// The next batch, or the end of the watch
    fn step(&mut self, keys: &Keys, watch_id: i64) -> Option<Batch> {
        let (compacted, fragment) = (keys.compacted(), self.fragment);
        if self.over {
            return None;
        }
        if self.cursor < compacted {
            (self.over, self.quiet) = (true, None);
            // In etcd's own answer the header has no revision and there is no reason.
            let mut response = WatchResponse { header: Some(header(0)), watch_id, ..Default::default() };
            // A compaction at 0 cannot be told from none, and in etcd is not.
            (response.canceled, response.compact_revision) = (compacted != 0, compacted);
            return Some(Batch { response, bytes: 0, fragment });
        }
        if self.cursor > keys.revision() {
            return None;
        }
        let (events, bytes) = self.read(keys);
        if events.is_empty() {
            return None;
        }
        self.quiet = self.quiet.map(|_| false);
        let header = Some(header(keys.revision()));
        let response = WatchResponse { header, watch_id, events, ..Default::default() };
        Some(Batch { response, bytes, fragment })
    }

    /// Events from the cursor on, whole revisions of them, and their size
    fn read(&mut self, keys: &Keys) -> (Vec<Event>, usize) {
        let (mut events, mut bytes) = (Vec::new(), 0);
        for kv in keys.since(self.cursor) {
            let full = events.len() >= BATCH || bytes >= BATCH_BYTES;
            if full && kv.mod_revision >= self.cursor {
                return (events, bytes);
            }
            self.cursor = kv.mod_revision + 1;
            if let Some(event) = self.event(keys, kv) {
                bytes += kv.key.len() + kv.value.len();
                events.push(event);
            }
        }
        self.cursor = keys.revision() + 1;
        (events, bytes)
    }

    fn event(&self, keys: &Keys, kv: &KeyValue) -> Option<Event> {
        let put = kv.version > 0;
        if !(if put { self.puts } else { self.deletes }) || !self.span.contains(&kv.key) {
            return None;
        }
        let r#type = if put { EventType::Put } else { EventType::Delete } as i32;
        let before = kv.mod_revision - 1;
        // A key that is made has nothing before it, not even what the same transaction deleted.
        let created = put && kv.create_revision == kv.mod_revision;
        let known = self.prev_kv && !created && before >= keys.compacted();
        let prev_kv = if known { keys.at(&kv.key, before).cloned() } else { None };
        Some(Event { r#type, kv: Some(kv.clone()), prev_kv })
    }

    fn unknown_delete(&self, keys: &Keys) -> Option<Event> {
        let key: Bytes = [self.span.start(), &b"~never-was"[..]].concat().into();
        let kv = KeyValue { key, mod_revision: keys.revision(), ..KeyValue::default() };
        let wanted = self.deletes && self.span.contains(&kv.key);
        wanted.then(|| Event { r#type: EventType::Delete as i32, kv: Some(kv), prev_kv: None })
    }
}
