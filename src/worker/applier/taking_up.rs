//! Going on with the spool of an earlier run, and leaving one for a later run.

use std::time::Duration;

use super::{Applier, Filtered, Place, Stage};
use crate::rdb::Decoder;
use crate::rdb::checksum::Crc;
use crate::worker::stream::StreamPlace;
use crate::worker::takeover::{Left, LeftPart};

/// A stop takes this long at most for what is not on disk yet.
const STORE: Duration = Duration::from_millis(1500);
/// Less of the stream than this is asked of the source again, whose backlog is no smaller.
const ASKED_AGAIN: u64 = 16 << 10;

impl Applier {
    /// Stands where an earlier run stood, as after a lost connection: keys behind that place, which that run
    /// may have loaded, are written again, and commands that it may have applied are skipped by their guards.
    pub fn take_up(&mut self, left: Left) {
        let Left { origin, stream_at, position, part } = left;
        let (stage, keys, keys_total) = match part {
            LeftPart::Snapshot(load) => {
                self.rules.replay = true;
                self.replay_until = stream_at;
                self.stream_db = load.stream_db;
                let decoder = Box::new(Decoder::at(self.limits, load.waypoint));
                (Stage::Snapshot { decoder, crc: Crc::resume(load.crc) }, load.keys, load.keys_total)
            }
            LeftPart::Stream { db } => {
                self.stream_at = Some(stream_at);
                self.offset_shift = origin.offset - stream_at as i64;
                self.replay_from_keeper();
                self.acknowledge(position as i64 + self.offset_shift);
                (Stage::Stream(StreamPlace { db }), 0, 0)
            }
        };
        self.origin = Some(origin);
        self.taken_up = true;
        let filtered = Filtered::default();
        self.stands = Place { position, stage, keys, expired: 0, keys_total, commands: 0, filtered };
        self.go_on_from_stands();
        self.reader.applied(position);
        self.publish();
    }

    /// Leaves what was received and does not stand on the target for another run, if it is of use to one:
    /// an RDB without its end is not. True when all of it is on disk.
    pub async fn leave_spool(&mut self) -> bool {
        let named = self.origin.as_ref().is_some_and(|origin| !origin.is_unnamed());
        let of_use = match self.stands.stage {
            Stage::Snapshot { .. } => self.reader.stream_at().is_some(),
            Stage::Stream(_) => self.reader.gauges().end.saturating_sub(self.stands.position) > ASKED_AGAIN,
        };
        if self.keeper.is_none() || !named || !of_use {
            return false;
        }
        // What is there already may do.
        self.reader.keep(true);
        let why = match tokio::time::timeout(STORE, self.reader.store()).await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("the disk did not take it within {STORE:?}"),
        };
        tracing::warn!(shard = %self.setup.shard, why, "not all that was received could be left for another run");
        false
    }
}
