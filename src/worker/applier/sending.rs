//! Batches out, answers in, and what the answers ask for.

use std::time::Duration;

use super::telling::tell;
use super::{Applier, Interrupted, PLACES, Stage, Work};
use crate::api::plan::ExistingKeys;
use crate::loss::Loss;
use crate::source::replication::Acknowledged;
use crate::target::keys::RecordPlace;
use crate::target::lane::Batch;
use crate::worker::WorkerError;
use crate::worker::direct::{Direct, DirectError, Guarding};
use crate::worker::outbox::{Heard, Trouble};
use crate::worker::progress::Quarantined;
use crate::worker::repair::{ChainedBatch, Fatal, Findings, Reading, Refusal, examine, examine_chained};
use crate::worker::stream::Barrier;

/// How long is waited at most before the limits are looked at again.
const PACE: Duration = Duration::from_millis(100);
/// How long a lost lane waits for the answers of the others.
const OTHERS: Duration = Duration::from_secs(2);
/// Refusals that are logged one by one; of more, the 2nd, 4th, 8th and so on.
const LOGGED_REFUSALS: u64 = 100;
/// Remembered places in the RDB are at least this far apart.
const PLACE_BYTES: u64 = 1 << 20;
/// Names of commands that the target does not know, as far as they are remembered.
const UNKNOWN_NAMES: usize = 1000;

impl Applier {
    /// Runs what cannot go through the lanes, with nothing else under way.
    pub(super) async fn run_alone(&mut self, barrier: Barrier) -> Result<(), Interrupted> {
        self.send_all().await?;
        self.wait_idle().await?;
        let mut barrier = barrier;
        self.leave_out_spoiled(&mut barrier);
        // A replay must not begin before this: what the command reads may have changed by then. While keys wait
        // for being overtaken, no replay may begin at all.
        if let Some(keeper) = &mut self.keeper
            && self.recopy.overtaken.is_none()
        {
            keeper.passed_barrier(barrier.from as i64 + self.offset_shift);
            let place = self.stream_place(barrier.from);
            self.write_records_at(place).await?;
            self.wait_idle().await?;
        }
        let guarding = self.guarding(barrier.end);
        let refused = {
            let mut parts = self.direct(guarding);
            parts.parts(&barrier).await
        };
        let refused = refused.map_err(undirected)?;
        self.numbers.waiting.clear();
        self.commands += u64::from(barrier.commands);
        for refusal in refused {
            self.refuse(barrier.db, refusal)?;
        }
        if let Some(keeper) = &mut self.keeper {
            keeper.passed_barrier(barrier.end as i64 + self.offset_shift);
        }
        self.open_new_lanes().await?;
        // So that a replay does not run it again.
        self.flush().await
    }

    pub(super) fn guarding(&self, end: u64) -> Option<Guarding> {
        let keeper = self.keeper.as_ref()?;
        Some(Guarding {
            fence: keeper.fence.clone(),
            history: keeper.history,
            shift: self.offset_shift,
            at: keeper.places(),
            record: keeper.record(self.stream_place(end)).to_bytes(),
            replaying: end <= self.replay_until,
        })
    }

    pub(super) fn direct(&mut self, guarding: Option<Guarding>) -> Direct<'_> {
        let addresses = self.lane_addresses.clone();
        let (numbers, progress) = (&mut self.numbers, &self.progress);
        let waiting = Box::new(move |why: &str| tell(numbers, progress, why));
        let conversations = &mut self.conversations;
        Direct::new(&self.setup.target_dialer, &mut self.router, addresses, conversations, guarding, waiting)
    }

    pub(super) async fn send_full(&mut self) -> Result<(), Interrupted> {
        let mut sent = false;
        while let Some(lane) = self.outbox.full() {
            if !self.may_send() {
                return Ok(());
            }
            self.send(lane).await?;
            sent = true;
            // Commands met a moving slot: nothing may overtake them.
            self.mend().await?;
        }
        // Where little goes out, marks by bytes are far apart: nobody would see that anything moves.
        if sent && self.setup.lane.pace().is_limited() {
            self.flush().await?;
        }
        Ok(())
    }

    /// Sends what is pending, and marks the place when nothing is half done.
    pub(super) async fn flush(&mut self) -> Result<(), Interrupted> {
        if !self.may_send() {
            return Ok(());
        }
        self.send_all().await?;
        if self.may_mark() && self.position() > self.marked {
            self.marked = self.position();
            self.marked_commands = self.commands;
            let place = self.place();
            self.outbox.mark(place);
            self.advance();
        }
        Ok(())
    }

    pub(super) async fn send_all(&mut self) -> Result<(), Interrupted> {
        for lane in 0..self.outbox.lanes() {
            self.send(lane).await?;
        }
        Ok(())
    }

    pub(super) async fn send(&mut self, lane: usize) -> Result<(), Interrupted> {
        self.outbox.set_bulk(matches!(self.work, Work::Snapshot { .. }));
        let (mut record, mut place_in) = (Vec::new(), None);
        if self.outbox.is_chained()
            && let Some(keeper) = &mut self.keeper
        {
            let db = match &self.work {
                Work::Stream(stream) => stream.place.db,
                Work::Snapshot { .. } => 0,
            };
            let place = RecordPlace::Stream {
                replication_id: self.reader.replication_id().unwrap_or_default(),
                offset: (self.base + self.at as u64) as i64 + self.offset_shift,
                db,
            };
            let written = keeper.record(place);
            written.encode(&mut record);
            place_in = Some(written.place);
        }
        let Some(batch) = self.outbox.take_batch(lane, self.position(), &record) else { return Ok(()) };
        // Without a batch there is no record either.
        if let (Some(place), Some(keeper)) = (place_in, &mut self.keeper) {
            keeper.wrote(place);
        }
        self.send_batch(lane, batch).await
    }

    pub(super) async fn send_batch(&mut self, lane: usize, batch: Batch) -> Result<(), Interrupted> {
        self.keep_pace(batch.bytes.len() as u64).await;
        self.numbers.sent_bytes += batch.bytes.len() as u64;
        let mut heard = Vec::new();
        let sent = self.outbox.send(lane, batch, &mut heard).await;
        for what in heard {
            self.hear(what)?;
        }
        self.advance();
        if !sent && self.lost.is_none() {
            self.lost = Some("a lane ended".to_owned());
        }
        self.check_lost().await
    }

    /// Waits until a batch of so many bytes may go, as `limits` say. The limits may change meanwhile.
    async fn keep_pace(&mut self, bytes: u64) {
        let done = self.keys + self.commands;
        let keys = done.saturating_sub(self.paced);
        self.paced = done;
        if !self.setup.lane.pace().is_limited() {
            self.outbox.limit_batches(u64::MAX, u64::MAX);
            return;
        }
        loop {
            let wait = self.setup.lane.pace().wait();
            if wait.is_zero() {
                break;
            }
            tokio::time::sleep(wait.min(PACE)).await;
            self.publish();
        }
        let pace = self.setup.lane.pace();
        pace.spend(bytes, keys);
        let (commands, bytes) = pace.batch();
        self.outbox.limit_batches(commands, bytes);
    }

    /// One unit of a chain, because one of those around it is not taken.
    pub(super) async fn send_alone(&mut self, end: u64) -> Result<(), Interrupted> {
        self.flush().await?;
        self.wait_answers().await?;
        self.check_lost().await?;
        self.advance();
        // A transaction is refused as a whole, and left out as one.
        if self.is_between() {
            self.alone_from = end;
        }
        Ok(())
    }

    pub(super) fn hear(&mut self, heard: Heard) -> Result<(), WorkerError> {
        match heard {
            Heard::Fine => {}
            Heard::Lost { error, .. } => self.lost = Some(error.to_string()),
            Heard::Trouble(trouble) if trouble.batch.head > 0 => self.hear_chained(trouble)?,
            Heard::Trouble(trouble) => {
                let findings = self.examine(&trouble);
                // Behind a batch that has to be sent again, whatever comes is looked at with it.
                if findings.retry.is_empty() && !self.outbox.holds(trouble.lane) {
                    self.settle_findings(&trouble, findings)?;
                    self.outbox.answered(trouble.lane, trouble.batch);
                } else {
                    self.outbox.hold(trouble.lane, true);
                    self.troubles.push(trouble);
                }
            }
        }
        Ok(())
    }

    fn hear_chained(&mut self, trouble: Trouble) -> Result<(), WorkerError> {
        match examine_chained(&trouble) {
            ChainedBatch::Applied { refused, fatal } => {
                let findings = Findings { refused, fatal, ..Findings::default() };
                self.settle_findings(&trouble, findings)?;
                self.outbox.answered(trouble.lane, trouble.batch);
            }
            ChainedBatch::Later(why) => {
                self.lost.get_or_insert(why);
            }
            ChainedBatch::Behind => {
                self.lost.get_or_insert_with(|| "behind a batch that was not taken".to_owned());
            }
            ChainedBatch::Refused(refused) => {
                let end = self.position();
                // One that was under way behind another that is not taken was not sent alone.
                let alone = end <= self.careful_until && self.lost.is_none();
                let why = refused.first().map(|refusal| format!("{}: {}", refusal.command, refusal.error));
                self.lost.get_or_insert(why.unwrap_or_default());
                if !alone {
                    // Which of the units it was shows when they go one by one.
                    self.careful_until = self.careful_until.max(end);
                    return Ok(());
                }
                self.left_out = Some((self.alone_from, end));
                for refusal in refused {
                    if refusal.error.contains("unknown command") && self.unknown.len() < UNKNOWN_NAMES {
                        self.unknown.insert(refusal.command.clone().into_bytes());
                    }
                    self.refuse(trouble.batch.db.unwrap_or_default(), refusal)?;
                }
            }
            ChainedBatch::Fatal(fatal) => {
                let findings = Findings { fatal: Some(fatal), ..Findings::default() };
                self.settle_findings(&trouble, findings)?;
            }
        }
        Ok(())
    }

    pub(super) fn examine(&self, trouble: &Trouble) -> Findings {
        let snapshot = matches!(self.stands.stage, Stage::Snapshot { .. });
        let replay = match snapshot {
            true => self.rules.replay,
            false => self.keeper.is_some() && self.stands.position < self.replay_until,
        };
        examine(trouble, Reading { snapshot, replay })
    }

    pub(super) fn settle_findings(
        &mut self,
        trouble: &Trouble,
        findings: Findings,
    ) -> Result<(), WorkerError> {
        let Findings { refused, existing, fatal, .. } = findings;
        if let Some(fatal) = fatal {
            let address = self.lane_addresses.get(trouble.lane).map(ToString::to_string).unwrap_or_default();
            return Err(match fatal {
                Fatal::Denied(text) => WorkerError::Denied(format!(
                    "{address}: {text}; give the target user the permissions that the README lists"
                )),
                Fatal::NoDatabase { db, error } => WorkerError::Target(format!(
                    "{address}: no database {db}: {error}; give the target more databases or set databaseMap"
                )),
            });
        }
        if let Some(key) = existing.first()
            && self.setup.existing_keys == ExistingKeys::Fail
        {
            return Err(WorkerError::KeyExists { key: String::from_utf8_lossy(key).into_owned() });
        }
        self.numbers.keys_skipped += existing.len() as u64;
        for refusal in refused {
            self.refuse(trouble.batch.db.unwrap_or_default(), refusal)?;
        }
        Ok(())
    }

    /// Until every batch is answered, and what the answers ask for is done.
    pub(super) async fn wait_idle(&mut self) -> Result<(), Interrupted> {
        self.wait_answers().await?;
        Box::pin(self.mend()).await?;
        self.advance();
        Ok(())
    }

    pub(super) async fn wait_answers(&mut self) -> Result<(), Interrupted> {
        while !self.outbox.is_idle() {
            let report = self.outbox.report().await;
            let heard = self.outbox.hear(report);
            self.hear(heard)?;
            if self.lost.is_some() {
                return self.check_lost().await;
            }
        }
        Ok(())
    }

    /// With a lane lost, waits shortly for the answers of the others: what they have need not be replayed.
    pub(super) async fn check_lost(&mut self) -> Result<(), Interrupted> {
        let Some(why) = self.lost.clone() else { return Ok(()) };
        let others = async {
            while !self.outbox.is_idle() {
                let report = self.outbox.report().await;
                let heard = self.outbox.hear(report);
                self.hear(heard)?;
            }
            Ok::<(), WorkerError>(())
        };
        match tokio::time::timeout(OTHERS, others).await {
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(())) | Err(_) => Err(Interrupted::Lost(why)),
        }
    }

    /// Takes note of what stands on the target by now.
    pub(super) fn advance(&mut self) {
        if self.recopy.overtaken.is_some() {
            return;
        }
        let Some(place) = self.outbox.reached() else { return };
        self.reader.applied(place.position);
        if let Stage::Stream(_) = place.stage {
            let first = matches!(self.stands.stage, Stage::Snapshot { .. });
            self.acknowledge(place.position as i64 + self.offset_shift);
            self.stands = place;
            if first {
                self.places.clear();
                // Where records are kept, nobody hears of it before they say so.
                if self.outbox.kept.is_none() {
                    self.publish();
                }
            }
        } else {
            let before = std::mem::replace(&mut self.stands, place);
            let apart = self.places.back().is_none_or(|last| before.position >= last.position + PLACE_BYTES);
            if self.keeper.is_some() && apart {
                self.places.push_back(before);
                if self.places.len() > PLACES {
                    self.places.pop_front();
                }
            }
        }
    }

    pub(super) fn acknowledge(&self, offset: i64) {
        self.acknowledge.send_replace(Acknowledged { history: self.reader.history(), offset });
    }

    /// What the stream must leave out, as the target does not take it.
    pub(super) fn is_left_out(&self, end: u64) -> bool {
        self.left_out.is_some_and(|(from, to)| from < end && end <= to)
    }

    /// What the target cannot hold of data that it has otherwise.
    pub(super) fn lost(&mut self, kind: Loss, times: u64) {
        let count = self.numbers.kinds.entry(kind).or_default();
        if *count == 0 {
            tracing::warn!(shard = %self.setup.shard, "the target cannot hold {kind}: the data go without them");
        }
        *count += times;
    }

    pub(super) fn refuse(&mut self, db: u64, refusal: Refusal) -> Result<(), WorkerError> {
        self.numbers.quarantined += 1;
        *self.numbers.kinds.entry(refusal.kind).or_default() += 1;
        let count = self.numbers.quarantined;
        let last = format!("{}: {}", refusal.command, refusal.error);
        if count <= LOGGED_REFUSALS || count.is_power_of_two() {
            tracing::warn!(
                shard = %self.setup.shard, count, command = %refusal.command, error = %refusal.error,
                key = %String::from_utf8_lossy(&refusal.key), "set aside: the target does not take it"
            );
        }
        self.progress.quarantine(Quarantined { offset: self.offset(), db, refusal });
        if count > self.setup.max_quarantined {
            return Err(WorkerError::TooManyRefused { shard: self.setup.shard.clone(), count, last });
        }
        Ok(())
    }
}

pub(super) fn undirected(error: DirectError) -> Interrupted {
    match error {
        DirectError::Fence(error) => WorkerError::Fenced(error.to_string()).into(),
        DirectError::Newcomer { .. } | DirectError::Adrift { .. } => Interrupted::Lost(error.to_string()),
        error => WorkerError::Target(error.to_string()).into(),
    }
}
