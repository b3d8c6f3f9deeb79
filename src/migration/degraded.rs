//! What is wrong although the migration goes on (PURE).

use super::state::Shard;
use crate::api::Status;
use crate::api::conditions::reason;
use crate::command::{Kind, lookup};

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
    let why_full = |shard: &Shard| shard.numbers().why_full.map(|why| (shard.id.clone(), why));
    if let Some((shard, why)) = shards.iter().find_map(why_full) {
        let message = format!("the spool of shard {shard} is full: {why}; its source is made to wait");
        causes.push((reason::SPOOL_FULL, message));
    }
    causes
}

/// Which slots of the source changed hands while the migration ran; `None`: none did.
pub fn moved(shards: &[Shard]) -> Option<String> {
    let told = shards.iter().filter_map(|shard| {
        let slots = shard.moved_slots();
        if !slots.is_empty() {
            return Some(format!("slots {slots} of shard {}", shard.id));
        }
        // Servers that move slots as a whole say so in the stream, which may come before the topology shows it.
        let mut refused = shard.progress.quarantined().into_iter();
        refused
            .any(|entry| {
                lookup(entry.refusal.command.as_bytes()).is_some_and(|spec| spec.kind == Kind::TopologyChange)
            })
            .then(|| format!("slots of or to shard {}", shard.id))
    });
    let told: Vec<String> = told.collect();
    (!told.is_empty()).then(|| {
        format!(
            "{} moved between source shards while the migration ran: their keys may be missing or outdated on the target, so there will be no cutover; start over when the source has come to rest",
            told.join(", ")
        )
    })
}
