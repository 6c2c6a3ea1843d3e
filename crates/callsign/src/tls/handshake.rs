//! What went wrong between two that were to speak TLS

use std::io;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

/// Why there is no TLS connection
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("the peer's certificate is not trusted: {0}")]
    Untrusted(Error),
    #[error("the peer's certificate is for another name: {0}")]
    WrongName(Error),
    #[error("the peer asks for a client certificate: {0}")]
    NoIdentity(Error),
    #[error("the peer refuses our client certificate: {0}")]
    IdentityRefused(Error),
    #[error("the peer does not speak TLS: {0}")]
    NotTls(Error),
    #[error("the host is no name that a certificate can be for: configure the name to verify")]
    NoName,
    /// What a port does that expects something else.
    #[error("the peer closed the connection in the TLS handshake: it may not speak TLS ({0})")]
    Closed(io::Error),
    #[error("TLS failed: {0}")]
    Other(io::Error),
}

impl HandshakeError {
    /// What the failure of a handshake means to one who has a certificate to show or has not
    pub(crate) fn new(error: io::Error, has_identity: bool) -> Self {
        match cause(&error) {
            Some(cause) => Self::from_tls(cause.clone(), has_identity).unwrap_or(Self::Other(error)),
            None => Self::from_io(error),
        }
    }

    /// What the first failure to read means, if it is TLS's own
    ///
    /// In TLS 1.3 a client has done its part before the server has looked at its certificate: a refusal is read later.
    pub(crate) fn after_handshake(error: &io::Error, has_identity: bool) -> Option<Self> {
        let tls = cause(error)?.clone();
        let other = || Self::Other(io::Error::new(error.kind(), tls.clone()));
        Some(Self::from_tls(tls.clone(), has_identity).unwrap_or_else(other))
    }

    fn from_tls(error: Error, has_identity: bool) -> Option<Self> {
        Some(match &error {
            Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            ) => Self::WrongName(error),
            Error::InvalidCertificate(_) => Self::Untrusted(error),
            Error::AlertReceived(alert) if is_of_certificate(*alert) && has_identity => {
                Self::IdentityRefused(error)
            }
            Error::AlertReceived(alert) if is_of_certificate(*alert) => Self::NoIdentity(error),
            Error::InvalidMessage(InvalidMessage::InvalidContentType) => Self::NotTls(error),
            _ => return None,
        })
    }

    fn from_io(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe => Self::Closed(error),
            _ => Self::Other(error),
        }
    }
}

fn cause(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

/// What a server says about a client's certificate, or the lack of one (RFC 8446, section 6.2; RFC 5246, section 7.2.2)
///
/// One that shows none can be told nothing else by these. Go's servers say "bad certificate" for each of them.
fn is_of_certificate(alert: AlertDescription) -> bool {
    matches!(
        alert,
        AlertDescription::NoCertificate
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::CertificateRequired
    )
}
