use std::io;

use thiserror::Error;

use super::FileUri;
use crate::connection::SecretError;

/// What a store answers may hold the query of a URL, and with it a signature: see [`ObjectError::store`].
#[derive(Debug, Error)]
pub enum ObjectError {
    #[error("{uri}: {source}")]
    File { uri: FileUri, source: io::Error },
    #[error("{uri}: there is no such file")]
    NotFound { uri: FileUri },
    #[error("{uri}: no file matches")]
    NoMatch { uri: FileUri },
    #[error("{uri}: matches more than {most} files; name fewer at once")]
    TooMany { uri: FileUri, most: usize },
    #[error(
        "{uri}: the store refuses: {text}; see to the keys of credentialsSecretRef and to what they permit"
    )]
    Denied { uri: FileUri, text: String },
    #[error("{uri}: {text}")]
    Store { uri: FileUri, text: String, transient: bool },
    #[error("{uri}: it was changed while it was read; leave it as it is, and start again")]
    Changed { uri: FileUri },
    #[error("{uri}: is there already, and existingKeys is Fail; remove it, name another, or choose Replace")]
    Exists { uri: FileUri },
    #[error("{uri}: what was read back differs from what was written: the storage damaged it")]
    ReadBack { uri: FileUri },
    #[error("{source}; the file was written to its end, but not read back, and stays where it is")]
    Unread { source: Box<ObjectError> },
    #[error(
        "{uri}: another run is writing it; let that one come to its end, or stop it, or name another file"
    )]
    Busy { uri: FileUri },
    #[error("{uri}: credentialsSecretRef: the key {key} is not text")]
    NotText { uri: FileUri, key: &'static str },
    #[error("{uri}: credentialsSecretRef: {source}")]
    Secret { uri: FileUri, source: SecretError },
}

impl ObjectError {
    pub fn file(uri: &FileUri, source: io::Error) -> Self {
        if source.kind() == io::ErrorKind::NotFound {
            return Self::NotFound { uri: uri.clone() };
        }
        Self::File { uri: uri.clone(), source }
    }

    pub fn store(uri: &FileUri, error: &object_store::Error) -> Self {
        use object_store::Error;
        let uri = uri.clone();
        let mut text = error.to_string();
        if let FileUri::Http(url) = &uri {
            for secret in [url.query(), url.password(), Some(url.username())].into_iter().flatten() {
                if !secret.is_empty() {
                    text = text.replace(secret, "…");
                }
            }
        }
        match error {
            Error::NotFound { .. } => Self::NotFound { uri },
            Error::Precondition { .. } => Self::Changed { uri },
            Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => Self::Denied { uri, text },
            Error::Generic { .. } | Error::JoinError { .. } => Self::Store { uri, text, transient: true },
            _ => Self::Store { uri, text, transient: false },
        }
    }

    /// True when trying again may do.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Store { transient, .. } => *transient,
            Self::Secret { .. } => true,
            _ => false,
        }
    }

    pub fn is_auth(&self) -> bool {
        matches!(self, Self::Denied { .. } | Self::Secret { .. } | Self::NotText { .. })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_store_says_is_shown_without_the_signature() {
        let uri = FileUri::parse("https://me:sesame@h/a.rdb?X-Amz-Signature=swordfish").unwrap();
        let said = "error sending request for url (https://me:sesame@h/a.rdb?X-Amz-Signature=swordfish)";
        let error = object_store::Error::Generic { store: "HTTP", source: said.into() };
        let shown = ObjectError::store(&uri, &error).to_string();
        assert!(!shown.contains("swordfish") && !shown.contains("sesame"), "{shown}");
        assert!(shown.starts_with("https://h/a.rdb: "), "{shown}");
    }
}
