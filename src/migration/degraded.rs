//! What is wrong although the migration goes on (PURE).

use super::state::Shard;
use super::territory::Holding;
use crate::api::Status;
use crate::api::conditions::reason;
use crate::slot::SlotRanges;
use crate::source::watch::SourceShard;

/// Reasons and messages of the condition `Degraded`, the gravest first.
pub fn causes(shards: &[Shard], status: &Status) -> Vec<(&'static str, String)> {
    let mut causes = Vec::new();
    causes.extend(moved(shards).map(|message| (reason::SLOTS_MOVED, message)));
    let refused = status.quarantine.commands;
    if refused > 0 {
        let message =
            format!("{refused} command(s) or key(s) were not taken by the target; see status.quarantine");
        causes.push((reason::COMMANDS_QUARANTINED, message));
    }
    for shard in shards {
        let link = shard.link();
        if link.full_resyncs > 0 {
            let times =
                if link.full_resyncs == 1 { String::new() } else { format!(" {} times", link.full_resyncs) };
            let message =
                format!("shard {} had to be copied again{times}: {}", shard.id, link.full_resync_reason);
            causes.push((reason::FULL_RESYNC_FORCED, message));
        }
    }
    for shard in shards {
        let scan = shard.progress.scan.now();
        if scan.is_by_passes() && scan.passes > 0 && scan.changes > 0 {
            let changes = scan.changes;
            let message = format!(
                "shard {}: the last pass over all keys found {changes} changed; while writes go on, another may find as many",
                shard.id
            );
            causes.push((reason::NOT_CONVERGING, message));
        }
    }
    // A scan is held back that way at all times.
    let mut sent = shards.iter().filter(|shard| !shard.progress.scan.now().active);
    if let Some((shard, why)) = sent.find_map(|shard| Some((&shard.id, shard.numbers().why_full?))) {
        let message = format!("the spool of shard {shard} is full: {why}; its source is made to wait");
        causes.push((reason::SPOOL_FULL, message));
    }
    causes
}

/// Which slots of the source are not, or not for long, followed where they are served; `None`: all are.
pub fn moved(shards: &[Shard]) -> Option<String> {
    let mut told = Vec::new();
    let holdings = holdings(shards);
    for (shard, holding) in shards.iter().zip(&holdings) {
        let left = holding.follows.without(&holding.serves).with(&holding.leaving);
        let came: SlotRanges = holding.serves.without(&holding.follows);
        let followed = |slot: u16| holdings.iter().any(|other| other.follows.contains(slot));
        let came: SlotRanges = came.iter().filter(|slot| !followed(*slot)).collect();
        for (slots, way) in [(left, "of"), (came, "that came to")] {
            if !slots.is_empty() {
                told.push(format!("slots {slots} {way} shard {}", shard.id));
            }
        }
    }
    if told.is_empty() {
        return None;
    }
    let next = stuck(shards).unwrap_or_else(|| {
        "their keys are copied again when the move is over, and there is no cutover before".to_owned()
    });
    Some(format!("{} move between source shards: {next}", told.join(", ")))
}

/// Why waiting does not help; `None`: it does.
pub fn stuck(shards: &[Shard]) -> Option<String> {
    for shard in shards {
        let failure = shard.following().failure;
        if !failure.is_empty() {
            return Some(format!("their keys cannot be copied: {failure}"));
        }
    }
    let strange = shards.iter().find_map(|shard| Some(shard.watch.as_ref()?.now()?.strange))?;
    let gone = |holding: &Holding| holding.follows.without(&holding.serves).intersects(&strange);
    holdings(shards).iter().any(gone).then(|| {
        "they went to a shard that was not there when the migration began; stop it and start it again, when the source has come to rest".to_owned()
    })
}

/// What each shard follows and serves; empty without a cluster, and while a worker has not told yet.
pub fn holdings(shards: &[Shard]) -> Vec<Holding> {
    let holding = |shard: &Shard| {
        let following = shard.following();
        let at = shard.watch.as_ref().and_then(SourceShard::now)?;
        (following.known && !shard.slots.is_empty()).then_some(Holding {
            follows: following.slots,
            serves: at.serves,
            leaving: at.leaving,
        })
    };
    shards.iter().map(holding).collect::<Option<Vec<Holding>>>().unwrap_or_default()
}
