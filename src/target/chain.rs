//! Batches that take effect one after the other or not at all (PURE), for a single server.
//!
//! A batch is a transaction, but a pipeline goes on when one fails: while memory is short the server
//! refuses batch 7 (EXECABORT), and has room again for batch 8, which must not overtake it. So a set of
//! tokens stands on the server, one for each of the next batches, and every batch
//!
//! - watches the set and takes the token of the batch before it, *outside* of its transaction. That token
//!   is still there only if the transaction before failed; taking it changes the watched set, and this
//!   batch's EXEC is refused, too. Its own token then stays, and so on until the connection is given up;
//! - takes its own token inside its transaction, and puts one at the far end.
//!
//! No command in this fails for lack of memory but inside the transaction, which fails as a whole then.
//! (WATCH notices changes by the same connection: Redis `multi.c`, touchWatchedKey.)

use crate::resp::{array_header, bulk, encode_command};

/// Tokens ahead of the batch; no more batches than this may be under way.
pub const WINDOW: u64 = 256;
/// What a lane may have unanswered, with room for those on their way to it.
pub const MOST_BATCHES: usize = WINDOW as usize - 16;
/// Where the tokens are.
pub const DATABASE: u64 = 0;

/// Puts the tokens for batch `next` and those behind it in place.
pub fn seed(chain: &[u8], next: u64, out: &mut Vec<u8>) -> u32 {
    encode_command(&[b"DEL".as_slice(), chain], out);
    array_header(2 + WINDOW as usize, out);
    bulk(b"SADD", out);
    bulk(chain, out);
    for token in next..next + WINDOW {
        bulk(itoa::Buffer::new().format(token).as_bytes(), out);
    }
    2
}

/// In front of batch `number`; `db`: the connection's database now, and afterwards. Gives the commands written.
pub fn open(chain: &[u8], number: u64, db: Option<u64>, out: &mut Vec<u8>) -> u32 {
    let mut commands = 3;
    if db != Some(DATABASE) {
        select(DATABASE, out);
        commands += 1;
    }
    encode_command(&[b"WATCH".as_slice(), chain], out);
    take(chain, number.wrapping_sub(1), out);
    if let Some(db) = db.filter(|&db| db != DATABASE) {
        select(db, out);
        commands += 1;
    }
    encode_command(&[b"MULTI".as_slice()], out);
    commands
}

/// Behind batch `number`, in database `db` and still inside its transaction; `record` is kept under `at`.
/// `again`: the batch did away with the tokens and the epoch (key and value), which are put back.
/// Gives the commands written.
pub fn close(
    chain: &[u8],
    number: u64,
    (at, record): (&[u8], &[u8]),
    db: Option<u64>,
    again: Option<(&[u8], &[u8])>,
    out: &mut Vec<u8>,
) -> u32 {
    encode_command(&[b"SET".as_slice(), at, record], out);
    let mut commands = 4;
    let elsewhere = db.filter(|&db| db != DATABASE);
    if db != Some(DATABASE) {
        select(DATABASE, out);
        commands += 1;
    }
    if let Some((epoch, value)) = again {
        encode_command(&[b"SET".as_slice(), epoch, value], out);
        commands += 1;
        seed(chain, number + 1, out);
    } else {
        take(chain, number, out);
        let mut digits = itoa::Buffer::new();
        encode_command(&[b"SADD".as_slice(), chain, digits.format(number + WINDOW).as_bytes()], out);
    }
    if let Some(db) = elsewhere {
        select(db, out);
        commands += 1;
    }
    encode_command(&[b"EXEC".as_slice()], out);
    commands
}

fn take(chain: &[u8], token: u64, out: &mut Vec<u8>) {
    encode_command(&[b"SREM".as_slice(), chain, itoa::Buffer::new().format(token).as_bytes()], out);
}

fn select(db: u64, out: &mut Vec<u8>) {
    encode_command(&[b"SELECT".as_slice(), itoa::Buffer::new().format(db).as_bytes()], out);
}
