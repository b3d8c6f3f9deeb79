//! Where the applier stands, for those who ask.

use super::{Applier, Place, Stage, Work};
use crate::clock::unix_millis;
use crate::worker::progress::{Numbers, ShardPhase, ShardProgress};
use crate::worker::{Checkpoint, Stopped};

impl Applier {
    pub(super) fn position(&self) -> u64 {
        self.base + self.at as u64
    }

    /// Replication offset of the current position; 0 in the snapshot.
    pub(super) fn offset(&self) -> i64 {
        match self.work {
            Work::Snapshot { .. } => 0,
            Work::Stream(_) => self.position() as i64 + self.offset_shift,
        }
    }

    /// On a single target a transaction goes through as it comes, so that a batch must not end inside.
    pub(super) fn may_send(&self) -> bool {
        match &self.work {
            Work::Snapshot { .. } => true,
            Work::Stream(stream) => self.router.is_cluster() || stream.may_part(),
        }
    }

    pub(super) fn may_mark(&self) -> bool {
        // While keys wait for being overtaken, nobody may go on from any place behind that.
        self.recopy.overtaken.is_none() && self.is_between()
    }

    /// Nothing is half done.
    pub(super) fn is_between(&self) -> bool {
        match &self.work {
            Work::Snapshot { staged, .. } => staged.is_none(),
            Work::Stream(stream) => !stream.in_transaction(),
        }
    }

    pub(super) fn place(&mut self) -> Place {
        let position = self.position();
        let stage = match &mut self.work {
            Work::Snapshot { decoder, crc, .. } => {
                crc.update(self.window.get(self.summed..self.at).unwrap_or_default());
                self.summed = self.at;
                Stage::Snapshot { decoder: decoder.clone(), crc: crc.clone() }
            }
            Work::Stream(stream) => Stage::Stream(stream.place.clone()),
        };
        let Self { keys, commands, .. } = *self;
        Place { position, stage, keys, keys_total: self.numbers.keys_total, commands }
    }

    /// Where things stand, for another run.
    pub(in crate::worker) fn stopped(&mut self) -> Stopped {
        self.publish();
        let checkpoint = match (&self.stands.stage, &self.origin) {
            (Stage::Stream(place), Some(origin)) if !origin.is_unnamed() => Some(Checkpoint {
                replication_id: self.replication_id(),
                offset: self.stands.position as i64 + self.offset_shift,
                db: place.db,
            }),
            // Nothing has begun: an earlier run's place is still the one to go on from.
            (_, None) => self.setup.resume.clone(),
            _ => None,
        };
        Stopped { checkpoint, spooled: false }
    }

    /// Of the history that the applier is in, which the link may have left already, or renamed.
    pub(super) fn replication_id(&self) -> String {
        let begun = || self.origin.as_ref().map(|origin| origin.replication_id.clone());
        self.reader.replication_id().or_else(begun).unwrap_or_default()
    }

    /// Bytes that do not stand on the target, and the age of the oldest in ms.
    pub(super) fn lag(&self) -> (u64, u64) {
        let bytes = self.reader.gauges().end.saturating_sub(self.stands.position);
        match self.reader.arrived(self.stands.position) {
            Some(arrived) if bytes > 0 => (bytes, unix_millis().saturating_sub(arrived)),
            _ => (bytes, 0),
        }
    }

    pub(super) fn publish(&mut self) {
        let spool = self.reader.gauges();
        let replication_id = self.replication_id();
        let lag = self.lag();
        let numbers = &mut self.numbers;
        numbers.keys = self.stands.keys;
        numbers.commands = self.stands.commands;
        numbers.batches = self.outbox.batches;
        numbers.spool_memory = spool.memory_bytes;
        numbers.spool_disk = spool.disk_bytes;
        numbers.spool_full = spool.full;
        numbers.why_full = spool.why_full;
        numbers.replication_id = replication_id;
        numbers.snapshot_read = self.stream_at.unwrap_or(self.base + self.at as u64);
        numbers.phase = match (&self.stands.stage, &self.origin) {
            (_, None) => ShardPhase::Pending,
            (Stage::Snapshot { .. }, _) => ShardPhase::FullSync,
            (Stage::Stream(_), _) => ShardPhase::IncrementalSync,
        };
        (numbers.lag_bytes, numbers.lag_millis) = lag;
        if let Stage::Stream(_) = self.stands.stage {
            numbers.applied_offset = self.stands.position as i64 + self.offset_shift;
            numbers.received_offset = spool.end as i64 + self.offset_shift;
        } else {
            numbers.applied_offset = 0;
            numbers.received_offset = 0;
        }
        self.progress.numbers.send_replace(numbers.clone());
        self.published = self.moment.now;
    }
}

/// Publishes what a command waits for, while the applier waits with it.
pub(super) fn tell(numbers: &mut Numbers, progress: &ShardProgress, why: &str) {
    if numbers.waiting != why {
        tracing::warn!(why, "the target makes us wait");
        numbers.waiting = why.to_owned();
        progress.numbers.send_replace(numbers.clone());
    }
}
