//! A value in etcd as an instance
//!
//! `host:port`, with or without a scheme, or the object of etcd's naming for gRPC. The object is read as liberally as Go
//! does: names of fields in any case, the last of several counts, unknown fields are ignored, `Op` and `Metadata` may be
//! missing or null. Free pairs may also be numbers and booleans, whose text they become; what is neither is left out, as
//! is what is beyond the bounds of [`Metadata`].

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use crate::instance::{
    Address, AddressError, Metadata,
    metadata::{VERSION, WEIGHT, ZONE},
};

/// The address and the metadata in a value
pub(crate) fn read(value: &str) -> Result<(Address, Metadata), Unreadable> {
    // No address begins with a brace.
    if !value.trim_ascii_start().starts_with('{') {
        return Ok((value.parse().map_err(Unreadable::Address)?, Metadata::default()));
    }
    let Update { op, addr, metadata } =
        serde_json::from_str(value).map_err(|error| Unreadable::json(&error))?;
    match op {
        0 => {}
        1 => return Err(Unreadable::Deleted),
        _ => return Err(Unreadable::Op(op)),
    }
    if addr.is_empty() {
        return Err(Unreadable::NoAddress);
    }
    Ok((addr.parse().map_err(Unreadable::Address)?, metadata))
}

/// Why a value is no instance
///
/// Says nothing of what an object contains: it is foreign, and may hold secrets.
#[derive(Debug)]
pub(crate) enum Unreadable {
    Address(AddressError),
    Json { what: &'static str, line: usize, column: usize },
    NoAddress,
    Deleted,
    Op(u8),
}

impl Unreadable {
    fn json(error: &serde_json::Error) -> Self {
        let what = match error.classify() {
            serde_json::error::Category::Data => "is no instance",
            _ => "is no JSON",
        };
        Self::Json { what, line: error.line(), column: error.column() }
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(error) => error.fmt(f),
            Self::Json { what, line, column } => {
                write!(f, "the value begins with a brace and {what} (line {line}, column {column})")
            }
            Self::NoAddress => f.write_str("the object has no Addr"),
            Self::Deleted => f.write_str("the object says Op 1, which is a deletion"),
            Self::Op(op) => write!(f, "the object says Op {op}, which is unknown"),
        }
    }
}

/// Go's `struct { Op uint8; Addr string; Metadata any }`
#[derive(Default)]
struct Update {
    op: u8,
    addr: String,
    metadata: Metadata,
}

impl<'de> Deserialize<'de> for Update {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UpdateVisitor)
    }
}

struct UpdateVisitor;

impl<'de> Visitor<'de> for UpdateVisitor {
    type Value = Update;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an instance")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Update, A::Error> {
        let mut update = Update::default();
        while let Some(name) = map.next_key::<String>()? {
            match name.to_ascii_lowercase().as_str() {
                // To Go null is no news, but for a field of any type.
                "op" => update.op = map.next_value::<Option<_>>()?.unwrap_or(update.op),
                "addr" => update.addr = map.next_value::<Option<_>>()?.unwrap_or(update.addr),
                "metadata" => update.metadata = map.next_value::<Object>()?.0,
                _ => drop(map.next_value::<IgnoredAny>()?),
            }
        }
        Ok(update)
    }
}

/// Metadata: what is no object says nothing
struct Object(Metadata);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut metadata = Metadata::default();
        deserializer.deserialize_any(Shallow { pairs: Some(&mut metadata) })?;
        Ok(Self(metadata))
    }
}

/// A value within metadata, as text: what is nested or null has none
struct Flat(Option<String>);

impl<'de> Deserialize<'de> for Flat {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Shallow { pairs: None }).map(Self)
    }
}

/// Visits a value of any kind: a scalar becomes text, an array is skipped
struct Shallow<'a> {
    /// Takes the pairs of an object, which is skipped without
    pairs: Option<&'a mut Metadata>,
}

impl<'de> Visitor<'de> for Shallow<'_> {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Some(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Some(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(Some(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        match self.pairs {
            None => while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {},
            Some(pairs) => {
                while let Some((key, Flat(text))) = map.next_entry::<String, _>()? {
                    if let Some(text) = text {
                        take(pairs, &key, &text);
                    }
                }
            }
        }
        Ok(None)
    }
}

/// Takes one pair in, unless it is beyond the bounds
fn take(metadata: &mut Metadata, key: &str, text: &str) {
    // What is refused is left out: the rest of the instance is as good as ever.
    let _ = match key {
        WEIGHT => {
            let weight = text.trim().parse().unwrap_or(Metadata::default().weight());
            *metadata = std::mem::take(metadata).with_weight(weight);
            Ok(())
        }
        ZONE => metadata.set_zone(text),
        VERSION => metadata.set_version(text),
        _ => metadata.set(key, text),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(value: &str) -> (String, Metadata) {
        let (address, metadata) = read(value).unwrap_or_else(|error| panic!("{value}: {error}"));
        (address.to_string(), metadata)
    }

    fn metadata(json: &str) -> Metadata {
        let (address, metadata) = instance(&format!(r#"{{"Op":0,"Addr":"h:1","Metadata":{json}}}"#));
        assert_eq!(address, "h:1");
        metadata
    }

    fn garbage(value: &str) -> String {
        read(value).expect_err(value).to_string()
    }

    #[test]
    fn an_address_alone_is_an_instance_without_metadata() {
        assert_eq!(instance("10.0.0.1:8080"), ("10.0.0.1:8080".to_owned(), Metadata::new()));
        assert_eq!(instance("http://[::1]:80").0, "[::1]:80");
    }

    #[test]
    fn what_go_writes_is_read() {
        let all = concat!(
            r#"{"Op":0,"Addr":"10.0.0.1:8080","Metadata":{"Zone":"x","version":"v1","weight":2,"#,
            r#""zone":"a\u003cb\u003e\u0026c","z\u2028":"q\"\\/é😀"}}"#
        );
        let (address, metadata) = instance(all);
        assert_eq!((address.as_str(), metadata.weight()), ("10.0.0.1:8080", 2));
        assert_eq!((metadata.zone(), metadata.version()), (Some("a<b>&c"), Some("v1")));
        assert_eq!(metadata.iter().collect::<Vec<_>>(), [("Zone", "x"), ("z\u{2028}", "q\"\\/é😀")]);
        for none in ["null", "\"text\"", "7", "true", "[1,{}]", "{}"] {
            assert!(self::metadata(none).is_empty(), "{none}");
        }
    }

    /// Each as Go's decoder does it.
    #[test]
    fn fields_are_named_in_any_case_and_the_last_one_counts() {
        for (value, address) in [
            (r#"{"Addr":"a:1"}"#, "a:1"),
            (r#"{"aDDR":"a:1","oP":0,"METADATA":null}"#, "a:1"),
            (r#"{"Addr":"a:1","addr":"b:2"}"#, "b:2"),
            (r#"{"addr":"b:2","Addr":"a:1"}"#, "a:1"),
            (r#"{"Addr":"a:1","addr":null,"Op":null}"#, "a:1"),
            (r#" {"Addr":"a:1","x":{"y":[1,{"z":1e400}]}} "#, "a:1"),
            (r#"{"Op":1,"Addr":"https://a:1","op":0}"#, "a:1"),
        ] {
            assert_eq!(instance(value).0, address, "{value}");
        }
        let twice = instance(r#"{"Addr":"a:1","Metadata":{"a":1},"metadata":{"b":2}}"#).1;
        assert_eq!(twice.iter().collect::<Vec<_>>(), [("b", "2")]);
        assert!(instance(r#"{"Addr":"a:1","Metadata":{"a":1},"metadata":null}"#).1.is_empty());
    }

    #[test]
    fn scalars_become_text_and_what_is_nested_is_left_out() {
        let metadata = metadata(r#"{"a":1,"b":-2,"c":1.5,"d":true,"e":null,"f":{"g":1},"h":["i"],"j":"k"}"#);
        assert_eq!(
            metadata.iter().collect::<Vec<_>>(),
            [("a", "1"), ("b", "-2"), ("c", "1.5"), ("d", "true"), ("j", "k")]
        );
    }

    #[test]
    fn a_weight_is_a_number_or_its_text_and_anything_else_is_the_default() {
        for (json, weight) in [
            ("3", 3),
            ("0", 0),
            ("3.0", 3),
            ("\"7\"", 7),
            ("\" 7 \"", 7),
            ("4294967295", u32::MAX),
            ("4294967296", 1),
            ("-1", 1),
            ("1.5", 1),
            ("1e30", 1),
            ("\"heavy\"", 1),
            ("\"\"", 1),
            ("true", 1),
            ("[5]", 1),
            ("null", 1),
        ] {
            assert_eq!(metadata(&format!("{{\"weight\":{json}}}")).weight(), weight, "{json}");
        }
    }

    #[test]
    fn what_is_beyond_the_bounds_is_left_out_and_the_rest_stays() {
        let metadata = metadata(r#"{"a\n":"1","b":"\u001b[2J","":"x","zone":"\u0000","c":"2"}"#);
        assert_eq!((metadata.zone(), metadata.iter().collect::<Vec<_>>()), (None, vec![("c", "2")]));
        let many: Vec<_> = (0..1000).map(|number| format!("\"{number}\":\"x\"")).collect();
        assert_eq!(self::metadata(&format!("{{{}}}", many.join(","))).iter().len(), 64);
        let long = format!("{{\"a\":\"{}\",\"b\":\"2\"}}", "x".repeat(60_000));
        assert_eq!(self::metadata(&long).iter().collect::<Vec<_>>(), [("b", "2")]);
    }

    #[test]
    fn what_is_no_instance_says_why() {
        let deep = format!(r#"{{"Addr":"a:1","x":{}"#, "[".repeat(50_000));
        for (value, reason) in [
            ("", "the port is missing"),
            ("[1]", "the port is missing"),
            ("{", "is no JSON (line 1, column 1)"),
            (&deep, "is no JSON"),
            (r#"{"Addr":"a:1"} x"#, "is no JSON"),
            ("{\"Addr\":\"a:1\",\"x\":\"\t\"}", "is no JSON"),
            ("{\u{7}}", "is no JSON"),
            ("{}", "has no Addr"),
            (r#"{"Op":0,"Addr":""}"#, "has no Addr"),
            (r#"{"Op":0,"Addr":"h"}"#, "the port is missing"),
            (r#"{"Op":0,"Addr":7}"#, "is no instance"),
            (r#"{"Op":"0","Addr":"a:1"}"#, "is no instance"),
            (r#"{"Op":0.0,"Addr":"a:1"}"#, "is no instance"),
            (r#"{"Op":256,"Addr":"a:1"}"#, "is no instance"),
            (r#"{"Op":1,"Addr":"a:1"}"#, "Op 1, which is a deletion"),
            (r#"{"Op":2,"Addr":"a:1"}"#, "Op 2"),
            // Kratos, Kitex.
            (r#"{"id":"1","name":"h","endpoints":["grpc://10.0.0.1:9000"]}"#, "has no Addr"),
            (r#"{"network":"tcp","address":"10.0.0.1:8888","weight":10,"tags":{}}"#, "has no Addr"),
        ] {
            let error = garbage(value);
            assert!(error.contains(reason) && error.len() < 200, "{value:?}: {error}");
        }
        assert!(!garbage(r#"{"Op":"hunter2"}"#).contains("hunter2"), "what is foreign is not shown");
        assert!(!garbage(r#"{"Addr":"http://root:hunter2@h"}"#).contains("hunter2"));
    }

    #[test]
    fn deep_nesting_is_skipped_without_recursion() {
        let deep = format!("{}{}", "[".repeat(30_000), "]".repeat(30_000));
        assert_eq!(instance(&format!(r#"{{"Addr":"a:1","x":{deep}}}"#)).0, "a:1");
        assert!(metadata(&format!(r#"{{"x":{deep}}}"#)).is_empty());
    }
}
