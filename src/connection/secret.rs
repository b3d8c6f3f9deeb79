use std::path::PathBuf;
use std::sync::Arc;
use std::{fmt, fs, io};

use futures::future::BoxFuture;

use thiserror::Error;

/// Larger files are not secrets but a wrong path.
const MAX_SECRET: u64 = 1 << 20;

/// A secret that is read when it is needed, so that a rotated file needs no restart. Never printed.
#[derive(Clone)]
pub enum Secret {
    Literal(Vec<u8>),
    File(PathBuf),
    /// Kept by somebody else, such as the Kubernetes API.
    Elsewhere(Arc<dyn SecretSource>),
}

/// Where a secret is kept that is neither in the manifest nor in a file.
pub trait SecretSource: Send + Sync {
    /// What the secret is now.
    fn read(&self) -> BoxFuture<'_, Result<Vec<u8>, SecretError>>;
}

#[derive(Debug, Error)]
pub enum SecretError {
    #[error("the secret file {path} cannot be read: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("the secret file {path} holds {length} bytes; at most {MAX_SECRET} are taken")]
    TooLarge { path: PathBuf, length: u64 },
    #[error("the secret {name} cannot be read: {why}")]
    Elsewhere { name: String, why: String },
}

impl Secret {
    /// A file's trailing newline is not part of the secret.
    pub async fn read(&self) -> Result<Vec<u8>, SecretError> {
        let path = match self {
            Secret::Literal(bytes) => return Ok(bytes.clone()),
            Secret::Elsewhere(source) => return source.read().await,
            Secret::File(path) => path,
        };
        let unreadable = |source| SecretError::Unreadable { path: path.clone(), source };
        let length = fs::metadata(path).map_err(unreadable)?.len();
        if length > MAX_SECRET {
            return Err(SecretError::TooLarge { path: path.clone(), length });
        }
        let mut bytes = fs::read(path).map_err(unreadable)?;
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
            }
        }
        Ok(bytes)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_lose_one_trailing_newline_and_literals_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("password");
        for (content, secret) in [("pw\n", "pw"), ("pw\r\n", "pw"), ("p w", "p w"), ("pw\n\n", "pw\n")] {
            fs::write(&path, content).unwrap();
            assert_eq!(Secret::File(path.clone()).read().await.unwrap(), secret.as_bytes());
        }
        assert_eq!(Secret::Literal(b"pw\n".to_vec()).read().await.unwrap(), b"pw\n");
    }

    #[test]
    fn debug_shows_nothing() {
        assert_eq!(format!("{:?}", Secret::Literal(b"hunter2".to_vec())), "Secret(…)");
    }

    #[tokio::test]
    async fn a_missing_file_is_named() {
        let error = Secret::File("/nonexistent/pw".into()).read().await.unwrap_err();
        assert!(error.to_string().contains("/nonexistent/pw"), "{error}");
    }
}
