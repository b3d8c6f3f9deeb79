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
        let (from, to) = (is(self.arg(3)?, "RIGHT"), is(self.arg(4)?, "RIGHT"));
        if from && !to {
            return self.command("RPOPLPUSH", 1..3, &[]);
        }
        self.list_move_script(from, to)
    }

    /// HSET of several fields (4.0).
    pub(super) fn hset(self) -> Option<Rewrite> {
        self.renamed_before((4, 0), "HMSET")
    }

    /// LPUSHX, RPUSHX of several elements (4.0): the list was there.
    pub(super) fn push_existing(self) -> Option<Rewrite> {
        let name = if is(self.args.name(), "LPUSHX") { "LPUSH" } else { "RPUSH" };
        self.renamed_before((4, 0), name)
    }

    /// SCRIPT FLUSH: ASYNC and SYNC came with 6.2.
    pub(super) fn script_flush(self) -> Option<Rewrite> {
        if self.target.has_redis(6, 2) || !is(self.arg(1)?, "FLUSH") {
            return None;
        }
        self.command("SCRIPT", 1..2, &[])
    }

    /// GEOSEARCHSTORE (6.2) within a radius is GEORADIUS … STORE (3.2). A box, or ANY, has no such form.
    pub(super) fn geo_search_store(self) -> Option<Rewrite> {
        if self.target.has_redis(6, 2) || !self.target.has_redis(3, 2) || !self.clock.together {
            return None;
        }
        let (dest, source) = (self.arg(1)?, self.arg(2)?);
        let (mut center, mut radius, mut rest, mut distances) = (None, None, Vec::new(), false);
        let mut at = 3;
        while let Some(option) = self.arg(at) {
            let width = match option {
                _ if is(option, "FROMMEMBER") => {
                    center = Some(vec![self.arg(at + 1)?]);
                    2
                }
                _ if is(option, "FROMLONLAT") => {
                    center = Some(vec![self.arg(at + 1)?, self.arg(at + 2)?]);
                    3
                }
                _ if is(option, "BYRADIUS") => {
                    radius = Some([self.arg(at + 1)?, self.arg(at + 2)?]);
                    3
                }
                _ if is_any(option, &["ASC", "DESC"]) => {
                    rest.push(option);
                    1
                }
                _ if is(option, "COUNT") && self.arg(at + 2).is_none_or(|any| !is(any, "ANY")) => {
                    rest.extend([option, self.arg(at + 1)?]);
                    2
                }
                _ if is(option, "STOREDIST") => {
                    distances = true;
                    1
                }
                _ => return None,
            };
            at += width;
        }
        let (center, [radius, unit]) = (center?, radius?);
        let name = if center.len() == 2 { "GEORADIUS" } else { "GEORADIUSBYMEMBER" };
        let store: &[u8] = if distances { b"STOREDIST" } else { b"STORE" };
        let mut commands = 1;
        let mut writer = self;
        if source != dest {
            writer.append("DEL", 0..0, &[dest]);
            commands += 1;
        }
        let mut words = vec![source];
        words.extend(center);
        words.extend([radius, unit]);
        words.extend(rest);
        words.extend([store, dest]);
        writer.append(name, 0..0, &words);
        Some(Rewrite::Replaced(commands))
    }

    /// GEORADIUS … STORE: without its source, servers before 6.2 leave the destination as it is, and newer ones
    /// remove it.
    pub(super) fn geo_radius_store(mut self) -> Option<Rewrite> {
        if self.target.has_redis(6, 2) || !self.clock.together {
            return None;
        }
        let end = self.args.len();
        let is_store = |at: &usize| self.arg(*at).is_some_and(|arg| is_any(arg, &["STORE", "STOREDIST"]));
        let dest = self.arg((5..end).rev().find(is_store)? + 1)?;
        if Some(dest) == self.arg(1) {
            return None;
        }
        let name = if is(self.args.name(), "GEORADIUS") { "GEORADIUS" } else { "GEORADIUSBYMEMBER" };
        self.append("DEL", 0..0, &[dest]);
        self.append(name, 1..end, &[]);
        Some(Rewrite::Replaced(2))
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
}
