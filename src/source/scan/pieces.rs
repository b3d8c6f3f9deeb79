//! Values that are too big to be dumped at once, or may not be dumped: read piece by piece, and passed on as
//! commands that build them anew.
//!
//! Nothing holds such a value still while it is read. What changes meanwhile shows as any change does, by a
//! notification or in the next pass, and the value is read once more.

mod stream;

use super::emit::Emit;
use super::reading::{Expiry, expiry_of};
use super::table::News;
use super::taking::begin;
use super::{ScanError, Session, Work};
use crate::rdb::checksum::Crc;
use crate::resp::{Next, ReplyVerdict};
use crate::verify::frame::{Elements, Frame};
use crate::verify::wire::Wire;

/// Bytes of a string that are read at a time, and what the elements read at a time should come to.
const PIECE: u64 = 1 << 20;
const MOST_ELEMENTS: u64 = 512;
/// Big ones that may wait for their turn.
const MOST_BIG: usize = 1000;
/// Stands for the digest of a value that is half passed on: no value is taken for the same.
const HALF: u64 = 0x5bd1_e995_27d4_eb2f;

impl Work {
    /// There are so many of them that their turn has come.
    pub(super) fn has_big_ones(&self) -> bool {
        self.big.len() > MOST_BIG && !self.emit.in_snapshot()
    }

    /// Those that were found to be big; only in the stream.
    pub(super) async fn read_big_ones(&mut self, session: &mut Session) -> Result<(), ScanError> {
        let before = session.db;
        while let Some((db, key, size)) = self.big.last().cloned() {
            session.select(db).await?;
            match self.read_big(session, db, &key, size).await {
                Err(ScanError::Moved { .. }) => {}
                read => read?,
            }
            // Not before: after a lost connection it is read from its beginning.
            self.big.pop();
        }
        session.select(before).await
    }

    async fn read_big(
        &mut self,
        session: &mut Session,
        db: u32,
        key: &[u8],
        size: u64,
    ) -> Result<(), ScanError> {
        let type_ = match ask(&mut session.wire, &[b"TYPE", key], "TYPE").await? {
            Some(Frame::Simple(type_)) => type_.to_vec(),
            _ => return Err(session.unexpected("TYPE")),
        };
        let expiry = expiry_of(session, key).await?;
        if type_ == b"none" || expiry == Expiry::Gone {
            self.gone(db, key);
            return Ok(());
        }
        let exact = session.abilities.pexpiretime;
        let known = self.table.contains(self.name(db, key));
        if known {
            // Most that are known have not changed: only then it is worth to read it twice.
            let mut piece = Piece { session, emit: None, db, key, size, crc: begin() };
            if !piece.read(&type_).await? {
                self.gone(db, key);
                return Ok(());
            }
            let digest = piece.crc.value();
            if self.meets(db, key, digest, expiry.at(), exact) == News::Same {
                return Ok(());
            }
        }
        // From here on until all of it is passed on the target has it neither as it was nor as it is.
        if self.meets(db, key, HALF, None, true) == News::New {
            self.names.push(db, key);
        }
        let mut piece = Piece { session, emit: Some(&mut self.emit), db, key, size, crc: begin() };
        piece.emit(&[b"DEL", key]);
        let there = piece.read(&type_).await?;
        let digest = piece.crc.value();
        if let Some(at) = expiry.at().filter(|_| there) {
            let mut digits = itoa::Buffer::new();
            piece.emit(&[b"PEXPIREAT", key, digits.format(at.max(1)).as_bytes()]);
        }
        self.meets(db, key, digest, expiry.at(), exact);
        self.changes += 1;
        self.emit.settle().await
    }
}

/// One value that is being read.
struct Piece<'a> {
    session: &'a mut Session,
    /// `None`: only the digest is wanted.
    emit: Option<&'a mut Emit>,
    db: u32,
    key: &'a [u8],
    /// Bytes that it takes in the server's memory; 0: not known.
    size: u64,
    crc: Crc,
}

impl Piece<'_> {
    /// False: the key is not of this type any more.
    async fn read(&mut self, type_: &[u8]) -> Result<bool, ScanError> {
        self.crc.update(type_);
        match type_ {
            b"string" => self.string().await,
            b"list" => self.list().await,
            b"set" => self.scanned("SCARD", b"SSCAN", b"SADD").await,
            b"zset" => self.scanned("ZCARD", b"ZSCAN", b"ZADD").await,
            b"hash" => self.scanned("HLEN", b"HSCAN", b"HMSET").await,
            b"stream" => self.stream().await,
            _ => Err(ScanError::UnknownType {
                address: self.session.wire.address().clone(),
                key: self.key.escape_ascii().to_string(),
                type_: type_.escape_ascii().to_string(),
            }),
        }
    }

    async fn string(&mut self) -> Result<bool, ScanError> {
        let mut from = 0;
        loop {
            let (first, last) = (from.to_string(), (from + PIECE - 1).to_string());
            let args = [b"GETRANGE".as_slice(), self.key, first.as_bytes(), last.as_bytes()];
            let Self { session, emit, crc, key, db, .. } = self;
            let Some(Frame::Bulk(Some(bytes))) = ask(&mut session.wire, &args, "GETRANGE").await? else {
                return Ok(false);
            };
            crc.update(bytes);
            if let Some(emit) = emit
                && (from == 0 || !bytes.is_empty())
            {
                let command: &[u8] = if from == 0 { b"SET" } else { b"APPEND" };
                emit.command(*db, &[command, key, bytes]);
            }
            let count = bytes.len() as u64;
            self.settle().await?;
            if count < PIECE {
                return Ok(true);
            }
            from += count;
        }
    }

    async fn list(&mut self) -> Result<bool, ScanError> {
        let Some(count) = self.page_of("LLEN").await? else { return Ok(false) };
        let mut from = 0;
        loop {
            let (first, last) = (from.to_string(), (from + count - 1).to_string());
            let args = [b"LRANGE".as_slice(), self.key, first.as_bytes(), last.as_bytes()];
            let Self { session, emit, crc, key, db, .. } = self;
            let Some(Frame::Array(Some(items))) = ask(&mut session.wire, &args, "LRANGE").await? else {
                return Ok(false);
            };
            let got = items.len() as u64;
            let mut command = vec![b"RPUSH".as_slice(), key];
            fold(items, crc, &mut command);
            if let Some(emit) = emit
                && got > 0
            {
                emit.command(*db, &command);
            }
            self.settle().await?;
            if got == 0 {
                return Ok(true);
            }
            from += got;
        }
    }

    /// A set, sorted set or hash.
    async fn scanned(
        &mut self,
        length: &'static str,
        scan: &'static [u8],
        add: &'static [u8],
    ) -> Result<bool, ScanError> {
        let Some(count) = self.page_of(length).await? else { return Ok(false) };
        let count = count.to_string();
        let mut cursor = b"0".to_vec();
        let address = self.session.address.clone();
        let unexpected = |_| ScanError::Unexpected { address: address.clone(), command: "SCAN" };
        // Elements come in the order of a table that may be arranged anew: the digest must not depend on it.
        let mut digest = 0u64;
        loop {
            let args = [scan, self.key, &cursor, b"COUNT", count.as_bytes()];
            let fields = self.session.abilities.field_expiry && scan == b"HSCAN";
            let Self { session, emit, key, db, .. } = self;
            let Some(Frame::Array(Some(mut reply))) = ask(&mut session.wire, &args, "SCAN").await? else {
                return Ok(false);
            };
            let next = reply.next_bulk().map_err(unexpected)?.unwrap_or_default().to_vec();
            let Some(Frame::Array(Some(mut items))) = reply.next_frame().map_err(unexpected)? else {
                return Err(unexpected(crate::verify::frame::FrameError::Truncated));
            };
            let paired = scan != b"SSCAN";
            let mut command = vec![add, key];
            let mut names = Vec::new();
            while let Some(item) = items.next_bulk().map_err(unexpected)? {
                let mut crc = begin();
                crc.update(item);
                if paired {
                    let other = items.next_bulk().map_err(unexpected)?.unwrap_or_default();
                    crc.update(&(item.len() as u64).to_le_bytes());
                    crc.update(other);
                    // ZADD takes the score first.
                    if scan == b"ZSCAN" {
                        command.extend([other, item]);
                    } else {
                        command.extend([item, other]);
                    }
                    if fields {
                        names.push(item.to_vec());
                    }
                } else {
                    command.push(item);
                }
                digest = digest.wrapping_add(mixed(crc.value()));
            }
            if let Some(emit) = emit
                && command.len() > 2
            {
                emit.command(*db, &command);
            }
            if !names.is_empty() {
                digest = digest.wrapping_add(self.field_expiries(&names).await?);
            }
            self.settle().await?;
            if next == b"0" {
                self.crc.update(&digest.to_le_bytes());
                return Ok(true);
            }
            cursor = next;
        }
    }

    /// Passes on when these fields of a hash expire; something that tells whether it is the same as before.
    async fn field_expiries(&mut self, names: &[Vec<u8>]) -> Result<u64, ScanError> {
        let count = names.len().to_string();
        let head = [b"HPEXPIRETIME".as_slice(), self.key, b"FIELDS", count.as_bytes()];
        let args: Vec<&[u8]> = head.into_iter().chain(names.iter().map(Vec::as_slice)).collect();
        let Self { session, emit, key, db, .. } = self;
        let reply = ask(&mut session.wire, &args, "HPEXPIRETIME").await?;
        let Some(Frame::Array(Some(mut times))) = reply else { return Ok(0) };
        let mut digest = 0u64;
        for name in names {
            let time = times.next_frame().ok().flatten();
            let Some(Frame::Integer(at)) = time.filter(|time| matches!(time, Frame::Integer(0..))) else {
                continue;
            };
            let mut crc = begin();
            crc.update(name);
            crc.update(&at.to_le_bytes());
            digest = digest.wrapping_add(mixed(crc.value()));
            if let Some(emit) = emit {
                let at = at.to_string();
                emit.command(*db, &[b"HPEXPIREAT", *key, at.as_bytes(), b"FIELDS", b"1", name]);
            }
        }
        Ok(digest)
    }

    /// How many elements to ask for at a time; `None`: there is no such key.
    async fn page_of(&mut self, length: &'static str) -> Result<Option<u64>, ScanError> {
        let args = [length.as_bytes(), self.key];
        let size = self.size;
        let Some(Frame::Integer(count @ 1..)) = ask(&mut self.session.wire, &args, length).await? else {
            return Ok(None);
        };
        let each = size / count.unsigned_abs().max(1);
        Ok(Some((PIECE / each.max(1)).clamp(1, MOST_ELEMENTS)))
    }

    fn emit(&mut self, args: &[&[u8]]) {
        if let Some(emit) = &mut self.emit {
            emit.command(self.db, args);
        }
    }

    async fn settle(&mut self) -> Result<(), ScanError> {
        match &mut self.emit {
            Some(emit) => emit.settle().await,
            None => Ok(()),
        }
    }
}

/// `None`: the key is of another type by now.
async fn ask<'w>(
    wire: &'w mut Wire,
    args: &[&[u8]],
    command: &'static str,
) -> Result<Option<Frame<'w>>, ScanError> {
    let address = wire.address().clone();
    match wire.call(args).await? {
        Frame::Error(text) => {
            let verdict = ReplyVerdict::of(text);
            if verdict.next() == Next::Reroute {
                return Err(ScanError::Moved { address });
            }
            let other = verdict == ReplyVerdict::WrongType
                || text.starts_with(b"ERR no such key")
                || text.starts_with(b"NOGROUP");
            if other { Ok(None) } else { Err(ScanError::refused(&address, command, text)) }
        }
        Frame::TooLong(length) => {
            let key = args.get(1).copied().unwrap_or_default().escape_ascii().to_string();
            Err(ScanError::TooLarge { address, key, length })
        }
        frame => Ok(Some(frame)),
    }
}

fn fold<'f>(mut items: Elements<'f>, crc: &mut Crc, command: &mut Vec<&'f [u8]>) {
    while let Ok(Some(item)) = items.next_bulk() {
        crc.update(&(item.len() as u64).to_le_bytes());
        crc.update(item);
        command.push(item);
    }
}

/// So that sums of checksums tell sets apart, which checksums alone do not (splitmix64).
fn mixed(crc: u64) -> u64 {
    let mut x = crc.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}
