//! Commands that an older target has no other command for, as scripts on the same keys: EVAL is as old as 2.6, and
//! atomic. Numbers go through `%.0f`, as old servers print large ones with an exponent. Where a script reads
//! something that servers before 5.0 call random, it asks them to replicate what it does, not itself.

use super::super::{integer, is, is_any};
use super::{Rewrite, Writer};
use crate::version::{Flavor, ServerVersion};

macro_rules! script {
    ($body:literal) => {
        concat!("if redis.replicate_commands then redis.replicate_commands() end ", $body)
    };
}

const KEEPING: &str = script!(
    "local t=redis.call('PTTL',KEYS[1]) redis.call('SET',KEYS[1],ARGV[1]) \
     if t>0 then redis.call('PEXPIRE',KEYS[1],string.format('%.0f',t)) end"
);
const LIST_MOVE: &str = "local v=redis.call(ARGV[1],KEYS[1]) if v then redis.call(ARGV[2],KEYS[2],v) end";
const COPY: &str = script!(
    "local d=redis.call('DUMP',KEYS[1]) if d then local t=redis.call('PTTL',KEYS[1]) \
     if t<0 then t=0 elseif t==0 then t=1 end if ARGV[1] then redis.call('SELECT',ARGV[1]) end \
     redis.call('DEL',KEYS[2]) redis.call('RESTORE',KEYS[2],string.format('%.0f',t),d) end"
);
const MOVE: &str = script!(
    "local t=redis.call('PTTL',KEYS[1]) if redis.call('MOVE',KEYS[1],ARGV[1])==1 and t>0 then \
     redis.call('SELECT',ARGV[1]) redis.call('PEXPIRE',KEYS[1],string.format('%.0f',t)) end"
);
const RANGE_STORE: &str = "local m=redis.call(unpack(ARGV)) local s={} \
     for i,v in ipairs(m) do s[i]=redis.call('ZSCORE',KEYS[2],v) end redis.call('DEL',KEYS[1]) \
     for i,v in ipairs(m) do redis.call('ZADD',KEYS[1],s[i],v) end";
const DIFF_STORE: &str = "local o={} for i=3,#KEYS do local m \
     if redis.call('TYPE',KEYS[i]).ok=='set' then m=redis.call('SMEMBERS',KEYS[i]) \
     else m=redis.call('ZRANGE',KEYS[i],0,-1) end for _,v in ipairs(m) do o[#o+1]=v end end \
     redis.call('ZUNIONSTORE',KEYS[1],1,KEYS[2]) for _,v in ipairs(o) do redis.call('ZREM',KEYS[1],v) end";
const SORTED_ADD: &str = "for i=3,#ARGV,2 do local o=redis.call('ZSCORE',KEYS[1],ARGV[i+1]) local w=true \
     if o then local n,c=tonumber(ARGV[i]),tonumber(o) w=ARGV[1]~='NX' \
     and not (ARGV[2]=='GT' and n<=c) and not (ARGV[2]=='LT' and n>=c) else w=ARGV[1]~='XX' end \
     if w then redis.call('ZADD',KEYS[1],ARGV[i],ARGV[i+1]) end end";
const TRIMMING: &str = "local r repeat r=redis.call('XRANGE',KEYS[1],'-',ARGV[1],'COUNT',500) \
     for _,e in ipairs(r) do redis.call('XDEL',KEYS[1],e[1]) end until #r==0";

impl<'a> Writer<'a, '_> {
    fn append_script(&mut self, script: &str, keys: &[&[u8]], args: &[&[u8]]) {
        let mut digits = itoa::Buffer::new();
        let mut words = vec![script.as_bytes(), digits.format(keys.len()).as_bytes()];
        words.extend(keys);
        words.extend(args);
        self.append("EVAL", 0..0, &words);
    }

    fn scripted(mut self, script: &str, keys: &[&[u8]], args: &[&[u8]]) -> Option<Rewrite> {
        if !self.clock.together {
            return None;
        }
        self.append_script(script, keys, args);
        Some(Rewrite::Replaced(1))
    }

    /// SET … KEEPTTL of the pair at `key`.
    pub(super) fn append_keeping_script(&mut self, key: usize) {
        let [key, value] = [key, key + 1].map(|at| self.args.arg(at).unwrap_or_default());
        self.append_script(KEEPING, &[key], &[value]);
    }

    /// LMOVE (6.2) between other ends than RPOPLPUSH has.
    pub(super) fn list_move_script(self, from_right: bool, to_right: bool) -> Option<Rewrite> {
        let pop: &[u8] = if from_right { b"RPOP" } else { b"LPOP" };
        let push: &[u8] = if to_right { b"RPUSH" } else { b"LPUSH" };
        let (source, dest) = (self.arg(1)?, self.arg(2)?);
        self.scripted(LIST_MOVE, &[source, dest], &[pop, push])
    }

    /// COPY (6.2). Without REPLACE the destination was not there.
    pub(super) fn copy(self) -> Option<Rewrite> {
        if self.target.has_redis(6, 2) {
            return None;
        }
        let (mut db, mut at) = (Vec::new(), 3);
        while let Some(option) = self.arg(at) {
            if is(option, "DB") {
                db.push(self.arg(at + 1)?);
                at += 1;
            } else if !is(option, "REPLACE") {
                return None;
            }
            at += 1;
        }
        let (source, dest) = (self.arg(1)?, self.arg(2)?);
        self.scripted(COPY, &[source, dest], &db)
    }

    /// Before 3.0 a key that is moved loses its expiry.
    pub(super) fn move_with_expiry(self) -> Option<Rewrite> {
        if self.target.has_redis(3, 0) {
            return None;
        }
        let (key, db) = (self.arg(1)?, self.arg(2)?);
        self.scripted(MOVE, &[key], &[db])
    }

    /// ZRANGESTORE (6.2).
    pub(super) fn sorted_range_store(self) -> Option<Rewrite> {
        if self.target.has_redis(6, 2) {
            return None;
        }
        let (dest, source) = (self.arg(1)?, self.arg(2)?);
        let (mut by, mut reverse, mut limit, mut at) = ("", false, Vec::new(), 5);
        while let Some(option) = self.arg(at) {
            match option {
                _ if is(option, "BYSCORE") => by = "BYSCORE",
                _ if is(option, "BYLEX") => by = "BYLEX",
                _ if is(option, "REV") => reverse = true,
                _ if is(option, "LIMIT") => {
                    limit = vec![option, self.arg(at + 1)?, self.arg(at + 2)?];
                    at += 2;
                }
                _ => return None,
            }
            at += 1;
        }
        // ZREVRANGEBYLEX came with 2.8.9, as ZRANGEBYLEX did.
        let name = format!("{}{by}", if reverse { "ZREVRANGE" } else { "ZRANGE" });
        let mut query = vec![name.as_bytes(), source, self.arg(3)?, self.arg(4)?];
        query.extend(limit);
        self.scripted(RANGE_STORE, &[dest, source], &query)
    }

    /// ZDIFFSTORE (6.2).
    pub(super) fn sorted_diff_store(self) -> Option<Rewrite> {
        if self.target.has_redis(6, 2) {
            return None;
        }
        let count = usize::try_from(integer(self.arg(2)?)?).ok().filter(|&count| count > 0)?;
        if count.checked_add(3)? != self.args.len() {
            return None;
        }
        let mut keys = vec![self.arg(1)?];
        keys.extend((3..self.args.len()).filter_map(|at| self.args.arg(at)));
        self.scripted(DIFF_STORE, &keys, &[])
    }

    /// ZADD: NX, XX, CH and INCR came with 3.0.2, GT and LT with 6.2. One pair alone took effect.
    pub(super) fn sorted_add(self) -> Option<Rewrite> {
        let (mut at, mut increments, mut options, mut newer) = (2, false, false, false);
        let (mut presence, mut order): (&[u8], &[u8]) = (b"", b"");
        while let Some(option) =
            self.arg(at).filter(|arg| is_any(arg, &["NX", "XX", "GT", "LT", "CH", "INCR"]))
        {
            match option {
                _ if is(option, "NX") => presence = b"NX",
                _ if is(option, "XX") => presence = b"XX",
                _ if is(option, "GT") => (order, newer) = (b"GT", true),
                _ if is(option, "LT") => (order, newer) = (b"LT", true),
                _ => {}
            }
            increments |= is(option, "INCR");
            (options, at) = (true, at + 1);
        }
        let knows = self.target.has_redis(6, 2) || has_zadd_options(self.target) && !newer;
        if !options || knows {
            return None;
        }
        let (key, end) = (self.arg(1)?, self.args.len());
        let (score, member) = (self.arg(at)?, self.arg(at + 1)?);
        if increments {
            return self.command("ZINCRBY", 0..0, &[key, score, member]);
        }
        if (end - at) == 2 || (presence.is_empty() && order.is_empty()) {
            let mut writer = self;
            writer.append_around("ZADD", 1..2, &[], at..end);
            return Some(Rewrite::Replaced(1));
        }
        let mut args = vec![presence, order];
        args.extend((at..end).filter_map(|at| self.args.arg(at)));
        self.scripted(SORTED_ADD, &[key], &args)
    }

    /// XTRIM … MINID (6.2): everything up to `last`.
    pub(super) fn append_trimming_script(&mut self, key: &[u8], last: &[u8]) {
        self.append_script(TRIMMING, &[key], &[last]);
    }
}

fn has_zadd_options(target: ServerVersion) -> bool {
    target.flavor == Flavor::Valkey || (target.major, target.minor, target.patch) >= (3, 0, 2)
}
