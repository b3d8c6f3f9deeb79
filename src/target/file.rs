//! A file in the place of a server: the RDB as it comes, or what the filter leaves of it, or its keys as JSON lines.

mod names;
mod scripted;
mod sieve;

use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;

use crate::file::{FileError, Place, Pushed};
use crate::loss::Loss;
use crate::object::{Destination, Draft, ObjectError};
use crate::rdb::json::JsonLines;
use crate::rdb::{Event, Limits};
use crate::transform::Transform;
use crate::transform::script::ScriptError;
use names::Names;
use sieve::{Passing, Remade, Sieve};

/// Values beyond this are only walked through when the RDB is passed on as it is.
const WALKED: usize = 1 << 20;
/// Of the RDB, taken at a time: what it makes of lines at the very most, 88 times as long expanded, is held.
const TAKEN: usize = 64 << 10;
/// Lines are handed on in runs of this many bytes.
const RUN: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFormat {
    Rdb,
    Json,
}

#[derive(Debug, Error)]
pub enum WriteError {
    #[error("the source's RDB: {0}")]
    Rdb(#[from] FileError),
    #[error(transparent)]
    Object(#[from] ObjectError),
    #[error("spec.filter.lua: {0}")]
    Script(#[from] ScriptError),
    #[error(
        "more than {most} keys: with spec.filter.lua no more are taken into one file, as their names could not be told apart",
        most = Names::most()
    )]
    TooManyNames,
}

/// A key that the file lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    pub db: u64,
    pub key: Vec<u8>,
    pub why: String,
    /// What it failed at.
    pub command: &'static str,
    pub kind: Loss,
}

/// One RDB on its way into a file.
pub struct FileWriter {
    draft: Draft,
    pushed: Pushed,
    json: Option<Json>,
    /// Where something is to be left out; and the RDB without it.
    sieve: Option<Sieve>,
    remade: Option<Remade>,
    pub keys: u64,
    /// Announced so far.
    pub keys_total: u64,
}

#[derive(Default)]
struct Json {
    lines: JsonLines,
    out: Vec<u8>,
}

impl FileWriter {
    /// `transform`: what is left out by database and key, and a script that decides on keys.
    pub async fn begin(
        destination: &Destination,
        format: FileFormat,
        transform: Option<Arc<Transform>>,
    ) -> Result<Self, WriteError> {
        let scripted = transform.as_ref().is_some_and(|transform| transform.script.is_some());
        let limits = match format {
            // A script that rewrites takes values whole.
            _ if scripted => Limits::default(),
            FileFormat::Rdb => Limits { max_value: WALKED, ..Limits::default() },
            FileFormat::Json => JsonLines::limits(),
        };
        let json = (format == FileFormat::Json).then(Json::default);
        let sieve = transform.map(Sieve::new).transpose()?;
        let remade = (sieve.is_some() && json.is_none()).then(Remade::new);
        let draft = destination.begin().await?;
        Ok(Self { draft, pushed: Pushed::new(limits), json, sieve, remade, keys: 0, keys_total: 0 })
    }

    /// Bytes of the RDB decoded so far.
    pub fn position(&self) -> u64 {
        self.pushed.position()
    }

    /// True behind the end of the RDB, whose checksum fits.
    pub fn is_over(&self) -> bool {
        self.pushed.is_over()
    }

    /// Bytes behind what is decoded: at the end of the RDB there are none.
    pub fn undecoded(&self) -> usize {
        self.pushed.undecoded()
    }

    /// Keys that the filter left out.
    pub fn keys_filtered(&self) -> u64 {
        self.sieve.as_ref().map_or(0, |sieve| sieve.left_out)
    }

    /// `left`: is told of each key that cannot be written.
    pub async fn write(&mut self, mut bytes: Bytes, mut left: impl FnMut(Left)) -> Result<(), WriteError> {
        while self.json.is_some() && bytes.len() > TAKEN {
            self.take(bytes.split_to(TAKEN), &mut left).await?;
        }
        self.take(bytes, &mut left).await
    }

    async fn take(&mut self, bytes: Bytes, left: &mut impl FnMut(Left)) -> Result<(), WriteError> {
        let Self { pushed, json, sieve, remade, keys, keys_total, .. } = self;
        pushed.push_raw(&bytes, |place, event, raw| {
            if let Event::ResizeDb { keys, .. } = &event {
                *keys_total += keys;
            }
            let change = match sieve.as_mut().map_or(Passing::Kept, |sieve| sieve.judge(place, &event)) {
                Passing::Kept => None,
                Passing::Changed(change) => Some(change),
                Passing::LeftOut => return Ok(()),
                Passing::Refused(key) => {
                    left(key);
                    return Ok(());
                }
            };
            let event = change.as_ref().map_or(event, |change| change.of(&event));
            if matches!(event, Event::Key(_) | Event::LargeBegin(_)) {
                *keys += 1;
            }
            if let Some(remade) = remade {
                remade.add(place.version, &event, raw, change.is_some());
            }
            if let Some(json) = json {
                json.add(place, &event, left);
            }
            Ok(())
        })?;
        if self.sieve.as_ref().is_some_and(|sieve| !sieve.has_room()) {
            return Err(WriteError::TooManyNames);
        }
        let over = self.pushed.is_over();
        let run = match (&mut self.json, &mut self.remade) {
            (None, None) => bytes,
            (Some(json), _) if json.out.len() >= RUN || over => std::mem::take(&mut json.out).into(),
            (None, Some(remade)) if remade.out.len() >= RUN || over => remade.take(over).into(),
            _ => return Ok(()),
        };
        Ok(self.draft.write(run).await?)
    }

    /// Gives the file its name; see [`Draft::finish`].
    pub async fn finish(self, goes_on: impl FnMut(u64) -> bool) -> Result<bool, WriteError> {
        Ok(self.draft.finish(goes_on).await?)
    }

    pub async fn abort(self) {
        self.draft.abort().await;
    }
}

impl Json {
    fn add(&mut self, place: Place, event: &Event<'_>, left: &mut impl FnMut(Left)) {
        let Self { lines, out } = self;
        let (command, kind) = ("JSON", Loss::Values);
        let mut lacks = |key: &[u8], why: String| {
            left(Left { db: place.db, key: key.to_vec(), why, command, kind });
        };
        match event {
            Event::Key(record) => {
                if let Err(error) = lines.key(place.db, record, place.flavor, out) {
                    lacks(record.key, error.to_string());
                }
            }
            Event::LargeBegin(head) => lines.begin(place.db, head, out),
            Event::LargeItems { key, items } if lines.is_open() => {
                if let Err(error) = lines.items(items, out) {
                    lines.end(Some(&error.to_string()), out);
                    lacks(key, error.to_string());
                }
            }
            Event::LargeEnd { .. } => lines.end(None, out),
            Event::LargeUnsupported { key, why, .. } => {
                lines.end(Some(why), out);
                lacks(key, (*why).to_owned());
            }
            Event::Function { code } => JsonLines::function(code, out),
            _ => {}
        }
    }
}
