//! A server's error reply, classified once, with what to do next beside it.
//! The first word decides: texts behind it vary by version. Sources: redis-doc "Redis error codes"
//! and the wordings of Redis 2.8 to 8.2 and Valkey 8.1 and 9.1.

use crate::connection::Address;

/// What an error reply means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplyVerdict {
    /// The slot lives elsewhere. An empty host means the host that was asked. Nothing was executed.
    Moved {
        slot: u16,
        address: Address,
    },
    /// This one command goes elsewhere, behind ASKING. An empty host as above.
    Ask {
        slot: u16,
        address: Address,
    },
    TryAgain,
    ClusterDown,
    Loading,
    ReadOnly,
    MasterDown,
    /// A script, function or module is running.
    Busy,
    NoReplicas,
    Misconf,
    Oom,
    BusyKey,
    /// RESTORE refused the payload or its expiry.
    BadPayload,
    WrongType,
    UnknownCommand,
    CrossSlot,
    /// NOAUTH, WRONGPASS, NOPERM, protected mode.
    Auth,
    NoScript,
    /// The transaction was dropped; the replies at queue time name the cause.
    ExecAbort,
    MaxClients,
    Other,
}

/// What to do about an error reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send it, in order for its slot, where the error says.
    Reroute,
    /// Send it again, after a wait; passes by itself.
    RetryLater,
    /// Send it again, after a wait, and tell somebody: it passes when an operator acts.
    RetryUntilOperator,
    /// Set it aside, count it, go on.
    Quarantine,
    /// Stop.
    Fail,
}

impl ReplyVerdict {
    /// `text`: the error reply without `-` and CRLF.
    pub fn of(text: &[u8]) -> ReplyVerdict {
        let (word, rest) = match memchr::memchr(b' ', text) {
            Some(end) => (text.get(..end).unwrap_or_default(), text.get(end + 1..).unwrap_or_default()),
            None => (text, &[][..]),
        };
        match word {
            b"MOVED" => redirection(rest)
                .map_or(ReplyVerdict::Other, |(slot, address)| ReplyVerdict::Moved { slot, address }),
            b"ASK" => redirection(rest)
                .map_or(ReplyVerdict::Other, |(slot, address)| ReplyVerdict::Ask { slot, address }),
            b"TRYAGAIN" => ReplyVerdict::TryAgain,
            b"CLUSTERDOWN" => ReplyVerdict::ClusterDown,
            b"LOADING" => ReplyVerdict::Loading,
            b"READONLY" => ReplyVerdict::ReadOnly,
            b"MASTERDOWN" | b"NOMASTERLINK" => ReplyVerdict::MasterDown,
            b"BUSY" | b"UNKILLABLE" => ReplyVerdict::Busy,
            b"NOREPLICAS" => ReplyVerdict::NoReplicas,
            b"MISCONF" => ReplyVerdict::Misconf,
            b"OOM" => ReplyVerdict::Oom,
            b"BUSYKEY" => ReplyVerdict::BusyKey,
            b"WRONGTYPE" => ReplyVerdict::WrongType,
            b"CROSSSLOT" => ReplyVerdict::CrossSlot,
            b"NOAUTH" | b"WRONGPASS" | b"NOPERM" | b"DENIED" | b"-DENIED" => ReplyVerdict::Auth,
            b"NOSCRIPT" => ReplyVerdict::NoScript,
            b"EXECABORT" => aborted(rest),
            b"ERR" => plain_error(rest),
            _ => ReplyVerdict::Other,
        }
    }

    pub fn next(&self) -> Next {
        match self {
            Self::Moved { .. } | Self::Ask { .. } => Next::Reroute,
            Self::TryAgain | Self::ClusterDown | Self::Loading | Self::ReadOnly | Self::MasterDown => {
                Next::RetryLater
            }
            Self::Busy | Self::MaxClients => Next::RetryLater,
            Self::NoReplicas | Self::Misconf | Self::Oom => Next::RetryUntilOperator,
            Self::BusyKey | Self::BadPayload | Self::WrongType | Self::UnknownCommand | Self::CrossSlot => {
                Next::Quarantine
            }
            Self::NoScript | Self::ExecAbort | Self::Other => Next::Quarantine,
            Self::Auth => Next::Fail,
        }
    }
}

/// Redis 7 names the cause where EXEC itself met it: "Transaction discarded because of: OOM …". Otherwise
/// the replies at queue time do.
fn aborted(rest: &[u8]) -> ReplyVerdict {
    let cause = memchr::memmem::find(rest, b"because of: ").and_then(|at| rest.get(at + 12..));
    match cause.map(ReplyVerdict::of) {
        Some(cause) if cause.next() != Next::Quarantine => cause,
        _ => ReplyVerdict::ExecAbort,
    }
}

/// Errors whose first word is only `ERR`.
fn plain_error(rest: &[u8]) -> ReplyVerdict {
    let starts = |prefix: &str| {
        rest.get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix.as_bytes()))
    };
    if starts("unknown command") {
        ReplyVerdict::UnknownCommand
    } else if starts("Target key name is busy") {
        // Redis 2.8; BUSYKEY from 3.0.
        ReplyVerdict::BusyKey
    } else if starts("Bad data format")
        || starts("DUMP payload version or checksum are wrong")
        || starts("Invalid TTL value")
    {
        ReplyVerdict::BadPayload
    } else if starts("max number of clients") {
        ReplyVerdict::MaxClients
    } else if starts("operation not permitted") || starts("invalid password") {
        // Redis 2.4 and 2.6 knew no NOAUTH.
        ReplyVerdict::Auth
    } else {
        ReplyVerdict::Other
    }
}

/// `3999 127.0.0.1:6381`, the host possibly empty.
fn redirection(rest: &[u8]) -> Option<(u16, Address)> {
    let (slot, address) = std::str::from_utf8(rest).ok()?.trim_end().split_once(' ')?;
    let slot = slot.parse().ok().filter(|slot| *slot < 16384)?;
    Some((slot, Address::parse_announced(address)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirections_carry_slot_and_address() {
        let verdict = ReplyVerdict::of(b"MOVED 3999 127.0.0.1:6381");
        assert_eq!(verdict.next(), Next::Reroute);
        assert_eq!(
            verdict,
            ReplyVerdict::Moved { slot: 3999, address: Address { host: "127.0.0.1".into(), port: 6381 } }
        );
        assert_eq!(
            ReplyVerdict::of(b"ASK 1 ::1:7000"),
            ReplyVerdict::Ask { slot: 1, address: Address { host: "::1".into(), port: 7000 } }
        );
        assert_eq!(
            ReplyVerdict::of(b"MOVED 1 :7000"),
            ReplyVerdict::Moved { slot: 1, address: Address { host: String::new(), port: 7000 } }
        );
        assert_eq!(ReplyVerdict::of(b"MOVED 16384 a:1"), ReplyVerdict::Other);
        assert_eq!(ReplyVerdict::of(b"MOVED"), ReplyVerdict::Other);
    }

    #[test]
    fn wordings_of_old_and_new_servers() {
        let cases: [(&str, ReplyVerdict, Next); 25] = [
            (
                "EXECABORT Transaction discarded because of: OOM command not allowed when used memory > 'maxmemory'.",
                ReplyVerdict::Oom,
                Next::RetryUntilOperator,
            ),
            (
                "TRYAGAIN Multiple keys request during rehashing of slot",
                ReplyVerdict::TryAgain,
                Next::RetryLater,
            ),
            ("CLUSTERDOWN Hash slot not served", ReplyVerdict::ClusterDown, Next::RetryLater),
            ("LOADING Redis is loading the dataset in memory", ReplyVerdict::Loading, Next::RetryLater),
            (
                "READONLY You can't write against a read only replica.",
                ReplyVerdict::ReadOnly,
                Next::RetryLater,
            ),
            ("MASTERDOWN Link with MASTER is down", ReplyVerdict::MasterDown, Next::RetryLater),
            (
                "NOMASTERLINK Can't SYNC while not connected with my master",
                ReplyVerdict::MasterDown,
                Next::RetryLater,
            ),
            ("BUSY Redis is busy running a script.", ReplyVerdict::Busy, Next::RetryLater),
            (
                "NOREPLICAS Not enough good replicas to write.",
                ReplyVerdict::NoReplicas,
                Next::RetryUntilOperator,
            ),
            (
                "MISCONF Redis is configured to save RDB snapshots",
                ReplyVerdict::Misconf,
                Next::RetryUntilOperator,
            ),
            (
                "OOM command not allowed when used memory > 'maxmemory'.",
                ReplyVerdict::Oom,
                Next::RetryUntilOperator,
            ),
            ("BUSYKEY Target key name already exists.", ReplyVerdict::BusyKey, Next::Quarantine),
            ("ERR Target key name is busy.", ReplyVerdict::BusyKey, Next::Quarantine),
            ("ERR Bad data format", ReplyVerdict::BadPayload, Next::Quarantine),
            ("ERR DUMP payload version or checksum are wrong", ReplyVerdict::BadPayload, Next::Quarantine),
            ("WRONGTYPE Operation against a key", ReplyVerdict::WrongType, Next::Quarantine),
            ("ERR unknown command 'FOO'", ReplyVerdict::UnknownCommand, Next::Quarantine),
            (
                "ERR unknown command `FOO`, with args beginning with: ",
                ReplyVerdict::UnknownCommand,
                Next::Quarantine,
            ),
            (
                "CROSSSLOT Keys in request don't hash to the same slot",
                ReplyVerdict::CrossSlot,
                Next::Quarantine,
            ),
            ("NOAUTH Authentication required.", ReplyVerdict::Auth, Next::Fail),
            ("NOPERM this user has no permissions to run the 'set' command", ReplyVerdict::Auth, Next::Fail),
            ("NOSCRIPT No matching script.", ReplyVerdict::NoScript, Next::Quarantine),
            (
                "EXECABORT Transaction discarded because of previous errors.",
                ReplyVerdict::ExecAbort,
                Next::Quarantine,
            ),
            ("ERR max number of clients reached", ReplyVerdict::MaxClients, Next::RetryLater),
            ("ERR syntax error", ReplyVerdict::Other, Next::Quarantine),
        ];
        for (text, verdict, next) in cases {
            assert_eq!(ReplyVerdict::of(text.as_bytes()), verdict, "{text}");
            assert_eq!(verdict.next(), next, "{text}");
        }
    }
}
