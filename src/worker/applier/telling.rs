//! Where the applier stands, for those who ask.

use std::time::Instant;

use super::{Applier, Place, Stage, Work};
use crate::worker::progress::{self, Numbers, ShardPhase, ShardProgress, Told};
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
        let Self { keys, expired, commands, filtered, .. } = *self;
        Place { position, stage, keys, expired, keys_total: self.numbers.keys_total, commands, filtered }
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
        let stands = self.stands.position;
        progress::lag(self.reader.gauges().end, stands, self.reader.arrived(stands))
    }

    pub(super) fn publish(&mut self) {
        let spool = self.reader.gauges();
        let (replication_id, stands) = (self.replication_id(), self.stands.position);
        let numbers = &mut self.numbers;
        numbers.keys = self.stands.keys;
        numbers.keys_expired = self.stands.expired;
        numbers.commands = self.stands.commands;
        numbers.keys_filtered = self.stands.filtered.keys + self.progress.scan.now().left_out;
        numbers.commands_filtered = self.stands.filtered.commands;
        numbers.batches = self.outbox.batches;
        numbers.of_spool(spool, stands, self.reader.arrived(stands));
        numbers.replication_id = replication_id;
        numbers.snapshot_read = self.stream_at.unwrap_or(self.base + self.at as u64);
        numbers.phase = match (&self.stands.stage, &self.origin) {
            (_, None) => ShardPhase::Pending,
            (Stage::Snapshot { .. }, _) => ShardPhase::FullSync,
            (Stage::Stream(_), _) => ShardPhase::IncrementalSync,
        };
        if let Stage::Stream(_) = self.stands.stage {
            numbers.applied_offset = stands as i64 + self.offset_shift;
            numbers.received_offset = spool.end as i64 + self.offset_shift;
        } else {
            numbers.applied_offset = 0;
            numbers.received_offset = 0;
        }
        numbers.told =
            Some(Told { when: Instant::now(), history: self.reader.history(), end: spool.end, stands });
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
