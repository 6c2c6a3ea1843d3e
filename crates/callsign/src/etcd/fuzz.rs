//! Keys, values and names under random input

use std::collections::BTreeMap;

use serde::{Serialize, de::DeserializeOwned};

use super::{
    EtcdOptions, Namespace, ServiceName,
    entry::{Entry, Shown, id_of},
    value::{Content, ValueKey, decode},
};
use crate::{
    fuzz::{PASSWORD, assert_one_line, assert_secret, run, with_password},
    instance::{
        Instance, Layout,
        format::{read, write},
    },
};

const VALUES: [&str; 14] = [
    "10.0.0.1:8080",
    "http://[::1]:80",
    "https://root:secret@host:1",
    r#"{"Op":0,"Addr":"10.0.0.1:8080","Metadata":null}"#,
    r#"{"Op":0,"Addr":"10.0.0.1:8080","Metadata":{"weight":5,"zone":"eu-1","version":"v1","team":"\u003cgreet\u003e"}}"#,
    r#"{"op":0,"addr":"[::1]:80","metadata":{"weight":"7","a":1.5,"b":true,"c":{"d":[1,2]},"e":null}}"#,
    r#"{"Op":1,"Addr":"h:1","Metadata":"text"}"#,
    r#"{"Op":256,"Addr":"h:1"}"#,
    r#"{"Addr":"http://root:secret@h"}"#,
    r#"{"id":"1","name":"h","version":"v1","metadata":{},"endpoints":["grpc://10.0.0.1:9000?isSecure=false"]}"#,
    r#"{"network":"tcp","address":"10.0.0.1:8888","weight":10,"tags":{"a":"b"}}"#,
    // Much in them may change, and they are read all the same.
    r#"{"Op":0,"Addr":"10.0.0.1:8080","Metadata":{"version":"a version that somebody has given a name and a date","weight":10}}"#,
    r#"{"Op":0,"Addr":"greeter-0.greeter.production.svc.cluster.local:8080","Metadata":{"team":"greetings and goodbyes"}}"#,
    "weight=5&calls=0.00&connections=1.00",
];

#[test]
fn any_value_is_an_instance_that_reads_back_the_same_or_garbage_of_one_line() {
    let mut share = Share::default();
    run("value", &VALUES, |value| {
        match share.count(Entry::of("a.rpc/", b"a.rpc/1", value, 1), is_instance) {
            Entry::Instance(instance) => assert_valid(&instance),
            Entry::Garbage(garbage) => assert_one_line(&garbage, 3000),
            Entry::Foreign => panic!("the key is of this service"),
        }
    });
    share.assert_fair();
}

fn is_instance(entry: &Entry) -> bool {
    matches!(entry, Entry::Instance(_))
}

/// How many inputs were read and how many refused: where nearly all are the same, the others show nothing
#[derive(Debug, Default)]
struct Share {
    read: u64,
    refused: u64,
}

impl Share {
    fn count<T>(&mut self, outcome: T, is_read: impl Fn(&T) -> bool) -> T {
        *if is_read(&outcome) { &mut self.read } else { &mut self.refused } += 1;
        outcome
    }

    /// At least a twentieth of each kind
    fn assert_fair(&self) {
        let Self { read, refused } = self;
        // Fewer are the samples as they are.
        let enough = read + refused > 1_000;
        assert!(!enough || 20 * read.min(refused) >= read + refused, "{self:?}");
    }
}

fn assert_valid(instance: &Instance) {
    let Instance { address, metadata, .. } = instance;
    let (read_address, read_metadata) = read(&write(Layout::Grpc, address, metadata)).expect("ours");
    // No scheme is ever written.
    assert_eq!((read_address.authority(), &read_metadata), (address.authority(), metadata));
    let go_zero = write(Layout::GoZero, address, metadata);
    assert_eq!(go_zero, format!("{address}"), "what go-zero dials");
    let (host, port) = go_zero.rsplit_once(':').expect("host:port");
    assert!(!host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
    let texts = metadata.iter().flat_map(|(key, value)| [key, value]);
    let texts: Vec<_> = texts.chain(metadata.zone()).chain(metadata.version()).collect();
    assert!(metadata.iter().len() <= 64 && texts.iter().map(|text| text.len()).sum::<usize>() <= 4096);
    assert!(!texts.iter().any(|text| text.chars().any(char::is_control)), "{metadata:?}");
}

#[test]
fn any_key_is_an_id_another_service_s_or_garbage_of_one_line() {
    let keys: [&[u8]; 6] = [
        b"a.rpc/7587862094067205428",
        b"a.rpc/10.0.0.1:80",
        b"a.rpc/b/1",
        b"a.rpc/",
        b"a.rpc/\xff",
        b"b.rpc/1",
    ];
    let mut share = Share::default();
    run("key", &keys, |key| {
        assert_one_line(&format_args!("key={}", Shown(key)), 1000);
        let id = id_of("a.rpc/", key);
        match share.count(Entry::of("a.rpc/", key, b"h:1", 1), is_instance) {
            Entry::Instance(instance) => {
                assert_eq!(Some(&instance.id), id.as_ref());
                assert_eq!(key, [b"a.rpc/", instance.id.as_bytes()].concat());
                assert!(!instance.id.contains('/') && !instance.id.chars().any(char::is_control));
            }
            Entry::Foreign => assert!(id.is_none()),
            Entry::Garbage(garbage) => {
                assert!(id.is_none());
                assert_one_line(&garbage, 200);
            }
        }
    });
    share.assert_fair();
}

#[test]
fn any_name_is_a_prefix_or_an_error_of_one_line() {
    let mut share = Share::default();
    run("name", &["hello.rpc", "team/hello.rpc", "/a/", ""], |input| {
        let name = String::from_utf8_lossy(input);
        match share.count(ServiceName::parse(name.clone()), Result::is_ok) {
            Ok(service) => {
                assert_eq!(service.key(7), format!("{}7", service.prefix()));
                assert_one_line(&service, name.len());
            }
            // As long as what its author wrote.
            Err(error) => assert_one_line(&error, 100 + name.len() * 10),
        }
    });
    share.assert_fair();
}

#[test]
fn any_key_of_a_value_is_as_it_was_written_or_an_error_of_one_line() {
    let namespace = Namespace::parse("/service").expect("valid");
    let mut share = Share::default();
    run("value_key", &["config/hello", "/config/hello/", "limit", ""], |input| {
        let name = String::from_utf8_lossy(input);
        match share.count(ValueKey::parse(name.clone(), &namespace), Result::is_ok) {
            Ok(key) => {
                assert_eq!(key.key(), format!("/service/{name}"));
                assert_eq!(key.to_string(), name);
                assert_one_line(&key, name.len());
            }
            // As long as what its author wrote.
            Err(error) => assert_one_line(&error, 100 + name.len() * 10),
        }
    });
    share.assert_fair();
}

const LIVE: [&str; 6] = [
    r#"{"greeting":"Hi","team":"\u003cgreet\u003e"}"#,
    r#"{"greeting":"Hi","every_ms":200}"#,
    "[1,2,3]",
    "7",
    r#""text""#,
    "null",
];

#[test]
fn any_live_value_is_what_it_says_or_an_error_of_one_line() {
    let mut share = Share::default();
    run("live_value", &LIVE, |input| {
        let content = Content::Bytes(input.into());
        let read = [
            reads_back::<BTreeMap<String, String>>(&content),
            reads_back::<Vec<u32>>(&content),
            reads_back::<u32>(&content),
            reads_back::<String>(&content),
            // Numbers with a fraction may read back as their neighbours.
            decoded::<serde_json::Value>(&content).is_some(),
        ];
        share.count(read.contains(&true), |read| *read);
    });
    share.assert_fair();
}

/// Whether it is a `T`, which then is written and read as the same
fn reads_back<T: DeserializeOwned + Serialize + PartialEq>(content: &Content) -> bool {
    let Some(value) = decoded::<T>(content) else { return false };
    let written = serde_json::to_vec(&value).expect("it was JSON before");
    assert!(decoded(&Content::Bytes(written.into())) == Some(value));
    true
}

fn decoded<T: DeserializeOwned>(content: &Content) -> Option<T> {
    match decode(content) {
        Ok(value) => Some(value.expect("there is one")),
        Err(error) => {
            assert_one_line(&error, 800);
            None
        }
    }
}

const OPTIONS: [&str; 8] = [
    "127.0.0.1:2379",
    "root:se%40cret@10.0.0.1:2379,10.0.0.2:2379?namespace=/service",
    "etcd:///a:2379,[::1]:2379?require_tls=true&tls_server_name=etcd",
    "https://a:2379?tls_ca=/etc/ca.pem&tls_cert=/etc/cert.pem&tls_key=/etc/key.pem",
    "http://a:1,https://b:2",
    "etcd://root:secret@a:1/hello.rpc",
    "a:1?key=x&unknown=1",
    "",
];

#[test]
fn any_text_is_a_session_s_options_or_an_error_of_one_line_and_neither_shows_a_secret() {
    let mut share = Share::default();
    run("options", &OPTIONS, |input| {
        let text = String::from_utf8_lossy(input);
        if let Err(error) = share.count(text.parse::<EtcdOptions>(), Result::is_ok) {
            // As long as what its author wrote.
            assert_one_line(&error, 4000 + text.len() * 20);
        }
        for secret in [with_password(&text), format!("root:{PASSWORD}@{text}")] {
            match secret.parse::<EtcdOptions>() {
                Ok(options) => assert!(!format!("{options:?}").contains(PASSWORD), "{options:?}"),
                Err(error) => assert_secret(&error),
            }
        }
    });
    share.assert_fair();
}
