use std::io;
use std::time::Duration;

use thiserror::Error;

use super::{Address, SecretError};
use crate::resp::{Next, ReplyVerdict, RespError};

/// Everything that can go wrong between us and one server. Never holds an argument of a command.
#[derive(Debug, Error)]
pub enum ConnectionError {
    #[error("{address}: the name cannot be resolved: {source}")]
    Unresolved { address: Address, source: io::Error },
    #[error("{address}: connection refused; is the port right and the server up?")]
    Refused { address: Address },
    #[error("{address}: cannot be reached: {source}")]
    Unreachable { address: Address, source: io::Error },
    #[error("{address}: no connection within {after:?}")]
    ConnectTimeout { address: Address, after: Duration },
    #[error("TLS settings: {what}: {reason}")]
    TlsSettings { what: &'static str, reason: String },
    #[error("{address}: TLS handshake failed: {source}")]
    TlsHandshake { address: Address, source: io::Error },
    #[error("{address}: TLS handshake not finished within {after:?}")]
    TlsTimeout { address: Address, after: Duration },
    #[error("{address}: speaks plain text, but TLS is enabled; disable tls or use the TLS port")]
    PlainTextServer { address: Address },
    #[error("{address}: speaks TLS, but TLS is not enabled; set tls.enabled or use the plain port")]
    TlsServer { address: Address },
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// `text` is the server's own, cut before anything that echoes arguments.
    #[error("{address}: authentication as {user:?} failed: {text}")]
    AuthFailed { address: Address, user: String, text: String },
    #[error("{address}: the server wants a password; set auth")]
    NoAuth { address: Address },
    #[error("{address}: the server is in protected mode and takes no remote clients without a password")]
    ProtectedMode { address: Address },
    #[error("{address}: the server has reached its maxclients limit")]
    MaxClients { address: Address },
    #[error("{address}: {command}: {text}")]
    Server { address: Address, command: String, text: String },
    #[error("{address}: {command}: the reply is not what this command returns")]
    UnexpectedReply { address: Address, command: String },
    #[error("{address}: nothing received for {after:?} while a reply was due")]
    ResponseTimeout { address: Address, after: Duration },
    #[error("{address}: the server closed the connection")]
    Closed { address: Address },
    #[error("{address}: {source}")]
    Io { address: Address, source: io::Error },
    #[error("{address}: {source}")]
    Protocol { address: Address, source: RespError },
}

impl ConnectionError {
    /// An error reply to `command` (its name only).
    pub fn from_reply(address: &Address, command: &[u8], text: &[u8]) -> ConnectionError {
        let address = address.clone();
        if text.starts_with(b"NOAUTH") {
            return ConnectionError::NoAuth { address };
        }
        if text.starts_with(b"DENIED") || text.starts_with(b"-DENIED") {
            return ConnectionError::ProtectedMode { address };
        }
        if ReplyVerdict::of(text) == ReplyVerdict::MaxClients {
            return ConnectionError::MaxClients { address };
        }
        let command = String::from_utf8_lossy(command).to_ascii_uppercase();
        ConnectionError::Server { address, command, text: without_arguments(text) }
    }

    /// True when the same may succeed later without anybody changing a setting.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unresolved { .. } | Self::Refused { .. } | Self::Unreachable { .. } => true,
            Self::ConnectTimeout { .. } | Self::TlsTimeout { .. } | Self::ResponseTimeout { .. } => true,
            Self::MaxClients { .. } | Self::Closed { .. } | Self::Io { .. } => true,
            Self::TlsHandshake { source, .. } => source.kind() != io::ErrorKind::InvalidData,
            Self::Server { text, .. } => matches!(
                ReplyVerdict::of(text.as_bytes()).next(),
                Next::Reroute | Next::RetryLater | Next::RetryUntilOperator
            ),
            Self::TlsSettings { .. } | Self::PlainTextServer { .. } | Self::TlsServer { .. } => false,
            // A secret that is being rotated may be missing for a moment.
            Self::Secret(_) => true,
            Self::AuthFailed { .. } | Self::NoAuth { .. } | Self::ProtectedMode { .. } => false,
            Self::UnexpectedReply { .. } | Self::Protocol { .. } => false,
        }
    }

    /// True when the server refused who we are, or what we may do.
    pub fn is_auth(&self) -> bool {
        match self {
            Self::AuthFailed { .. } | Self::NoAuth { .. } | Self::ProtectedMode { .. } => true,
            Self::Server { text, .. } => ReplyVerdict::of(text.as_bytes()) == ReplyVerdict::Auth,
            _ => false,
        }
    }

    /// The error reply's text, when a server answered with one.
    pub fn server_text(&self) -> Option<&str> {
        match self {
            Self::Server { text, .. } | Self::AuthFailed { text, .. } => Some(text),
            _ => None,
        }
    }
}

/// Servers echo arguments behind "unknown command": those must not reach a log. The text stays short.
pub(super) fn without_arguments(text: &[u8]) -> String {
    const LONGEST: usize = 200;
    let text = String::from_utf8_lossy(text);
    let end = ["with args beginning with", "called with"].iter().filter_map(|mark| text.find(mark)).min();
    let text = end.and_then(|end| text.get(..end)).unwrap_or(&text);
    text.trim_end_matches([' ', ',', ':']).chars().take(LONGEST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(text: &str) -> ConnectionError {
        ConnectionError::from_reply(&Address::new("h", 1), b"get", text.as_bytes())
    }

    #[test]
    fn echoed_arguments_are_cut() {
        let error = from("ERR unknown command `AUTH`, with args beginning with: `hunter2`, ");
        assert_eq!(error.to_string(), "h:1: GET: ERR unknown command `AUTH`");
    }

    #[test]
    fn replies_are_classified() {
        assert!(matches!(from("NOAUTH Authentication required."), ConnectionError::NoAuth { .. }));
        assert!(matches!(
            from("DENIED Redis is running in protected mode"),
            ConnectionError::ProtectedMode { .. }
        ));
        assert!(matches!(from("ERR max number of clients reached"), ConnectionError::MaxClients { .. }));
        assert!(from("LOADING Redis is loading").is_transient());
        assert!(!from("WRONGTYPE x").is_transient());
        assert!(from("NOPERM this user has no permissions").is_auth());
        assert!(!from("NOAUTH x").is_transient());
    }
}
