//! TLS, by rustls: whom to trust, who we are, and which name to verify
//!
//! ```no_run
//! use callsign::tls::Tls;
//!
//! # fn main() -> Result<(), callsign::tls::TlsError> {
//! let tls = Tls::new().ca_file("/etc/etcd/ca.pem").identity_files("/etc/etcd/us.pem", "/etc/etcd/us.key");
//! tls.validate()?;
//! # Ok(())
//! # }
//! ```

mod pem;

mod connector;
mod handshake;
mod kept;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use self::pem::Pem;
pub(crate) use self::{connector::Connector, handshake::HandshakeError};

/// How TLS is spoken: whom to trust, who we are, and which name to verify
///
/// Versions 1.2 and 1.3, with ring. Cheap to clone. Files are read when a session or a channel is built, so that a mistake
/// is told at once, and read again for each connection: certificates and keys that are replaced on disk are used from the
/// next connection on. While a file cannot be read or makes no sense, for instance half-written, what was last read from it
/// stays in use, with one warning. `Debug` shows paths and never what is in them.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    roots: Roots,
    identity: Option<Identity>,
    server_name: Option<String>,
}

impl Tls {
    /// Trusts the system's roots, shows no certificate, verifies the name that is dialled
    ///
    /// The roots are what the platform keeps; `SSL_CERT_FILE` and `SSL_CERT_DIR` name others.
    pub fn new() -> Self {
        Self::default()
    }

    /// Trusts the certificates in this PEM file, instead of the system's roots
    pub fn ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.roots = Roots::Given(Pem::file(path));
        self
    }

    /// Trusts these certificates, in PEM form, instead of the system's roots
    pub fn ca_pem(mut self, pem: impl Into<Vec<u8>>) -> Self {
        self.roots = Roots::Given(Pem::bytes("the CA's PEM", pem));
        self
    }

    /// Shows the certificate in one PEM file, made for the key in the other, to a peer that asks for one (mTLS)
    ///
    /// The first certificate is ours; those that follow lead to the peer's CA. The key is PKCS#8, PKCS#1 or SEC1, not
    /// encrypted. Both may be in one file.
    pub fn identity_files(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.identity = Some(Identity { certificate: Pem::file(certificate), key: Pem::file(key) });
        self
    }

    /// The same from memory
    pub fn identity_pem(mut self, certificate: impl Into<Vec<u8>>, key: impl Into<Vec<u8>>) -> Self {
        let certificate = Pem::bytes("the client certificate's PEM", certificate);
        self.identity = Some(Identity { certificate, key: Pem::bytes("the client key's PEM", key) });
        self
    }

    /// Verifies that the peer's certificate is for this DNS name or IP address, instead of for the host that is dialled
    pub fn server_name(mut self, name: impl Into<String>) -> Self {
        self.server_name = Some(name.into());
        self
    }

    /// Whether a certificate for any name in the world may do, if that is the name that is dialled
    pub(crate) fn trusts_any_name(&self) -> bool {
        matches!(self.roots, Roots::System) && self.server_name.is_none()
    }

    /// Reads and checks all of it, as every builder that takes a `Tls` does; blocks for as long as reading files does
    ///
    /// # Errors
    ///
    /// [`TlsError`], which names the file.
    pub fn validate(&self) -> Result<(), TlsError> {
        Connector::new(self).map(drop)
    }
}

#[derive(Clone, Debug, Default)]
enum Roots {
    #[default]
    System,
    Given(Pem),
}

#[derive(Clone, Debug)]
struct Identity {
    certificate: Pem,
    key: Pem,
}

/// Why TLS cannot be spoken as told; names the file, or says that the PEM came from memory
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read: correct the path or its permissions
    #[error("cannot read {}: {cause}", path.display())]
    Unreadable {
        /// The file
        path: PathBuf,
        /// What the system says
        cause: Arc<io::Error>,
    },
    /// It is no PEM, or ends in the middle of one: write it anew
    #[error("{origin} is no valid PEM: {cause}")]
    BadPem {
        /// Where it came from
        origin: String,
        /// What is wrong
        cause: String,
    },
    /// There is no certificate in it: give a file with `BEGIN CERTIFICATE`
    #[error("{origin} holds no certificate")]
    NoCertificate {
        /// Where it came from
        origin: String,
    },
    /// A certificate in it cannot be used: issue another
    #[error("{origin} holds a certificate that cannot be used: {cause}")]
    BadCertificate {
        /// Where it came from
        origin: String,
        /// What rustls says
        cause: String,
    },
    /// There is no private key in it: give one as PKCS#8, PKCS#1 or SEC1, not encrypted
    #[error("{origin} holds no private key that is not encrypted")]
    NoKey {
        /// Where it came from
        origin: String,
    },
    /// The key and the certificate are no pair: give those that belong together
    #[error("the key in {key} does not fit the certificate in {certificate}: {cause}")]
    BadIdentity {
        /// Where the certificate came from
        certificate: String,
        /// Where the key came from
        key: String,
        /// What rustls says
        cause: String,
    },
    /// The system has no root certificates: install them, or name a CA
    #[error("the system has no root certificates: {cause}")]
    NoSystemRoots {
        /// What went wrong with the places looked at
        cause: String,
    },
    /// The name to verify is neither a DNS name nor an IP address: correct it
    #[error("\"{}\" is no name that a certificate can be for", name.escape_debug())]
    BadServerName {
        /// The name
        name: String,
    },
}

impl TlsError {
    fn unreadable(path: &Path, cause: io::Error) -> Self {
        Self::Unreadable { path: path.to_owned(), cause: Arc::new(cause) }
    }

    fn bad_certificate(origin: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Self::BadCertificate { origin: origin.to_string(), cause: cause.to_string() }
    }
}
