//! Certificates made for one test: an authority, a server for `localhost`, a client.

use std::path::Path;

use anyhow::Result;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// A folder with `ca.crt`, `server.crt`, `server.key`, `tls.crt` and `tls.key` (the client's, named as in a
/// Kubernetes TLS secret) in PEM.
pub struct Certificates {
    folder: TempDir,
}

impl Certificates {
    pub fn new() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("redis-migration-e2e-").tempdir()?;
        let key = KeyPair::generate()?;
        let mut authority = CertificateParams::new(Vec::new())?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.distinguished_name.push(DnType::CommonName, "test authority");
        std::fs::write(folder.path().join("ca.crt"), authority.self_signed(&key)?.pem())?;
        let authority = Issuer::new(authority, key);
        for (name, subjects) in
            [("server", vec!["localhost", "127.0.0.1", "redis.test"]), ("tls", vec!["client"])]
        {
            let key = KeyPair::generate()?;
            let names: Vec<String> = subjects.into_iter().map(str::to_owned).collect();
            let certificate = CertificateParams::new(names)?.signed_by(&key, &authority)?;
            std::fs::write(folder.path().join(format!("{name}.crt")), certificate.pem())?;
            std::fs::write(folder.path().join(format!("{name}.key")), key.serialize_pem())?;
        }
        Ok(Self { folder })
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The text of one of the files.
    pub fn pem(&self, file: &str) -> Result<String> {
        Ok(std::fs::read_to_string(self.folder.path().join(file))?)
    }
}
