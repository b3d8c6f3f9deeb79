//! What can be known to go wrong, found before anything is read or written, each in one line.
//!
//! Nothing here changes a server. Commands used beside those of discovery: INFO, and where they are
//! allowed CONFIG GET, MODULE LIST, COMMAND INFO, ACL WHOAMI, ACL DRYRUN, ACL GETUSER; on the target SELECT and SCAN.
//! Where those are forbidden, what they would have told is left for the run to find out.

mod checks;
mod error;
mod pausing;
mod permissions;
mod survey;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::connection::{Address, Dialer, RedisAccess};
use crate::rdb::compat::{losses, unloadable};
use crate::topology::{Role, Topology, discover, pick_source};

pub use error::PreflightError;
use survey::{Survey, survey};

/// Short enough that an address that swallows packets is told within 5 s.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// What is to be checked. A side that is a file is left out.
#[derive(Clone)]
pub struct PreflightInput {
    pub source: Option<SourceSide>,
    pub target: Option<TargetSide>,
    /// Database on the source → database on the target; those not named keep their number.
    pub database_map: BTreeMap<u64, u64>,
    /// Databases of the source that are copied; empty: all but the excluded.
    pub include_databases: Vec<u64>,
    pub exclude_databases: Vec<u64>,
    /// Not everything is copied, so sizes on the source are upper bounds only.
    pub filtered: bool,
    /// `failurePolicy.maxQuarantined` is 0: what has no equivalent on the target is a fault, not a warning.
    pub nothing_may_be_lost: bool,
}

#[derive(Clone)]
pub struct SourceSide {
    pub access: RedisAccess,
    pub dialer: Dialer,
    pub prefer_replica: bool,
    /// `PSYNC`, or what the service renamed it to; `None`: nothing is replicated (SCAN).
    pub psync_command: Option<String>,
    /// A cutover is to pause its writes.
    pub pauses: bool,
}

#[derive(Clone)]
pub struct TargetSide {
    pub access: RedisAccess,
    pub dialer: Dialer,
    /// `existingKeys: Fail`, at a first start. Not to be asked when carrying on: the keys are then ours.
    pub must_be_empty: bool,
    /// Keys that are in the way then; `None`: all.
    pub claimed: Option<Claimed>,
}

/// True for a key of the target, by its database there, that may have come from the source.
pub type Claimed = Arc<dyn Fn(u64, &[u8]) -> bool + Send + Sync>;

/// What was found when nothing stands in the way.
#[derive(Clone, Debug, Default)]
pub struct PreflightReport {
    pub source: Option<SourceReport>,
    pub target: Option<TargetReport>,
    /// One line each: worth knowing, not in the way.
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug)]
pub struct SourceReport {
    pub topology: Topology,
    /// Where to replicate each shard of `topology.shards` from, in their order; reachable addresses.
    pub origins: Vec<Address>,
    /// Keys in all databases of all shards when asked.
    pub keys: u64,
    /// Bytes, of all shards.
    pub used_memory: u64,
}

#[derive(Clone, Debug)]
pub struct TargetReport {
    pub topology: Topology,
    pub keys: u64,
}

/// Looks at both sides at once; the first fault that stands in the way is the error.
pub async fn preflight(input: &PreflightInput) -> Result<PreflightReport, PreflightError> {
    let (source, target) =
        tokio::join!(look_at_source(input.source.as_ref()), look_at_target(input.target.as_ref()));
    let (source, target) = (source?, target?);
    let servers = [&source, &target].into_iter().flatten().flat_map(|side| &side.servers);
    let mut warnings: Vec<String> = servers.filter_map(|survey| survey.unchecked.clone()).collect();
    if let (Some(side), Some(source)) = (&input.source, &source)
        && side.pauses
    {
        warnings.extend(pausing::cannot_pause(&quick(&side.dialer), &source.topology).await);
    }
    if let Some(source) = &source {
        let replicates = input.source.as_ref().is_some_and(|side| side.psync_command.is_some());
        checks::source(source, replicates, &mut warnings)?;
    }
    if let Some(target) = &target {
        checks::target(target, &mut warnings)?;
    }
    if let (Some(source), Some(target)) = (&source, &target) {
        checks::not_the_same(source, target)?;
        let (from, to) = (source.topology.server, target.topology.server);
        warnings.extend(unloadable(from, to).map(|what| what.to_string()));
        checks::losses((from, to), &losses(from, to), input.nothing_may_be_lost, &mut warnings)?;
        checks::databases(input, source, target)?;
        checks::memory(input.filtered, source, target, &mut warnings)?;
        checks::modules(source, target, input.nothing_may_be_lost, &mut warnings)?;
    }
    if let (Some(side), Some(target)) = (&input.target, &target)
        && side.must_be_empty
    {
        survey::empty(&quick(&side.dialer), &target.servers, side.claimed.as_ref()).await?;
    }
    Ok(PreflightReport {
        source: source.map(|side| SourceReport {
            keys: side.total(|survey| survey.info.keys()),
            used_memory: side.total(|survey| survey.info.used_memory),
            origins: side.servers.into_iter().map(|survey| survey.address).collect(),
            topology: side.topology,
        }),
        target: target.map(|side| TargetReport {
            keys: side.total(|survey| survey.info.keys()),
            topology: side.topology,
        }),
        warnings,
    })
}

/// One side's topology and what its servers say: on the source those to replicate from, on the
/// target the masters, in the order of the shards.
struct Side {
    topology: Topology,
    servers: Vec<Survey>,
}

impl Side {
    fn total(&self, of: impl Fn(&Survey) -> u64) -> u64 {
        self.servers.iter().fold(0, |sum, survey| sum.saturating_add(of(survey)))
    }
}

async fn look_at_source(side: Option<&SourceSide>) -> Result<Option<Side>, PreflightError> {
    let Some(side) = side else { return Ok(None) };
    let dialer = quick(&side.dialer);
    let topology = discover(&side.access, &dialer, Role::Source).await?;
    checks::covered(&topology, Role::Source)?;
    let origins = topology.shards.iter().map(|shard| pick_source(shard, side.prefer_replica, &dialer));
    let origins = futures::future::join_all(origins).await;
    let psync = side.psync_command.as_deref();
    let surveys = origins.iter().map(|address| survey(&dialer, address, Role::Source, psync));
    let servers = futures::future::try_join_all(surveys).await?;
    Ok(Some(Side { topology, servers }))
}

async fn look_at_target(side: Option<&TargetSide>) -> Result<Option<Side>, PreflightError> {
    let Some(side) = side else { return Ok(None) };
    let dialer = quick(&side.dialer);
    let topology = discover(&side.access, &dialer, Role::Target).await?;
    checks::covered(&topology, Role::Target)?;
    let masters = topology.shards.iter().map(|shard| &shard.master.address);
    let surveys = masters.map(|address| survey(&dialer, address, Role::Target, None));
    let servers = futures::future::try_join_all(surveys).await?;
    Ok(Some(Side { topology, servers }))
}

fn quick(dialer: &Dialer) -> Dialer {
    dialer.with_connect_timeout(CONNECT_TIMEOUT).with_response_timeout(CONNECT_TIMEOUT)
}
