//! Certificates and keys in PEM form, from a file or from memory

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};

use super::TlsError;

/// Where PEM comes from
#[derive(Clone)]
pub(super) enum Pem {
    /// Read when it is needed
    File(Arc<Path>),
    Bytes {
        what: &'static str,
        pem: Arc<[u8]>,
    },
}

impl Pem {
    pub(super) fn file(path: impl Into<PathBuf>) -> Self {
        Self::File(path.into().into())
    }

    pub(super) fn bytes(what: &'static str, pem: impl Into<Vec<u8>>) -> Self {
        Self::Bytes { what, pem: pem.into().into() }
    }

    /// Whether it may be another one tomorrow
    pub(super) fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// All certificates in it, of which there is at least one
    pub(super) fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let pem = self.read()?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        match certificates {
            Ok(none) if none.is_empty() => Err(TlsError::NoCertificate { origin: self.to_string() }),
            certificates => certificates.map_err(|error| self.bad(&error)),
        }
    }

    /// The first private key in it
    pub(super) fn key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        PrivateKeyDer::from_pem_slice(&self.read()?).map_err(|error| match error {
            pem::Error::NoItemsFound => TlsError::NoKey { origin: self.to_string() },
            error => self.bad(&error),
        })
    }

    fn read(&self) -> Result<Arc<[u8]>, TlsError> {
        match self {
            Self::File(path) => {
                fs::read(path).map(Arc::from).map_err(|error| TlsError::unreadable(path, error))
            }
            Self::Bytes { pem, .. } => Ok(Arc::clone(pem)),
        }
    }

    fn bad(&self, error: &pem::Error) -> TlsError {
        // The parser quotes a line in its message, which may be one of a key, and as a list of numbers.
        let cause = match error {
            pem::Error::MissingSectionEnd { .. } => "it ends within a section".to_owned(),
            pem::Error::IllegalSectionStart { .. } => {
                "a section begins in a way that is not PEM's".to_owned()
            }
            error => error.to_string(),
        };
        TlsError::BadPem { origin: self.to_string(), cause }
    }
}

impl fmt::Display for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Bytes { what, .. } => f.write_str(what),
        }
    }
}

impl fmt::Debug for Pem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.fmt(f),
            // A key may be in it.
            Self::Bytes { what, .. } => f.write_str(what),
        }
    }
}
