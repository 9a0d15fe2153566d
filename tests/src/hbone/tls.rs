//! Mutual TLS 1.3 between workloads, as ztunnel does it: the peer is its SPIFFE identity, names and
//! addresses do not matter.

use std::net::Ipv4Addr;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, CommonState, DigitallySignedStruct, Error, RootCertStore,
    ServerConfig, SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsConnector, client};

use super::ca::{Ca, Identity};

const ALPN_H2: &[u8] = b"h2";

/// A workload's side of mutual TLS, as a server and as a client.
#[derive(Clone, Debug)]
pub(super) struct WorkloadTls {
    pub(super) server: Arc<ServerConfig>,
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    leaf: Arc<super::ca::Leaf>,
}

impl WorkloadTls {
    pub(super) fn new(ca: &Ca, identity: &Identity) -> anyhow::Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(ca.root())?;
        let roots = Arc::new(roots);
        let leaf = Arc::new(ca.issue(identity)?);
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone());
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(clients.build()?)
            .with_single_cert(leaf.chain.clone(), leaf.key.clone_key())?;
        server.alpn_protocols = vec![ALPN_H2.to_vec()];
        Ok(Self { server: Arc::new(server), provider, roots, leaf })
    }

    /// Connects over `stream`; the server must be one of `expected`, or anyone of the mesh if that
    /// is empty.
    pub(super) async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
        expected: Vec<Identity>,
    ) -> anyhow::Result<client::TlsStream<S>> {
        let verifier = WorkloadVerifier {
            provider: self.provider.clone(),
            roots: self.roots.clone(),
            expected,
        };
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_protocol_versions(&[&TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.leaf.chain.clone(), self.leaf.key.clone_key())?;
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        // One connection carries many streams; a ticket would outlive the identity it stands for.
        config.resumption = Resumption::disabled();
        // The verifier looks at the identity alone, so any name will do; ztunnel sends 0.0.0.0 too.
        let name = ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into());
        Ok(TlsConnector::from(Arc::new(config)).connect(name, stream).await?)
    }
}

/// The SPIFFE identity in the certificate that the peer of an established connection has shown.
pub(super) fn peer_identity(connection: &CommonState) -> Option<Identity> {
    identity_of(connection.peer_certificates()?.first()?)
}

fn identity_of(certificate: &CertificateDer<'_>) -> Option<Identity> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    certificate
        .valid_uri_names()
        .filter(|uri| uri.starts_with("spiffe://"))
        .find_map(|uri| uri.parse().ok())
}

#[derive(Debug)]
struct WorkloadVerifier {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    expected: Vec<Identity>,
}

impl ServerCertVerifier for WorkloadVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(certificate)?,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        match identity_of(certificate) {
            Some(identity) if self.expected.is_empty() || self.expected.contains(&identity) => {
                Ok(ServerCertVerified::assertion())
            }
            _ => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
