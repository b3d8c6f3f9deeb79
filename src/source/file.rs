//! An RDB file in the place of a replication link: its bytes go into the spool, and no stream follows.
//!
//! The file is the log: nothing of it is kept on disk, and another run reads it again from the place that the
//! target's record names. Its fingerprint is the number of the spool's history and, spelled out, the id of
//! the replication history, so that a record of another content is never taken for one of this.

use std::future::pending;

use thiserror::Error;
use tokio::sync::watch;

use super::replication::{LinkPhase, LinkState};
use crate::backoff::Backoff;
use crate::clock::unix_millis;
use crate::object::{ObjectError, SourceFile};
use crate::spool::{Origin, SpoolError, SpoolWriter};

/// Attempts in a row that bring nothing.
const ATTEMPTS: u32 = 8;

#[derive(Debug, Error)]
pub enum FileFeedError {
    #[error("at byte {position}: {source}")]
    Object { position: u64, source: ObjectError },
    #[error(transparent)]
    Spool(#[from] SpoolError),
}

/// Where a file is to be read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    Start,
    /// The spool stands there already.
    Position(u64),
    /// All of it stands on the target.
    End,
}

pub struct FileFeed {
    pub file: SourceFile,
    pub from: From,
    pub state: watch::Sender<LinkState>,
}

/// As a replication history: what the target's record calls this content.
pub fn origin(file: &SourceFile) -> Origin {
    Origin { replication_id: format!("file-{:016x}", file.fingerprint()), offset: 0 }
}

impl FileFeed {
    /// Ends only with an error; dropping the future ends the reading.
    pub async fn run(self, mut spool: SpoolWriter) -> FileFeedError {
        let Self { file, from, state } = self;
        let origin = origin(&file);
        let mut position = match from {
            From::Start => {
                spool.begin_as(file.fingerprint(), origin.clone(), true);
                0
            }
            From::Position(position) => position,
            From::End => {
                spool.begin_as(file.fingerprint(), origin.clone(), false);
                file.size
            }
        };
        state.send_modify(|state| {
            state.phase = LinkPhase::Snapshot;
            state.origin = Some(origin);
            state.snapshot_bytes = Some(file.size);
        });
        let (mut backoff, mut attempts) = (Backoff::default(), 0);
        while position < file.size {
            let before = position;
            let error = match read(&file, &mut position, &mut spool).await {
                Ok(()) => break,
                Err(error) => error,
            };
            if position > before {
                (attempts, backoff) = (0, Backoff::default());
            }
            attempts += 1;
            let again = matches!(&error, FileFeedError::Object { source, .. } if source.is_transient());
            if !again || attempts > ATTEMPTS {
                return error;
            }
            tracing::warn!(%error, "the file cannot be read on, trying again");
            state.send_modify(|state| {
                state.attempts = attempts;
                state.last_error = error.to_string();
            });
            backoff.wait().await;
        }
        if from != From::End {
            spool.start_stream();
        }
        state.send_modify(|state| {
            state.phase = LinkPhase::Streaming;
            state.attempts = 0;
            state.last_error.clear();
        });
        pending().await
    }
}

async fn read(file: &SourceFile, position: &mut u64, spool: &mut SpoolWriter) -> Result<(), FileFeedError> {
    let mut chunks = file.chunks(*position);
    loop {
        let chunk = chunks.next().await;
        let chunk = chunk.map_err(|source| FileFeedError::Object { position: *position, source })?;
        let Some(chunk) = chunk else { return Ok(()) };
        spool.append(&chunk, unix_millis()).await?;
        *position += chunk.len() as u64;
    }
}
