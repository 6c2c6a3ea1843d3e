//! What was made of files, kept while they are bad

use std::mem;

use super::TlsError;

/// What was last read, and what was made of it
#[derive(Debug)]
pub(super) struct Kept<R, M> {
    read: R,
    made: M,
    failing: bool,
}

/// What a look at the files brought
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    Same,
    Renewed,
    /// The files are bad since this look
    Failed,
    /// They were bad before
    StillFailing,
}

impl<R: PartialEq, M> Kept<R, M> {
    /// The first of its kind, which has to be good
    pub(super) fn new(read: R, make: impl FnOnce(&R) -> Result<M, TlsError>) -> Result<Self, TlsError> {
        let made = make(&read)?;
        Ok(Self { read, made, failing: false })
    }

    pub(super) fn made(&self) -> &M {
        &self.made
    }

    /// Takes what was read now, if it is new and good
    pub(super) fn look(
        &mut self,
        read: Result<R, TlsError>,
        make: impl FnOnce(&R) -> Result<M, TlsError>,
    ) -> Look {
        let made = read.and_then(|read| match read == self.read {
            true => Ok(None),
            false => make(&read).map(|made| Some((read, made))),
        });
        let failed = mem::replace(&mut self.failing, made.is_err());
        match made {
            Ok(None) => Look::Same,
            Ok(Some((read, made))) => {
                (self.read, self.made) = (read, made);
                tracing::info!("TLS certificates have changed: using them from here on");
                Look::Renewed
            }
            Err(error) if failed => {
                tracing::debug!(%error, "TLS certificates still cannot be read again");
                Look::StillFailing
            }
            Err(error) => {
                tracing::warn!(%error, "TLS certificates cannot be read again: keeping the last good ones");
                Look::Failed
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn even(read: &u32) -> Result<String, TlsError> {
        match read % 2 {
            0 => Ok(read.to_string()),
            _ => Err(TlsError::NoCertificate { origin: read.to_string() }),
        }
    }

    fn unreadable() -> Result<u32, TlsError> {
        Err(TlsError::NoKey { origin: "a file".to_owned() })
    }

    #[test]
    fn what_is_bad_is_said_once_and_the_last_good_one_stays() {
        let mut kept = Kept::new(2, even).unwrap();
        assert_eq!(kept.look(Ok(2), even), Look::Same);
        assert_eq!(kept.look(Ok(3), even), Look::Failed);
        assert_eq!(kept.look(unreadable(), even), Look::StillFailing);
        assert_eq!(kept.made(), "2");
        assert_eq!(kept.look(Ok(4), even), Look::Renewed);
        assert_eq!(kept.made(), "4");
        assert_eq!(kept.look(unreadable(), even), Look::Failed, "it was good in between");
        assert_eq!(kept.look(Ok(4), even), Look::Same);
        assert_eq!(kept.look(Ok(5), even), Look::Failed, "it was good in between");
    }

    #[test]
    fn before_there_is_a_good_one_a_bad_one_is_an_error() {
        assert!(matches!(Kept::new(1, even), Err(TlsError::NoCertificate { .. })));
    }
}
