//! What a schedule may inject, and where it can.

use std::fmt;

use anyhow::Result;

use super::Shape;

/// One kind of fault. The names, which `--faults` takes, are in `TABLE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    Stop,
    Kill,
    KillFresh,
    Rival,
    CutSource,
    CutTarget,
    CutBoth,
    StallSource,
    StallTarget,
    StallBoth,
    SlowSource,
    SlowTarget,
    ResetSource,
    ResetTarget,
    FreezeSource,
    Outrun,
    SourceFailover,
    SourceCrash,
    SourceBehind,
    SourceSlots,
    TargetFailover,
    TargetForce,
    TargetCrash,
    TargetRollback,
    TargetSlots,
    TargetMemory,
}

/// Name, how often it is chosen beside others, and what happens.
const TABLE: [(Fault, &str, u32, &str); 26] = [
    (Fault::Stop, "stop", 2, "SIGTERM, and a start with the same data folder"),
    (Fault::Kill, "kill", 10, "SIGKILL, and a start with the same data folder"),
    (Fault::KillFresh, "kill-fresh", 4, "SIGKILL, and a start with an empty data folder"),
    (Fault::Rival, "rival", 3, "SIGSTOP, a second process, SIGCONT: the first must end with exit code 1"),
    (Fault::CutSource, "cut-source", 4, "connections to the source are closed"),
    (Fault::CutTarget, "cut-target", 5, "connections to the target are closed"),
    (Fault::CutBoth, "cut-both", 2, "both"),
    (
        Fault::StallSource,
        "stall-source",
        2,
        "the source's connections stay open and pass nothing for a while",
    ),
    (Fault::StallTarget, "stall-target", 3, "the target's do"),
    (Fault::StallBoth, "stall-both", 1, "both do"),
    (Fault::SlowSource, "slow-source", 2, "5 KB/s and more from the source for a while"),
    (Fault::SlowTarget, "slow-target", 2, "5 KB/s and more to the target for a while"),
    (Fault::ResetSource, "reset-source", 3, "closed after some more bytes of the stream"),
    (Fault::ResetTarget, "reset-target", 6, "closed after some more bytes of a batch, or of its replies"),
    (Fault::FreezeSource, "freeze-source", 1, "connections to the source that never pass anything again"),
    (Fault::Outrun, "outrun", 2, "the source's backlog ends before the link is back: a full resync"),
    (Fault::SourceFailover, "source-failover", 4, "a replica of the source is promoted"),
    (Fault::SourceCrash, "source-crash", 3, "kill -9 of a source master"),
    (Fault::SourceBehind, "source-behind", 2, "as source-crash, its replica not having the last writes"),
    (
        Fault::SourceSlots,
        "source-slots",
        4,
        "slots of the source move between its shards while they are written",
    ),
    (Fault::TargetFailover, "target-failover", 4, "a replica of the target is promoted"),
    (Fault::TargetForce, "target-force", 2, "CLUSTER FAILOVER FORCE or TAKEOVER"),
    (Fault::TargetCrash, "target-crash", 5, "kill -9 of a target master; standalone: and its restart"),
    (
        Fault::TargetRollback,
        "target-rollback",
        3,
        "as target-crash, its replica not having what was acknowledged last",
    ),
    (Fault::TargetSlots, "target-slots", 4, "slots of the target move while they are written"),
    (Fault::TargetMemory, "target-memory", 2, "the target refuses writes for lack of memory"),
];

impl Fault {
    pub fn all() -> Vec<Self> {
        TABLE.iter().map(|row| row.0).collect()
    }

    /// Names and what happens, a line each.
    pub fn list() -> String {
        TABLE.iter().map(|(_, name, _, about)| format!("{name:16} {about}\n")).collect()
    }

    /// Those whose names are given, or start with a part that is: `kill`, `cut-target`, `target`.
    pub fn select(names: &str) -> Result<Vec<Self>> {
        let mut found = Vec::new();
        for name in names.split(',').map(str::trim) {
            let before = found.len();
            let parts = format!("{name}-");
            found.extend(TABLE.iter().filter(|r| r.1 == name || r.1.starts_with(&parts)).map(|row| row.0));
            anyhow::ensure!(found.len() > before, "{name}: no such fault; there are\n{}", Self::list());
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    pub fn name(self) -> &'static str {
        self.row().map_or("", |row| row.1)
    }

    pub(super) fn weight(self) -> u32 {
        self.row().map_or(0, |row| row.2)
    }

    /// Between deployments of these shapes it can happen.
    pub fn is_possible(self, source: Shape, target: Shape) -> bool {
        match self {
            Self::SourceFailover | Self::SourceCrash | Self::SourceBehind => source != Shape::Standalone,
            Self::TargetFailover | Self::TargetRollback => target != Shape::Standalone,
            Self::TargetForce | Self::TargetSlots => target == Shape::Cluster,
            Self::SourceSlots => source == Shape::Cluster,
            _ => true,
        }
    }

    /// Needs what lasts to be over: what follows must be able to make progress, or slots that move
    /// would be lost with the master that gives them away, whatever the tool does.
    pub(super) fn stands_alone(self) -> bool {
        use Fault::*;
        matches!(
            self,
            Stop | Rival
                | Outrun
                | TargetMemory
                | TargetSlots
                | SourceSlots
                | TargetFailover
                | TargetForce
                | TargetCrash
                | TargetRollback
        )
    }

    /// Slots that move then would be lost with the master that gives them away, whatever the tool does.
    pub(super) fn needs_slots_at_rest(self) -> bool {
        matches!(self, Self::SourceFailover | Self::SourceCrash | Self::SourceBehind)
    }

    fn row(self) -> Option<&'static (Self, &'static str, u32, &'static str)> {
        TABLE.iter().find(|row| row.0 == self)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_has_one_name_and_can_happen_somewhere() {
        for (i, (fault, name, weight, _)) in TABLE.iter().enumerate() {
            assert_eq!(fault.name(), *name);
            assert!(TABLE.iter().skip(i + 1).all(|row| row.0 != *fault && row.1 != *name));
            assert!(*weight > 0 && fault.is_possible(Shape::Cluster, Shape::Cluster));
        }
    }

    #[test]
    fn faults_are_selected_by_name_and_by_group() {
        let target = Fault::select("target").unwrap();
        assert!(target.contains(&Fault::TargetCrash) && !target.contains(&Fault::CutTarget));
        assert_eq!(Fault::select("stop,cut-target,stop").unwrap(), [Fault::Stop, Fault::CutTarget]);
        assert_eq!(Fault::select("kill").unwrap(), [Fault::Kill, Fault::KillFresh]);
        assert!(Fault::select("kil").is_err());
    }
}
