//! How keys were used, for an eviction on the target that goes on as on the source.

use super::ScanError;
use super::abilities::{PROBE, may};
use crate::connection::Connection;
use crate::resp::{Next, ReplyVerdict};
use crate::topology::ServerInfo;
use crate::verify::frame::Frame;
use crate::verify::wire::Wire;

/// How a key was used, as the server's policy counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Usage {
    #[default]
    Unknown,
    /// Seconds since it was used last.
    Idle(u64),
    /// How often, on a logarithmic scale.
    Frequency(u8),
}

/// What OBJECT is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageQuestion {
    IdleTime,
    Frequency,
}

impl Usage {
    pub fn idle_seconds(self) -> Option<u64> {
        if let Self::Idle(seconds) = self { Some(seconds) } else { None }
    }

    pub fn lfu(self) -> Option<u8> {
        if let Self::Frequency(frequency) = self { Some(frequency) } else { None }
    }
}

impl UsageQuestion {
    fn word(self) -> &'static [u8] {
        match self {
            Self::IdleTime => b"IDLETIME",
            Self::Frequency => b"FREQ",
        }
    }

    /// What this server keeps; `None`: it does not let us ask.
    pub async fn of(connection: &mut Connection, info: &ServerInfo) -> Result<Option<Self>, ScanError> {
        // It counts one or the other.
        let by_frequency = info.maxmemory_policy.as_ref().is_some_and(|policy| policy.contains("lfu"));
        let question = if by_frequency { Self::Frequency } else { Self::IdleTime };
        if may(connection, &[b"OBJECT", question.word(), PROBE]).await? {
            return Ok(Some(question));
        }
        let server = connection.address();
        tracing::warn!(%server, "OBJECT is refused: how keys were used stays behind, whatever evictionData says");
        Ok(None)
    }

    pub fn queue(self, wire: &mut Wire, key: &[u8]) {
        wire.queue(&[b"OBJECT", self.word(), key]);
    }

    /// The answer; `false`: the server does not tell this any more, so that it need not be asked.
    pub async fn answer(self, wire: &mut Wire) -> Result<(Usage, bool), ScanError> {
        let refused = match wire.reply().await? {
            Frame::Integer(number) => return Ok((self.usage(number), true)),
            Frame::Error(text) => {
                let reroute = ReplyVerdict::of(text).next() == Next::Reroute;
                (!reroute).then(|| String::from_utf8_lossy(text).into_owned())
            }
            // It is not there any more.
            _ => None,
        };
        if let Some(text) = &refused {
            let server = wire.address();
            tracing::warn!(%server, text, "OBJECT was refused: how the other keys were used stays behind");
        }
        Ok((Usage::Unknown, refused.is_none()))
    }

    fn usage(self, number: i64) -> Usage {
        match self {
            Self::IdleTime => u64::try_from(number).map_or(Usage::Unknown, Usage::Idle),
            Self::Frequency => u8::try_from(number).map_or(Usage::Unknown, Usage::Frequency),
        }
    }
}
