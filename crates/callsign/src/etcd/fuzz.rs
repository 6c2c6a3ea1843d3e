//! Keys, values and names under random input

use super::{
    EtcdOptions, ServiceName,
    entry::{Entry, Shown, id_of},
};
use crate::{
    fuzz::{PASSWORD, assert_one_line, assert_secret, run, with_password},
    instance::{
        Instance, Layout,
        format::{read, write},
    },
};

const VALUES: [&str; 12] = [
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
    "weight=5&calls=0.00&connections=1.00",
];

#[test]
fn any_value_is_an_instance_that_reads_back_the_same_or_garbage_of_one_line() {
    run("value", &VALUES, |value| match Entry::of("a.rpc/", b"a.rpc/1", value, 1) {
        Entry::Instance(instance) => assert_valid(&instance),
        Entry::Garbage(garbage) => assert_one_line(&garbage, 3000),
        Entry::Foreign => panic!("the key is of this service"),
    });
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
    run("key", &keys, |key| {
        assert_one_line(&format_args!("key={}", Shown(key)), 1000);
        let id = id_of("a.rpc/", key);
        match Entry::of("a.rpc/", key, b"h:1", 1) {
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
}

#[test]
fn any_name_is_a_prefix_or_an_error_of_one_line() {
    run("name", &["hello.rpc", "team/hello.rpc", "/a/", ""], |input| {
        let name = String::from_utf8_lossy(input);
        match ServiceName::parse(name.clone()) {
            Ok(service) => {
                assert_eq!(service.key(7), format!("{}7", service.prefix()));
                assert_one_line(&service, name.len());
            }
            // As long as what its author wrote.
            Err(error) => assert_one_line(&error, 100 + name.len() * 10),
        }
    });
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
    run("options", &OPTIONS, |input| {
        let text = String::from_utf8_lossy(input);
        if let Err(error) = text.parse::<EtcdOptions>() {
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
}
