//! An instance as a value in etcd

use std::fmt::Write as _;

use super::Layout;
use crate::instance::{
    Address, Metadata,
    metadata::{VERSION, WEIGHT, ZONE},
};

/// The value of an instance at `address`
///
/// The go-zero layout has no room for metadata: whoever chose it has none.
pub(crate) fn write(layout: Layout, address: &Address, metadata: &Metadata) -> String {
    match layout {
        Layout::GoZero => address.to_string(),
        Layout::Grpc => grpc(address, metadata),
    }
}

/// Byte for byte what Go's `json.Marshal` makes of `struct { Op uint8; Addr string; Metadata any }`
fn grpc(address: &Address, metadata: &Metadata) -> String {
    let mut value = String::from(r#"{"Op":0,"Addr":"#);
    push_text(&mut value, address.authority());
    value.push_str(r#","Metadata":"#);
    push_metadata(&mut value, metadata);
    value.push('}');
    value
}

fn push_metadata(to: &mut String, metadata: &Metadata) {
    if metadata.is_empty() {
        return to.push_str("null");
    }
    let weight = metadata.weight();
    let mut fields: Vec<_> = metadata.iter().collect();
    fields.extend(metadata.zone().map(|zone| (ZONE, zone)));
    fields.extend(metadata.version().map(|version| (VERSION, version)));
    // No free pair has this key: the empty text only marks its place.
    fields.extend((weight != Metadata::default().weight()).then_some((WEIGHT, "")));
    // Go sorts the keys of a map by their bytes.
    fields.sort_unstable();
    for (position, (key, text)) in fields.into_iter().enumerate() {
        to.push(if position == 0 { '{' } else { ',' });
        push_text(to, key);
        to.push(':');
        if key == WEIGHT {
            // Writing to a string cannot fail.
            let _ = write!(to, "{weight}");
        } else {
            push_text(to, text);
        }
    }
    to.push('}');
}

/// A JSON string with the escapes of Go, which also spares HTML and JavaScript
fn push_text(to: &mut String, text: &str) {
    to.push('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => to.extend(['\\', character]),
            // Control characters are in no address and no metadata.
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' | '\0'..' ' => {
                let _ = write!(to, "\\u{:04x}", u32::from(character));
            }
            _ => to.push(character),
        }
    }
    to.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(metadata: &Metadata) -> String {
        write(Layout::Grpc, &"10.0.0.1:8080".parse().unwrap(), metadata)
    }

    #[test]
    fn the_go_zero_layout_is_the_address_and_nothing_else() {
        for address in ["10.0.0.1:8080", "[::1]:80", "https://h:1"] {
            let written = write(Layout::GoZero, &address.parse().unwrap(), &Metadata::new());
            assert_eq!(written, address.trim_start_matches("https://"));
        }
    }

    /// The expected bytes are what Go's `json.Marshal` printed.
    #[test]
    fn the_grpc_layout_is_what_go_marshals() {
        assert_eq!(written(&Metadata::new()), r#"{"Op":0,"Addr":"10.0.0.1:8080","Metadata":null}"#);
        let all = Metadata::new().with_weight(2).with_zone("a<b>&c").unwrap().with_version("v1").unwrap();
        let all = all.with("Zone", "x").unwrap().with("z\u{2028}", "q\"\\/é😀").unwrap();
        assert_eq!(
            written(&all),
            concat!(
                r#"{"Op":0,"Addr":"10.0.0.1:8080","Metadata":{"Zone":"x","version":"v1","weight":2,"#,
                r#""zone":"a\u003cb\u003e\u0026c","z\u2028":"q\"\\/é😀"}}"#
            )
        );
    }
}
