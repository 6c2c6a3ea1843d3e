//! Addresses: `host:port`, optionally with a scheme

use std::{fmt, net::IpAddr, str::FromStr, sync::Arc};

/// Where a server listens: `host:port`, optionally with a scheme
///
/// Parsed from `host:port`, `[v6]:port` or `http(s)://host:port`; the host is a name or an IP address. Cheap to clone.
/// Two addresses are equal if scheme, host and port are; none is a scheme of its own. Displayed as `host:port`, ready for a
/// dial or an `:authority`.
///
/// ```
/// use callsign::instance::Address;
///
/// let address: Address = "[::1]:9090".parse()?;
/// assert_eq!((address.host(), address.port()), ("::1", 9090));
/// assert_eq!(address.to_string(), "[::1]:9090");
/// assert!("127.0.0.1".parse::<Address>().is_err(), "a port is required");
/// # Ok::<(), callsign::instance::AddressError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// `host:port`, brackets included: what `Display` shows.
    authority: Arc<str>,
    port: u16,
    scheme: Option<Scheme>,
}

/// What is written before `://`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Scheme {
    Http,
    Https,
}

impl Address {
    /// An address from its parts; an IPv6 host comes without brackets
    ///
    /// # Errors
    ///
    /// [`AddressError`] if the host is empty or contains what no host can, or if the port is 0.
    pub fn new(host: &str, port: u16) -> Result<Self, AddressError> {
        let error = |reason| AddressError { address: shown(&format!("{host}:{port}")), reason };
        if port == 0 {
            return Err(error("the port is 0"));
        }
        let authority = match host.parse::<IpAddr>() {
            Ok(IpAddr::V6(v6)) => format!("[{v6}]:{port}"),
            Ok(IpAddr::V4(v4)) => format!("{v4}:{port}"),
            Err(_) => {
                let named = !host.is_empty() && host.len() <= MAX_HOST;
                let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
                if !named || !host.chars().all(legal) {
                    return Err(error("the host is neither a name nor an IP address"));
                }
                format!("{host}:{port}")
            }
        };
        Ok(Self { authority: authority.into(), port, scheme: None })
    }

    /// The host, without brackets
    pub fn host(&self) -> &str {
        let host = self.authority.rsplit_once(':').map_or("", |(host, _)| host);
        host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
    }

    /// The port, never 0
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether the address was written with `https://`: it is for TLS alone
    pub fn is_https(&self) -> bool {
        self.scheme == Some(Scheme::Https)
    }

    /// Whether the address was written with `http://`: it is for plaintext alone
    pub fn is_http(&self) -> bool {
        self.scheme == Some(Scheme::Http)
    }

    /// Whether host and port are the same, whatever the schemes are
    pub(crate) fn is_where(&self, other: &Self) -> bool {
        // The port first: it takes no look elsewhere.
        self.port == other.port && self.authority == other.authority
    }

    /// Whether the address was written without a scheme: it is for whatever its channel speaks
    #[cfg(feature = "etcd")]
    pub(crate) fn is_bare(&self) -> bool {
        self.scheme.is_none()
    }

    /// The same host and port without a scheme
    #[cfg(feature = "etcd")]
    pub(crate) fn bare(&self) -> Self {
        Self { scheme: None, ..self.clone() }
    }

    /// The same host and port with each scheme
    #[cfg(feature = "etcd")]
    pub(crate) fn with_schemes(&self) -> [Self; 2] {
        [Scheme::Http, Scheme::Https].map(|scheme| Self { scheme: Some(scheme), ..self.clone() })
    }

    /// `host:port`, as [`Display`](fmt::Display) shows it
    pub fn authority(&self) -> &str {
        &self.authority
    }
}

/// A text that may come from etcd or hold a password, as it may be logged: cut, escaped, nothing before an `@`
pub(super) fn shown(text: &str) -> String {
    let (hidden, rest) = text.rsplit_once('@').map_or(("", text), |(_, rest)| ("***@", rest));
    let cut: String = rest.chars().take(MAX_HOST).collect();
    format!("{hidden}{}", cut.escape_default())
}

/// The longest DNS name (RFC 1035, section 2.3.4).
const MAX_HOST: usize = 253;

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.authority)
    }
}

impl From<std::net::SocketAddr> for Address {
    /// The address of a bound socket
    ///
    /// A port of 0 stays 0: such an address is good for nothing but a message.
    fn from(socket: std::net::SocketAddr) -> Self {
        Self { authority: socket.to_string().into(), port: socket.port(), scheme: None }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(address: &str) -> Result<Self, AddressError> {
        let error = |reason| AddressError { address: shown(address), reason };
        let (scheme, rest) = match address.split_once("://") {
            Some(("http", rest)) => (Some(Scheme::Http), rest),
            Some(("https", rest)) => (Some(Scheme::Https), rest),
            Some(_) => return Err(error("the scheme is neither http nor https")),
            None => (None, address),
        };
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| error("the port is missing"))?;
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port
            .parse()
            .ok()
            .filter(|_| digits)
            .ok_or_else(|| error("the port is not a number up to 65535"))?;
        let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
            Some(v6) if v6.parse::<std::net::Ipv6Addr>().is_ok() => v6,
            Some(_) => return Err(error("the brackets hold no IPv6 address")),
            None if host.contains(':') => return Err(error("an IPv6 address needs brackets")),
            None => host,
        };
        let parsed = Self::new(host, port).map_err(|AddressError { reason, .. }| error(reason))?;
        Ok(Self { scheme, ..parsed })
    }
}

/// Why a text is no [`Address`]
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bad address \"{address}\": {reason}")]
pub struct AddressError {
    /// Escaped
    address: String,
    reason: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_in_three_forms() {
        for (text, host, port, scheme, shown) in [
            ("127.0.0.1:9090", "127.0.0.1", 9090, None, "127.0.0.1:9090"),
            ("db-1.example.com:1", "db-1.example.com", 1, None, "db-1.example.com:1"),
            ("[2001:db8::1]:443", "2001:db8::1", 443, None, "[2001:db8::1]:443"),
            ("http://a_b:65535", "a_b", 65535, Some(Scheme::Http), "a_b:65535"),
            ("https://[::1]:8443", "::1", 8443, Some(Scheme::Https), "[::1]:8443"),
        ] {
            let address: Address = text.parse().unwrap();
            assert_eq!((address.host(), address.port()), (host, port), "{text}");
            assert_eq!(address.is_http(), scheme == Some(Scheme::Http), "{text}");
            assert_eq!(address.is_https(), scheme == Some(Scheme::Https), "{text}");
            assert_eq!(address.to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_address_says_why() {
        for (text, reason) in [
            ("", "port is missing"),
            ("host", "port is missing"),
            (":80", "neither a name nor an IP"),
            ("host:", "not a number"),
            ("host:+80", "not a number"),
            ("host:65536", "not a number"),
            ("host:0", "the port is 0"),
            ("::1:80", "needs brackets"),
            ("[::1:80", "needs brackets"),
            ("[nope]:80", "no IPv6"),
            ("ftp://host:80", "scheme"),
            ("user@host:80", "neither a name nor an IP"),
            ("host/path:80", "neither a name nor an IP"),
            ("{\"Op\":0,\"Addr\":\"host:80\"}", "not a number"),
            ("h\u{7}st:80", "neither a name nor an IP"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(reason), "{text:?}: {error}");
            assert!(!error.contains('\u{7}'), "control characters are escaped");
        }
        let long = format!("{}:80", "x".repeat(1_000_000)).parse::<Address>().unwrap_err().to_string();
        assert!(long.len() < 1000, "a long value is cut");
        let secret = "http://root:secret@host".parse::<Address>().unwrap_err().to_string();
        assert!(!secret.contains("secret") && secret.contains("host"), "{secret}");
    }
}
