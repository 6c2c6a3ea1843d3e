//! Options as one line of text: for the environment, and for the targets of channels

use super::{EtcdOptions, tls::TlsText};
use crate::etcd::EtcdError;

/// Reads `[etcd:///][user:password@]host,host...[?option=value&...]`, and a `key` among the options
///
/// `%` and two hex digits are one byte. `@` and `%` need it everywhere, `?` in user and password, `:` in the user, `&` in
/// options. Of an `@` that is written as it is nobody knows where the hosts begin: an error, never a guess.
pub(crate) fn parse(text: &str) -> Result<(EtcdOptions, Option<String>), EtcdError> {
    let text = text.trim();
    let text = text.strip_prefix("etcd:///").unwrap_or(text);
    let (place, query) = text.split_once('?').unwrap_or((text, ""));
    // Half a password would be taken for a host, and shown.
    if query.contains('@') {
        return Err(EtcdError::Login { reason: "write ? as %3F before the hosts, and @ as %40 after them" });
    }
    let (login, hosts) = place.rsplit_once('@').map_or((None, place), |(login, hosts)| (Some(login), hosts));
    // Who writes user and password before each host would otherwise have hosts in the password.
    if login.is_some_and(|login| login.contains('@')) {
        return Err(EtcdError::Login {
            reason: "they stand once, before the first host; write an @ in them as %40",
        });
    }
    let mut options = EtcdOptions::new(listed(hosts));
    if let Some(login) = login {
        let (name, password) = credentials(login)?;
        options = options.user(name, password);
    }
    let (mut key, mut tls) = (None, TlsText::default());
    for option in query.split('&').filter(|option| !option.is_empty()) {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let value = unescape(value).ok_or_else(|| bad(name, "it is not UTF-8"))?;
        match name {
            "key" => key = Some(value),
            name if tls.take(name, &value)? => {}
            name => options = set(options, name, value)?,
        }
    }
    options = tls.apply(options)?;
    match options.mistake.take() {
        Some(mistake) => Err(mistake),
        None => Ok((options, key)),
    }
}

fn set(options: EtcdOptions, name: &str, value: String) -> Result<EtcdOptions, EtcdError> {
    Ok(match name {
        "namespace" => options.namespace(value),
        "require_tls" => match value.as_str() {
            "true" => options.require_tls(),
            "false" => options,
            _ => return Err(bad(name, "it is neither true nor false")),
        },
        unknown => return Err(EtcdError::UnknownOption { option: shown(unknown) }),
    })
}

fn bad(option: &str, reason: &'static str) -> EtcdError {
    EtcdError::BadOption { option: shown(option), reason }
}

/// The name of an option, however wrong, as it may be shown
fn shown(option: &str) -> String {
    option.chars().take(40).collect::<String>().escape_debug().to_string()
}

fn credentials(login: &str) -> Result<(String, String), EtcdError> {
    let error = |reason| EtcdError::Login { reason };
    if login.contains("://") {
        return Err(error("they stand before the scheme of the first host: user:password@https://host"));
    }
    let (name, password) = login.split_once(':').ok_or_else(|| error("there is no password"))?;
    unescape(name).zip(unescape(password)).ok_or_else(|| error("they are not UTF-8"))
}

/// Parts with commas between; empty ones are none
pub(crate) fn listed(hosts: &str) -> impl Iterator<Item = &str> {
    hosts.split(',').map(str::trim).filter(|host| !host.is_empty())
}

/// `%2F` and the like as go-zero writes them; what is no escape stays as it is. `None` if that is no UTF-8
fn unescape(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped = match (first, tail) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)).map(|(high, low)| high << 4 | low),
            _ => None,
        };
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8(bytes).ok()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::{Hosts, login::Secret};

    fn refused(text: &str) -> EtcdError {
        parse(text).unwrap_err()
    }

    fn hosts(text: &str) -> String {
        Hosts(&parse(text).unwrap().0.hosts.all).to_string()
    }

    #[test]
    fn hosts_come_with_or_without_scheme_and_brackets() {
        assert_eq!(hosts("a:1,"), "a:1");
        assert_eq!(
            hosts(" etcd:///a:1 , http://[::1]:2,etcd.example.org:2379"),
            "a:1, [::1]:2, etcd.example.org:2379"
        );
    }

    #[test]
    fn user_and_password_are_decoded() {
        for (text, name, password) in [
            ("root:secret@a:1", "root", "secret"),
            ("etcd:///ro%3Aot:p%40s%3Fs%25@a:1,b:2", "ro:ot", "p@s?s%"),
            ("u:p,w:x/y@a:1", "u", "p,w:x/y"),
            ("u:p%a\u{e4}@a:1", "u", "p%a\u{e4}"),
        ] {
            let user = parse(text).unwrap().0.user.unwrap();
            assert_eq!((&user.name, &user.password), (&Secret::new(name), &Secret::new(password)), "{text}");
        }
        assert!(parse("a:1").unwrap().0.user.is_none());
    }

    #[test]
    fn options_follow_the_hosts() {
        let (options, key) = parse("a:1?key=%2Fsvc%2fhello&namespace=/service&&require_tls=false").unwrap();
        assert_eq!(key.as_deref(), Some("/svc/hello"));
        assert_eq!(options.check().unwrap().namespace.key("x"), "/service/x");
    }

    #[test]
    fn every_mistake_is_told_by_its_type() {
        use EtcdError::{BadHost, BadOption, Login, Namespace, NoHosts, Plaintext, UnknownOption};
        assert!(matches!(refused(""), NoHosts));
        assert!(matches!(refused("etcd:///?namespace=a"), NoHosts));
        assert!(matches!(refused("a"), BadHost(_)));
        assert!(matches!(refused("foo:///a:1"), BadHost(_)));
        assert!(matches!(refused("::1:2379"), BadHost(_)));
        assert!(matches!(refused("root@a:1"), Login { .. }));
        assert!(matches!(refused("root:@a:1"), Login { .. }));
        assert!(matches!(refused(":secret@a:1"), Login { .. }));
        assert!(matches!(refused("root:%ff@a:1"), Login { .. }));
        assert!(matches!(refused("root:s@cret@a:1"), Login { .. }));
        assert!(matches!(refused("http://root:secret@a:1"), Login { .. }));
        assert!(matches!(refused("a:1?namespace=a/"), Namespace { .. }));
        assert!(matches!(refused("a:1?namespace=%ff"), BadOption { .. }));
        assert!(matches!(refused("a:1?require_tls=yes"), BadOption { .. }));
        assert!(matches!(refused("a:1?require_tls"), BadOption { .. }));
        assert!(matches!(refused("a:1?colour=red"), UnknownOption { .. }));
        let plain = parse("a:1?require_tls=true").unwrap().0.check().err();
        assert!(matches!(plain, Some(Plaintext)));
    }

    /// It was taken for the password `p@a:1,u:p`, and the first host for none
    #[test]
    fn user_and_password_before_each_host_are_a_mistake() {
        for text in ["u:p@a:1,u:p@b:1", "etcd:///u:p@a:1,u:p@b:1?key=hello.rpc", "u:p@a:1,b:1@c:1"] {
            let error = refused(text);
            assert!(error.to_string().contains("%40"), "{text}: {error}");
        }
    }

    #[test]
    fn no_mistake_shows_a_secret_or_a_control_character() {
        for text in [
            "root:s3cret@a",
            "root:s3cret@",
            "root:s3cr?s3cret@a:1",
            "s3cret@a:1",
            "http://root:s3cret@a:1",
            "root:s3cret@a:1?colour=x",
            "root:s3cret@a:1,root:s3cret@b",
            "etcd:///root:s3cret@https://a:x",
            "root:s3cret@a:1?namespace=%0a",
            "root:s3cret@a\n:1",
            "root:s3cret@a:1?col\nour=x",
            "a\u{1b}[31m:1",
        ] {
            let error = refused(text);
            for shown in [error.to_string(), format!("{error:?}")] {
                assert!(!shown.contains("s3cr") && !shown.contains("root"), "{text}: {shown}");
                assert!(!shown.chars().any(char::is_control), "{text}: {shown}");
            }
        }
    }
}
