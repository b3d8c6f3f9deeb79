//! What fills a spool.

use std::sync::Arc;

use tokio::sync::watch;

use super::takeover::Left;
use super::{Checkpoint, ShardProgress, WorkerError};
use crate::connection::{Address, Dialer};
use crate::object::SourceFile;
use crate::source::file::{FileFeed, From};
use crate::source::replication::{Acknowledged, LinkState, Replication};
use crate::source::scan::{Scan, ScanProgress, ScanRules, Undo};
use crate::source::watch::SourceShard;
use crate::spool::{Origin, SpoolWriter};

/// What fills the spool: an RDB, and the commands that follow it.
#[derive(Clone)]
pub enum Feed {
    Replication(Upstream),
    Scan(Upstream, ScanRules),
    /// An RDB that nothing follows.
    File(SourceFile),
}

impl Feed {
    /// The server behind it; `None`: there is none.
    pub fn upstream(&self) -> Option<&Upstream> {
        match self {
            Self::Replication(upstream) | Self::Scan(upstream, _) => Some(upstream),
            Self::File(_) => None,
        }
    }

    /// True when commands may follow that renew what is about to expire. A scan reads what was renewed again.
    pub fn renews(&self) -> bool {
        matches!(self, Self::Replication(_))
    }

    /// True when nothing is left to be done once the RDB stands on the target.
    pub fn is_file(&self) -> bool {
        matches!(self, Self::File(_))
    }
}

/// A shard of the source that is followed.
#[derive(Clone)]
pub struct Upstream {
    /// Where to begin to read.
    pub address: Address,
    /// Where the shard is after a failover; `None`: always at `address`.
    pub shard: Option<SourceShard>,
    /// Read from a replica where one is fit.
    pub prefer_replica: bool,
    pub dialer: Dialer,
    pub psync_command: String,
    pub allow_full_resync: bool,
}

/// Where an earlier run stopped.
#[derive(Clone, Default)]
pub(super) struct Resumed<'a> {
    pub from: Option<&'a Checkpoint>,
    /// What it left in the spool.
    pub left: Option<&'a Left>,
    /// A link of this run was there before.
    pub restarted: bool,
    pub scan: Scanning,
}

/// What others share with a scan.
#[derive(Clone, Default)]
pub(super) struct Scanning {
    pub progress: Arc<ScanProgress>,
    pub undo: Undo,
}

/// A feed at work.
pub enum Link {
    Replication(Replication),
    Scan(Box<Scan>),
    File(FileFeed),
}

impl Link {
    /// From the very beginning. `acknowledged`: what those who read the spool have done with.
    pub fn first(feed: Feed, acknowledged: watch::Receiver<Acknowledged>, progress: &ShardProgress) -> Self {
        let scan = Scanning { progress: Arc::clone(&progress.scan), undo: Undo::default() };
        let resumed = Resumed { scan, ..Resumed::default() };
        Self::new(feed, resumed, acknowledged, progress.link.clone())
    }

    pub(super) fn new(
        feed: Feed,
        resumed: Resumed<'_>,
        acknowledged: watch::Receiver<Acknowledged>,
        state: watch::Sender<LinkState>,
    ) -> Self {
        let Resumed { from, left, restarted, scan } = resumed;
        match feed {
            Feed::File(file) => {
                let from = match (left, from) {
                    (Some(left), _) => From::Position(left.position),
                    (None, Some(_)) => From::End,
                    (None, None) => From::Start,
                };
                Self::File(FileFeed { file, from, state })
            }
            Feed::Scan(upstream, rules) => Self::Scan(Box::new(Scan {
                dialer: upstream.dialer,
                address: upstream.address,
                shard: upstream.shard,
                prefer_replica: upstream.prefer_replica,
                allow_anew: upstream.allow_full_resync,
                anew: restarted.then_some("a scan cannot be gone on with where an earlier one stopped"),
                rules,
                state,
                progress: scan.progress,
                undo: scan.undo,
            })),
            Feed::Replication(upstream) => Self::Replication(Replication {
                dialer: upstream.dialer,
                address: upstream.address,
                shard: upstream.shard,
                prefer_replica: upstream.prefer_replica,
                psync_command: upstream.psync_command,
                resume: from.map(|checkpoint| Origin {
                    replication_id: checkpoint.replication_id.clone(),
                    offset: checkpoint.offset,
                }),
                spooled: left.map(|left| (left.origin.clone(), left.stream_at)),
                allow_full_resync: upstream.allow_full_resync,
                restarted,
                acknowledged,
                state,
            }),
        }
    }

    /// Ends only with an error.
    pub async fn run(self, writer: SpoolWriter) -> WorkerError {
        match self {
            Self::Replication(link) => link.run(writer).await.into(),
            Self::Scan(scan) => scan.run(writer).await.into(),
            Self::File(feed) => feed.run(writer).await.into(),
        }
    }
}
