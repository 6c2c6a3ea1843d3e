//! What a line of text says of TLS

use crate::etcd::{EtcdError, EtcdOptions};

/// The names of the options kept here
const NAMES: [&str; 4] = ["tls_ca", "tls_cert", "tls_key", "tls_server_name"];

/// Their values, until all were read
#[derive(Debug, Default)]
pub(super) struct TlsText([Option<String>; 4]);

impl TlsText {
    /// Takes the value of one of `NAMES`; false if it is another's
    pub(super) fn take(&mut self, name: &str, value: &str) -> Result<bool, EtcdError> {
        let Some(position) = NAMES.iter().position(|known| *known == name) else { return Ok(false) };
        if value.is_empty() {
            return Err(bad(name, "it is empty"));
        }
        self.0[position] = Some(value.to_owned());
        Ok(true)
    }

    #[cfg(feature = "tls")]
    pub(super) fn apply(self, options: EtcdOptions) -> Result<EtcdOptions, EtcdError> {
        use crate::tls::Tls;

        let [ca, certificate, key, server_name] = self.0;
        if [&ca, &certificate, &key, &server_name].iter().all(|value| value.is_none()) {
            return Ok(options);
        }
        let mut tls = ca.map_or_else(Tls::new, |path| Tls::new().ca_file(path));
        tls = match (certificate, key) {
            (Some(certificate), Some(key)) => tls.identity_files(certificate, key),
            (None, None) => tls,
            (Some(_), None) => return Err(bad("tls_cert", "tls_key has to stand beside it")),
            (None, Some(_)) => return Err(bad("tls_key", "tls_cert has to stand beside it")),
        };
        Ok(options.tls(server_name.into_iter().fold(tls, Tls::server_name)))
    }

    #[cfg(not(feature = "tls"))]
    pub(super) fn apply(self, options: EtcdOptions) -> Result<EtcdOptions, EtcdError> {
        match NAMES.iter().zip(self.0).find(|(_, value)| value.is_some()) {
            Some((name, _)) => Err(bad(name, "callsign has to be built with the feature `tls`")),
            None => Ok(options),
        }
    }
}

fn bad(option: &str, reason: &'static str) -> EtcdError {
    EtcdError::BadOption { option: option.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: &str) -> Result<EtcdOptions, EtcdError> {
        format!("a:1?{query}").parse()
    }

    fn refusal(query: &str) -> String {
        parse(query).unwrap_err().to_string()
    }

    #[test]
    fn an_empty_value_is_none() {
        for name in NAMES {
            assert!(refusal(name).contains(name), "{name}");
        }
    }

    #[test]
    #[cfg(feature = "tls")]
    fn files_and_a_name_are_told_in_one_line() {
        let query = "tls_ca=/ca%2Epem&tls_cert=/us.pem&tls_key=/us.key&tls_server_name=etcd.test";
        let shown = format!("{:?}", parse(query).unwrap());
        for part in ["/ca.pem", "/us.pem", "/us.key", "etcd.test"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        assert!(parse("namespace=/service").unwrap().tls.is_none());
    }

    #[test]
    #[cfg(feature = "tls")]
    fn a_certificate_and_its_key_come_together() {
        assert!(refusal("tls_cert=/us.pem").contains("tls_key has to stand beside it"));
        assert!(refusal("tls_key=/us.key").contains("tls_cert has to stand beside it"));
    }

    #[test]
    #[cfg(not(feature = "tls"))]
    fn a_build_without_tls_says_what_it_needs() {
        assert!(refusal("tls_ca=/ca.pem").contains("feature `tls`"));
    }
}
