//! From spool blocks to commands for the lanes.

use super::{Applier, Interrupted, MARK_BYTES, PUBLISH, WINDOW, Work};
use crate::clock::unix_millis;
use crate::command::{DynamicTable, Part as CommandPart, Step as EmulationStep, lookup};
use crate::loss::Loss;
use crate::rdb::{Event, Step};
use crate::resp::frame::{Parsed, parse_frame};
use crate::resp::{Args, encode_command};
use crate::spool::{Block, Part};
use crate::target::keys::PREFIX;
use crate::worker::WorkerError;
use crate::worker::recopy::gate::{Gate, keys_of_frames};
use crate::worker::repair::Refusal;
use crate::worker::snapshot::scripted::{Scripted, Through};
use crate::worker::snapshot::{self, Applied, KeyPlace};
use crate::worker::stream::{Barrier, Moment, Onward, Stream, StreamPlace, Taken};

impl Applier {
    pub(super) async fn take_block(&mut self, block: &Block) -> Result<(), Interrupted> {
        if let Part::Stream { offset } = block.part {
            self.check_stream_start(block.position, offset)?;
        }
        self.compact();
        self.window.extend_from_slice(&block.bytes);
        self.moment = Moment { arrived: block.arrived, now: unix_millis() };
        if self.window.len() - self.at < self.need {
            return Ok(());
        }
        if matches!(self.work, Work::Snapshot { .. }) {
            self.decode().await?;
        }
        if matches!(self.work, Work::Stream(_)) {
            self.follow().await?;
        }
        if self.position() - self.marked >= MARK_BYTES && self.may_send() {
            self.flush().await?;
        }
        // While there is always another block at hand, the timer is never looked at.
        if u128::from(self.moment.now.saturating_sub(self.published)) >= PUBLISH.as_millis() {
            self.publish();
            self.write_records(false).await?;
        }
        Ok(())
    }

    /// The stream starts where the RDB ended, neither before nor behind.
    fn check_stream_start(&self, position: u64, offset: i64) -> Result<(), WorkerError> {
        let fits = self.stream_at.is_some_and(|stream_at| position >= stream_at)
            && offset == position as i64 + self.offset_shift;
        if fits {
            return Ok(());
        }
        Err(WorkerError::SnapshotEnd {
            shard: self.setup.shard.clone(),
            position: self.stream_at.unwrap_or(self.position()),
            what: "starts the command stream at another place",
        })
    }

    /// Drops what was read from the window. The checksum takes it along, many bytes at a time.
    fn compact(&mut self) {
        if self.at == 0 {
            return;
        }
        if let Work::Snapshot { crc, .. } = &mut self.work {
            crc.update(self.window.get(self.summed..self.at).unwrap_or_default());
        }
        self.base += self.at as u64;
        let left = self.window.len() - self.at;
        self.window.copy_within(self.at.., 0);
        self.window.truncate(left);
        if left < WINDOW && self.window.capacity() > 4 * WINDOW {
            self.window.shrink_to(WINDOW);
        }
        self.at = 0;
        self.summed = 0;
    }

    /// Decodes the RDB bytes at hand.
    async fn decode(&mut self) -> Result<(), Interrupted> {
        loop {
            let Work::Snapshot { decoder, crc, staged } = &mut self.work else { return Ok(()) };
            let (db, flavor) = (decoder.db(), decoder.flavor());
            let input = self.window.get(self.at..).unwrap_or_default();
            let shard = &self.setup.shard;
            let step =
                decoder.next(input).map_err(|source| WorkerError::Rdb { shard: shard.clone(), source })?;
            let (consumed, event) = match step {
                Step::NeedMore { at_least } => {
                    self.need = at_least.max(input.len() + 1);
                    let missing = self.need - input.len();
                    if missing > WINDOW {
                        self.window.reserve_exact(missing);
                    }
                    return Ok(());
                }
                Step::Event { consumed, event } => (consumed, event),
            };
            self.need = 1;
            match event {
                Event::End { crc: stored } => {
                    let covered = self.at + consumed.min(1);
                    crc.update(self.window.get(self.summed..covered).unwrap_or_default());
                    let computed = crc.value();
                    if let Some(stored) = stored.filter(|&stored| stored != computed) {
                        let shard = shard.clone();
                        return Err(WorkerError::Checksum { shard, computed, stored }.into());
                    }
                    self.at += consumed;
                    self.summed = self.at;
                    self.end_file().await?;
                    self.end_snapshot()?;
                    return self.enter_stream().await;
                }
                Event::ResizeDb { keys, .. } => self.numbers.keys_total += keys,
                Event::Aux { key: b"repl-stream-db", value } => {
                    self.stream_db =
                        std::str::from_utf8(value).ok().and_then(|db| db.parse().ok()).unwrap_or(0);
                }
                _ => {}
            }
            if self.rules.replay && self.base + self.at as u64 >= self.replay_until {
                self.rules.replay = false;
            }
            let source_db = db;
            let db = self.setup.database_map.get(&db).copied().unwrap_or(db);
            let at = KeyPlace { db, flavor, now_ms: self.moment.now };
            if is_foreign(&event, &self.recopy.gate) {
                self.at += consumed;
                continue;
            }
            if let Some(transform) = &self.setup.transform
                && let Some((key, first)) = key_of(&event)
                && !transform.admits(source_db, key)
            {
                self.filtered.keys += u64::from(first);
                self.at += consumed;
                continue;
            }
            let (rules, router, outbox) = (&self.rules, &self.router, &mut self.outbox);
            let applied = match self.script.as_mut().filter(|script| script.runner.judges_keys()) {
                None => snapshot::apply(&event, at, rules, router, staged, outbox),
                Some(script) => {
                    let target = self.setup.target_version;
                    let through = Through { db: source_db, place: at, target, rules, router };
                    match script.apply(&event, through, staged, outbox) {
                        Scripted::Applied(applied) => applied,
                        Scripted::Dropped(counts) => {
                            self.filtered.keys += u64::from(counts);
                            self.at += consumed;
                            continue;
                        }
                    }
                }
            };
            self.at += consumed;
            match applied {
                Applied::Nothing | Applied::Broadcast | Applied::Part { done: false, .. } => {}
                Applied::Expired => self.expired += 1,
                Applied::Key(_) | Applied::Part { done: true, .. } => self.keys += 1,
                Applied::Lossy(kind) => {
                    self.keys += 1;
                    self.lost(kind, 1);
                }
                Applied::Refused { key, why, kind } => {
                    let command = if kind == Loss::Functions { "FUNCTION" } else { "RESTORE" }.to_owned();
                    self.refuse(db, Refusal { command, key, error: why, kind })?;
                }
            }
            self.send_full().await?;
        }
    }

    /// What follows an RDB in a file is not read, so that it must not be taken for complete.
    async fn end_file(&self) -> Result<(), WorkerError> {
        let position = self.position();
        if !self.setup.feed.is_file() || self.reader.ends_at(position).await == Some(true) {
            return Ok(());
        }
        let shard = self.setup.shard.clone();
        Err(WorkerError::SnapshotEnd { shard, position, what: "goes on behind it; cut the file there" })
    }

    /// All of the RDB was read, and its end was not there.
    pub(super) fn check_truncated(&self) -> Result<(), WorkerError> {
        let read = self.base + self.window.len() as u64;
        let over = matches!(self.work, Work::Snapshot { .. }) && self.reader.stream_at() == Some(read);
        if !over || !self.setup.feed.is_file() {
            return Ok(());
        }
        Err(WorkerError::Truncated { shard: self.setup.shard.clone(), position: read })
    }

    /// A file is damaged: what was read before is brought to the target, so that the count of keys holds.
    pub(super) async fn settle_what_was_read(&mut self, error: &WorkerError) {
        if matches!(
            error,
            WorkerError::Rdb { .. }
                | WorkerError::Checksum { .. }
                | WorkerError::Truncated { .. }
                | WorkerError::SnapshotEnd { .. }
        ) && self.flush().await.is_ok()
            && self.wait_idle().await.is_ok()
        {
            self.publish();
        }
    }

    fn end_snapshot(&mut self) -> Result<(), WorkerError> {
        let origin = self.origin.as_ref().map_or(0, |origin| origin.offset);
        let position = self.position();
        self.offset_shift = origin - position as i64;
        self.stream_at = Some(position);
        // An earlier attempt at the full sync sent nothing of its stream that could be met again.
        self.replay_until = if self.replay_until == u64::MAX { position } else { self.replay_until };
        self.work = Work::Stream(Stream::at(StreamPlace { db: self.stream_db }));
        if self.window.len() > self.at {
            return Err(WorkerError::SnapshotEnd {
                shard: self.setup.shard.clone(),
                position,
                what: "sent more bytes as part of it",
            });
        }
        Ok(())
    }

    /// Takes the commands at hand.
    async fn follow(&mut self) -> Result<(), Interrupted> {
        loop {
            if self.position() >= self.recopy.stop_at() {
                self.arrive().await?;
            }
            let input = self.window.get(self.at..).unwrap_or_default();
            let parsed = parse_frame(input, &mut self.spans).map_err(|source| WorkerError::Stream {
                shard: self.setup.shard.clone(),
                offset: self.offset(),
                source,
            })?;
            let length = match parsed {
                Parsed::NeedMore(more) => {
                    self.need = input.len() + more;
                    if more > WINDOW {
                        self.window.reserve_exact(more);
                    }
                    return Ok(());
                }
                Parsed::Blank(length) => {
                    self.at += length;
                    continue;
                }
                Parsed::Command(length) => length,
            };
            self.need = 1;
            let frame = input.get(..length).unwrap_or_default();
            let end = self.base + (self.at + length) as u64;
            let args = Args { frame, spans: &self.spans };
            let alone = end <= self.careful_until;
            if self.is_left_out(end) && !args.name().eq_ignore_ascii_case(b"SELECT") {
                self.at += length;
                continue;
            }
            if !self.unknown.is_empty() && self.unknown.contains(&args.name().to_ascii_uppercase()) {
                let key = args.arg(1).unwrap_or_default().to_vec();
                let command = String::from_utf8_lossy(args.name()).to_ascii_uppercase();
                let error = "the target does not know this command".to_owned();
                let kind = Loss::of_command(command.as_bytes(), None);
                self.at += length;
                let db = self.source_db();
                self.refuse(db, Refusal { command, key, error, kind })?;
                continue;
            }
            let Work::Stream(stream) = &mut self.work else { return Ok(()) };
            let mut onward = Onward {
                rules: &self.stream_rules,
                router: &self.router,
                outbox: &mut self.outbox,
                gate: &mut self.recopy.gate,
                moment: self.moment,
                start: self.base + self.at as u64,
                end,
                filtered: &mut self.filtered.commands,
                script: self
                    .script
                    .as_mut()
                    .map(|script| &mut script.runner)
                    .filter(|runner| runner.judges_commands()),
                carried: self.release.carried(),
            };
            let taken = stream.take(&args, &mut onward);
            let lost = std::mem::take(&mut stream.lost_expiries);
            self.at += length;
            self.settle_doubt()?;
            if lost > 0 {
                self.lost(Loss::FieldExpiry, lost);
            }
            match taken {
                Taken::Done { commands } => self.commands += u64::from(commands),
                Taken::Barrier(barrier) => self.run_alone(*barrier).await?,
                Taken::Refused { command, key, why } => {
                    let db = self.source_db();
                    let kind = Loss::of_command(command.as_bytes(), None);
                    self.refuse(db, Refusal { command, key, error: why, kind })?;
                }
            }
            self.send_full().await?;
            if alone && self.may_send() {
                self.send_alone(end).await?;
            }
            // A single server gets a record with each batch.
            if self.commands.saturating_sub(self.marked_commands) >= self.stride()
                && !self.outbox.is_chained()
                && self.may_mark()
            {
                self.flush().await?;
                self.write_records(false).await?;
            }
        }
    }

    /// Takes out of a command that runs alone what would read or write keys that wait to be copied again.
    pub(super) fn leave_out_spoiled(&mut self, barrier: &mut Barrier) {
        let (gate, db) = (&mut self.recopy.gate, barrier.db);
        if gate.spoiled() == 0 {
            return;
        }
        let dynamic = &self.stream_rules.dynamic;
        // To the end: a part that is left out may spoil keys of one before it.
        let mut before = usize::MAX;
        while before != barrier.parts.len() {
            before = barrier.parts.len();
            barrier.parts.retain(|part| gate.admits_keys(db, keys_of_part(part, dynamic)));
        }
    }

    pub(super) fn source_db(&self) -> u64 {
        match &self.work {
            Work::Stream(stream) => stream.place.db,
            Work::Snapshot { decoder, .. } => decoder.db(),
        }
    }
}

/// A key that is not for this worker: its slot is another's, and a snapshot may hold a part of it.
fn is_foreign(event: &Event<'_>, gate: &Gate) -> bool {
    key_of(event).is_some_and(|(key, _)| !gate.owns(key))
}

/// The key that the event is about, and whether it is the first about it.
#[inline]
fn key_of<'a>(event: &Event<'a>) -> Option<(&'a [u8], bool)> {
    match event {
        Event::Key(record) => Some((record.key, true)),
        Event::LargeBegin(head) => Some((head.key, true)),
        Event::LargeItems { key, .. } | Event::LargeEnd { key } | Event::LargeUnsupported { key, .. } => {
            Some((key, false))
        }
        _ => None,
    }
}

/// Keys of the data that a part of a barrier reads or writes.
fn keys_of_part(part: &CommandPart, dynamic: &DynamicTable) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut of = |frames: &[u8]| {
        keys_of_frames(frames, |args| lookup(args.name()).or_else(|| dynamic.lookup(args)), &mut found);
    };
    match part {
        CommandPart::Group { frames, .. } => of(frames),
        CommandPart::Emulate(emulation) => {
            for step in &emulation.steps {
                match step {
                    EmulationStep::Run { frame, .. } => of(frame),
                    EmulationStep::Clean { .. } => {}
                    EmulationStep::Carry { read, command, .. } => {
                        of(read);
                        let mut frame = Vec::new();
                        encode_command(command, &mut frame);
                        of(&frame);
                    }
                    EmulationStep::Copy { from, to, .. } => {
                        let mut frame = Vec::new();
                        encode_command(&[b"COPY".as_slice(), &from.name, &to.name], &mut frame);
                        of(&frame);
                    }
                }
            }
        }
        CommandPart::Keyless { .. } | CommandPart::Impossible { .. } => {}
    }
    found.retain(|key| !key.starts_with(PREFIX));
    found
}
