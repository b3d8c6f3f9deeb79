//! Relative expiries into absolute ones, and absolute ones into held ones.

use super::super::{integer, is, is_any};
use super::{Rewrite, Writer, has};
use crate::rdb::compat::TargetFormat;
use crate::rdb::{append_restore_payload, hold_fields, parse_dump, recode};
use crate::resp::{array_header, bulk};
use crate::version::Flavor;

/// The expiry options that SET, GETEX, HSETEX and MSETEX share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expiry {
    None,
    Keep,
    /// Unix ms.
    At {
        ms: i64,
        /// Counted from the receipt, not told by the source.
        relative: bool,
    },
}

impl Writer<'_, '_> {
    pub(super) fn set(self) -> Option<Rewrite> {
        let mut expiry = Expiry::None;
        let mut conditional = false;
        let mut at = 3;
        while let Some(option) = self.arg(at) {
            if let Some((found, width)) = self.expiry_option(at)? {
                expiry = found;
                at += width;
                continue;
            }
            if !is_any(option, &["NX", "XX", "GET", "IFEQ", "IFNE", "IFDEQ", "IFDNE"]) {
                return None;
            }
            conditional = true;
            at += if is_any(option, &["NX", "XX", "GET"]) { 1 } else { 2 };
        }
        let kept = self.target.has_redis(6, 2) && !self.clock.holding.keys;
        match expiry {
            Expiry::At { relative: false, .. } if kept && !conditional => None,
            Expiry::Keep if !conditional && self.target.has_redis(6, 0) => None,
            Expiry::None if !conditional => None,
            Expiry::None => self.command("SET", 1..3, &[]),
            Expiry::Keep => self.set_keeping(),
            Expiry::At { ms, .. } => self.set_until(2, ms),
        }
    }

    /// KEEPTTL came with 6.0.
    fn set_keeping(mut self) -> Option<Rewrite> {
        self.append_set_keeping(1);
        Some(Rewrite::Replaced(1))
    }

    /// Of the pair at `key`.
    fn append_set_keeping(&mut self, key: usize) {
        if self.target.has_redis(6, 0) {
            self.append("SET", key..key + 2, &[b"KEEPTTL"]);
        } else {
            self.append_keeping_script(key);
        }
    }

    /// SETEX, PSETEX: key, time, value.
    pub(super) fn set_with_expiry(self, unit_ms: i64) -> Option<Rewrite> {
        let amount = self.arg(2).filter(|amount| integer(amount).is_some_and(|amount| amount > 0))?;
        let deadline = self.deadline(amount, unit_ms)?;
        self.set_until(3, deadline)
    }

    pub(super) fn expire(self, unit_ms: i64) -> Option<Rewrite> {
        let deadline = self.deadline(self.arg(2)?, unit_ms)?;
        self.expires_at(deadline)
    }

    /// EXPIREAT, PEXPIREAT. What a condition compares with may be held, and older targets know none.
    pub(super) fn expire_at(self, unit_ms: i64) -> Option<Rewrite> {
        let conditions = 3..self.args.len();
        let conditional = !conditions.is_empty();
        let known = |at| self.arg(at).is_some_and(|option| is_any(option, &["NX", "XX", "GT", "LT"]));
        if !conditions.into_iter().all(known) || !(conditional || self.clock.holding.keys) {
            return None;
        }
        let at = integer(self.arg(2)?)?.checked_mul(unit_ms)?;
        self.expires_at(at)
    }

    fn expires_at(self, ms: i64) -> Option<Rewrite> {
        let until = self.clock.holding.key(ms);
        self.command("PEXPIREAT", 1..2, &[number(until, &mut buffer())])
    }

    pub(super) fn getex(self) -> Option<Rewrite> {
        let Some(option) = self.arg(2) else { return Some(Rewrite::Drop) };
        if is(option, "PERSIST") {
            return self.command("PERSIST", 1..2, &[]);
        }
        match self.expiry_option(2)? {
            Some((Expiry::At { ms, .. }, _)) => self.expires_at(ms),
            _ => None,
        }
    }

    /// RESTORE key ttl payload and options.
    pub(super) fn restore(mut self, asking: bool) -> Option<Rewrite> {
        let ttl = integer(self.arg(2)?)?;
        let (mut replace, mut absolute, mut at) = (false, false, 4);
        while let Some(option) = self.arg(at) {
            replace |= is(option, "REPLACE");
            absolute |= is(option, "ABSTTL");
            at += if is_any(option, &["IDLETIME", "FREQ"]) { 2 } else { 1 };
        }
        let deadline = match ttl {
            ..=0 => None,
            _ if absolute => Some(self.clock.holding.key(ttl)),
            _ => Some(self.clock.holding.key(self.clock.received_at_ms.checked_add(ttl)?)),
        };
        let (fitted, lossy) = self.fitted_payload();
        let replaced = |count| if lossy { Rewrite::Lossy(count) } else { Rewrite::Replaced(count) };
        let (key, payload) = (self.arg(1)?, fitted.as_deref().or(self.arg(3))?);
        if self.target.has_redis(5, 0) {
            if fitted.is_none() && deadline.is_none_or(|deadline| absolute && deadline == ttl) {
                return if asking { self.renamed("RESTORE") } else { None };
            }
            let add = deadline.is_some() && !absolute;
            array_header(self.args.len() + usize::from(add), self.out);
            bulk(b"RESTORE", self.out);
            bulk(key, self.out);
            bulk(number(deadline.unwrap_or(0), &mut buffer()), self.out);
            bulk(payload, self.out);
            (4..self.args.len()).filter_map(|at| self.args.arg(at)).for_each(|arg| bulk(arg, self.out));
            if add {
                bulk(b"ABSTTL", self.out);
            }
            return Some(replaced(1));
        }
        let ttl = deadline.map_or(ttl, |deadline| self.remaining(deadline));
        let mut ttl_text = buffer();
        let values = [key, number(ttl, &mut ttl_text), payload, b"REPLACE"];
        // Before 3.0 RESTORE takes no option at all.
        let in_place = replace && self.target.has_redis(3, 0);
        if replace && !in_place {
            self.append("DEL", 1..2, &[]);
        }
        self.append("RESTORE", 0..0, if in_place { &values } else { values.get(..3)? });
        Some(replaced(if replace && !in_place { 2 } else { 1 }))
    }

    /// The payload as the target takes it, with the expiries of its fields held, unless it may stay; and whether
    /// those expiries are lost. What the target cannot have stays as it is, for it to refuse.
    fn fitted_payload(&self) -> (Option<Vec<u8>>, bool) {
        let Some(dump) = self.arg(3).and_then(|payload| parse_dump(payload).ok()) else {
            return (None, false);
        };
        let format = TargetFormat::of(self.target);
        // As the footer of a type that only one of them writes.
        let mut flavor = if dump.version >= 80 { Flavor::Valkey } else { Flavor::Redis };
        let (mut type_byte, mut lossy) = (dump.type_byte, false);
        let mut value = None;
        if !format.can_load(type_byte, flavor) {
            let mut fitting = Vec::new();
            let Ok(recoded) = recode(type_byte, dump.value, flavor, &format, &mut fitting) else {
                return (None, false);
            };
            (type_byte, lossy, flavor) = (recoded.type_byte, recoded.lost_field_expiry, self.target.flavor);
            value = Some(fitting);
        }
        if self.clock.holding.fields {
            let mut held = Vec::new();
            if hold_fields(type_byte, value.as_deref().unwrap_or(dump.value), flavor, &mut held) {
                value = Some(held);
            }
        }
        if value.is_none() && format.accepts_footer(dump.version) {
            return (None, false);
        }
        let mut payload = Vec::new();
        let value = value.as_deref().unwrap_or(dump.value);
        append_restore_payload(&mut payload, type_byte, value, format.footer_version());
        (Some(payload), lossy)
    }

    /// HEXPIRE, HPEXPIRE. A condition stays: it may hold for some fields only. (Held times are in the same
    /// order as true ones.)
    pub(super) fn hash_expire(self, unit_ms: i64) -> Option<Rewrite> {
        if !self.target.has_field_expiry() {
            return Some(Rewrite::Lossy(0));
        }
        let deadline = self.deadline(self.arg(2)?, unit_ms)?;
        self.fields_expire_at(deadline, 3)
    }

    /// HEXPIREAT, HPEXPIREAT
    pub(super) fn hash_expire_at(self, unit_ms: i64) -> Option<Rewrite> {
        if !self.target.has_field_expiry() {
            return Some(Rewrite::Lossy(0));
        }
        if !self.clock.holding.fields {
            return None;
        }
        let at = integer(self.arg(2)?)?.checked_mul(unit_ms)?;
        self.fields_expire_at(at, 3)
    }

    /// HGETEX key option FIELDS n field …: what it answers is of no use.
    pub(super) fn hgetex(self) -> Option<Rewrite> {
        let option = self.arg(2)?;
        if is(option, "FIELDS") {
            return Some(Rewrite::Drop);
        }
        if !self.target.has_field_expiry() {
            return Some(if is(option, "PERSIST") { Rewrite::Drop } else { Rewrite::Lossy(0) });
        }
        if is(option, "PERSIST") {
            let end = self.args.len();
            array_header(end - 1, self.out);
            bulk(b"HPERSIST", self.out);
            bulk(self.args.arg(1)?, self.out);
            (3..end).filter_map(|at| self.args.arg(at)).for_each(|arg| bulk(arg, self.out));
            return Some(Rewrite::Replaced(1));
        }
        match self.expiry_option(2)? {
            Some((Expiry::At { ms, .. }, width)) => self.fields_expire_at(ms, 2 + width),
            _ => None,
        }
    }

    /// `from`: what follows the time.
    fn fields_expire_at(self, ms: i64, from: usize) -> Option<Rewrite> {
        let (key, until) = (self.arg(1)?, self.clock.holding.field(ms));
        array_header(3 + self.args.len().saturating_sub(from), self.out);
        bulk(b"HPEXPIREAT", self.out);
        bulk(key, self.out);
        bulk(number(until, &mut buffer()), self.out);
        (from..self.args.len()).filter_map(|at| self.args.arg(at)).for_each(|arg| bulk(arg, self.out));
        Some(Rewrite::Replaced(1))
    }

    /// HSETEX key options FIELDS n field value …
    pub(super) fn hsetex(mut self) -> Option<Rewrite> {
        let (mut expiry, mut at) = (Expiry::None, 2);
        while let Some(option) = self.arg(at).filter(|option| !is(option, "FIELDS")) {
            match self.expiry_option(at)? {
                Some((found, width)) => {
                    expiry = found;
                    at += width;
                }
                None if is_any(option, &["FNX", "FXX"]) => at += 1,
                None => return None,
            }
        }
        let (fields, end) = (at, self.args.len());
        if fields + 2 >= end {
            return None;
        }
        let known = has(self.target, (8, 0), (9, 0));
        match expiry {
            // Where fields have no expiry, there is none to keep, to clear or to set: the form of HINCRBYFLOAT on 8.2.
            _ if !self.target.has_field_expiry() => {
                self.append_hset(fields + 2);
                let lossy = matches!(expiry, Expiry::At { .. });
                Some(if lossy { Rewrite::Lossy(1) } else { Rewrite::Replaced(1) })
            }
            // HSET clears the expiry of what it sets, too.
            Expiry::None if !known => {
                self.append_hset(fields + 2);
                Some(Rewrite::Replaced(1))
            }
            Expiry::At { ms, .. } if !known => {
                self.append_hset(fields + 2);
                let until = self.clock.holding.field(ms);
                let names: Vec<&[u8]> =
                    (fields + 2..end).step_by(2).filter_map(|at| self.args.arg(at)).collect();
                array_header(5 + names.len(), self.out);
                bulk(b"HPEXPIREAT", self.out);
                bulk(self.args.arg(1)?, self.out);
                bulk(number(until, &mut buffer()), self.out);
                bulk(b"FIELDS", self.out);
                bulk(number(names.len() as i64, &mut buffer()), self.out);
                names.iter().for_each(|name| bulk(name, self.out));
                Some(Rewrite::Replaced(2))
            }
            Expiry::At { ms, relative } if relative || self.clock.holding.fields => {
                let until = self.clock.holding.field(ms);
                self.append_around("HSETEX", 1..2, &[b"PXAT", number(until, &mut buffer())], fields..end);
                Some(Rewrite::Replaced(1))
            }
            _ => None,
        }
    }

    /// With the fields and values from `from` on.
    fn append_hset(&mut self, from: usize) {
        let end = self.args.len();
        let name = if self.target.has_redis(4, 0) || end - from <= 2 { "HSET" } else { "HMSET" };
        self.append_around(name, 1..2, &[], from..end);
    }

    /// MSETEX n key value … options: kept where the target has it, else one SET for each pair.
    pub(super) fn msetex(mut self) -> Option<Rewrite> {
        let pairs = usize::try_from(integer(self.arg(1)?)?).ok()?;
        let behind_pairs = pairs.checked_mul(2)?.checked_add(2).filter(|&end| end <= self.args.len())?;
        let (mut expiry, mut at) = (Expiry::None, behind_pairs);
        while let Some(option) = self.arg(at) {
            match self.expiry_option(at)? {
                Some((found, width)) => {
                    expiry = found;
                    at += width;
                }
                None if is_any(option, &["NX", "XX"]) => at += 1,
                None => return None,
            }
        }
        if has(self.target, (8, 4), (9, 1)) {
            return match expiry {
                Expiry::At { ms, relative } if relative || self.clock.holding.keys => {
                    let until = self.clock.holding.key(ms);
                    self.command("MSETEX", 1..behind_pairs, &[b"PXAT", number(until, &mut buffer())])
                }
                _ => None,
            };
        }
        for pair in 0..pairs {
            let key = 2 + pair * 2;
            match expiry {
                Expiry::None => self.append("SET", key..key + 2, &[]),
                Expiry::Keep => self.append_set_keeping(key),
                Expiry::At { ms, .. } => self.append_set_until(key, key + 1, ms),
            }
        }
        u32::try_from(pairs).ok().map(Rewrite::Replaced)
    }

    /// The expiry option at `at` and how many arguments it takes; `Some(None)` if another option
    /// stands there, `None` if it has no valid time.
    fn expiry_option(&self, at: usize) -> Option<Option<(Expiry, usize)>> {
        let option = self.arg(at)?;
        if is(option, "KEEPTTL") {
            return Some(Some((Expiry::Keep, 1)));
        }
        let (unit_ms, relative) = match option {
            _ if is(option, "EX") => (1000, true),
            _ if is(option, "PX") => (1, true),
            _ if is(option, "EXAT") => (1000, false),
            _ if is(option, "PXAT") => (1, false),
            _ => return Some(None),
        };
        let amount = integer(self.arg(at + 1)?).filter(|&amount| amount > 0)?.checked_mul(unit_ms)?;
        let ms = if relative { self.clock.received_at_ms.checked_add(amount)? } else { amount };
        Some(Some((Expiry::At { ms, relative }, 2)))
    }

    fn set_until(mut self, value: usize, deadline: i64) -> Option<Rewrite> {
        self.append_set_until(1, value, deadline);
        Some(Rewrite::Replaced(1))
    }

    fn append_set_until(&mut self, key: usize, value: usize, deadline: i64) {
        let deadline = self.clock.holding.key(deadline);
        let (option, time) =
            if self.target.has_redis(6, 2) { ("PXAT", deadline) } else { ("PX", self.remaining(deadline)) };
        let [key, value] = [key, value].map(|at| self.args.arg(at).unwrap_or_default());
        self.append("SET", 0..0, &[key, value, option.as_bytes(), number(time, &mut buffer())]);
    }
}

fn buffer() -> itoa::Buffer {
    itoa::Buffer::new()
}

fn number(value: i64, buffer: &mut itoa::Buffer) -> &[u8] {
    buffer.format(value).as_bytes()
}
