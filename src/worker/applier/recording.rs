//! How far the shard has come, as it is kept in the target.

use super::{Applier, Interrupted, Place, Stage, Work};
use crate::target::keys::{Load, RecordPlace};

impl Applier {
    /// A full sync begins: its first record goes in front of its first key.
    pub(super) fn begin_records(&mut self) {
        let place = self.snapshot_place();
        let (Some(keeper), Some(kept)) = (&mut self.keeper, &mut self.outbox.kept) else { return };
        keeper.begin_history();
        kept.history = keeper.history;
        let record = keeper.record(place.clone()).to_bytes();
        for (lane, slot) in keeper.places() {
            self.outbox.append_record(lane, slot, &record);
        }
        keeper.wrote(place);
        self.append_slots();
    }

    /// Writes how far all nodes have come, when it is due or must be.
    pub(super) async fn write_records(&mut self, must: bool) -> Result<(), Interrupted> {
        let Some(keeper) = &self.keeper else { return Ok(()) };
        if self.origin.is_none() || !self.may_send() {
            return Ok(());
        }
        let place = match self.stands.stage {
            Stage::Snapshot { .. } => self.snapshot_place(),
            Stage::Stream(_) => self.stream_place(self.stands.position),
        };
        // The record before is of more use, though it lies further back.
        if !must && matches!(place, RecordPlace::Snapshot { load: None, .. }) {
            return Ok(());
        }
        let chained = self.outbox.is_chained();
        // The batches of a chain hold one each: what is under way holds a newer one.
        let far = !chained && self.stands.commands.saturating_sub(self.recorded_commands) >= self.stride();
        if !must && ((chained && !self.outbox.is_quick()) || !(far || keeper.is_due(&place, chained))) {
            return Ok(());
        }
        self.write_records_at(place).await
    }

    pub(super) async fn write_records_at(&mut self, place: RecordPlace) -> Result<(), Interrupted> {
        if self.outbox.is_chained() {
            // Every batch holds one; this one may hold nothing else.
            self.outbox.pending(0);
            return self.send(0).await;
        }
        let Some(keeper) = &mut self.keeper else { return Ok(()) };
        let record = keeper.record(place.clone()).to_bytes();
        for (lane, slot) in keeper.places() {
            self.outbox.append_record(lane, slot, &record);
        }
        keeper.wrote(place);
        self.recorded_commands = self.stands.commands;
        self.send_all().await
    }

    /// Marks lie no more commands apart than this, and records not much more: what lies behind the last record is
    /// sent again after a kill, though it may stand.
    pub(super) fn stride(&self) -> u64 {
        let window = self.setup.lane.commands() * self.outbox.lanes();
        u64::try_from(window / 8).unwrap_or(u64::MAX).max(1)
    }

    /// Where the snapshot stands on the target.
    fn snapshot_place(&self) -> RecordPlace {
        let Place { position, stage, keys, keys_total, .. } = &self.stands;
        let load = match stage {
            Stage::Snapshot { decoder, crc } => decoder.waypoint().map(|waypoint| Load {
                spool: self.reader.history(),
                waypoint,
                crc: crc.value(),
                stream_db: self.stream_db,
                keys: *keys,
                keys_total: *keys_total,
            }),
            Stage::Stream(_) => None,
        };
        RecordPlace::Snapshot { position: *position, load }
    }

    /// `position` is of the stream, and not behind what stands; the database is that of what stands.
    pub(super) fn stream_place(&self, position: u64) -> RecordPlace {
        let db = match (&self.stands.stage, &self.work) {
            (Stage::Stream(place), _) if position <= self.stands.position => place.db,
            (_, Work::Stream(stream)) => stream.place.db,
            (Stage::Stream(place), _) => place.db,
            _ => self.stream_db,
        };
        RecordPlace::Stream {
            replication_id: self.replication_id(),
            offset: position as i64 + self.offset_shift,
            db,
        }
    }
}
