//! Commands and options that are newer than the target, and blocking ones.

use super::super::{integer, is, is_any};
use super::{Rewrite, Writer};
use crate::resp::{array_header, bulk};

impl Writer<'_, '_> {
    /// HGETDEL key FIELDS n field …: what it answers is of no use, and HDEL is as old as hashes.
    pub(super) fn hgetdel(self) -> Option<Rewrite> {
        let end = self.args.len();
        if !is(self.arg(2)?, "FIELDS") {
            return None;
        }
        array_header(2 + end - 4, self.out);
        bulk(b"HDEL", self.out);
        bulk(self.args.arg(1)?, self.out);
        (4..end).filter_map(|at| self.args.arg(at)).for_each(|arg| bulk(arg, self.out));
        Some(Rewrite::Replaced(1))
    }

    /// LPOP, RPOP with a count (6.2): cutting the list does the same.
    pub(super) fn list_pop(self) -> Option<Rewrite> {
        if self.target.has_redis(6, 2) {
            return None;
        }
        let count = integer(self.arg(2)?).filter(|&count| count >= 0)?;
        let mut buffer = itoa::Buffer::new();
        if is(self.args.name(), "LPOP") {
            return self.command("LTRIM", 1..2, &[buffer.format(count).as_bytes(), b"-1"]);
        }
        let last = count.checked_neg()?.checked_sub(1)?;
        self.command("LTRIM", 1..2, &[b"0", buffer.format(last).as_bytes()])
    }

    /// ZPOPMIN, ZPOPMAX (5.0): removing the ranks does the same.
    pub(super) fn sorted_pop(self) -> Option<Rewrite> {
        if self.target.has_redis(5, 0) {
            return None;
        }
        let count = self.arg(2).map_or(Some(1), integer).filter(|&count| count > 0)?;
        let mut buffer = itoa::Buffer::new();
        if is(self.args.name(), "ZPOPMIN") {
            let last = buffer.format(count.checked_sub(1)?).as_bytes();
            return self.command("ZREMRANGEBYRANK", 1..2, &[b"0", last]);
        }
        let first = buffer.format(count.checked_neg()?).as_bytes();
        self.command("ZREMRANGEBYRANK", 1..2, &[first, b"-1"])
    }

    /// LMOVE (6.2), and BLMOVE, which must not block the connection that replays it.
    pub(super) fn list_move(self, blocking: bool) -> Option<Rewrite> {
        if self.target.has_redis(6, 2) {
            return if blocking { self.command("LMOVE", 1..5, &[]) } else { None };
        }
        if is(self.arg(3)?, "RIGHT") && is(self.arg(4)?, "LEFT") {
            return self.command("RPOPLPUSH", 1..3, &[]);
        }
        None
    }

    /// FLUSHALL, FLUSHDB: ASYNC came with 4.0, SYNC with 6.2.
    pub(super) fn flush(self) -> Option<Rewrite> {
        let option = self.arg(1)?;
        let known = is(option, "ASYNC") && self.target.has_redis(4, 0)
            || is(option, "SYNC") && self.target.has_redis(6, 2);
        if known || !is_any(option, &["ASYNC", "SYNC"]) {
            return None;
        }
        let name = if is(self.args.name(), "FLUSHALL") { "FLUSHALL" } else { "FLUSHDB" };
        self.command(name, 1..1, &[])
    }

    /// NOMKSTREAM (6.2) took effect, so the stream is there.
    pub(super) fn xadd(self) -> Option<Rewrite> {
        if self.target.has_redis(6, 2) || !is(self.arg(2)?, "NOMKSTREAM") {
            return None;
        }
        let end = self.args.len();
        array_header(end - 1, self.out);
        bulk(b"XADD", self.out);
        bulk(self.args.arg(1)?, self.out);
        (3..end).filter_map(|at| self.args.arg(at)).for_each(|arg| bulk(arg, self.out));
        Some(Rewrite::Replaced(1))
    }

    /// ENTRIESREAD (7.0) is a counter that older servers do not keep.
    pub(super) fn xgroup(self) -> Option<Rewrite> {
        let option =
            (5..self.args.len()).find(|&at| self.arg(at).is_some_and(|arg| is(arg, "ENTRIESREAD")))?;
        if self.target.has_redis(7, 0) || option + 2 != self.args.len() {
            return None;
        }
        self.command("XGROUP", 1..option, &[])
    }

    /// ENTRIESADDED, MAXDELETEDID (7.0), likewise.
    pub(super) fn xsetid(self) -> Option<Rewrite> {
        if self.target.has_redis(7, 0) {
            return None;
        }
        self.command("XSETID", 1..3, &[])
    }
}
