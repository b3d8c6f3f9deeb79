use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// Host and port of one server. Displays as `host:port`, IPv6 hosts in brackets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Address {
    pub host: String,
    pub port: u16,
}

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AddressError {
    #[error("{0:?} has no port; write host:port")]
    NoPort(String),
    #[error("{0:?} has no host; write host:port")]
    NoHost(String),
    #[error("{0:?}: the port must be a number from 1 to 65535")]
    BadPort(String),
    #[error("{0:?}: an IPv6 host must stand in brackets, as in [::1]:6379")]
    BareIpv6(String),
}

impl Address {
    pub fn new(host: impl Into<String>, port: u16) -> Address {
        Address { host: host.into(), port }
    }

    /// As servers print it in MOVED and CLUSTER NODES: the port after the last colon, IPv6 without
    /// brackets, the host possibly empty (meaning: the host that was asked).
    pub fn parse_announced(text: &str) -> Option<Address> {
        let (host, port) = text.rsplit_once(':')?;
        let host = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(host);
        Some(Address { host: host.to_owned(), port: port.parse().ok()? })
    }

    /// This address, with `asked`'s host where its own is empty or unknown.
    pub fn or_host_of(self, asked: &Address) -> Address {
        if self.host.is_empty() || self.host == "?" {
            Address { host: asked.host.clone(), port: self.port }
        } else {
            self
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Address, AddressError> {
        let whole = || text.to_owned();
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(|| AddressError::BareIpv6(whole()))?;
                (host, port.strip_prefix(':').ok_or_else(|| AddressError::NoPort(whole()))?)
            }
            None => text.rsplit_once(':').ok_or_else(|| AddressError::NoPort(whole()))?,
        };
        if !text.starts_with('[') && host.contains(':') {
            return Err(AddressError::BareIpv6(whole()));
        }
        if host.is_empty() || host.chars().any(char::is_whitespace) {
            return Err(AddressError::NoHost(whole()));
        }
        match port.parse() {
            Ok(port) if port != 0 => Ok(Address::new(host, port)),
            _ => Err(AddressError::BadPort(whole())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_what_it_parses() {
        for text in ["redis-old:6379", "10.0.0.1:1", "[::1]:65535", "[fe80::1%eth0]:6379"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!("[::1]:1".parse::<Address>().unwrap().host, "::1");
    }

    #[test]
    fn says_what_is_wrong() {
        let fault = |text: &str| text.parse::<Address>().unwrap_err();
        assert_eq!(fault("redis"), AddressError::NoPort("redis".into()));
        assert_eq!(fault("[::1]"), AddressError::NoPort("[::1]".into()));
        assert_eq!(fault("::1:6379"), AddressError::BareIpv6("::1:6379".into()));
        assert_eq!(fault(":6379"), AddressError::NoHost(":6379".into()));
        assert_eq!(fault("a b:6379"), AddressError::NoHost("a b:6379".into()));
        for text in ["a:", "a:0", "a:65536", "a:x"] {
            assert_eq!(fault(text), AddressError::BadPort(text.into()));
        }
    }

    #[test]
    fn an_announced_host_may_be_missing() {
        let asked = Address::new("proxy", 1);
        let at = |text: &str| Address::parse_announced(text).unwrap().or_host_of(&asked);
        assert_eq!(at(":7000"), Address::new("proxy", 7000));
        assert_eq!(at("?:7000"), Address::new("proxy", 7000));
        assert_eq!(at("2001:db8::1:7000"), Address::new("2001:db8::1", 7000));
        assert_eq!(Address::parse_announced("nothing"), None);
    }
}
