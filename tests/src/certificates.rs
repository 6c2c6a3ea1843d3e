//! Certificates for one test, in files that can be replaced

use std::{
    env, fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

/// A CA, a server's certificate by it and a client's, each with its key, as PEM files in a fresh temp dir
///
/// Dropping it removes the directory.
#[derive(Debug)]
pub struct Certificates {
    dir: PathBuf,
}

impl Certificates {
    /// The server's is for 127.0.0.1 and localhost
    pub fn new() -> Self {
        Self::for_server(&["127.0.0.1", "localhost"])
    }

    /// The server's is for these names and IP addresses
    pub fn for_server(names: &[&str]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("callsign-tls-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = env::temp_dir().join(name);
        fs::create_dir_all(&dir).expect("the temp dir is writable");
        let certificates = Self { dir };
        certificates.issue(names);
        certificates
    }

    /// Replaces all of them, the CA included: nothing issued before is trusted any more
    pub fn rotate(&self) {
        self.issue(&["127.0.0.1", "localhost"]);
    }

    fn issue(&self, server: &[&str]) {
        let key = KeyPair::generate().expect("ring makes keys");
        // Two CAs differ by name, a new one and the one that it replaces do not: as it is outside of tests.
        let mut params = params(&[], &format!("CA of {}", self.dir.display()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key).expect("a CA can sign itself");
        self.write("ca", &ca.pem(), &key);
        let issuer = Issuer::new(params, key);
        // etcd's own gateway is a client of etcd's, with the server's certificate.
        let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        for (name, names, usages) in [("server", server, &both[..]), ("client", &[], &both[1..])] {
            let key = KeyPair::generate().expect("ring makes keys");
            let mut params = self::params(names, name);
            params.extended_key_usages = usages.to_vec();
            let certificate = params.signed_by(&key, &issuer).expect("the CA can sign");
            self.write(name, &certificate.pem(), &key);
        }
    }

    fn write(&self, name: &str, certificate: &str, key: &KeyPair) {
        let write =
            |suffix, pem: &str| fs::write(self.path(format!("{name}.{suffix}")), pem).expect("writable");
        write("pem", certificate);
        write("key", &key.serialize_pem());
    }

    /// The CA's certificate
    pub fn ca(&self) -> PathBuf {
        self.path("ca.pem")
    }

    /// The server's certificate and key
    pub fn server(&self) -> [PathBuf; 2] {
        ["server.pem", "server.key"].map(|name| self.path(name))
    }

    /// The client's certificate and key
    pub fn client(&self) -> [PathBuf; 2] {
        ["client.pem", "client.key"].map(|name| self.path(name))
    }

    /// A file beside them
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }

    /// Tells etcd to speak TLS
    pub fn etcd_options(&self) -> Vec<String> {
        let [certificate, key] = self.server();
        vec![option("cert-file", &certificate), option("key-file", &key)]
    }

    /// Tells etcd to speak TLS with clients that have a certificate of this CA
    pub fn etcd_mtls_options(&self) -> Vec<String> {
        let mtls = ["--client-cert-auth".to_owned(), option("trusted-ca-file", &self.ca())];
        [self.etcd_options(), mtls.to_vec()].concat()
    }
}

impl Default for Certificates {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Certificates {
    fn drop(&mut self) {
        // A directory that stays behind harms nobody.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn params(names: &[&str], common_name: &str) -> CertificateParams {
    let names: Vec<_> = names.iter().map(ToString::to_string).collect();
    let mut params = CertificateParams::new(names).expect("names and addresses");
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

fn option(name: &str, path: &Path) -> String {
    format!("--{name}={}", path.display())
}
