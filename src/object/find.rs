//! From what is written in a manifest to files that are there.

use std::path::Path as FsPath;

use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStoreExt};

use super::read::{Place, SourceFile, time_of, version_of};
use super::store::{self, Opened};
use super::{FileUri, ObjectError, StoreCredentials};

/// More files than this are a mistake in a glob.
const MOST: usize = 10_000;

/// The files of one URI.
pub type Found = Vec<SourceFile>;

/// In the order of their names.
pub async fn find(uri: &FileUri, credentials: &StoreCredentials) -> Result<Found, ObjectError> {
    let pattern = uri.pattern().unwrap_or_default();
    let opened = store::open(uri, credentials).await?;
    let mut found = match (opened, pattern, uri) {
        (None, None, FileUri::Local(path)) => vec![local(path)?],
        (None, Some(_), FileUri::Local(path)) => matching(uri, path)?,
        (Some(opened), None, _) => {
            let meta = opened.store.head(&opened.path).await;
            let meta = meta.map_err(|error| ObjectError::store(uri, &error))?;
            vec![of_store(uri, opened, &meta)]
        }
        (Some(opened), Some(pattern), FileUri::Store { key, .. }) => {
            listed(uri, opened, &pattern, key).await?
        }
        _ => Vec::new(),
    };
    if found.is_empty() {
        return Err(ObjectError::NoMatch { uri: uri.clone() });
    }
    found.sort_by(|a, b| a.uri.cmp(&b.uri));
    Ok(found)
}

fn local(path: &str) -> Result<SourceFile, ObjectError> {
    let uri = FileUri::Local(path.to_owned());
    let looked = std::fs::metadata(path).and_then(|meta| {
        // That it can be read shows now, and not in the middle of a run.
        std::fs::File::open(path)?;
        if meta.is_dir() { Err(std::io::ErrorKind::IsADirectory.into()) } else { Ok(meta) }
    });
    let meta = looked.map_err(|error| ObjectError::file(&uri, error))?;
    Ok(SourceFile { uri, size: meta.len(), version: version_of(&meta), place: Place::Local(path.into()) })
}

fn matching(uri: &FileUri, pattern: &str) -> Result<Found, ObjectError> {
    let paths = glob::glob(pattern).map_err(|error| {
        let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, error.msg);
        ObjectError::File { uri: uri.clone(), source }
    })?;
    let mut found = Vec::new();
    for path in paths {
        let path = path.map_err(|error| ObjectError::File { uri: uri.clone(), source: error.into() })?;
        if FsPath::is_dir(&path) {
            continue;
        }
        let name = path.to_str().ok_or_else(|| {
            let source = std::io::Error::new(std::io::ErrorKind::InvalidInput, "a name that is not UTF-8");
            ObjectError::File { uri: FileUri::Local(path.display().to_string()), source }
        })?;
        push(&mut found, local(name)?, uri)?;
    }
    Ok(found)
}

async fn listed(
    uri: &FileUri,
    opened: Opened,
    pattern: &glob::Pattern,
    key: &str,
) -> Result<Found, ObjectError> {
    let failed = |error: object_store::Error| ObjectError::store(uri, &error);
    // A store lists what is below a folder.
    let fixed = key.split(['*', '?', '[']).next().unwrap_or_default();
    let folder = fixed.rsplit_once('/').map_or("", |(folder, _)| folder);
    let folder = Path::parse(folder).map_err(|error| failed(error.into()))?;
    let mut listing = opened.store.list(Some(&folder));
    let mut found = Vec::new();
    let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
    while let Some(meta) = listing.try_next().await.map_err(failed)? {
        if pattern.matches_with(meta.location.as_ref(), options) {
            let opened = Opened { store: opened.store.clone(), path: meta.location.clone() };
            push(&mut found, of_store(uri, opened, &meta), uri)?;
        }
    }
    drop(listing);
    Ok(found)
}

fn push(found: &mut Found, file: SourceFile, uri: &FileUri) -> Result<(), ObjectError> {
    if found.len() >= MOST {
        return Err(ObjectError::TooMany { uri: uri.clone(), most: MOST });
    }
    found.push(file);
    Ok(())
}

fn of_store(uri: &FileUri, opened: Opened, meta: &ObjectMeta) -> SourceFile {
    let uri = match uri {
        FileUri::Store { store, bucket, .. } => {
            FileUri::Store { store: *store, bucket: bucket.clone(), key: meta.location.to_string() }
        }
        uri => uri.clone(),
    };
    // Some give no tag, and some a time that means nothing.
    let tag = meta.e_tag.clone();
    let version = tag.clone().unwrap_or_else(|| time_of(meta));
    SourceFile { uri, size: meta.size, version, place: Place::Store { opened, tag } }
}
