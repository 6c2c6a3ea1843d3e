//! Makes TLS connections, with what the files say now

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustls::{
    ClientConfig, RootCertStore,
    client::{ResolvesClientCert, Resumption},
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    sign::{CertifiedKey, SingleCertAndKey},
};
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{
    HandshakeError, Identity, Roots, Tls, TlsError,
    kept::{Kept, Look},
};
use crate::instance::Address;

/// The longest that a connection waits for files. One disk answers in milliseconds; a network's that hangs may do so for
/// ever, and a connection has 2 s in all.
const LOOK: Duration = Duration::from_millis(500);

/// A [`Tls`] that was good once, and what it last came to
pub(crate) struct Connector {
    tls: Tls,
    /// Verified instead of the host.
    name: Option<ServerName<'static>>,
    current: Mutex<Current>,
    /// The look at the files that is under way, of which there is one at most: a file system that hangs pins one thread,
    /// however many would connect
    looking: tokio::sync::Mutex<Option<JoinHandle<()>>>,
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
        let (current, looking) = (Mutex::new(current), tokio::sync::Mutex::default());
        Ok(Arc::new(Self { tls: tls.clone(), name, current, looking }))
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
        if self.tls.has_files() && timeout(LOOK, self.looked()).await.is_err() {
            tracing::debug!("the files with TLS certificates do not answer: using what was last read");
        }
        Arc::clone(&self.current.lock().unwrap_or_else(PoisonError::into_inner).config)
    }

    /// Looks at the files, after the look that is under way if there is one
    async fn looked(self: &Arc<Self>) {
        let mut looking = self.looking.lock().await;
        if let Some(former) = looking.as_mut() {
            // It may have begun before the files changed. That a runtime has ended with it is no matter.
            let _ = former.await;
            // Awaited again, it would panic.
            *looking = None;
        }
        let this = Arc::clone(self);
        let task = looking.insert(tokio::task::spawn_blocking(move || this.look()));
        // Ends by itself. A runtime that ends runs it no more: what was last read will do.
        let _ = task.await;
        *looking = None;
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

#[cfg(test)]
#[cfg(unix)]
mod tests {
    use std::{fs, process::Command};

    use tokio::runtime::Builder;

    use super::*;

    /// Each connection had a look of its own, and each look a thread
    #[test]
    fn a_file_system_that_hangs_pins_one_thread_and_holds_up_no_connection_for_long() {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let file = std::env::temp_dir().join(format!("callsign-connector-{}.pem", std::process::id()));
        fs::write(&file, made.cert.pem()).unwrap();
        let connector = Connector::new(&Tls::new().ca_file(&file)).unwrap();
        // Nobody writes to it: whoever opens it to read hangs.
        fs::remove_file(&file).unwrap();
        assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
        let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(2).build().unwrap();
        runtime.block_on(async {
            let connects = [(); 4].map(|()| {
                let connector = Arc::clone(&connector);
                tokio::spawn(async move { connector.config().await })
            });
            for connect in connects {
                timeout(4 * LOOK, connect).await.expect("the last good ones will do").unwrap();
            }
            let free = timeout(4 * LOOK, tokio::task::spawn_blocking(|| ())).await;
            free.expect("the second thread is free").unwrap();
        });
        // Lets the reader go.
        fs::write(&file, made.cert.pem()).unwrap();
        drop(runtime);
        fs::remove_file(&file).unwrap();
    }
}
