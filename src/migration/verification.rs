//! Verification as part of a run, and on its own.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::join_all;
use tokio::sync::watch;

use super::setup::{self, sides};
use super::state::{Shard, State, now};
use super::{MigrationError, Observers, Outcome, RunOptions, StopRequest};
use crate::api::conditions::{self, reason};
use crate::api::plan::VerificationMode;
use crate::api::status::DifferenceSample;
use crate::api::{Phase, Plan};
use crate::backoff::Backoff;
use crate::connection::{Address, Dialer};
use crate::preflight::PreflightReport;
use crate::source::replication::LinkState;
use crate::topology::{Topology, server_info};
use crate::verify::{
    CHUNK_ABOVE, DatabaseChoice, Deployment, KeyFilter, NodeShare, Settle, VerifyError, VerifyInput,
    VerifyMode, VerifyProgress, VerifyReport, verify,
};
use crate::worker::{Numbers, ShardPhase};

const SAMPLES: usize = 20;

/// Waits until everything that the sources had written when this was called stands on the target.
pub async fn settle(shards: &[Shard]) {
    join_all(shards.iter().map(settle_shard)).await;
}

/// After a failover the offset of the server before says nothing: then the new one is asked.
async fn settle_shard(shard: &Shard) {
    loop {
        let mut link = shard.progress.link.subscribe();
        let history = |link: &LinkState| (link.full_resyncs, link.master.clone());
        let before = history(&shard.link());
        let settled = async {
            let offset = source_offset(shard, None).await;
            caught_up(shard, offset).await;
        };
        let another = async {
            // The shard holds the sender, so that there is no error.
            let _ = link.wait_for(|link| history(link) != before).await;
        };
        tokio::select! {
            () = settled => return,
            () = another => {}
        }
    }
}

/// Waits until the target has everything of this shard up to `offset` (`None`: everything received). Does
/// not end when the worker is over, which has not settled anything: those who watch the workers see that.
pub async fn caught_up(shard: &Shard, offset: Option<i64>) {
    let question = shard.progress.ask(offset);
    let reached = |numbers: &Numbers| {
        let reached = match offset {
            Some(offset) => numbers.applied_offset >= offset,
            None => numbers.lag_bytes == 0,
        };
        // What a worker elsewhere told may be some seconds old.
        let fresh = shard.progress.has_answered(question);
        // After a new full resync, an offset of the history before says nothing.
        let same_history =
            || shard.link().origin.is_some_and(|origin| origin.replication_id == numbers.replication_id);
        let works = !numbers.stopped && numbers.phase == ShardPhase::IncrementalSync;
        works && fresh && reached && same_history()
    };
    // The shard holds the sender, so that there is no error.
    let _ = shard.progress.numbers.subscribe().wait_for(reached).await;
}

/// Waits until every worker in another process has said once more how far it is.
pub async fn heard(shards: &[Shard]) {
    join_all(shards.iter().map(async |shard| {
        // That far it is already.
        let question = shard.progress.ask(Some(0));
        let answered = |_: &Numbers| shard.progress.has_answered(question);
        // The shard holds the sender, so that there is no error.
        let _ = shard.progress.numbers.subscribe().wait_for(answered).await;
    }))
    .await;
}

/// Waits until no key of this shard holds its expiry on the target any more.
pub async fn released(shard: &Shard) {
    let released = |numbers: &Numbers| {
        !numbers.stopped && numbers.phase == ShardPhase::IncrementalSync && !numbers.holding
    };
    // The shard holds the sender, so that there is no error.
    let _ = shard.progress.numbers.subscribe().wait_for(released).await;
}

/// The replication offset of `server` (`None`: of the shard's master) now. `None`: it does not let us ask,
/// or it is a SYNC source, whose offsets are not ours; then what was received has to do.
pub async fn source_offset(shard: &Shard, server: Option<&Address>) -> Option<i64> {
    if let Some(offset) = shard.progress.scan.settle().await {
        return Some(offset);
    }
    let mut backoff = Backoff::default();
    loop {
        if shard.link().origin.is_some_and(|origin| origin.is_unnamed()) {
            return None;
        }
        let server = server.cloned().unwrap_or_else(|| shard.master());
        match server_info(&shard.dialer, &server).await {
            Ok(info) => return Some(info.offset),
            Err(error) if error.is_transient() => backoff.wait().await,
            Err(error) => {
                tracing::debug!(%error, "the source's offset cannot be asked for");
                tokio::time::sleep(Duration::from_secs(1)).await;
                return None;
            }
        }
    }
}

fn deployment(topology: &Topology, dialer: &Dialer, read: Option<&[Address]>) -> Deployment {
    let nodes = topology.shards.iter().enumerate().map(|(index, shard)| {
        let master = &shard.master.address;
        let address = read.and_then(|read| read.get(index)).unwrap_or(master);
        NodeShare {
            address: address.clone(),
            slots: shard.slots.ranges().iter().map(|&(first, last)| first..=last).collect(),
            replica: address != master,
        }
    });
    Deployment {
        dialer: dialer.clone(),
        version: topology.server,
        nodes: nodes.collect(),
        cluster: topology.is_cluster(),
    }
}

/// `shards`: where the source is by now, in the order of its topology; empty: where preflight found it.
/// `None`: the plan asks for no verification.
pub fn input(
    plan: &Plan,
    report: &PreflightReport,
    shards: &[Shard],
    settle: Settle,
) -> Result<Option<VerifyInput>, MigrationError> {
    let mode = match plan.verification.mode {
        VerificationMode::Full => VerifyMode::Full,
        VerificationMode::Sample => {
            VerifyMode::Sample { percent: u32::from(plan.verification.sample_percent) }
        }
        VerificationMode::Keys => VerifyMode::Keys,
        VerificationMode::Off => return Ok(None),
    };
    let (source, target) = sides(report)?;
    let (mut topology, mut origins) = (source.topology.clone(), source.origins.clone());
    for (index, shard) in shards.iter().enumerate() {
        if let (Some(found), Some(origin)) = (topology.shards.get_mut(index), origins.get_mut(index)) {
            found.master.address = shard.master();
            if let Some(at) = shard.watch.as_ref().and_then(|watch| watch.now())
                && !found.slots.is_empty()
            {
                found.slots = at.serves;
            }
            *origin = shard.reader();
        }
    }
    Ok(Some(VerifyInput {
        source: deployment(&topology, &setup::source_dialer(plan)?, Some(&origins)),
        target: deployment(&target.topology, &setup::target_dialer(plan)?, None),
        databases: plan.database_map.clone(),
        copied: plan
            .transform
            .clone()
            .map(|transform| Arc::new(move |db| transform.databases.admits(db)) as DatabaseChoice),
        include: plan
            .transform
            .clone()
            .map(|transform| Arc::new(move |db, key: &[u8]| transform.admits(db, key)) as KeyFilter),
        script: plan.transform.as_ref().and_then(|transform| transform.script.clone()),
        mode,
        rounds: plan.verification.rounds,
        max_samples: SAMPLES,
        chunk_above: CHUNK_ABOVE,
        settle,
    }))
}

/// Puts progress and report into the status.
pub fn show_progress(state: &mut State, progress: &VerifyProgress) {
    let verification = &mut state.status.verification;
    verification.round = i64::from(progress.round);
    verification.keys_compared = progress.keys_compared as i64;
    verification.differences = progress.differences as i64;
}

/// True when no more differs than the plan allows. The condition's message begins with `when`.
pub fn show_report(state: &mut State, plan: &Plan, report: &VerifyReport, when: &str) -> bool {
    let verification = &mut state.status.verification;
    verification.round = i64::from(report.rounds);
    verification.keys_compared = report.keys_compared as i64;
    verification.differences = report.differences() as i64;
    verification.unsupported = report.unsupported as i64;
    verification.samples = report
        .samples
        .iter()
        .map(|difference| DifferenceSample {
            db: difference.db as i64,
            key: difference.key.clone(),
            kind: format!("{:?}", difference.kind),
            detail: difference.detail.clone(),
        })
        .collect();
    verification.completion_time = Some(now());
    let passed = report.differences() <= plan.verification.max_differences;
    let message = format!("{when}{}", in_words(plan, report));
    let why = if passed { reason::COMPLETED } else { reason::VERIFICATION_FAILED };
    state.set(conditions::VERIFIED, passed, why, &message);
    state.publish();
    passed
}

/// What was compared, and what was found.
pub fn in_words(plan: &Plan, report: &VerifyReport) -> String {
    let VerifyReport {
        keys_compared,
        missing,
        different,
        extra,
        unchecked,
        unsettled,
        unsupported,
        not_compared,
        ..
    } = report;
    let mut message =
        format!("{keys_compared} keys compared: {missing} missing, {different} different, {extra} extra");
    if *unchecked > 0 {
        message.push_str(&format!(", {unchecked} more not equal at first sight"));
    }
    if *unsettled > 0 {
        let named = report.unsettled_keys.join(", ");
        message.push_str(&format!(
            "; not settled, as they change all the time or are too large: {unsettled} ({named})"
        ));
    }
    if *unsupported > 0 {
        message.push_str(&format!("; {unsupported} that the target cannot hold by its version, left out"));
    }
    if plan.transform.as_ref().is_some_and(|transform| transform.script.is_some()) {
        message.push_str(&format!(
            "; not compared, as filter.lua changes or drops them: {not_compared}, nor what only the target has"
        ));
    }
    message
}

/// `redis-migration verify`: no worker runs; both sides are taken as they are.
pub async fn run_alone(plan: Arc<Plan>, options: RunOptions, observers: Observers) -> Outcome {
    let mut state = State::new(&plan, observers);
    if plan.source.redis().is_none() || plan.target.redis().is_none() {
        let message = "verify compares two servers, and a side is a file: nothing to compare".to_owned();
        return failed(&mut state, reason::INVALID_SPEC, message);
    }
    state.phase(Phase::Preflight, "looking at both sides");
    let report = match setup::preflight(&plan, false).await {
        Ok(report) => report,
        Err(error) => return failed(&mut state, error.reason, error.to_string()),
    };
    let settle: Settle = Arc::new(|| tokio::time::sleep(Duration::from_millis(500)).boxed());
    let input = match input(&plan, &report, &[], settle) {
        Ok(Some(input)) => input,
        Ok(None) => {
            let message = "spec.verification.mode is Off: nothing to compare".to_owned();
            return failed(&mut state, reason::INVALID_SPEC, message);
        }
        Err(error) => return failed(&mut state, error.reason, error.to_string()),
    };
    state.phase(Phase::Verifying, "comparing source and target");
    let (stop, stopped) = watch::channel(false);
    let mut asked = options.stop.clone();
    let (progress, mut seen) = watch::channel(VerifyProgress::default());
    let mut job = Box::pin(verify(input, progress, stopped));
    let result = loop {
        tokio::select! {
            result = &mut job => break result,
            Ok(()) = seen.changed() => {
                let progress = *seen.borrow_and_update();
                show_progress(&mut state, &progress);
                state.publish();
            }
            Ok(_) = asked.wait_for(|stop| *stop != StopRequest::Run) => {
                stop.send_replace(true);
                return Outcome::Stopped;
            }
        }
    };
    match result {
        Ok(report) => {
            if show_report(&mut state, &plan, &report, "") {
                let mut message = match report.unsettled {
                    0 if report.not_compared > 0 => {
                        let others = report.not_compared;
                        format!(
                            "source and target are equal, but for {others} key(s) that filter.lua changes or drops, which are not compared"
                        )
                    }
                    0 => "source and target are equal".to_owned(),
                    unsettled => {
                        format!("source and target are equal, but for {unsettled} key(s) not settled")
                    }
                };
                if report.held > 0 {
                    let held = report.held;
                    message.push_str(&format!(
                        "; the target holds the expiries of {held} key(s) until the cutover"
                    ));
                }
                state.finish(Phase::Completed, true, reason::COMPLETED, &message);
                Outcome::Done
            } else {
                let count = report.differences();
                let message = format!("source and target differ in {count} key(s)");
                state.finish(Phase::Failed, false, reason::VERIFICATION_FAILED, &message);
                Outcome::Differences { count }
            }
        }
        Err(VerifyError::Stopped) => Outcome::Stopped,
        Err(error) => failed(&mut state, reason::VERIFICATION_FAILED, error.to_string()),
    }
}

pub fn failed(state: &mut State, reason: &'static str, message: String) -> Outcome {
    state.finish(Phase::Failed, false, reason, &message);
    Outcome::Failed { reason, message, transient: false }
}
