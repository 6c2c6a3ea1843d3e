//! Addresses and metadata under random input

use super::{
    Address, Layout, Metadata,
    format::{read, write},
};
use crate::fuzz::{assert_one_line, assert_secret, run, with_password};

const ADDRESSES: [&str; 8] = [
    "10.0.0.1:8080",
    "db-1.example.com:1",
    "[2001:db8::1]:443",
    "http://a_b:65535",
    "https://[::ffff:1.2.3.4]:8443",
    "http://root:secret@host:80",
    "",
    "ftp://[fe80::1%eth0]:80/path",
];

#[test]
fn any_text_is_an_address_that_displays_as_itself_or_an_error_of_one_line() {
    run("address", &ADDRESSES, |input| {
        let text = String::from_utf8_lossy(input);
        match text.parse::<Address>() {
            Ok(address) => {
                let scheme = match (address.is_http(), address.is_https()) {
                    (true, _) => "http://",
                    (_, true) => "https://",
                    _ => "",
                };
                assert_eq!(format!("{scheme}{address}").parse(), Ok(address.clone()));
                assert_ne!(address.port(), 0);
                assert!(!address.host().is_empty() && address.authority().is_ascii());
                http::uri::Authority::try_from(address.authority()).expect("an authority");
            }
            Err(error) => assert_one_line(&error, 3000),
        }
        if let Err(error) = with_password(&text).parse::<Address>() {
            assert_secret(&error);
        }
    });
}

#[test]
fn any_host_and_port_are_an_address_or_an_error_of_one_line() {
    run("host", &["10.0.0.1", "::1", "a-b.c_d", "", "a:1"], |input| {
        let text = String::from_utf8_lossy(input);
        match Address::new(&text, u16::from(input.first().copied().unwrap_or_default())) {
            Ok(address) => assert_eq!(address.to_string().parse(), Ok(address)),
            Err(error) => assert_one_line(&error, 3000),
        }
    });
}

#[test]
fn what_is_said_is_written_and_read_back_the_same() {
    let samples =
        ["weight=5;zone=eu-1;version=v1.2;team=greetings", "a=1;b=2;c=<&>\u{2028}\\\"", "=;zone=;weight=x"];
    run("metadata", &samples, |input| {
        let metadata = said(&String::from_utf8_lossy(input));
        let address: Address = "10.0.0.1:8080".parse().unwrap();
        let written = write(Layout::Grpc, &address, &metadata);
        assert!(written.len() < 64 * 1024, "a value that readers skip");
        let (read_address, read_metadata) = read(&written).expect("ours");
        assert_eq!((&read_address, &read_metadata), (&address, &metadata));

        let value: serde_json::Value = serde_json::from_str(&written).expect("JSON");
        assert_eq!((&value["Op"], &value["Addr"]), (&0.into(), &"10.0.0.1:8080".into()));
        // As Go sees it: null, or an object sorted by key.
        assert_eq!(value["Metadata"].is_null(), metadata.is_empty());
        let keys = value["Metadata"].as_object().map_or(0, serde_json::Map::len);
        let fixed = [metadata.weight() != 1, metadata.zone().is_some(), metadata.version().is_some()];
        assert_eq!(keys, metadata.iter().len() + fixed.into_iter().filter(|is| *is).count());

        assert_eq!(write(Layout::GoZero, &address, &Metadata::new()), "10.0.0.1:8080");
    });
}

/// `key=value` with semicolons between; what cannot be said is left out
fn said(text: &str) -> Metadata {
    text.split(';').fold(Metadata::new(), |metadata, pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let more = match key {
            "weight" => Ok(metadata.clone().with_weight(value.parse().unwrap_or(7))),
            "zone" => metadata.clone().with_zone(value),
            "version" => metadata.clone().with_version(value),
            _ => metadata.clone().with(key, value),
        };
        more.unwrap_or_else(|error| {
            assert_one_line(&error, 3000);
            metadata
        })
    })
}
