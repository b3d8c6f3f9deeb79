//! What a target cannot take over by what it is (PURE).

use std::fmt;

/// What is counted apart in `status.quarantine.kinds`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub enum Loss {
    /// Commands of no other kind.
    Commands,
    /// Keys with a value that the target refused, though its version should load it.
    Values,
    /// Redis 5.0 and newer have streams.
    Streams,
    /// Values of modules that the target lacks.
    Modules,
    /// Redis 7.0 and newer have functions.
    Functions,
    /// Redis 7.4, Valkey 9.0: expiries of hash fields. The fields and their values are kept, and go when the
    /// source says so; with the source gone they stay.
    FieldExpiry,
}

impl Loss {
    pub fn as_str(self) -> &'static str {
        match self {
            Loss::Commands => "Commands",
            Loss::Values => "Values",
            Loss::Streams => "Streams",
            Loss::Modules => "Modules",
            Loss::Functions => "Functions",
            Loss::FieldExpiry => "FieldExpiry",
        }
    }

    /// As `as_str` has it.
    pub fn named(name: &str) -> Option<Self> {
        let all =
            [Loss::Commands, Loss::Values, Loss::Streams, Loss::Modules, Loss::Functions, Loss::FieldExpiry];
        all.into_iter().find(|loss| loss.as_str() == name)
    }

    /// The data stand, but for an expiry: it does not keep anybody from the cutover.
    pub fn is_only_expiry(self) -> bool {
        self == Loss::FieldExpiry
    }

    /// Of a command that the target refused for good. `payload`: what RESTORE was to bring.
    pub fn of_command(name: &[u8], payload: Option<&[u8]>) -> Self {
        let upper = name.to_ascii_uppercase();
        match upper.as_slice() {
            b"RESTORE" | b"RESTORE-ASKING" => match payload.and_then(|payload| payload.first()) {
                Some(6 | 7) => Loss::Modules,
                Some(15 | 19 | 21 | 26) => Loss::Streams,
                _ => Loss::Values,
            },
            b"XADD" | b"XTRIM" | b"XDEL" | b"XDELEX" | b"XACK" | b"XACKDEL" | b"XCLAIM" | b"XAUTOCLAIM"
            | b"XGROUP" | b"XSETID" | b"XREADGROUP" | b"XCFGSET" => Loss::Streams,
            b"FUNCTION" | b"FCALL" => Loss::Functions,
            // Commands of modules are named so, and vector sets are one.
            b"VADD" | b"VREM" | b"VSETATTR" => Loss::Modules,
            name if name.contains(&b'.') => Loss::Modules,
            _ => Loss::Commands,
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Loss::Commands => "commands that it does not know",
            Loss::Values => "values that it refuses",
            Loss::Streams => "streams",
            Loss::Modules => "module data",
            Loss::Functions => "functions",
            Loss::FieldExpiry => "expiries of hash fields",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_commands_have_a_kind() {
        for (name, payload, kind) in [
            ("xadd", None, Loss::Streams),
            ("FUNCTION", None, Loss::Functions),
            ("JSON.SET", None, Loss::Modules),
            ("RESTORE", Some(&[7u8, 1][..]), Loss::Modules),
            ("RESTORE", Some(&[21, 1]), Loss::Streams),
            ("RESTORE", Some(&[0]), Loss::Values),
            ("RESTORE", None, Loss::Values),
            ("BITFIELD", None, Loss::Commands),
        ] {
            assert_eq!(Loss::of_command(name.as_bytes(), payload), kind, "{name}");
        }
    }
}
