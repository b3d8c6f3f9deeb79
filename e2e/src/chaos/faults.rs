//! How each fault begins, and how those that hold on end.

use anyhow::{Context, Result};

use super::deployment::{Deployment, How, Side};
use super::keeper::Rival;
use super::plan::Step;
use super::run::{Run, wait_probe};
use super::shards::{Shards, SlotMove};
use super::ways::Ways;
use super::{Fault, Void};
use crate::client::slot;
use crate::proxy::Way;

/// Bytes a second of a slow connection.
const SPEEDS: [u64; 4] = [5_000, 5_000, 20_000, 100_000];

/// A fault that holds on until `Run::over`.
pub(super) enum Active {
    Held(Side, Held),
    Slots(Side, Vec<SlotMove>),
    Memory,
}

pub(super) enum Held {
    Stall,
    Slow,
    Fuse,
}

impl Run<'_> {
    pub fn begin(&mut self, step: &Step) -> Result<()> {
        use Fault::*;
        let Step { pick, hold, .. } = *step;
        match step.fault {
            Stop => {
                self.keeper.stop()?;
                self.keeper.watch()
            }
            Kill | KillFresh => {
                self.keeper.kill(step.fault == KillFresh)?;
                // Now and then it is missed for a while.
                if pick.is_multiple_of(3) {
                    self.gap(hold)?;
                }
                self.keeper.watch()
            }
            Rival => self.rival(step),
            CutSource => self.each(&[Side::Source], |ways| ways.each(crate::Proxy::cut)),
            CutTarget => self.each(&[Side::Target], |ways| ways.each(crate::Proxy::cut)),
            CutBoth => self.each(&[Side::Source, Side::Target], |ways| ways.each(crate::Proxy::cut)),
            FreezeSource => self.each(&[Side::Source], |ways| ways.each(crate::Proxy::freeze)),
            StallSource => self.hold(&[Side::Source], Held::Stall, pick),
            StallTarget => self.hold(&[Side::Target], Held::Stall, pick),
            StallBoth => self.hold(&[Side::Source, Side::Target], Held::Stall, pick),
            SlowSource => self.hold(&[Side::Source], Held::Slow, pick),
            SlowTarget => self.hold(&[Side::Target], Held::Slow, pick),
            ResetSource => self.hold(&[Side::Source], Held::Fuse, pick),
            ResetTarget => self.hold(&[Side::Target], Held::Fuse, pick),
            Outrun => self.outrun(),
            SourceFailover => self.fail_over(Side::Source, How::Asked, step),
            SourceCrash => self.fail_over(Side::Source, How::Crash, step),
            SourceBehind => self.fail_over(Side::Source, How::Behind, step),
            TargetFailover => self.fail_over(Side::Target, How::Asked, step),
            TargetForce => {
                let word = if pick.is_multiple_of(2) { "FORCE" } else { "TAKEOVER" };
                self.fail_over(Side::Target, How::Forced(word), step)
            }
            TargetCrash => self.fail_over(Side::Target, How::Crash, step),
            TargetRollback => self.fail_over(Side::Target, How::Behind, step),
            SourceSlots => self.move_slots(Side::Source, step),
            TargetSlots => self.move_slots(Side::Target, step),
            TargetMemory => {
                self.target.configure("maxmemory", "1mb")?;
                self.active.push(Active::Memory);
                Ok(())
            }
        }
    }

    pub fn over(&mut self, active: Active) -> Result<()> {
        match active {
            Active::Held(side, held) => {
                self.ways(side).each(|proxy| match held {
                    Held::Stall => proxy.stall(false),
                    Held::Slow => proxy.limit(None),
                    // Broken all the same where too little went through.
                    Held::Fuse => {
                        if proxy.defuse() {
                            proxy.cut();
                        }
                    }
                });
                Ok(())
            }
            Active::Memory => self.target.configure("maxmemory", "0"),
            Active::Slots(side, moves) => {
                let Some(shards) = self.shards(side) else { return Ok(()) };
                for moved in &moves {
                    if !moved.finish(shards)? {
                        return Err(Void("the cluster failed over by itself while slots moved").into());
                    }
                }
                Ok(())
            }
        }
    }

    fn rival(&mut self, step: &Step) -> Result<()> {
        // It has to be there, and at work, to be frozen in the middle of it.
        self.caught_up()?;
        let kind = [Rival::Copied, Rival::Fresh, Rival::Shared][step.pick as usize % 3];
        let Self { keeper, probe, writer, .. } = self;
        keeper.rival(kind, |keeper| {
            writer.as_ref().context("the writer has been stopped")?.wait_more(step.hold, super::PATIENCE)?;
            wait_probe(probe, keeper)
        })
    }

    /// The backlog is made shorter than what is written while the link is down.
    fn outrun(&mut self) -> Result<()> {
        self.source.configure("repl-backlog-size", "16kb")?;
        self.each(&[Side::Source], |ways| {
            ways.each(|proxy| {
                proxy.refuse(true);
                proxy.cut();
            });
        })?;
        let written = self.gap(1_500);
        self.to_source.each(|proxy| proxy.refuse(false));
        written?;
        self.caught_up()?;
        self.source.configure("repl-backlog-size", "64mb")
    }

    /// Writes go on, and nobody looks after the tool.
    fn gap(&self, count: u64) -> Result<()> {
        self.writer.as_ref().context("the writer has been stopped")?.wait_more(count, super::PATIENCE)
    }

    /// Slots that the load writes to, moved key by key while it goes on.
    fn move_slots(&mut self, side: Side, step: &Step) -> Result<()> {
        match if side == Side::Source { &mut *self.source } else { &mut *self.target } {
            Deployment::Cluster(shards) => shards.ready()?,
            _ => return Ok(()),
        }
        let Some(shards) = self.shards(side) else { return Ok(()) };
        let tags = u64::from(self.plan.load.tags.max(1));
        let mut slots: Vec<u16> =
            (0..=step.pick % 3).map(|i| slot(((step.pick / 7 + i) % tags).to_string().as_bytes())).collect();
        slots.sort_unstable();
        slots.dedup();
        let moves: Vec<SlotMove> =
            slots.iter().map(|&slot| SlotMove::begin(shards, slot, step.pick / 3)).collect::<Result<_>>()?;
        // Half way on there are keys on both sides.
        for _ in 0..8 {
            let Some(shards) = self.shards(side) else { return Ok(()) };
            for moved in &moves {
                moved.advance(shards, 3)?;
            }
            self.written(step.hold / 10)?;
        }
        self.active.push(Active::Slots(side, moves));
        Ok(())
    }

    fn shards(&self, side: Side) -> Option<&Shards> {
        match if side == Side::Source { &*self.source } else { &*self.target } {
            Deployment::Cluster(shards) => Some(shards),
            _ => None,
        }
    }

    fn hold(&mut self, sides: &[Side], held: Held, pick: u64) -> Result<()> {
        for &side in sides {
            let held = match held {
                Held::Stall => {
                    self.ways(side).each(|proxy| proxy.stall(true));
                    Held::Stall
                }
                Held::Slow => {
                    let speed = SPEEDS[pick as usize % SPEEDS.len()];
                    self.ways(side).each(|proxy| proxy.limit(Some(speed)));
                    Held::Slow
                }
                Held::Fuse => {
                    // Batches and replies of the target, the stream of the source.
                    let way =
                        if side == Side::Target && !pick.is_multiple_of(4) { Way::Up } else { Way::Down };
                    self.ways(side).each(|proxy| proxy.cut_after(pick / 4 % 15_000, way));
                    Held::Fuse
                }
            };
            self.active.push(Active::Held(side, held));
        }
        Ok(())
    }

    fn each(&self, sides: &[Side], act: impl Fn(&Ways)) -> Result<()> {
        sides.iter().for_each(|&side| act(self.ways(side)));
        Ok(())
    }

    fn ways(&self, side: Side) -> &Ways {
        match side {
            Side::Source => &self.to_source,
            Side::Target => &self.to_target,
        }
    }
}
