//! Names of files, and what it takes to get at them.

use std::collections::BTreeMap;
use std::fmt;

use glob::Pattern;
use thiserror::Error;
use url::Url;

use crate::connection::Secret;

/// Keys of the Secret that `credentialsSecretRef` names. `endpoint` is an S3-compatible server, or another
/// address of the service; `authorization` is the header of that name, for HTTP.
pub const KEYS: [&str; 10] = [
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "aws_region",
    "google_service_account_key",
    "azure_storage_account_name",
    "azure_storage_account_key",
    "azure_storage_sas_token",
    "endpoint",
    "authorization",
];

/// Where a file is. Shown without what may be secret in it: the user and the query of a URL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum FileUri {
    /// A path of the machine or Pod that the tool runs on.
    Local(String),
    Store {
        store: Store,
        /// Bucket or container.
        bucket: String,
        key: String,
    },
    Http(Box<Url>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Store {
    S3,
    Google,
    Azure,
}

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FileUriError {
    #[error("is empty; allowed: a path, or file://, s3://, gs://, az://, http:// or https://")]
    Empty,
    #[error(
        "is of unknown kind \"{0}://\"; allowed: a path, or file://, s3://, gs://, az://, http:// or https://"
    )]
    Scheme(String),
    #[error("names a host; allowed: file:///path, with three slashes")]
    Host,
    #[error("names no bucket; allowed: {0}://bucket/path")]
    NoBucket(&'static str),
    #[error("names no file behind the bucket; allowed: {0}://bucket/path")]
    NoKey(&'static str),
    #[error("is no URL: {0}")]
    Url(url::ParseError),
    #[error("is no glob: {0}; a literal *, ? or [ is written as [*], [?] or [[]")]
    Glob(&'static str),
}

impl FileUri {
    pub fn parse(text: &str) -> Result<Self, FileUriError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return if text.is_empty() { Err(FileUriError::Empty) } else { Ok(Self::Local(text.to_owned())) };
        };
        let store = match scheme.to_ascii_lowercase().as_str() {
            "file" if rest.starts_with('/') => return Ok(Self::Local(rest.to_owned())),
            "file" => return Err(FileUriError::Host),
            "http" | "https" => {
                return Url::parse(text).map(Box::new).map(Self::Http).map_err(FileUriError::Url);
            }
            "s3" => Store::S3,
            "gs" => Store::Google,
            "az" => Store::Azure,
            _ => return Err(FileUriError::Scheme(scheme.to_owned())),
        };
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(FileUriError::NoBucket(store.scheme()));
        }
        if key.trim_matches('/').is_empty() {
            return Err(FileUriError::NoKey(store.scheme()));
        }
        Ok(Self::Store { store, bucket: bucket.to_owned(), key: key.trim_start_matches('/').to_owned() })
    }

    /// The files that it stands for; `None`: it names one.
    pub fn pattern(&self) -> Result<Option<Pattern>, FileUriError> {
        let text = match self {
            Self::Local(path) => path,
            Self::Store { key, .. } => key,
            // A `?` begins the query, and nobody lists what there is.
            Self::Http(_) => return Ok(None),
        };
        let is_glob = text.contains(['*', '?', '[']);
        is_glob.then(|| Pattern::new(text).map_err(|error| FileUriError::Glob(error.msg))).transpose()
    }

    /// The last part of its path.
    pub fn name(&self) -> &str {
        let path = match self {
            Self::Local(path) => path,
            Self::Store { key, .. } => key,
            Self::Http(url) => url.path(),
        };
        path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
    }
}

impl Store {
    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Google => "gs",
            Self::Azure => "az",
        }
    }
}

impl fmt::Display for FileUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(path) => f.write_str(path),
            Self::Store { store, bucket, key } => write!(f, "{}://{bucket}/{key}", store.scheme()),
            Self::Http(url) => {
                write!(f, "{}://{}", url.scheme(), url.host_str().unwrap_or_default())?;
                if let Some(port) = url.port() {
                    write!(f, ":{port}")?;
                }
                f.write_str(url.path())
            }
        }
    }
}

impl fmt::Debug for FileUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a store asks for.
#[derive(Clone, Debug, Default)]
pub struct StoreCredentials {
    /// By one of [`KEYS`].
    pub secrets: BTreeMap<&'static str, Secret>,
    /// What the process has of its own (environment, the machine's identity) counts where no Secret is
    /// named. Not in an operator, which serves several owners.
    pub ambient: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> FileUri {
        FileUri::parse(text).unwrap()
    }

    #[test]
    fn every_kind_is_told_apart() {
        assert_eq!(parsed("dump.rdb"), FileUri::Local("dump.rdb".to_owned()));
        assert_eq!(parsed("file:///data/a b.rdb"), FileUri::Local("/data/a b.rdb".to_owned()));
        let key = "x/y%20 z.rdb".to_owned();
        let store = FileUri::Store { store: Store::S3, bucket: "b".to_owned(), key };
        assert_eq!(parsed("s3://b/x/y%20 z.rdb"), store);
        for (text, name) in
            [("gs://b/d/f.rdb", "f.rdb"), ("az://c/f.rdb", "f.rdb"), ("https://h/a/b.rdb?x=/y", "b.rdb")]
        {
            assert_eq!(parsed(text).name(), name);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, fault) in [
            ("", FileUriError::Empty),
            ("ftp://h/x", FileUriError::Scheme("ftp".to_owned())),
            ("file://host/x", FileUriError::Host),
            ("s3:///x", FileUriError::NoBucket("s3")),
            ("gs://b/", FileUriError::NoKey("gs")),
            ("az://b", FileUriError::NoKey("az")),
        ] {
            assert_eq!(FileUri::parse(text), Err(fault), "{text}");
        }
        assert!(matches!(FileUri::parse("http://"), Err(FileUriError::Url(_))));
        assert!(matches!(parsed("/a/***").pattern(), Err(FileUriError::Glob(_))));
    }

    #[test]
    fn a_signed_url_is_shown_without_its_signature() {
        let uri = parsed("https://user:sesame@h:8443/a.rdb?X-Amz-Signature=swordfish#x");
        assert_eq!(format!("{uri} {uri:?}"), "https://h:8443/a.rdb https://h:8443/a.rdb");
    }

    #[test]
    fn globs_are_of_paths_and_keys() {
        for (text, is_glob) in
            [("/a/*.rdb", true), ("s3://b/d-?/x", true), ("https://h/x?y=*", false), ("/a/b", false)]
        {
            assert_eq!(parsed(text).pattern().unwrap().is_some(), is_glob, "{text}");
        }
    }
}
