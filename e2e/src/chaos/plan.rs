//! What a run does, by its seed alone: no clock, server or process is asked here, so that the same
//! seed and choice give the same plan.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::Fault;
use crate::load::Load;

/// What source or target is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Shape {
    /// One server; a target keeps an append-only file, so that it survives its own kill -9.
    Standalone,
    /// A master and a replica, watched by a Sentinel.
    Sentinel,
    /// Three masters with a replica each.
    Cluster,
}

impl Shape {
    pub const ALL: [Self; 3] = [Self::Standalone, Self::Sentinel, Self::Cluster];

    pub fn name(self) -> &'static str {
        match self {
            Self::Standalone => "standalone",
            Self::Sentinel => "sentinel",
            Self::Cluster => "cluster",
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Shape {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|shape| shape.name() == name);
        found.with_context(|| format!("{name}: there are standalone, sentinel and cluster"))
    }
}

/// What plans are made from.
#[derive(Clone, Debug)]
pub struct Choice {
    pub sources: Vec<Shape>,
    pub targets: Vec<Shape>,
    pub faults: Vec<Fault>,
    /// Faults of a run, at least and at most.
    pub steps: (usize, usize),
    /// The load renews keys that are about to expire.
    pub renewals: bool,
    /// Percent of the load's commands that show when they run twice; a part of the plan otherwise.
    pub additive: Option<u32>,
    /// Whether the full sync is slow; a part of the plan otherwise.
    pub slow_start: Option<bool>,
    /// Fields of the manifest, by their paths.
    pub fields: Vec<(String, Value)>,
}

impl Default for Choice {
    fn default() -> Self {
        Self {
            sources: Shape::ALL.to_vec(),
            targets: Shape::ALL.to_vec(),
            faults: Fault::all(),
            steps: (5, 8),
            renewals: true,
            additive: None,
            slow_start: None,
            fields: Vec::new(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub source: Shape,
    pub target: Shape,
    pub load: Load,
    /// How often each form of value is in the data that the source begins with.
    pub rounds: usize,
    /// Microseconds that the source takes for each key of a snapshot.
    pub key_delay: u32,
    /// The snapshot comes without a file on the source's disk, and so without its length.
    pub diskless: bool,
    /// Faults begin once the tool is in sync, and not already during the full sync.
    pub in_sync: bool,
    pub steps: Vec<Step>,
    /// Bytes a second to each server of the target while the first faults hit: the full sync is not over by
    /// then, and what the tool has received of it is on its disk.
    pub slow_start: Option<u64>,
    /// Fields of the manifest, by their paths.
    pub fields: Vec<(String, Value)>,
}

/// A fault. Time is counted in commands of the writer, which stops for no fault of the tool's.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    pub fault: Fault,
    /// Written before it begins.
    pub before: u64,
    /// Written while it holds on, for faults that do.
    pub hold: u64,
    /// It holds on until the next fault has begun.
    pub overlaps: bool,
    /// The tool catches up before the next fault.
    pub settles: bool,
    /// Which master, how slow, after how many bytes: whatever the kind of fault has to choose.
    pub pick: u64,
}

impl Plan {
    pub fn new(seed: u64, choice: &Choice) -> Result<Self> {
        let random = &mut StdRng::seed_from_u64(seed);
        let (source, target) = (one_of(random, &choice.sources)?, one_of(random, &choice.targets)?);
        let load = load(random, seed, source, target, choice);
        let possible: Vec<Fault> =
            choice.faults.iter().copied().filter(|fault| fault.is_possible(source, target)).collect();
        if possible.is_empty() {
            bail!("seed {seed}: none of the chosen faults can happen from {source} to {target}");
        }
        let (least, most) = choice.steps;
        let count = random.random_range(least..=most.max(least));
        let mut plan = Self {
            seed,
            source,
            target,
            load,
            rounds: random.random_range(1..=2),
            key_delay: if random.random_bool(0.5) { random.random_range(100..=1_500) } else { 0 },
            diskless: random.random(),
            in_sync: random.random_bool(0.6),
            steps: (0..count).map(|_| step(random, &possible)).collect(),
            slow_start: None,
            fields: choice.fields.clone(),
        };
        let (slow, speed) = (random.random_bool(0.2), random.random_range(100_000..=400_000));
        if choice.slow_start.unwrap_or(slow) {
            plan.slow_start = Some(speed);
            plan.in_sync = false;
            // There are many keys, and without its end the snapshot is of no use.
            plan.key_delay /= 10;
            let small = [
                ("spoolMemory", "1Mi".into()),
                ("pipelineBytes", "64Ki".into()),
                ("pipelineCommands", 64.into()),
            ];
            let small = small.map(|(name, value)| (format!("/spec/limits/{name}"), value));
            plan.fields.splice(0..0, small);
        }
        if let Some(last) = plan.steps.last_mut() {
            last.overlaps = false;
        }
        Ok(plan)
    }
}

fn load(random: &mut StdRng, seed: u64, source: Shape, target: Shape, choice: &Choice) -> Load {
    let several = source != Shape::Cluster && target != Shape::Cluster && random.random_bool(0.6);
    let one_slot = source == Shape::Cluster || random.random();
    let rate = random.random_range(1_500..=3_500);
    Load {
        seed,
        // A command over several slots of a cluster takes the tool many round trips. What is asked here
        // is whether it is exact, not whether it keeps up.
        rate: if target == Shape::Cluster && !one_slot { rate / 4 } else { rate },
        // Database 0 stays where it is: the first and the last change places.
        databases: if several { vec![2, 0, 5] } else { vec![0] },
        across_databases: several,
        one_slot,
        tags: random.random_range(4..=24),
        additive: choice.additive.unwrap_or_else(|| random.random_range(40..=90)),
        renewals: choice.renewals,
        prefix: "load".into(),
        without: &[],
    }
}

fn step(random: &mut StdRng, possible: &[Fault]) -> Step {
    let total: u32 = possible.iter().map(|fault| fault.weight()).sum();
    let mut at = random.random_range(0..total.max(1));
    let chosen = possible.iter().copied().find(|fault| {
        let found = at < fault.weight();
        at = at.saturating_sub(fault.weight());
        found
    });
    Step {
        // There is one, as `at` lies below the sum.
        fault: chosen.unwrap_or(Fault::Kill),
        // Often at once, so that faults hit a tool that has not recovered from the one before.
        before: if random.random_bool(0.4) {
            random.random_range(0..60)
        } else {
            random.random_range(100..1_200)
        },
        hold: random.random_range(100..1_500),
        overlaps: random.random_bool(0.5),
        settles: random.random_bool(0.5),
        pick: random.random(),
    }
}

fn one_of(random: &mut StdRng, shapes: &[Shape]) -> Result<Shape> {
    if shapes.is_empty() {
        bail!("no shape to choose from");
    }
    Ok(shapes.get(random.random_range(0..shapes.len())).copied().unwrap_or(Shape::Standalone))
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            seed,
            source,
            target,
            load,
            rounds,
            key_delay,
            diskless,
            in_sync,
            steps,
            slow_start,
            fields,
        } = self;
        writeln!(f, "seed {seed}: {source} to {target}")?;
        writeln!(
            f,
            "  {rounds} rounds of data, snapshot with {key_delay} us a key, diskless {diskless}; faults begin {}",
            if *in_sync { "in sync" } else { "at once" }
        )?;
        writeln!(
            f,
            "  load: {}/s, databases {:?}, {} tags, one slot {}, {} % additive",
            load.rate, load.databases, load.tags, load.one_slot, load.additive
        )?;
        if let Some(speed) = slow_start {
            writeln!(f, "  the target takes {speed} bytes a second at first")?;
        }
        for (path, value) in fields {
            writeln!(f, "  {path} is {value}")?;
        }
        for step in steps {
            let Step { fault, before, hold, overlaps, settles, pick } = step;
            writeln!(
                f,
                "  after {before:5} writes {fault:16} hold {hold:5} overlaps {overlaps:5} settles {settles:5} pick {pick}"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_plan_and_many_seeds_give_all_faults() {
        let choice = Choice::default();
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..300 {
            let plan = Plan::new(seed, &choice).unwrap();
            assert_eq!(format!("{plan:?}"), format!("{:?}", Plan::new(seed, &choice).unwrap()));
            assert!((5..=8).contains(&plan.steps.len()));
            assert!(plan.steps.iter().all(|step| step.fault.is_possible(plan.source, plan.target)));
            seen.extend(plan.steps.iter().map(|step| step.fault));
        }
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), {
            let mut all = Fault::all();
            all.sort_unstable();
            all
        });
    }

    #[test]
    fn a_choice_without_a_possible_fault_is_refused() {
        let choice = Choice {
            sources: vec![Shape::Standalone],
            faults: vec![Fault::SourceCrash],
            ..Choice::default()
        };
        assert!(Plan::new(1, &choice).is_err());
    }
}
