//! Which cluster, as whom, and how long to try

pub(crate) mod text;
mod tls;

use std::{ffi::OsString, str::FromStr, time::Duration};

use super::{
    EtcdError,
    login::{Credentials, Secret},
    name::Namespace,
};
use crate::{connection::Transport, instance::Address};

/// etcd's own default.
const DEFAULT_HOST: &str = "127.0.0.1:2379";

/// Which cluster, as whom, and how long to try
///
/// From code by [`new`](Self::new) and the setters, or from a text, as in `CALLSIGN_ETCD`:
/// `[etcd:///][user:password@]host,host...[?option=value&...]`, where `%` and two hex digits stand for one byte:
/// an `@` in user or password is `%40`.
///
/// | option | is |
/// | --- | --- |
/// | `namespace` | [`namespace`](Self::namespace) |
/// | `require_tls` | `true` for [`require_tls`](Self::require_tls) |
/// | `tls_ca`, `tls_cert`, `tls_key` | files for TLS: whom to trust instead of the system's roots; our certificate, its key |
/// | `tls_server_name` | the name to verify instead of the host's |
///
/// Any of the options `tls_*`, which need the feature `tls`, turns TLS on.
///
/// Connections to etcd are pinged every 10 s while a request or stream is open, and given up when a ping is not answered
/// within 3 s. That is no option: etcd closes connections that are pinged more often than every 5 s.
///
/// What is wrong with a setter's argument is reported by [`Etcd::connect`](super::Etcd::connect) and
/// [`Etcd::connect_lazy`](super::Etcd::connect_lazy). User and password are never shown, nor is either in any error or log.
///
/// ```
/// use callsign::EtcdOptions;
///
/// let options: EtcdOptions = "root:se%40cret@10.0.0.1:2379,10.0.0.2:2379?namespace=/service".parse()?;
/// assert!(!format!("{options:?}").contains("cret"));
/// # Ok::<(), callsign::EtcdError>(())
/// ```
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    hosts: Hosts,
    user: Option<Credentials>,
    #[cfg(feature = "tls")]
    tls: Option<crate::tls::Tls>,
    namespace: Namespace,
    require_tls: bool,
    pub(super) connect_timeout: Duration,
    /// The first mistake that was made
    mistake: Option<EtcdError>,
}

/// Options without a mistake
pub(super) struct Checked {
    pub(super) hosts: Vec<Address>,
    pub(super) user: Option<Credentials>,
    pub(super) namespace: Namespace,
    pub(super) transport: Transport,
}

impl EtcdOptions {
    /// A cluster by its hosts, each `host:port`, `http://host:port` or `https://host:port`; a host is a name or an IP
    /// address, IPv6 in brackets
    ///
    /// One host is used at a time. One that fails, or whose name cannot be resolved, is left for the next. `https`, which
    /// needs the feature `tls`, goes for all of them: by default with the system's roots. Hosts without a scheme go with the
    /// rest.
    pub fn new<S: AsRef<str>>(hosts: impl IntoIterator<Item = S>) -> Self {
        let mut options = Self {
            hosts: Hosts::default(),
            user: None,
            #[cfg(feature = "tls")]
            tls: None,
            require_tls: false,
            namespace: Namespace::default(),
            connect_timeout: Duration::from_secs(5),
            mistake: None,
        };
        match parse(hosts) {
            Ok(hosts) => options.hosts = hosts,
            Err(mistake) => options.mistake = Some(mistake),
        }
        options
    }

    /// The cluster named by the environment: `CALLSIGN_ETCD`, in the form of a text, else `127.0.0.1:2379`
    ///
    /// Empty is as good as unset. What is wrong with it is reported as it is of a setter's argument.
    pub fn from_env() -> Self {
        Self::from_variable(std::env::var_os("CALLSIGN_ETCD"))
    }

    fn from_variable(text: Option<OsString>) -> Self {
        let parsed = match text.unwrap_or_default().into_string() {
            Ok(text) if text.trim().is_empty() => return Self::new([DEFAULT_HOST]),
            Ok(text) => text.parse(),
            Err(_) => Err(EtcdError::NotUnicode),
        };
        parsed.unwrap_or_else(|mistake| Self { mistake: Some(mistake), ..Self::new([DEFAULT_HOST]) })
    }

    /// Who logs in; by default nobody
    ///
    /// The session logs in on each host that it uses, and again when etcd refuses its token, at most once a second. A
    /// login that is refused is tried again every 30 s. An etcd without authentication is used without a login, until it
    /// asks for one. Over `http://` the password is sent in plaintext, which is warned of once a session; see
    /// [`require_tls`](Self::require_tls).
    pub fn user(mut self, name: impl AsRef<str>, password: impl AsRef<str>) -> Self {
        let (name, password) = (name.as_ref(), password.as_ref());
        let reason = match (name.is_empty(), password.is_empty()) {
            (true, _) => Some("the user is empty"),
            (_, true) => Some("the password is empty"),
            _ => None,
        };
        self.mistake = self.mistake.or(reason.map(|reason| EtcdError::Login { reason }));
        self.user = Some(Credentials { name: Secret::new(name), password: Secret::new(password) });
        self
    }

    /// Refuses to use etcd in plaintext; by default that is allowed
    pub fn require_tls(mut self) -> Self {
        self.require_tls = true;
        self
    }

    /// What stands before every key that is read or written, with a slash between; by default nothing
    ///
    /// `/service` makes `/service/hello.rpc/7` of the key `hello.rpc/7`. Two namespaces do not see each other. It must not
    /// end with a slash; an empty one is none.
    pub fn namespace(mut self, namespace: impl AsRef<str>) -> Self {
        match Namespace::parse(namespace.as_ref()) {
            Ok(namespace) => self.namespace = namespace,
            Err(mistake) => self.mistake = self.mistake.or(Some(mistake)),
        }
        self
    }

    /// Speaks TLS with every host; none of them may be `http://`
    #[cfg(feature = "tls")]
    pub fn tls(mut self, tls: crate::tls::Tls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// How long [`Etcd::connect`](super::Etcd::connect) tries in all, 5 s by default
    ///
    /// A host that accepts and does not answer costs 2 s of it.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    pub(super) fn check(self) -> Result<Checked, EtcdError> {
        if let Some(mistake) = &self.mistake {
            return Err(mistake.clone());
        }
        let transport = self.transport()?;
        if self.require_tls && transport.is_plain() {
            return Err(EtcdError::Plaintext);
        }
        let Self { hosts: Hosts { all: hosts, .. }, user, namespace, .. } = self;
        Ok(Checked { hosts, user, namespace, transport })
    }

    /// Reads and checks what TLS needs
    #[cfg(feature = "tls")]
    fn transport(&self) -> Result<Transport, EtcdError> {
        use crate::tls::{Connector, Tls};

        let tls = match (&self.tls, &self.hosts) {
            (None, Hosts { https: None, .. }) => return Ok(Transport::Plain),
            (Some(_), Hosts { http: Some(host), .. }) => return Err(EtcdError::Mixed { host: host.clone() }),
            (Some(tls), _) => tls,
            (None, _) => &Tls::new(),
        };
        Ok(Transport::Tls(Connector::new(tls)?))
    }

    #[cfg(not(feature = "tls"))]
    fn transport(&self) -> Result<Transport, EtcdError> {
        match &self.hosts.https {
            // Going on in plaintext would be a silent downgrade.
            Some(host) => Err(EtcdError::Https { host: host.clone() }),
            None => Ok(Transport::Plain),
        }
    }
}

impl FromStr for EtcdOptions {
    type Err = EtcdError;

    fn from_str(text: &str) -> Result<Self, EtcdError> {
        match text::parse(text)? {
            (options, None) => Ok(options),
            // A channel's target has one.
            (_, Some(_)) => Err(EtcdError::UnknownOption { option: "key".to_owned() }),
        }
    }
}

/// The hosts, and the first of them that was written with either scheme
#[derive(Clone, Debug, Default)]
struct Hosts {
    all: Vec<Address>,
    http: Option<Address>,
    https: Option<Address>,
}

fn parse<S: AsRef<str>>(texts: impl IntoIterator<Item = S>) -> Result<Hosts, EtcdError> {
    let mut hosts = Hosts::default();
    for text in texts {
        let host: Address = text.as_ref().parse().map_err(EtcdError::BadHost)?;
        if host.is_https() {
            hosts.https.get_or_insert_with(|| host.clone());
        } else if host.is_http() {
            hosts.http.get_or_insert_with(|| host.clone());
        }
        hosts.all.push(host);
    }
    match hosts {
        Hosts { all, .. } if all.is_empty() => Err(EtcdError::NoHosts),
        Hosts { http: Some(host), https: Some(_), .. } => Err(EtcdError::Mixed { host }),
        hosts => Ok(hosts),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd;

    fn refused(options: EtcdOptions) -> EtcdError {
        options.check().err().unwrap()
    }

    #[test]
    fn bad_hosts_are_refused_before_any_network_call() {
        let refused = |hosts: &[&str]| refused(EtcdOptions::new(hosts));
        assert!(matches!(refused(&[]), EtcdError::NoHosts));
        assert!(refused(&["127.0.0.1"]).to_string().contains("etcd host: bad address \"127.0.0.1\""));
        assert!(matches!(refused(&["http://a:1", "https://b:2"]), EtcdError::Mixed { .. }));
    }

    #[test]
    #[cfg(not(feature = "tls"))]
    fn https_is_refused_by_a_build_without_tls() {
        let error = refused(EtcdOptions::new(["a:1", "https://b:2"]));
        assert!(matches!(&error, EtcdError::Https { .. }));
        assert!(error.to_string().contains("b:2") && error.to_string().contains("feature `tls`"), "{error}");
    }

    #[test]
    #[cfg(feature = "tls")]
    fn a_scheme_or_settings_ask_for_tls_and_never_for_less() {
        use crate::tls::{Tls, TlsError};

        // No CA is read where the scheme is wrong already, and where it is right that is the next mistake.
        let tls = || Tls::new().ca_pem("");
        let bare = |hosts: &[&str]| EtcdOptions::new(hosts);
        assert!(matches!(bare(&["a:1", "http://b:2"]).check().unwrap().transport, Transport::Plain));
        assert!(matches!(refused(bare(&["a:1", "http://b:2"]).tls(tls())), EtcdError::Mixed { .. }));
        for hosts in [&["a:1", "b:2"][..], &["a:1", "https://b:2"]] {
            let error = refused(bare(hosts).tls(tls()));
            assert!(matches!(error, EtcdError::Tls(TlsError::NoCertificate { .. })), "{error}");
        }
    }

    #[test]
    fn an_empty_user_or_password_is_refused_before_any_network_call() {
        for (name, password) in [("", "secret"), ("root", "")] {
            let error = refused(EtcdOptions::new(["a:1"]).user(name, password));
            assert!(matches!(error, EtcdError::Login { .. }));
        }
    }

    #[test]
    fn options_do_not_show_user_or_password() {
        let shown = format!("{:?}", EtcdOptions::new(["a:1"]).user("root", "s3cret"));
        assert!(shown.contains("a:1") && !shown.contains("s3cret") && !shown.contains("root"), "{shown}");
    }

    #[test]
    fn a_key_is_no_option_of_a_session() {
        assert!(matches!("a:1?key=x".parse::<EtcdOptions>(), Err(EtcdError::UnknownOption { .. })));
    }

    #[test]
    fn a_bad_namespace_is_refused_and_the_first_mistake_is_told() {
        let options = || EtcdOptions::new(["a:1"]).namespace("/service/");
        assert!(matches!(refused(options()), EtcdError::Namespace { .. }));
        assert!(matches!(refused(EtcdOptions::new([""; 0]).namespace("/")), EtcdError::NoHosts));
    }

    #[test]
    fn an_empty_variable_is_none_and_so_is_an_empty_host() {
        let hosts = |value: &str| EtcdOptions::from_variable(Some(value.into())).hosts.all;
        let hosts = |value: &str| etcd::Hosts(&hosts(value)).to_string();
        for unset in ["", " "] {
            assert_eq!(hosts(unset), DEFAULT_HOST);
        }
        assert_eq!(hosts("a:1,"), "a:1");
        assert_eq!(hosts(" a:1 , ,b:2"), "a:1, b:2");
        assert!(matches!(refused(EtcdOptions::from_variable(Some(",".into()))), EtcdError::NoHosts));
        let mistake = EtcdOptions::from_variable(Some("a:1?x=1".into()));
        assert!(matches!(refused(mistake), EtcdError::UnknownOption { .. }));
        assert_eq!(etcd::Hosts(&EtcdOptions::from_variable(None).hosts.all).to_string(), DEFAULT_HOST);
    }

    #[test]
    #[cfg(unix)]
    fn a_variable_that_is_no_text_is_an_error() {
        let value = std::os::unix::ffi::OsStringExt::from_vec(vec![0xff]);
        assert!(matches!(refused(EtcdOptions::from_variable(Some(value))), EtcdError::NotUnicode));
    }
}
