//! Runs full of faults: does the target end up exactly like the source?
//!
//! A seed gives a [`Plan`]: what source and target are made of, the load, and a schedule of faults.
//! [`Arena::run`] carries it out against real servers, behind proxies, and compares every key at the end.

mod deployment;
mod fault;
mod faults;
mod keeper;
mod plan;
mod probe;
mod report;
mod run;
mod shards;
mod watched;
mod ways;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};

pub use fault::Fault;
pub use plan::{Choice, Plan, Shape, Step};
pub use report::{Outcome, Summary};
pub use shards::{Shards, SlotMove};

use deployment::{Deployment, Side};

/// Long enough for two busy cores; what takes this long is broken.
const PATIENCE: Duration = Duration::from_secs(60);
/// For what gets on all the while, but slowly: commands over several slots of a target take round trips.
const MOST_PATIENCE: Duration = Duration::from_secs(240);

/// The servers, kept from run to run.
pub struct Arena {
    deployments: BTreeMap<(Side, Shape), Deployment>,
    unguarded: bool,
}

/// A run that shows nothing, as the servers lost data by themselves.
#[derive(Debug)]
struct Void(&'static str);

impl std::fmt::Display for Void {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Void {}

impl Arena {
    /// `unguarded`: the tool ignores what keeps it from applying twice (a switch for tests), so that
    /// runs must differ.
    pub fn new(unguarded: bool) -> Self {
        Self { deployments: BTreeMap::new(), unguarded }
    }

    /// An error is one of the servers or of the harness, not of the tool.
    pub fn run(&mut self, plan: &Plan) -> Result<Outcome> {
        // Once more with new servers: kept ones may have failed over by themselves while they were filled.
        self.once(plan).or_else(|_| self.once(plan))
    }

    fn once(&mut self, plan: &Plan) -> Result<Outcome> {
        let mut source = self.take(Side::Source, plan.source)?;
        let mut target = self.take(Side::Target, plan.target)?;
        let outcome = run::run(plan, self.unguarded, &mut source, &mut target)?;
        // Servers that a run left in the middle of something are not worth mending.
        if outcome.error.is_none() {
            self.deployments.insert((Side::Source, plan.source), source);
            self.deployments.insert((Side::Target, plan.target), target);
        }
        Ok(outcome)
    }

    fn take(&mut self, side: Side, shape: Shape) -> Result<Deployment> {
        if let Some(mut kept) = self.deployments.remove(&(side, shape))
            && kept.reset().is_ok()
        {
            return Ok(kept);
        }
        Deployment::start(side, shape).with_context(|| format!("starting the {} ({shape})", side.name()))
    }
}
