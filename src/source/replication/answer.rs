//! What is asked of a source, what it answers, and why it would not go on (PURE).

use crate::resp::{Next, ReplyVerdict, encode_command};
use crate::spool::Origin;
use crate::topology::{ServerInfo, ServerRole};

/// Which command asks for the data.
pub enum Ask {
    Psync(Origin),
    /// `why`: what there is cannot be gone on with.
    PsyncFull {
        why: &'static str,
    },
    /// Redis before 2.8.
    Sync,
}

impl Ask {
    /// `psync`: the command's name at this source.
    pub fn encode(&self, psync: &str) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Ask::Sync => encode_command(&["SYNC"], &mut out),
            Ask::PsyncFull { .. } => encode_command(&[psync, "?", "-1"], &mut out),
            Ask::Psync(Origin { replication_id, offset }) => {
                // The next byte wanted; asking for the last one received would send it twice.
                encode_command(&[psync, replication_id, &(offset + 1).to_string()], &mut out);
            }
        }
        out
    }
}

pub enum Answer {
    /// The id that the history goes on under. Without one (before Redis 4.0) it is the same.
    Continue(Option<String>),
    FullResync(Origin),
    /// The RDB comes without a word about its history.
    Snapshot(Origin),
    NoSuchCommand,
    Refused,
    NotReady,
    Unknown,
}

pub fn answer(line: &[u8], ask: &Ask) -> Answer {
    if matches!(ask, Ask::Sync) {
        // SYNC names no history; a lost link means another full sync.
        return Answer::Snapshot(Origin::unnamed());
    }
    if line.starts_with(b"$") {
        // Redis takes any name but "psync" itself for SYNC, and sends the RDB without further words.
        return Answer::Snapshot(Origin::unnamed());
    }
    let text = String::from_utf8_lossy(line);
    let mut words = text.split_ascii_whitespace();
    match words.next() {
        Some("+CONTINUE") => Answer::Continue(words.next().filter(|id| id.len() == 40).map(str::to_owned)),
        Some("+FULLRESYNC") => match (words.next(), words.next().map(str::parse)) {
            (Some(id), Some(Ok(offset))) if id.len() == 40 => {
                Answer::FullResync(Origin { replication_id: id.to_owned(), offset })
            }
            _ => Answer::Unknown,
        },
        _ => match line.strip_prefix(b"-") {
            None => Answer::Unknown,
            Some(error) => match ReplyVerdict::of(error) {
                ReplyVerdict::UnknownCommand => Answer::NoSuchCommand,
                verdict if verdict.next() == Next::RetryLater => Answer::NotReady,
                ReplyVerdict::Auth => Answer::Refused,
                // "-ERR Can't SYNC while not connected with my master", "-ERR ... failover": they pass.
                _ => Answer::NotReady,
            },
        },
    }
}

pub fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line).chars().filter(|c| !c.is_control()).take(200).collect()
}

/// A replica of the history asked for that has not got that far: it would send everything, although it,
/// or its master, will soon be able to go on.
pub fn is_behind(info: &ServerInfo, wanted: &Origin) -> bool {
    info.role == ServerRole::Replica
        && info.replication_id == wanted.replication_id
        && info.offset < wanted.offset
}

/// Why a source sends everything instead of going on: `info` is its INFO from just before.
pub fn why_full(ask: &Ask, info: Option<&ServerInfo>) -> String {
    let wanted = match ask {
        Ask::Sync => return "SYNC cannot go on where it stopped".to_owned(),
        Ask::PsyncFull { why } => return (*why).to_owned(),
        Ask::Psync(wanted) => wanted,
    };
    let Origin { replication_id, offset } = wanted;
    let Some(info) = info.filter(|info| !info.replication_id.is_empty()) else {
        return format!("it does not go on at offset {offset} of the history {replication_id}");
    };
    let backlog = || match info.backlog_from {
        Some(from) => format!("its backlog no longer holds offset {offset}, it begins at {from}"),
        None => format!("it has no backlog that holds offset {offset}"),
    };
    if info.replication_id == *replication_id {
        if *offset > info.offset {
            let has = info.offset;
            return format!("it has the history only up to offset {has}, and {offset} was received already");
        }
        return backlog();
    }
    if info.former_replication_id == *replication_id {
        if offset + 1 > info.former_until {
            let had = info.former_until - 1;
            return format!(
                "the promoted master does not have what was received: it took over at offset {had}, and {offset} was reached already"
            );
        }
        return backlog();
    }
    format!(
        "it does not know the history {replication_id}: it was started anew, or took over from a server whose history it never had"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789012345678901234567890123456789";

    fn psync(offset: i64) -> Ask {
        Ask::Psync(Origin { replication_id: ID.to_owned(), offset })
    }

    #[test]
    fn the_byte_behind_the_last_one_is_asked_for() {
        let text = String::from_utf8(psync(41).encode("PSYNC")).unwrap();
        assert!(text.ends_with(&format!("{ID}\r\n$2\r\n42\r\n")), "{text}");
    }

    #[test]
    fn continue_with_an_id_and_without() {
        let id = |line: &str| match answer(line.as_bytes(), &psync(1)) {
            Answer::Continue(id) => id,
            _ => panic!("{line}"),
        };
        assert_eq!(id("+CONTINUE"), None);
        assert_eq!(id(&format!("+CONTINUE {ID}")), Some(ID.to_owned()));
    }

    #[test]
    fn a_server_that_is_no_master_is_asked_again_later() {
        for line in [
            "-NOMASTERLINK Can't SYNC while not connected with my master",
            "-LOADING Redis is loading the dataset in memory",
            "-MASTERDOWN Link with MASTER is down",
            "-ERR Can't SYNC while not connected with my master",
        ] {
            assert!(matches!(answer(line.as_bytes(), &psync(1)), Answer::NotReady), "{line}");
        }
    }

    #[test]
    fn reasons_of_a_full_resync() {
        let why = |info: &str, offset| why_full(&psync(offset), Some(&ServerInfo::parse(info)));
        let same = format!(
            "master_replid:{ID}\nmaster_repl_offset:900\nrepl_backlog_active:1\nrepl_backlog_first_byte_offset:500\n"
        );
        assert_eq!(why(&same, 100), "its backlog no longer holds offset 100, it begins at 500");
        assert_eq!(why(&same, 901), "it has the history only up to offset 900, and 901 was received already");
        let promoted = format!(
            "master_replid:b\nmaster_replid2:{ID}\nsecond_repl_offset:801\nmaster_repl_offset:5000\n"
        );
        assert!(why(&promoted, 801).contains("took over at offset 800, and 801"), "{}", why(&promoted, 801));
        assert_eq!(why(&promoted, 800), "it has no backlog that holds offset 800");
        assert!(why("master_replid:b\n", 1).starts_with("it does not know the history 0123"));
        assert!(why_full(&psync(7), None).contains("offset 7"));
    }

    #[test]
    fn a_replica_that_lags_is_waited_for() {
        let wanted = |offset| Origin { replication_id: ID.to_owned(), offset };
        let info = ServerInfo::parse(&format!("role:slave\nmaster_replid:{ID}\nslave_repl_offset:10\n"));
        assert!(is_behind(&info, &wanted(11)));
        assert!(!is_behind(&info, &wanted(10)));
        // A master does not catch up, and another history neither.
        let master = ServerInfo::parse(&format!("role:master\nmaster_replid:{ID}\nmaster_repl_offset:10\n"));
        assert!(!is_behind(&master, &wanted(11)));
        let other = ServerInfo::parse("role:slave\nmaster_replid:x\nslave_repl_offset:10\n");
        assert!(!is_behind(&other, &wanted(11)));
    }
}
