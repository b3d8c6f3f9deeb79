//! PURE. When keys expire, as two servers tell it, and when two answers agree.

use super::frame::Frame;
use crate::hold::true_key;

/// Two expiries closer than this are one: commands of old servers are relative, and are applied
/// at another time than they were given.
pub const TOLERANCE_MS: i64 = 1000;

/// Which question was asked. Both sides must be asked the same one: the absolute time compares
/// without regard to clocks, the relative one bears clocks that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// PEXPIRETIME, from Redis 7.0.
    Absolute,
    /// PTTL.
    Relative,
}

impl Question {
    pub fn name(self) -> &'static str {
        match self {
            Question::Absolute => "PEXPIRETIME",
            Question::Relative => "PTTL",
        }
    }

    pub fn command(self) -> &'static [u8] {
        self.name().as_bytes()
    }
}

/// When one key expires: Unix milliseconds for `Absolute`, milliseconds from now for `Relative`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expiry {
    /// There is no such key.
    NoKey,
    Never,
    At(i64),
}

impl Expiry {
    /// `None` when the reply is no integer. Of a key whose expiry is held it is the true one: the target holds
    /// expiries until the migration is complete.
    pub fn of(reply: &Frame<'_>) -> Option<Expiry> {
        match *reply {
            Frame::Integer(-2) => Some(Expiry::NoKey),
            Frame::Integer(-1) => Some(Expiry::Never),
            Frame::Integer(at) => Some(Expiry::At(true_key(at).unwrap_or(at))),
            _ => None,
        }
    }

    pub fn is_held(reply: &Frame<'_>) -> bool {
        matches!(*reply, Frame::Integer(at) if true_key(at).is_some())
    }

    /// Milliseconds between the two, beyond tolerance and `slack_ms`; `None` when they agree.
    pub fn apart(self, other: Expiry, slack_ms: i64) -> Option<Apart> {
        match (self, other) {
            (Expiry::At(a), Expiry::At(b)) => {
                let apart = a.saturating_sub(b).saturating_abs();
                (apart > TOLERANCE_MS.saturating_add(slack_ms)).then_some(Apart::Millis(apart))
            }
            (Expiry::Never, Expiry::Never) | (Expiry::NoKey, _) | (_, Expiry::NoKey) => None,
            (Expiry::Never, Expiry::At(_)) => Some(Apart::OnlyTarget),
            (Expiry::At(_), Expiry::Never) => Some(Apart::OnlySource),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Apart {
    Millis(i64),
    OnlySource,
    OnlyTarget,
}

impl std::fmt::Display for Apart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Apart::Millis(ms) => write!(f, "expiry {}.{} s apart", ms / 1000, ms % 1000 / 100),
            Apart::OnlySource => f.write_str("expiry only on the source"),
            Apart::OnlyTarget => f.write_str("expiry only on the target"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_is_tolerated_and_no_more() {
        assert_eq!(Expiry::At(5000).apart(Expiry::At(6000), 0), None);
        assert_eq!(Expiry::At(5000).apart(Expiry::At(10_200), 0), Some(Apart::Millis(5200)));
        assert_eq!(Apart::Millis(5200).to_string(), "expiry 5.2 s apart");
        assert_eq!(Expiry::At(0).apart(Expiry::At(1500), 500), None);
        assert_eq!(Expiry::At(i64::MIN).apart(Expiry::At(i64::MAX), 0), Some(Apart::Millis(i64::MAX)));
    }

    #[test]
    fn one_sided_expiries_differ() {
        assert_eq!(Expiry::Never.apart(Expiry::At(1), 0), Some(Apart::OnlyTarget));
        assert_eq!(Expiry::At(1).apart(Expiry::Never, 0), Some(Apart::OnlySource));
        assert_eq!(Expiry::Never.apart(Expiry::Never, 0), None);
    }

    #[test]
    fn replies_are_read() {
        assert_eq!(Expiry::of(&Frame::Integer(-2)), Some(Expiry::NoKey));
        assert_eq!(Expiry::of(&Frame::Integer(-1)), Some(Expiry::Never));
        assert_eq!(Expiry::of(&Frame::Integer(17)), Some(Expiry::At(17)));
        let held = Frame::Integer(crate::hold::KEY + 17);
        assert!(Expiry::is_held(&held) && !Expiry::is_held(&Frame::Integer(17)));
        assert_eq!(Expiry::of(&held), Some(Expiry::At(17)));
        assert_eq!(Expiry::of(&Frame::Error(b"ERR")), None);
    }
}
