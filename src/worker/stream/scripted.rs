//! Commands through the script of `spec.filter.lua`.

use super::transaction::Transaction;
use super::{Onward, Stream, Taken, refused};
use crate::command::{CommandSpec, lookup};
use crate::resp::Args;
use crate::resp::frame::each_frame;
use crate::transform::script::CommandChange;

impl Stream {
    /// Brings on its way what the script makes of a command.
    pub(super) fn judge<S>(
        &mut self,
        known: Option<&CommandSpec>,
        args: &Args<'_>,
        to: &mut Onward<'_, S>,
    ) -> Taken {
        if let Some(spec) = known.filter(|_| to.rules.scanned)
            && let Some(taken) = self.judge_read(spec, args, to)
        {
            return taken;
        }
        let mut made = std::mem::take(&mut self.scripted);
        made.clear();
        let changed = match &mut to.script {
            Some(script) => script.command(known, args, self.place.db, &mut made),
            None => Ok(CommandChange::Keep),
        };
        let taken = match changed {
            Ok(CommandChange::Keep) => self.judged(known, args, to),
            Ok(CommandChange::Drop) => {
                *to.filtered += 1;
                Taken::Done { commands: 0 }
            }
            Ok(CommandChange::Replaced(count)) => self.several(&made, count, args, to),
            Err(why) => refused(args, &why),
        };
        self.scripted = made;
        taken
    }

    pub(super) fn judged<S>(
        &mut self,
        known: Option<&CommandSpec>,
        args: &Args<'_>,
        to: &mut Onward<'_, S>,
    ) -> Taken {
        match known {
            Some(spec) => self.pass_on(spec, args, to),
            None => self.unknown(args, to),
        }
    }

    /// What one command became takes effect together: with one place in the stream, a part of it could not be
    /// told from all of it.
    pub(super) fn several<S>(
        &mut self,
        frames: &[u8],
        count: u32,
        args: &Args<'_>,
        to: &mut Onward<'_, S>,
    ) -> Taken {
        let own = count > 1 && to.router.is_cluster() && self.transaction.is_none();
        if own {
            self.transaction =
                Some(Transaction { db: self.place.db, from: to.start, ..Transaction::default() });
        }
        let rules = to.rules;
        let mut taken = Taken::Done { commands: 1 };
        each_frame(frames, |args| {
            let known = lookup(args.name()).or_else(|| rules.dynamic.lookup(args));
            let one = self.judged(known, args, to);
            if !matches!(one, Taken::Done { .. }) {
                taken = one;
            }
        });
        if !own {
            return taken;
        }
        match (self.exec(args, to), taken) {
            (Taken::Done { .. }, taken) => taken,
            // Counted once: what else was refused of it is told with the next.
            (other, _) => other,
        }
    }
}
