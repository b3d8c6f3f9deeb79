//! Copying keys again, at the place in the stream at which the source was asked for them; and slots that
//! change hands. See [`recopy`](crate::worker::recopy).

use std::collections::HashSet;
use std::time::Instant;

use super::sending::undirected;
use super::{Applier, Interrupted, Stage, Work};
use crate::api::plan::ExistingKeys;
use crate::clock::unix_millis;
use crate::loss::Loss;
use crate::slot::{SlotRanges, slot};
use crate::target::scan;
use crate::worker::WorkerError;
use crate::worker::recopy::put::Writer;
use crate::worker::recopy::source::{AskError, At, Source};
use crate::worker::recopy::{
    Awaited, BLIND_KEYS, LISTED_KEYS, LISTED_SLOTS, PATIENCE, PORTION_BYTES, PORTION_KEYS,
};
use crate::worker::repair::Refusal;

/// Of an order, no more than these are taken up: the next round finds the others.
const ORDERED_KEYS: usize = 100_000;
/// What ends a transaction that the place lies in.
const EXEC: &[u8] = b"*1\r\n$4\r\nEXEC\r\n";

impl Applier {
    /// Keys, by database of the target, that others overtook which cannot be repeated. They are left alone until
    /// they are copied from the source.
    pub(super) fn spoil(&mut self, keys: HashSet<(u64, Vec<u8>)>, why: &str) -> Result<(), WorkerError> {
        tracing::info!(shard = %self.setup.shard, keys = keys.len(), why, "left alone until they are copied again");
        keys.into_iter().for_each(|(db, key)| self.recopy.gate.spoil(db, key));
        self.wait_for_spoiled(why)
    }

    /// Commands of an earlier attempt were left out as applied, of which some may not have been.
    pub(super) fn settle_doubt(&mut self) -> Result<(), WorkerError> {
        if !self.recopy.gate.take_doubted() {
            return Ok(());
        }
        let why = "the target refused commands for a moment, and which of them is not known";
        if self.recopy.overtaken.is_none() {
            tracing::info!(shard = %self.setup.shard, why, "keys that were written last are copied again");
        }
        self.wait_for_spoiled(why)
    }

    /// Nobody may go on from behind this place until all that is spoiled was copied.
    fn wait_for_spoiled(&mut self, why: &str) -> Result<(), WorkerError> {
        let overtaken = || WorkerError::Overtaken { shard: self.setup.shard.clone(), why: why.to_owned() };
        // In the snapshot no place of the stream is known; and what is not ours cannot be asked for.
        if !self.in_stream() || self.origin.as_ref().is_none_or(|origin| origin.is_unnamed()) {
            return Err(overtaken());
        }
        // Which key of the source a script has given such a name is not known either.
        if self.script.is_some() || self.recopy.gate.databases().any(|db| self.source_db_of(db).is_none()) {
            return Err(overtaken());
        }
        self.recopy.gate.check().map_err(|_| overtaken())?;
        self.recopy.overtaken.get_or_insert_with(Instant::now);
        Ok(())
    }

    /// Does what there is to do for keys that are to be copied again and slots that change hands. Cheap when
    /// there is nothing.
    pub(super) async fn tend(&mut self) -> Result<(), Interrupted> {
        if self.recopy.gate.owned().is_some() {
            self.let_go().await?;
            if self.recopy.untold {
                self.tell_slots().await?;
            }
        }
        if !self.in_stream() || self.recopy.awaited.is_some() || self.recopy.rests() {
            return Ok(());
        }
        self.take_order().await?;
        if let Some(since) = self.recopy.overtaken
            && since.elapsed() > PATIENCE
        {
            let why = format!("the source could not be asked for these keys within {PATIENCE:?}");
            return Err(WorkerError::Overtaken { shard: self.setup.shard.clone(), why }.into());
        }
        let asked = if self.recopy.gate.spoiled() > 0 {
            self.ask_values().await
        } else if !self.recopy.adopting.is_empty() {
            return self.settle_adoption().await;
        } else {
            let wanted = self.to_adopt();
            if wanted.is_empty() {
                return Ok(());
            }
            self.ask_slots(wanted).await
        };
        match asked {
            Ok(()) => self.recopy.backoff.reset(),
            Err(Asked::Interrupted(interrupted)) => return Err(interrupted),
            Err(Asked::NotNow) => self.recopy.rest(),
            Err(Asked::Failed(error)) => self.put_off(&error)?,
        }
        self.arrive().await
    }

    /// Keys that somebody found to differ go the way of those that were overtaken. An order is done when all of
    /// them stand.
    async fn take_order(&mut self) -> Result<(), Interrupted> {
        let number = self.progress.repair.borrow().number;
        if number == self.numbers.orders_done || self.recopy.gate.spoiled() > 0 || !self.is_between() {
            return Ok(());
        }
        if self.ordered.0 == number {
            self.numbers.repaired += std::mem::take(&mut self.ordered.1);
            self.numbers.orders_done = number;
            self.publish();
            return Ok(());
        }
        let order = self.progress.repair.borrow().clone();
        let target = |db: &u64| self.setup.database_map.get(db).copied().unwrap_or(*db);
        // What cannot be asked for stays as it is, and differs in the next round as well.
        let named = self.origin.as_ref().is_some_and(|origin| !origin.is_unnamed());
        let owned = order.keys.iter().filter(|(db, key)| {
            named && self.recopy.gate.owns(key) && self.source_db_of(target(db)).is_some()
        });
        let keys: HashSet<(u64, Vec<u8>)> =
            owned.take(ORDERED_KEYS).map(|(db, key)| (target(db), key.clone())).collect();
        self.ordered = (order.number, keys.len() as u64);
        if keys.is_empty() {
            return Ok(());
        }
        self.send_all().await?;
        self.wait_idle().await?;
        self.spoil(keys, "they differ, as the verification found")?;
        // Until they stand, what the target has been told says too much: nobody may go on from here.
        if let Some(keeper) = &mut self.keeper {
            keeper.passed_barrier((self.base + self.at as u64) as i64 + self.offset_shift);
            self.write_records(true).await?;
            self.wait_answers().await?;
        }
        Ok(())
    }

    fn put_off(&mut self, error: &AskError) -> Result<(), Interrupted> {
        tracing::debug!(shard = %self.setup.shard, %error, "keys cannot be copied again now");
        self.recopy.by_link ^= matches!(error, AskError::OtherHistory { .. });
        if error.is_final() {
            if self.recopy.overtaken.is_some() {
                let (shard, why) = (self.setup.shard.clone(), error.to_string());
                return Err(WorkerError::Overtaken { shard, why }.into());
            }
            let failure = error.to_string();
            self.progress.following.send_if_modified(|following| {
                let news = following.failure != failure;
                following.failure = failure;
                news
            });
        }
        self.recopy.rest();
        Ok(())
    }

    pub(super) fn in_stream(&self) -> bool {
        matches!((&self.work, &self.stands.stage), (Work::Stream(_), Stage::Stream(_)))
    }

    /// The source's database for one of the target; `None`: not one alone.
    fn source_db_of(&self, db: u64) -> Option<u64> {
        let map = &self.setup.database_map;
        let mut from = map.iter().filter(|(_, to)| **to == db).map(|(from, _)| *from);
        let own = (!map.contains_key(&db)).then_some(db);
        match (from.next().or(own), from.next()) {
            (Some(found), None) => Some(found),
            _ => None,
        }
    }

    // Asking the source.

    pub(super) async fn source(&mut self) -> Result<&mut Source, AskError> {
        if self.origin.as_ref().is_none_or(|origin| origin.is_unnamed()) {
            return Err(AskError::Unnamed);
        }
        let Some(upstream) = self.setup.feed.upstream() else { return Err(AskError::Unnamed) };
        let master = upstream.shard.as_ref().and_then(|shard| shard.now()).map(|at| at.master);
        let link = self.progress.link.borrow().server.clone();
        // To a replica, a key whose time is over is gone although its master may have renewed it. So it is asked
        // only where the master has other offsets: before 4.0.
        let (first, second) = if self.recopy.by_link { (link, master) } else { (master, link) };
        let address = first.or(second).unwrap_or_else(|| upstream.address.clone());
        if self.recopy.source.as_ref().is_some_and(|source| *source.address() != address) {
            self.recopy.source = None;
        }
        let open = match self.recopy.source.take() {
            Some(open) => open,
            None => Source::connect(&upstream.dialer, &address).await?,
        };
        Ok(self.recopy.source.insert(open))
    }

    /// Some of the spoiled keys, as many as fit.
    async fn ask_values(&mut self) -> Result<(), Asked> {
        let Some((db, mut keys)) = self.recopy.gate.some_spoiled(PORTION_KEYS) else { return Ok(()) };
        let Some(source_db) = self.source_db_of(db) else { return Err(AskError::Unnamed.into()) };
        let history = self.replication_id();
        let source = self.source().await?;
        let most = match source.sizes(source_db, &keys).await? {
            Some(sizes) => fitting(&sizes),
            None => BLIND_KEYS,
        };
        keys.truncate(most.max(1));
        let At { offset, what } = source.values(&history, source_db, &keys).await?;
        let values = keys.into_iter().zip(what).collect();
        self.await_place(offset, Awaited::Values { db, values });
        Ok(())
    }

    /// The first of `wanted`, with the keys that they have on either side.
    async fn ask_slots(&mut self, wanted: SlotRanges) -> Result<(), Asked> {
        if self.script.is_some() {
            return Err(Asked::Interrupted(Interrupted::Failed(WorkerError::Target(format!(
                "{}: slots {wanted} came from another shard of the source, whose keys cannot be copied through filter.lua; empty the target and start again when the slots are at rest",
                self.setup.shard
            )))));
        }
        let history = self.replication_id();
        let first: SlotRanges = wanted.iter().take(LISTED_SLOTS).collect();
        let mut counts = self.source().await?.counts(&first).await?;
        let mut sum = 0;
        let fits = counts.iter().take_while(|(_, keys)| {
            sum += keys;
            sum <= LISTED_KEYS
        });
        let fits = fits.count().max(1);
        counts.truncate(fits);
        let slots: SlotRanges = counts.iter().map(|(slot, _)| *slot).collect();
        // Nobody writes there until the slots are ours: those who had them have let them go.
        let mut keys = match self.setup.existing_keys {
            ExistingKeys::Fail => self.keys_on_target(&slots).await?,
            // What the source does not have may be there by right.
            ExistingKeys::Replace | ExistingKeys::Skip => Vec::new(),
        };
        let At { offset, what } = self.source().await?.list(&history, &counts).await?;
        keys.extend(what);
        tracing::info!(shard = %self.setup.shard, %slots, keys = keys.len(), "slots came from another source shard: copied from here");
        self.await_place(offset, Awaited::Slots { slots, keys });
        Ok(())
    }

    async fn keys_on_target(&mut self, slots: &SlotRanges) -> Result<Vec<Vec<u8>>, Asked> {
        let db = self.setup.database_map.get(&0).copied().unwrap_or(0);
        if !self.router.is_cluster() {
            let address = self.lane_addresses.first().cloned();
            let Some(address) = address else { return Err(Asked::NotNow) };
            let scanned = scan::keys_in(&self.setup.target_dialer, &address, db, slots).await;
            return scanned.map_err(|error| Asked::Failed(AskError::Connection(error)));
        }
        let guarding = self.guarding(self.position());
        let mut keys = Vec::new();
        {
            let mut direct = self.direct(guarding);
            for slot in slots.iter() {
                match direct.keys_in_slot(slot).await {
                    Ok(found) => keys.extend(found),
                    Err(error) => return Err(Asked::Interrupted(undirected(error))),
                }
            }
        }
        self.numbers.waiting.clear();
        Ok(keys)
    }

    fn await_place(&mut self, offset: i64, what: Awaited) {
        let position = u64::try_from(offset - self.offset_shift).unwrap_or_default();
        self.recopy.inside = false;
        self.recopy.awaited = Some((position, what));
    }

    // Coming there.

    /// Does what waits for this place, if anything does.
    pub(super) async fn arrive(&mut self) -> Result<(), Interrupted> {
        let here = self.position();
        let stop_at = self.recopy.stop_at();
        if here < stop_at {
            return Ok(());
        }
        let in_transaction = matches!(&self.work, Work::Stream(stream) if stream.in_transaction());
        if here == stop_at && in_transaction && !self.recopy.inside {
            self.recopy.inside = true;
            if let Some((at, _)) = &mut self.recopy.awaited {
                *at += EXEC.len() as u64;
            }
            return Ok(());
        }
        let Some((at, what)) = self.recopy.awaited.take() else { return Ok(()) };
        self.recopy.inside = false;
        if at != here || in_transaction {
            tracing::warn!(shard = %self.setup.shard, at, here, "keys to be copied again were told for a place between two commands; asking anew");
            self.recopy.rest();
            return Ok(());
        }
        self.send_all().await?;
        self.wait_idle().await?;
        match what {
            Awaited::Slots { slots, keys } => self.begin_adoption(&slots, keys),
            Awaited::Values { db, values } => {
                for (key, value) in values {
                    self.put(db, &key, value.as_ref()).await?;
                }
                self.send_all().await?;
                self.wait_idle().await?;
                if self.recopy.gate.spoiled() == 0 && self.recopy.overtaken.take().is_some() {
                    tracing::info!(shard = %self.setup.shard, keys = self.recopy.copied, "copied again");
                }
            }
        }
        self.flush().await
    }

    async fn put(
        &mut self,
        db: u64,
        key: &[u8],
        value: Option<&crate::worker::recopy::put::Value>,
    ) -> Result<(), Interrupted> {
        let end = self.position();
        let flavor = self.recopy.source.as_ref().map_or(self.setup.target_version.flavor, Source::flavor);
        let writer = Writer {
            rules: &self.rules,
            flavor,
            now_ms: unix_millis(),
            max_restore_bytes: self.setup.max_restore_bytes,
        };
        let writing = match writer.write(key, value) {
            Ok(writing) => writing,
            Err(error) => {
                let kind = Loss::of_command(b"RESTORE", value.map(|value| value.payload.as_slice()));
                let refusal = Refusal { command: "RESTORE".to_owned(), key: key.to_vec(), error, kind };
                self.recopy.gate.restored(db, key);
                return Ok(self.refuse(db, refusal)?);
            }
        };
        if writing.lossy {
            self.lost(Loss::FieldExpiry, 1);
        }
        let slot = slot(key);
        for frame in &writing.before {
            let lane = self.router.lane_of_slot(slot);
            self.outbox.append(lane, db, (frame, 1), None, end);
            self.send_full().await?;
        }
        let guard = self.router.is_cluster().then_some(slot);
        let lane = self.router.lane_of_slot(slot);
        self.outbox.append(lane, db, (&writing.frames, writing.count), guard, end);
        // Before the target can refuse it: then it is spoiled again.
        self.recopy.gate.restored(db, key);
        self.recopy.copied += 1;
        self.send_full().await
    }
}

/// Why the source was not asked.
enum Asked {
    Failed(AskError),
    Interrupted(Interrupted),
    NotNow,
}

impl From<AskError> for Asked {
    fn from(error: AskError) -> Self {
        Self::Failed(error)
    }
}

/// How many of the first fit into a portion.
fn fitting(sizes: &[u64]) -> usize {
    let mut sum = 0u64;
    let fits = sizes.iter().take_while(|size| {
        sum = sum.saturating_add(**size);
        sum <= PORTION_BYTES
    });
    fits.count()
}
