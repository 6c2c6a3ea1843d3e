//! One key and its value, as an instance

use std::{fmt, sync::Arc};

use etcd_client::KeyValue;

use crate::instance::{
    Address, Instance, Metadata,
    format::{self, Unreadable},
};

/// Values are small; a registry that someone filled with large ones must not fill the memory of all clients.
const MAX_VALUE: usize = 64 * 1024;

/// An id is a number or an address; what is longer was not written by a registration.
const MAX_ID: usize = 1024;

/// What a key under a service's prefix is
#[derive(Debug)]
pub(crate) enum Entry {
    Instance(Instance),
    /// A deeper key (`<service>/a/b`): it belongs to another service
    Foreign,
    /// Nothing that can be read
    Garbage(Garbage),
}

impl Entry {
    /// Reads `pair`, whose key starts with `prefix`
    pub(crate) fn read(prefix: &str, pair: &KeyValue) -> Self {
        Self::of(prefix, pair.key(), pair.value(), pair.mod_revision())
    }

    pub(super) fn of(prefix: &str, key: &[u8], value: &[u8], mod_revision: i64) -> Self {
        match id(prefix, key) {
            Id::Foreign => Self::Foreign,
            Id::Garbage(garbage) => Self::Garbage(garbage),
            Id::Of(id) => match read(value) {
                Err(garbage) => Self::Garbage(garbage),
                Ok((address, metadata)) => {
                    Self::Instance(Instance { id: id.into(), address, mod_revision, metadata })
                }
            },
        }
    }
}

/// The instance id that `key` names, if it names one
pub(crate) fn id_of(prefix: &str, key: &[u8]) -> Option<Arc<str>> {
    match id(prefix, key) {
        Id::Of(id) => Some(id.into()),
        Id::Foreign | Id::Garbage(_) => None,
    }
}

enum Id<'a> {
    Of(&'a str),
    Foreign,
    Garbage(Garbage),
}

fn id<'a>(prefix: &str, key: &'a [u8]) -> Id<'a> {
    let id = key.strip_prefix(prefix.as_bytes()).unwrap_or_default();
    if id.contains(&b'/') {
        return Id::Foreign;
    }
    match std::str::from_utf8(id) {
        Ok("") => Id::Garbage(Garbage::Key("it has no instance id")),
        Ok(id) if id.len() > MAX_ID => Id::Garbage(Garbage::Key("its instance id is too long")),
        Ok(id) if id.chars().any(char::is_control) => Id::Garbage(Garbage::Key("it has control characters")),
        Ok(id) => Id::Of(id),
        Err(_) => Id::Garbage(Garbage::Key("it is not UTF-8")),
    }
}

fn read(value: &[u8]) -> Result<(Address, Metadata), Garbage> {
    if value.len() > MAX_VALUE {
        return Err(Garbage::TooLarge(value.len()));
    }
    let text = std::str::from_utf8(value).map_err(|_| Garbage::NotText)?;
    format::read(text).map_err(Garbage::Value)
}

/// Why an entry cannot be read
#[derive(Debug)]
pub(crate) enum Garbage {
    Key(&'static str),
    TooLarge(usize),
    NotText,
    Value(Unreadable),
}

impl fmt::Display for Garbage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(reason) => write!(f, "bad key: {reason}"),
            Self::TooLarge(size) => write!(f, "the value has {size} bytes, more than {MAX_VALUE}"),
            Self::NotText => f.write_str("the value is not UTF-8"),
            Self::Value(error) => error.fmt(f),
        }
    }
}

/// A key from etcd as it may be logged: escaped and cut
pub(crate) struct Shown<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LONGEST: usize = 200;
        let (shown, rest) = self.0.split_at(self.0.len().min(LONGEST));
        write!(f, "{}{}", shown.escape_ascii(), if rest.is_empty() { "" } else { "..." })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_name_an_instance_another_service_or_nothing() {
        assert_eq!(id_of("a.rpc/", b"a.rpc/7587862094067205428").as_deref(), Some("7587862094067205428"));
        assert_eq!(id_of("a.rpc/", b"a.rpc/10.0.0.1:80").as_deref(), Some("10.0.0.1:80"));
        for foreign in [&b"a.rpc/b/1"[..], b"a.rpc//", b"a.rpc/\xff/1"] {
            assert!(matches!(id("a.rpc/", foreign), Id::Foreign), "{}", Shown(foreign));
        }
        let long = [b"a.rpc/".as_slice(), &[b'x'; 2000]].concat();
        for garbage in [&b"a.rpc/"[..], b"a.rpc/\xff", b"a.rpc/\x07", &long] {
            assert!(matches!(id("a.rpc/", garbage), Id::Garbage(_)), "{}", Shown(garbage));
        }
    }

    #[test]
    fn values_are_instances_in_either_layout_or_garbage() {
        for value in [&b"10.0.0.1:8080"[..], br#"{"Op":0,"Addr":"10.0.0.1:8080","Metadata":{"weight":3}}"#] {
            let Entry::Instance(instance) = Entry::of("a/", b"a/1", value, 7) else { panic!("{value:?}") };
            assert_eq!((&*instance.id, instance.address.authority()), ("1", "10.0.0.1:8080"));
            assert_eq!(instance.mod_revision, 7);
            assert_eq!(instance.metadata.weight(), if value.starts_with(b"{") { 3 } else { 1 });
        }
        for (value, reason) in [
            (&b""[..], "port is missing"),
            (b"\xff\xfe", "not UTF-8"),
            (b"{\"Op\":0}", "has no Addr"),
            (&[b'{'; MAX_VALUE + 1], "65537 bytes"),
        ] {
            let Entry::Garbage(garbage) = Entry::of("a/", b"a/1", value, 7) else { panic!("{reason}") };
            assert!(garbage.to_string().contains(reason), "{garbage}");
        }
    }

    #[test]
    fn a_logged_key_is_escaped_and_cut() {
        assert_eq!(Shown(b"a\n\xff").to_string(), "a\\n\\xff");
        assert_eq!(Shown(&[b'x'; 1_000_000]).to_string().len(), 203);
    }
}
