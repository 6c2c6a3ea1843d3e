//! Makes TLS connections, with what the files say now

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use rustls::{
    ClientConfig, RootCertStore,
    client::{ResolvesClientCert, Resumption},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    sign::{CertifiedKey, SingleCertAndKey},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    HandshakeError, Identity, Roots, Tls, TlsError,
    kept::{Kept, Look},
};
use crate::instance::Address;

/// A [`Tls`] that was good once, and what it last came to
pub(crate) struct Connector {
    tls: Tls,
    /// Verified instead of the host.
    name: Option<ServerName<'static>>,
    current: Mutex<Current>,
}

impl Connector {
    /// Reads and checks everything; blocks meanwhile
    ///
    /// # Errors
    ///
    /// [`TlsError`] for the first thing that is wrong.
    pub(crate) fn new(tls: &Tls) -> Result<Arc<Self>, TlsError> {
        let bad = |name: &str| TlsError::BadServerName { name: name.to_owned() };
        let parse = |name: &String| ServerName::try_from(name.clone()).map_err(|_| bad(name));
        let name = tls.server_name.as_ref().map(parse).transpose()?;
        let current = Current::new(tls)?;
        Ok(Arc::new(Self { tls: tls.clone(), name, current: Mutex::new(current) }))
    }

    /// Whether we have a certificate to show
    pub(crate) fn has_identity(&self) -> bool {
        self.tls.identity.is_some()
    }

    /// Speaks TLS over `tcp`
    pub(crate) async fn connect(
        self: &Arc<Self>,
        address: &Address,
        tcp: TcpStream,
    ) -> Result<TlsStream<TcpStream>, HandshakeError> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => ServerName::try_from(address.host().to_owned()).map_err(|_| HandshakeError::NoName)?,
        };
        let config = self.config().await;
        let secured = TlsConnector::from(config).connect(name, tcp).await;
        secured.map_err(|error| HandshakeError::new(error, self.has_identity()))
    }

    async fn config(self: &Arc<Self>) -> Arc<ClientConfig> {
        if self.tls.has_files() {
            let this = Arc::clone(self);
            // Ends by itself. A runtime that ends runs it no more: what was last read will do.
            let _ = tokio::task::spawn_blocking(move || this.look()).await;
        }
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner).config)
    }

    fn look(&self) {
        // Read before locking: a file on a dead file system must not hold up who has no need of it.
        let (roots, identity) = (self.tls.roots.read(), self.tls.identity.as_ref().map(Identity::read));
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        current.look(&self.tls, roots, identity);
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Connector").field(&self.tls).finish()
    }
}

type Certificates = Vec<CertificateDer<'static>>;
type KeyPair = (Certificates, PrivateKeyDer<'static>);

/// What the files last came to
struct Current {
    roots: Kept<Certificates, Arc<RootCertStore>>,
    identity: Option<Kept<KeyPair, Arc<SingleCertAndKey>>>,
    config: Arc<ClientConfig>,
}

impl Current {
    fn new(tls: &Tls) -> Result<Self, TlsError> {
        let roots = Kept::new(tls.roots.read()?, |read| tls.roots.make(read))?;
        let pair = |identity: &Identity| Kept::new(identity.read()?, |read| identity.make(read));
        let identity = tls.identity.as_ref().map(pair).transpose()?;
        let config = configure(roots.made(), identity.as_ref().map(Kept::made));
        Ok(Self { roots, identity, config })
    }

    fn look(
        &mut self,
        tls: &Tls,
        roots: Result<Certificates, TlsError>,
        pair: Option<Result<KeyPair, TlsError>>,
    ) {
        let mut renewed = self.roots.look(roots, |read| tls.roots.make(read)) == Look::Renewed;
        if let (Some(kept), Some(pair), Some(identity)) = (&mut self.identity, pair, &tls.identity) {
            renewed |= kept.look(pair, |read| identity.make(read)) == Look::Renewed;
        }
        if renewed {
            self.config = configure(self.roots.made(), self.identity.as_ref().map(Kept::made));
        }
    }
}

impl Tls {
    /// Whether anything is to be read again
    fn has_files(&self) -> bool {
        let identity = self.identity.as_ref();
        self.roots.is_file() || identity.is_some_and(|pair| pair.certificate.is_file() || pair.key.is_file())
    }
}

impl Roots {
    fn is_file(&self) -> bool {
        match self {
            Self::System => true,
            Self::Given(pem) => pem.is_file(),
        }
    }

    fn read(&self) -> Result<Certificates, TlsError> {
        let Self::Given(pem) = self else {
            let system = rustls_native_certs::load_native_certs();
            // One bad file among many is the system's affair; none at all is not.
            if system.certs.is_empty() {
                let causes: Vec<_> = system.errors.iter().map(ToString::to_string).collect();
                let cause = if causes.is_empty() { "none was found".to_owned() } else { causes.join(", ") };
                return Err(TlsError::NoSystemRoots { cause });
            }
            return Ok(system.certs);
        };
        pem.certificates()
    }

    fn make(&self, certificates: &Certificates) -> Result<Arc<RootCertStore>, TlsError> {
        let mut store = RootCertStore::empty();
        match self {
            Self::System => {
                // Old roots may be in a form that nobody verifies any more.
                let (added, _) = store.add_parsable_certificates(certificates.iter().cloned());
                if added == 0 {
                    return Err(TlsError::NoSystemRoots { cause: "none can be used".to_owned() });
                }
            }
            Self::Given(pem) => {
                for certificate in certificates {
                    let added = store.add(certificate.clone());
                    added.map_err(|error| TlsError::bad_certificate(pem, error))?;
                }
            }
        }
        Ok(Arc::new(store))
    }
}

impl Identity {
    fn read(&self) -> Result<KeyPair, TlsError> {
        Ok((self.certificate.certificates()?, self.key.key()?))
    }

    fn make(&self, (certificates, key): &KeyPair) -> Result<Arc<SingleCertAndKey>, TlsError> {
        let pair = CertifiedKey::from_der(certificates.clone(), key.clone_key(), &provider());
        let pair = pair.map_err(|error| match error {
            rustls::Error::InvalidCertificate(error) => TlsError::bad_certificate(&self.certificate, error),
            error => TlsError::BadIdentity {
                certificate: self.certificate.to_string(),
                key: self.key.to_string(),
                cause: error.to_string(),
            },
        });
        Ok(Arc::new(SingleCertAndKey::from(pair?)))
    }
}

/// Never the process's default: there is none when two are linked, and asking for it panics.
fn provider() -> CryptoProvider {
    ring::default_provider()
}

fn configure(roots: &Arc<RootCertStore>, identity: Option<&Arc<SingleCertAndKey>>) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_safe_default_protocol_versions()
        .expect("ring has cipher suites for TLS 1.2 and 1.3")
        .with_root_certificates(Arc::clone(roots));
    let mut config = match identity {
        Some(identity) => {
            let resolver: Arc<dyn ResolvesClientCert> = Arc::clone(identity) as _;
            builder.with_client_cert_resolver(resolver)
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    // Connections are few and live long. Each verifies its peer anew, so that none outlives what it was resumed from.
    config.resumption = Resumption::disabled();
    Arc::new(config)
}
