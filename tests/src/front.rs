//! TLS in front of a server that speaks plaintext

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use callsign::instance::Address;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tokio_rustls::TlsAcceptor;

use crate::certificates::Certificates;

/// Ends TLS and passes on what is within; dropped, it and its connections are gone without a word, as if killed
#[derive(Debug)]
pub struct Front {
    address: Address,
    handshakes: Arc<AtomicU32>,
    cuts: watch::Sender<()>,
    task: JoinHandle<()>,
}

/// Whom it lets in
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// Everybody
    Any,
    /// Those with a certificate of the same CA
    Known,
}

impl Front {
    /// Listens on a port of its own for `target`, with the server's certificate as it is when somebody connects
    pub async fn start(target: Address, certificates: &Certificates, clients: Clients) -> Self {
        let files = Files { ca: certificates.ca(), server: certificates.server(), clients };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = Address::from(listener.local_addr().expect("the listener is bound"));
        let handshakes = Arc::<AtomicU32>::default();
        let (cuts, count) = (watch::Sender::new(()), handshakes.clone());
        let mut cut = cuts.subscribe();
        let task = tokio::spawn(async move {
            // Owns the connections: they end with the listener.
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    Ok((stream, _)) = listener.accept() => {
                        connections.spawn(pass_on(stream, files.acceptor(), target.clone(), count.clone()));
                    }
                    Ok(()) = cut.changed() => connections.shutdown().await,
                    else => return,
                }
            }
        });
        Self { address, handshakes, cuts, task }
    }

    /// Where it listens
    pub fn address(&self) -> Address {
        self.address.clone()
    }

    /// The same, as a registry that knows of TLS would write it
    pub fn https(&self) -> Address {
        format!("https://{}", self.address).parse().expect("an address with a scheme")
    }

    /// How many handshakes have succeeded
    pub fn handshakes(&self) -> u32 {
        self.handshakes.load(Relaxed)
    }

    /// Ends all connections without a word, and goes on to listen
    pub fn cut(&self) {
        self.cuts.send_replace(());
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An error ends the connection, which is what a client then sees
async fn pass_on(
    tcp: TcpStream,
    acceptor: TlsAcceptor,
    target: Address,
    handshakes: Arc<AtomicU32>,
) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let mut within = acceptor.accept(tcp).await?;
    handshakes.fetch_add(1, Relaxed);
    let mut server = TcpStream::connect(target.authority()).await?;
    server.set_nodelay(true)?;
    copy_bidirectional(&mut within, &mut server).await.map(drop)
}

struct Files {
    ca: std::path::PathBuf,
    server: [std::path::PathBuf; 2],
    clients: Clients,
}

impl Files {
    fn acceptor(&self) -> TlsAcceptor {
        let provider = Arc::new(ring::default_provider());
        let [certificate, key] = &self.server;
        let certificate: Result<Vec<_>, _> =
            CertificateDer::pem_file_iter(certificate).expect("it was written").collect();
        let key = PrivateKeyDer::from_pem_file(key).expect("it was written");
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .expect("ring has cipher suites for TLS 1.2 and 1.3");
        let builder = match self.clients {
            Clients::Any => builder.with_no_client_auth(),
            Clients::Known => {
                let mut roots = RootCertStore::empty();
                let ca = CertificateDer::from_pem_file(&self.ca).expect("it was written");
                roots.add(ca).expect("a CA");
                let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
                builder.with_client_cert_verifier(verifier.build().expect("there are roots"))
            }
        };
        let pair = builder.with_single_cert(certificate.expect("PEM"), key);
        let mut config = pair.expect("they belong together");
        config.alpn_protocols = vec![b"h2".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }
}
