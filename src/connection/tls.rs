//! The TLS client from the manifest's settings.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::{ConnectionError, TlsAccess};

/// The secrets as they were read: equal material makes an equal client.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct TlsMaterial {
    ca: Option<Vec<u8>>,
    client: Option<(Vec<u8>, Vec<u8>)>,
}

impl TlsMaterial {
    pub(super) async fn read(access: &TlsAccess) -> Result<TlsMaterial, ConnectionError> {
        let ca = match &access.ca {
            Some(ca) => Some(ca.read().await?),
            None => None,
        };
        let client = match (&access.client_certificate, &access.client_key) {
            (Some(certificate), Some(key)) => Some((certificate.read().await?, key.read().await?)),
            (None, None) => None,
            _ => return Err(fault("client certificate", "certificate and key must be given together")),
        };
        Ok(TlsMaterial { ca, client })
    }

    pub(super) fn client_config(&self, access: &TlsAccess) -> Result<ClientConfig, ConnectionError> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| fault("protocol versions", error))?;
        let builder = if access.insecure_skip_verify {
            builder.dangerous().with_custom_certificate_verifier(Arc::new(AnyServer::new(&provider)))
        } else {
            builder.with_root_certificates(self.roots()?)
        };
        match &self.client {
            None => Ok(builder.with_no_client_auth()),
            Some((certificate, key)) => {
                let chain = certificates(certificate, "client certificate")?;
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| fault("client key", error))?;
                builder.with_client_auth_cert(chain, key).map_err(|error| fault("client certificate", error))
            }
        }
    }

    fn roots(&self) -> Result<RootCertStore, ConnectionError> {
        let mut roots = RootCertStore::empty();
        match &self.ca {
            Some(pem) => {
                for certificate in certificates(pem, "CA certificate")? {
                    roots.add(certificate).map_err(|error| fault("CA certificate", error))?;
                }
            }
            None => {
                let found = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(found.certs);
                if roots.is_empty() {
                    return Err(fault(
                        "system roots",
                        "none found; install ca-certificates or give tls.caSecretRef",
                    ));
                }
            }
        }
        Ok(roots)
    }
}

fn certificates(pem: &[u8], what: &'static str) -> Result<Vec<CertificateDer<'static>>, ConnectionError> {
    let found: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| fault(what, error))?;
    if found.is_empty() { Err(fault(what, "no certificate in the PEM data")) } else { Ok(found) }
}

pub(super) fn fault(what: &'static str, reason: impl ToString) -> ConnectionError {
    ConnectionError::TlsSettings { what, reason: reason.to_string() }
}

/// `insecureSkipVerify`: any certificate will do, but the peer must own its key.
#[derive(Debug)]
pub(super) struct AnyServer(WebPkiSupportedAlgorithms);

impl AnyServer {
    pub(super) fn new(provider: &CryptoProvider) -> AnyServer {
        AnyServer(provider.signature_verification_algorithms)
    }
}

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
