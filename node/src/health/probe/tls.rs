//! TLS for `https` checks.
//!
//! Certificates are not verified unless the check asks for it: backends commonly have certificates of their own making,
//! and the question of a health check is whether the backend serves, not who it is. Verified against the system's
//! roots, where an operator adds his own authority anyway.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::io_words;

/// Bundles of root certificates, the first that exists is read: Debian, Red Hat, openSUSE, Alpine.
const BUNDLES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Where the roots for verified checks come from.
#[derive(Clone, Debug)]
pub(super) enum RootSource {
    /// Nowhere: such checks fail.
    None,
    /// The file that `SSL_CERT_FILE` names, else the first of the bundles that exists.
    System,
    /// One file.
    #[cfg_attr(not(test), allow(dead_code, reason = "tests bring an authority of their own"))]
    File(PathBuf),
}

/// One client for each way of treating certificates.
#[derive(Clone, Debug)]
pub(super) struct TlsClients {
    trusting: Arc<ClientConfig>,
    verifying: Result<Arc<ClientConfig>, String>,
}

impl TlsClients {
    pub(super) fn new(roots: RootSource) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = || {
            ClientConfig::builder_with_provider(provider.clone())
                .with_safe_default_protocol_versions()
                .expect("ring supports the default protocol versions")
        };
        let trusting = builder()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider.clone())))
            .with_no_client_auth();
        let verifying = read_roots(&roots)
            .map(|roots| Arc::new(builder().with_root_certificates(roots).with_no_client_auth()));
        TlsClients { trusting: Arc::new(trusting), verifying }
    }

    /// Handshakes on `stream`. `host` is sent as server name, and verified where `verify` is set; else `address` is.
    pub(super) async fn connect(
        &self,
        stream: TcpStream,
        address: IpAddr,
        host: Option<&str>,
        verify: bool,
    ) -> Result<TlsStream<TcpStream>, String> {
        let config = if verify { self.verifying.clone()? } else { self.trusting.clone() };
        let name = match host {
            Some(host) => ServerName::try_from(without_port(host).to_owned())
                .map_err(|_| format!("host \"{host}\" is no name of a server"))?,
            None => ServerName::IpAddress(address.into()),
        };
        TlsConnector::from(config).connect(name, stream).await.map_err(|e| match tls_error(&e) {
            Some(tls) => format!("TLS: {tls}"),
            None => format!("TLS: {}", io_words(&e)),
        })
    }
}

fn tls_error(error: &std::io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|e| e.downcast_ref())
}

/// `example.org:8443` → `example.org`; an IPv6 address in brackets loses them.
fn without_port(host: &str) -> &str {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    match host.split_once(':') {
        Some((name, port)) if !port.contains(':') => name,
        _ => host,
    }
}

fn read_roots(source: &RootSource) -> Result<RootCertStore, String> {
    let file = match source {
        RootSource::None => return Err("no root certificates were read".to_owned()),
        RootSource::File(file) => file.clone(),
        RootSource::System => std::env::var_os("SSL_CERT_FILE")
            .map(PathBuf::from)
            .or_else(|| BUNDLES.iter().map(PathBuf::from).find(|p| p.exists()))
            .ok_or_else(|| {
                "tls_verify is on and this machine has no root certificates: install ca-certificates"
                    .to_owned()
            })?,
    };
    let mut roots = RootCertStore::empty();
    let certificates = read_certificates(&file)
        .map_err(|e| format!("root certificates of {} can't be read: {e}", file.display()))?;
    let (added, _) = roots.add_parsable_certificates(certificates);
    if added == 0 {
        return Err(format!("no root certificate in {}", file.display()));
    }
    Ok(roots)
}

fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, rustls::pki_types::pem::Error> {
    CertificateDer::pem_file_iter(file)?.collect()
}

/// Takes any certificate; the handshake's signature must still be that certificate's.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_loses_its_port() {
        for (host, name) in [
            ("example.org", "example.org"),
            ("example.org:8443", "example.org"),
            ("[2001:db8::1]:443", "2001:db8::1"),
            ("2001:db8::1", "2001:db8::1"),
            ("192.0.2.1:1", "192.0.2.1"),
        ] {
            assert_eq!(without_port(host), name);
        }
    }
}
