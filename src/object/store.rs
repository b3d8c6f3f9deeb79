//! Clients of stores.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey as S3};
use object_store::azure::{AzureConfigKey as Azure, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey as Google};
use object_store::http::HttpBuilder;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};

use super::{FileUri, ObjectError, Store, StoreCredentials};

/// A store that says nothing for so long is asked again.
const SILENT: Duration = Duration::from_secs(30);
const CONNECT: Duration = Duration::from_secs(5);
/// A request is repeated for so long.
const RETRY: Duration = Duration::from_secs(60);

/// A store, and the place of the file in it.
#[derive(Clone, Debug)]
pub struct Opened {
    pub store: Arc<dyn ObjectStore>,
    pub path: Path,
}

/// `None`: the file is on a disk.
pub async fn open(uri: &FileUri, credentials: &StoreCredentials) -> Result<Option<Opened>, ObjectError> {
    if matches!(uri, FileUri::Local(_)) {
        return Ok(None);
    }
    // The process has one crypto library; an error means that it is set already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let keys = read_keys(uri, credentials).await?;
    let built = match uri {
        FileUri::Local(_) => return Ok(None),
        FileUri::Store { store, bucket, key } => {
            let path = Path::parse(key.trim_matches('/')).map_err(object_store::Error::from);
            let store = match store {
                Store::S3 => s3(bucket, &keys, credentials.ambient),
                Store::Google => google(bucket, &keys, credentials.ambient),
                Store::Azure => azure(bucket, &keys, credentials.ambient),
            };
            path.and_then(|path| Ok(Opened { store: store?, path }))
        }
        FileUri::Http(url) => http(url.as_str(), &keys, uri)?,
    };
    built.map(Some).map_err(|error| ObjectError::store(uri, &error))
}

type Keys = BTreeMap<&'static str, String>;
type Built = Result<Arc<dyn ObjectStore>, object_store::Error>;

async fn read_keys(uri: &FileUri, credentials: &StoreCredentials) -> Result<Keys, ObjectError> {
    let mut keys = Keys::new();
    for (key, secret) in &credentials.secrets {
        let read = secret.read().await;
        let value = read.map_err(|source| ObjectError::Secret { uri: uri.clone(), source })?;
        let not_text = |_| ObjectError::NotText { uri: uri.clone(), key };
        keys.insert(key, String::from_utf8(value).map_err(not_text)?);
    }
    Ok(keys)
}

fn options(keys: &Keys) -> ClientOptions {
    let plain = keys.get("endpoint").is_some_and(|endpoint| endpoint.starts_with("http://"));
    // A large answer takes as long as the target takes.
    ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(CONNECT)
        .with_read_timeout(SILENT)
        .with_allow_http(plain)
}

fn retry() -> RetryConfig {
    RetryConfig { max_retries: 5, retry_timeout: RETRY, ..RetryConfig::default() }
}

fn s3(bucket: &str, keys: &Keys, ambient: bool) -> Built {
    let mut builder = if ambient { AmazonS3Builder::from_env() } else { AmazonS3Builder::new() };
    if !ambient {
        builder = builder.with_client_options(options(keys));
    }
    builder = builder.with_retry(retry()).with_bucket_name(bucket);
    for (key, config) in [
        ("aws_access_key_id", S3::AccessKeyId),
        ("aws_secret_access_key", S3::SecretAccessKey),
        ("aws_session_token", S3::Token),
        ("aws_region", S3::Region),
        ("endpoint", S3::Endpoint),
    ] {
        if let Some(value) = keys.get(key) {
            builder = builder.with_config(config, value);
        }
    }
    let anonymous = !ambient && !keys.contains_key("aws_access_key_id");
    Ok(Arc::new(builder.with_skip_signature(anonymous).build()?))
}

fn google(bucket: &str, keys: &Keys, ambient: bool) -> Built {
    let mut builder =
        if ambient { GoogleCloudStorageBuilder::from_env() } else { GoogleCloudStorageBuilder::new() };
    if !ambient {
        builder = builder.with_client_options(options(keys));
    }
    builder = builder.with_retry(retry()).with_bucket_name(bucket);
    if let Some(endpoint) = keys.get("endpoint") {
        builder = builder.with_config(Google::BaseUrl, endpoint);
    }
    match keys.get("google_service_account_key") {
        Some(key) => builder = builder.with_service_account_key(key),
        None if !ambient => builder = builder.with_skip_signature(true),
        None => {}
    }
    Ok(Arc::new(builder.build()?))
}

fn azure(container: &str, keys: &Keys, ambient: bool) -> Built {
    let mut builder = if ambient { MicrosoftAzureBuilder::from_env() } else { MicrosoftAzureBuilder::new() };
    if !ambient {
        builder = builder.with_client_options(options(keys));
    }
    builder = builder.with_retry(retry()).with_container_name(container);
    for (key, config) in [
        ("azure_storage_account_name", Azure::AccountName),
        ("azure_storage_account_key", Azure::AccessKey),
        ("azure_storage_sas_token", Azure::SasKey),
        ("endpoint", Azure::Endpoint),
    ] {
        if let Some(value) = keys.get(key) {
            builder = builder.with_config(config, value);
        }
    }
    let signed = ["azure_storage_account_key", "azure_storage_sas_token"];
    let anonymous = !ambient && !signed.iter().any(|key| keys.contains_key(key));
    Ok(Arc::new(builder.with_skip_signature(anonymous).build()?))
}

fn http(url: &str, keys: &Keys, uri: &FileUri) -> Result<Result<Opened, object_store::Error>, ObjectError> {
    let mut options = options(keys).with_allow_http(url.starts_with("http://"));
    if let Some(authorization) = keys.get("authorization") {
        let mut value = HeaderValue::from_str(authorization)
            .map_err(|_| ObjectError::NotText { uri: uri.clone(), key: "authorization" })?;
        value.set_sensitive(true);
        options = options.with_default_headers(HeaderMap::from_iter([(AUTHORIZATION, value)]));
    }
    let built = HttpBuilder::new().with_url(url).with_client_options(options).with_retry(retry()).build();
    // The whole URL is the store's, so that its query stays what it is.
    Ok(built.map(|store| Opened { store: Arc::new(store), path: Path::default() }))
}
