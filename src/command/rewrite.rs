//! Commands as the target must get them: expiries made absolute, so that lag does not lengthen
//! them, and held where that is asked for (`hold.rs`); forms that the target does not know replaced where another has exactly the same effect.
//!
//! As in `split.rs`, a condition that guards a whole command (SET NX, EXPIRE GT …) is dropped when
//! the command is rewritten anyway: the stream carries it only because it took effect.

mod expiry;
mod newer;
mod scripts;
mod streams;

use super::{CommandSpec, Rewriting};
use crate::hold::Holding;
use crate::resp::{Args, array_header, bulk};
use crate::version::{Flavor, ServerVersion};

/// Two moments in Unix milliseconds, and what may be made of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock {
    /// When the command's bytes arrived from the source: relative expiries count from here.
    pub received_at_ms: i64,
    /// For targets that cannot be told an absolute time.
    pub now_ms: i64,
    pub holding: Holding,
    /// All its keys lie in one slot, or there are none: a script may stand for the command.
    pub together: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rewrite {
    /// Send it as it came; nothing was written.
    Unchanged,
    /// So many commands were appended in its place. Their keys are keys of the original, perhaps
    /// one key each, so a cluster target routes them anew.
    Replaced(u32),
    /// The same, but the target knows no expiries of fields: one is left out.
    Lossy(u32),
    /// It has no effect that a target could take over.
    Drop,
}

/// Whether [`rewrite`] can do anything: two loads and a comparison, false for plain SET.
pub fn may_rewrite(spec: &CommandSpec, args: &Args) -> bool {
    args.len() >= usize::from(spec.rewrite_from)
}

/// Appends to `out` what `target` must get instead of `args`. Arguments that do not fit the command
/// leave it unchanged, for the target to refuse. Allocates nothing but room in `out`.
pub fn rewrite(
    spec: &CommandSpec,
    args: &Args,
    clock: Clock,
    target: ServerVersion,
    out: &mut Vec<u8>,
) -> Rewrite {
    if !may_rewrite(spec, args) {
        return Rewrite::Unchanged;
    }
    let writer = Writer { args, clock, target, out };
    let rewritten = match spec.rewriting {
        Rewriting::None => None,
        Rewriting::Set => writer.set(),
        Rewriting::SetWithExpiry { unit_ms } => writer.set_with_expiry(unit_ms),
        Rewriting::Expire { unit_ms } => writer.expire(unit_ms),
        Rewriting::ExpireAt { unit_ms } => writer.expire_at(unit_ms),
        Rewriting::Getex => writer.getex(),
        Rewriting::Restore => writer.restore(false),
        Rewriting::RestoreAsking => writer.restore(true),
        Rewriting::HashExpire { unit_ms } => writer.hash_expire(unit_ms),
        Rewriting::HashExpireAt { unit_ms } => writer.hash_expire_at(unit_ms),
        Rewriting::Hgetex => writer.hgetex(),
        Rewriting::Hsetex => writer.hsetex(),
        Rewriting::Msetex => writer.msetex(),
        Rewriting::Hgetdel => writer.hgetdel(),
        Rewriting::Unlink => writer.renamed_before((4, 0), "DEL"),
        Rewriting::Getdel => writer.renamed_before((6, 2), "DEL"),
        Rewriting::ListPop => writer.list_pop(),
        Rewriting::SortedPop => writer.sorted_pop(),
        Rewriting::ListMove => writer.list_move(false),
        Rewriting::BlockingListMove => writer.list_move(true),
        Rewriting::BlockingRotate => writer.command("RPOPLPUSH", 1..3, &[]),
        Rewriting::Flush => writer.flush(),
        Rewriting::Xadd | Rewriting::Xtrim => writer.trimming(),
        Rewriting::Xgroup => writer.xgroup(),
        Rewriting::Xsetid => writer.xsetid(),
        Rewriting::Xdelex => writer.xdelex(),
        Rewriting::Move => writer.move_with_expiry(),
        Rewriting::Copy => writer.copy(),
        // Where there are no such channels nobody listens.
        Rewriting::ShardPublish => (!target.has_redis(7, 0)).then_some(Rewrite::Drop),
        Rewriting::Script => writer.script_flush(),
        Rewriting::PushExisting => writer.push_existing(),
        Rewriting::Hset => writer.hset(),
        Rewriting::Hpersist => (!target.has_field_expiry()).then_some(Rewrite::Drop),
        Rewriting::SortedAdd => writer.sorted_add(),
        Rewriting::SortedRangeStore => writer.sorted_range_store(),
        Rewriting::SortedDiffStore => writer.sorted_diff_store(),
        Rewriting::GeoRadiusStore => writer.geo_radius_store(),
        Rewriting::GeoSearchStore => writer.geo_search_store(),
    };
    rewritten.unwrap_or(Rewrite::Unchanged)
}

/// One rewriting under way. Its methods answer `None` for "leave it as it is" and write only
/// when they are sure.
struct Writer<'a, 'o> {
    args: &'a Args<'a>,
    clock: Clock,
    target: ServerVersion,
    out: &'o mut Vec<u8>,
}

impl<'a> Writer<'a, '_> {
    fn arg(&self, index: usize) -> Option<&'a [u8]> {
        self.args.arg(index)
    }

    /// `name`, the arguments of `kept`, then `more`.
    fn command(mut self, name: &str, kept: std::ops::Range<usize>, more: &[&[u8]]) -> Option<Rewrite> {
        self.append(name, kept, more);
        Some(Rewrite::Replaced(1))
    }

    fn append(&mut self, name: &str, kept: std::ops::Range<usize>, more: &[&[u8]]) {
        self.append_around(name, kept, more, 0..0);
    }

    /// `name`, the arguments of `kept`, `more`, then those of `rest`.
    fn append_around(
        &mut self,
        name: &str,
        kept: std::ops::Range<usize>,
        more: &[&[u8]],
        rest: std::ops::Range<usize>,
    ) {
        let kept = kept.start..kept.end.min(self.args.len()).max(kept.start);
        array_header(1 + kept.len() + more.len() + rest.len(), self.out);
        bulk(name.as_bytes(), self.out);
        for index in kept {
            bulk(self.args.arg(index).unwrap_or_default(), self.out);
        }
        more.iter().for_each(|arg| bulk(arg, self.out));
        for index in rest {
            bulk(self.args.arg(index).unwrap_or_default(), self.out);
        }
    }

    /// All arguments under another name.
    fn renamed(self, name: &str) -> Option<Rewrite> {
        let end = self.args.len();
        self.command(name, 1..end, &[])
    }

    fn renamed_before(self, (major, minor): (u16, u16), name: &str) -> Option<Rewrite> {
        if self.target.has_redis(major, minor) {
            return None;
        }
        self.renamed(name)
    }

    /// When a relative expiry of `amount` units ends, in Unix ms. `None` for what is no expiry.
    fn deadline(&self, amount: &[u8], unit_ms: i64) -> Option<i64> {
        self.clock.received_at_ms.checked_add(super::integer(amount)?.checked_mul(unit_ms)?)
    }

    /// What remains until `deadline`. At least 1 ms: 0 is refused, or would mean "for ever".
    fn remaining(&self, deadline: i64) -> i64 {
        deadline.saturating_sub(self.clock.now_ms).max(1)
    }
}

/// Whether `target` is at least this Redis, or at least that Valkey, for what came after they parted.
fn has(target: ServerVersion, redis: (u16, u16), valkey: (u16, u16)) -> bool {
    let version = (target.major, target.minor);
    match target.flavor {
        Flavor::Redis => version >= redis,
        Flavor::Valkey => version >= valkey,
    }
}

#[cfg(test)]
mod tests;
