//! What is left out or changed on the way (PURE): `spec.filter`, compiled once.
//!
//! Everything here is a function of the key or the command alone, so that a replay decides as the first
//! attempt did.

mod commands;
mod databases;
mod glob;
mod patterns;
pub mod script;

use std::collections::BTreeMap;

pub use commands::Verdict;
pub use databases::DatabaseFilter;
pub use patterns::{Pattern, PatternError, Patterns};

use commands::Names;
use script::Script;

/// All that a plan leaves out. A plan that leaves nothing out has none of these, and pays nothing.
#[derive(Debug, Default)]
pub struct Transform {
    pub databases: DatabaseFilter,
    pub keys: KeyFilter,
    names: Names,
    pub script: Option<Script>,
}

/// Keys by name.
#[derive(Debug, Default)]
pub struct KeyFilter {
    /// `None`: all but the excluded.
    pub include: Option<Patterns>,
    pub exclude: Option<Patterns>,
}

impl KeyFilter {
    #[inline]
    pub fn admits(&self, key: &[u8]) -> bool {
        self.include.as_ref().is_none_or(|patterns| patterns.matches(key))
            && !self.exclude.as_ref().is_some_and(|patterns| patterns.matches(key))
    }

    pub fn is_open(&self) -> bool {
        self.include.is_none() && self.exclude.is_none()
    }
}

impl Transform {
    /// `excluded`: names of commands that are not replayed, in any case.
    pub fn new(databases: DatabaseFilter, keys: KeyFilter, excluded: &[String]) -> Self {
        Self { databases, keys, names: Names::new(excluded), script: None }
    }

    pub fn with_script(self, script: Option<Script>) -> Self {
        Self { script, ..self }
    }

    /// Nothing is left out.
    pub fn is_open(&self) -> bool {
        self.databases.is_open() && self.keys.is_open() && self.names.is_empty() && self.script.is_none()
    }

    /// Whether a key of the source is copied. `db`: the source's.
    #[inline]
    pub fn admits(&self, db: u64, key: &[u8]) -> bool {
        self.databases.admits(db) && self.keys.admits(key)
    }

    /// Keys may have other names on the target.
    pub fn renames(&self) -> bool {
        self.script.as_ref().is_some_and(Script::defines_key)
    }

    /// Whether a key of the target may have come from the source. `db`: the target's.
    pub fn claims(&self, map: &BTreeMap<u64, u64>, db: u64, key: &[u8]) -> bool {
        let unmapped = (!map.contains_key(&db)).then_some(db);
        let mut sources = map.iter().filter(|(_, to)| **to == db).map(|(from, _)| *from).chain(unmapped);
        // What a script calls its keys only the script knows.
        let any_name = self.renames();
        sources.any(|source| self.databases.admits(source) && (any_name || self.keys.admits(key)))
    }
}

#[cfg(test)]
mod tests;
