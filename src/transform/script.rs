//! The Lua script of `spec.filter.lua`: sandboxed, and asked about each key and each command.
//!
//! A script defines `key(k)` and `command(c)`, or one of them. What it may use: the basic functions, `string`,
//! `table`, `math` and `utf8`, without what reads files, loads code, catches errors, or depends on the moment.

mod building;
mod runner;

pub use building::{only_key, pass_through};
pub use runner::{CommandChange, KeyChange, KeyFacts, Runner};

/// Longest script, in bytes; as much as a ConfigMap holds.
const LONGEST: usize = 1 << 20;
/// Memory of one state, the script's own and the arguments of a command included.
const MEMORY: usize = 64 << 20;
/// Instructions of the virtual machine that one call may take.
const INSTRUCTIONS: u32 = 1_000_000;
/// What errors call the script.
const NAME: &str = "filter.lua";

/// A script that compiles, and what it defines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    text: String,
    defines_key: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScriptError {
    #[error("has {length} bytes; allowed: at most {LONGEST}")]
    TooLong { length: usize },
    /// `filter.lua:LINE: …`
    #[error("{0}")]
    Lua(String),
    #[error("defines neither function key(k) nor function command(c)")]
    Nothing,
    #[error(
        "defines key(k) but no command(c): what it does to the keys of the snapshot must be done to the commands that follow, too"
    )]
    NoCommand,
}

impl Script {
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Compiles the script and runs its outermost level once. `follows`: commands come behind the snapshot.
    pub fn new(text: &str, follows: bool) -> Result<Self, ScriptError> {
        if text.len() > LONGEST {
            return Err(ScriptError::TooLong { length: text.len() });
        }
        let script = Self { text: text.to_owned(), defines_key: false };
        let runner = script.runner()?;
        match (runner.judges_keys(), runner.judges_commands()) {
            (false, false) => Err(ScriptError::Nothing),
            (true, false) if follows => Err(ScriptError::NoCommand),
            (defines_key, _) => Ok(Self { defines_key, ..script }),
        }
    }

    /// A state of its own, for one task.
    pub fn runner(&self) -> Result<Runner, ScriptError> {
        Runner::new(&self.text).map_err(ScriptError::Lua)
    }

    pub fn defines_key(&self) -> bool {
        self.defines_key
    }
}

#[cfg(test)]
mod tests;
