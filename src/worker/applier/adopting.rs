//! Slots of a source cluster that change hands: one worker lets them go, another takes them over. See
//! [`recopy`](crate::worker::recopy).

use super::{Applier, Interrupted};
use crate::slot::SlotRanges;
use crate::target::keys::{RecordPlace, TERRITORY_SLOTS, Territory};

impl Applier {
    /// Slots that shall be ours and are not.
    pub(super) fn to_adopt(&self) -> SlotRanges {
        match (self.progress.wanted.borrow().as_ref(), self.recopy.gate.owned()) {
            (Some(wanted), Some(owned)) if wanted != owned => wanted.without(owned),
            _ => SlotRanges::default(),
        }
    }

    /// At this place, with nothing under way, the slots become ours, their keys to be copied.
    pub(super) fn begin_adoption(&mut self, slots: &SlotRanges, keys: Vec<Vec<u8>>) {
        let wanted = self.to_adopt();
        if slots.iter().any(|slot| !wanted.contains(slot)) {
            // They moved on meanwhile.
            return;
        }
        let db = self.setup.database_map.get(&0).copied().unwrap_or(0);
        let gate = &mut self.recopy.gate;
        let owned = gate.owned().cloned().unwrap_or_default();
        gate.set_owned(owned.with(slots));
        let transform = self.setup.transform.as_ref();
        keys.into_iter()
            .filter(|key| transform.is_none_or(|transform| transform.admits(0, key)))
            .for_each(|key| gate.spoil(db, key));
        self.recopy.adopting = self.recopy.adopting.with(slots);
    }

    /// All keys of the adopted slots were copied: from here on another run may count on that.
    pub(super) async fn settle_adoption(&mut self) -> Result<(), Interrupted> {
        if !self.may_mark() || !self.may_send() {
            return Ok(());
        }
        self.flush().await?;
        self.wait_idle().await?;
        // One that falls back behind this has lost what was copied. Every record has to be here before any of
        // them says so.
        if self.router.is_cluster() && self.keeper.is_some() {
            let place = self.stream_place(self.position());
            self.write_records_at(place.clone()).await?;
            self.wait_idle().await?;
            if let (Some(keeper), RecordPlace::Stream { offset, .. }) = (&mut self.keeper, &place) {
                keeper.passed_barrier(*offset);
            }
            self.write_records_at(place).await?;
            self.wait_idle().await?;
        }
        if self.recopy.gate.spoiled() > 0 || self.stands.position != self.position() {
            // The target refused something once more.
            return Ok(());
        }
        let slots = std::mem::take(&mut self.recopy.adopting);
        self.recopy.untold = true;
        self.tell_slots().await?;
        self.progress.following.send_modify(|following| {
            following.adoptions += 1;
            following.failure.clear();
        });
        tracing::info!(shard = %self.setup.shard, %slots, keys = self.recopy.copied, "slots from another source shard stand on the target");
        Ok(())
    }

    /// Slots that went to another shard: nothing is done to them any more.
    pub(super) async fn let_go(&mut self) -> Result<(), Interrupted> {
        let lost = match (self.progress.wanted.borrow().as_ref(), self.recopy.gate.owned()) {
            (Some(wanted), Some(owned)) if wanted != owned => owned.without(wanted),
            _ => return Ok(()),
        };
        if lost.is_empty() || !self.may_mark() || !self.may_send() {
            return Ok(());
        }
        // What moved away was deleted by that, which is in the stream up to here.
        if self.in_stream() && !self.recopy.adopting.intersects(&lost) {
            let at = match self.recopy.let_go_at {
                Some(at) => at,
                None => {
                    let history = self.replication_id();
                    let at = match self.source().await {
                        Ok(source) => source.offset(&history).await,
                        Err(error) => Err(error),
                    };
                    // A server that is gone has nothing more to tell.
                    let at = at.unwrap_or_default();
                    *self.recopy.let_go_at.insert(at)
                }
            };
            if self.offset() < at && self.recopy.source.is_some() {
                return Ok(());
            }
        }
        self.recopy.let_go_at = None;
        tracing::info!(shard = %self.setup.shard, slots = %lost, "slots went to another source shard");
        let owned = self.recopy.gate.owned().cloned().unwrap_or_default();
        self.recopy.gate.set_owned(owned.without(&lost));
        self.recopy.gate.forget_spoiled_of(&lost);
        self.recopy.adopting = self.recopy.adopting.without(&lost);
        if self.recopy.gate.spoiled() == 0 {
            self.recopy.overtaken = None;
        }
        self.recopy.untold = true;
        Ok(())
    }

    /// Keeps in the target which slots are ours, and then tells others.
    pub(super) async fn tell_slots(&mut self) -> Result<(), Interrupted> {
        if self.origin.is_some() {
            if !self.may_mark() || !self.may_send() {
                return Ok(());
            }
            // Whoever hears of it may write there.
            self.send_all().await?;
            self.wait_idle().await?;
            self.recopy.version += 1;
            self.append_slots();
            self.send_all().await?;
            self.wait_idle().await?;
        }
        let Some(slots) = self.recopy.settled() else { return Ok(()) };
        self.recopy.untold = false;
        self.progress.following.send_modify(|following| {
            following.known = true;
            following.slots = slots;
        });
        Ok(())
    }

    /// Which slots are ours, for another run.
    pub(super) fn append_slots(&mut self) {
        let (Some(keeper), Some(slots)) = (&self.keeper, self.recopy.settled()) else { return };
        let names = keeper.fence.names().clone();
        let territory = Territory { history: keeper.history, version: self.recopy.version, slots };
        let value = territory.to_bytes();
        let slots: &[u16] = if self.router.is_cluster() { &TERRITORY_SLOTS } else { &[0] };
        for &slot in slots {
            let lane = self.router.lane_of_slot(slot);
            self.outbox.append_kept(lane, &names.territory(slot), &value);
        }
    }
}
