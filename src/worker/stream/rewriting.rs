//! Commands in the form for their target.

use super::{Moment, Router, Stream, StreamRules};
use crate::command::{
    Clock, CommandSpec, Kind, Rewrite, Route, database_args, decimal, may_rewrite, rewrite, route,
};
use crate::resp::frame::each_frame;
use crate::resp::{Args, array_header, bulk};

impl Stream {
    /// The command in the form for this target, in `scratch`: `None` when it may stay as it is.
    pub(super) fn rewritten(
        &mut self,
        spec: &CommandSpec,
        args: &Args<'_>,
        moment: Moment,
        rules: &StreamRules,
        router: &Router,
    ) -> Option<u32> {
        let mapped = !rules.database_map.is_empty()
            && matches!(spec.kind, Kind::Move | Kind::SwapDb | Kind::Data)
            && self.map_databases(spec, args, rules);
        if !mapped {
            return self.rewritten_for_target(spec, args, moment, rules, router);
        }
        let (frame, mut count) = (std::mem::take(&mut self.scratch), None);
        each_frame(&frame, |args| count = self.rewritten_for_target(spec, args, moment, rules, router));
        if count.is_none() {
            self.scratch = frame;
        }
        Some(count.unwrap_or(1))
    }

    fn rewritten_for_target(
        &mut self,
        spec: &CommandSpec,
        args: &Args<'_>,
        moment: Moment,
        rules: &StreamRules,
        router: &Router,
    ) -> Option<u32> {
        if !may_rewrite(spec, args) {
            return None;
        }
        self.scratch.clear();
        let clock = Clock {
            received_at_ms: moment.arrived as i64,
            now_ms: moment.now as i64,
            holding: rules.holding,
            together: !router.is_cluster()
                || rules.target.has_redis(6, 2)
                || !matches!(route(spec, args), Ok(Route::CrossSlot)),
        };
        match rewrite(spec, args, clock, rules.target, &mut self.scratch) {
            Rewrite::Unchanged => None,
            Rewrite::Replaced(count) => Some(count),
            Rewrite::Lossy(count) => {
                self.lost_expiries += 1;
                Some(count)
            }
            Rewrite::Drop => Some(0),
        }
    }

    /// MOVE, SWAPDB and COPY … DB name databases; true when the mapped command is in `scratch`.
    fn map_databases(&mut self, spec: &CommandSpec, args: &Args<'_>, rules: &StreamRules) -> bool {
        let mut places = Vec::new();
        database_args(spec, args, &mut |index| places.push(index));
        if places.is_empty() {
            return false;
        }
        self.scratch.clear();
        array_header(args.len(), &mut self.scratch);
        for (index, arg) in args.iter().enumerate() {
            match decimal(arg).filter(|_| places.contains(&index)) {
                Some(db) => {
                    let db = rules.database_map.get(&db).copied().unwrap_or(db);
                    bulk(itoa::Buffer::new().format(db).as_bytes(), &mut self.scratch);
                }
                None => bulk(arg, &mut self.scratch),
            }
        }
        true
    }
}
