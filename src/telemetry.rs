//! Logs, metrics and the HTTP endpoints. All of it reads what the engine publishes; none of it is
//! on the way of the data.

pub mod http;
pub mod logging;
pub mod metrics;

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use serde::Serialize;
use tokio::sync::watch;

use crate::api::conditions::{self, is_true};
use crate::api::{Phase, Status};

/// What the engine knows beyond the status; published by the engine, read by `/metrics`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EngineGauges {
    pub shards: Vec<ShardGauges>,
}

/// Counters of one shard since the process started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardGauges {
    /// Same as the shard's `id` in the status.
    pub id: String,
    /// Bytes of snapshot and stream received from the source.
    pub received_bytes: u64,
    /// Bytes written to the target.
    pub sent_bytes: u64,
    /// Batches that the target has acknowledged.
    pub batches: u64,
    /// Connections to the source beyond the first.
    pub source_reconnects: u64,
    /// Connections to the target beyond the first of each node.
    pub target_reconnects: u64,
    /// Bytes of the spool held in memory now.
    pub spool_memory_bytes: u64,
    /// Bytes of the spool held on disk now.
    pub spool_disk_bytes: u64,
}

/// One migration as it can be watched from outside.
#[derive(Clone, Debug)]
pub struct Observed {
    pub name: String,
    pub namespace: String,
    pub status: watch::Receiver<Status>,
    pub gauges: watch::Receiver<EngineGauges>,
}

/// What is shown of a migration that nobody works on, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stand {
    pub phase: Phase,
    pub stalled: bool,
}

impl Stand {
    pub fn of(status: &Status) -> Self {
        Self { phase: status.phase, stalled: is_true(&status.conditions, conditions::STALLED) }
    }
}

/// The migrations that are shown, which may change while they are.
#[derive(Clone, Debug, Default)]
pub struct ObservedSet {
    running: Arc<RwLock<Vec<Observed>>>,
    /// By namespace and name.
    at_rest: Arc<RwLock<BTreeMap<(String, String), Stand>>>,
}

impl ObservedSet {
    pub fn list(&self) -> Vec<Observed> {
        self.running.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Those that do not run in this process.
    pub fn at_rest(&self) -> BTreeMap<(String, String), Stand> {
        let mut at_rest = self.at_rest.read().unwrap_or_else(PoisonError::into_inner).clone();
        for Observed { namespace, name, .. } in self.list() {
            at_rest.remove(&(namespace, name));
        }
        at_rest
    }

    /// `None`: it is worked on, or gone.
    pub fn rests(&self, namespace: &str, name: &str, at_rest: Option<Stand>) {
        let mut all = self.at_rest.write().unwrap_or_else(PoisonError::into_inner);
        let key = (namespace.to_owned(), name.to_owned());
        match at_rest {
            Some(at_rest) => all.insert(key, at_rest),
            None => all.remove(&key),
        };
    }

    /// Forgets those at rest that are not there any more.
    pub fn keep_only(&self, is_there: impl Fn(&str, &str) -> bool) {
        let mut all = self.at_rest.write().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(namespace, name), _| is_there(namespace, name));
    }

    /// In the place of one of the same name, if there is one.
    pub fn insert(&self, observed: Observed) {
        self.remove(&observed.namespace, &observed.name);
        self.running.write().unwrap_or_else(PoisonError::into_inner).push(observed);
    }

    pub fn remove(&self, namespace: &str, name: &str) {
        let mut list = self.running.write().unwrap_or_else(PoisonError::into_inner);
        list.retain(|observed| observed.namespace != namespace || observed.name != name);
    }
}

impl From<Observed> for ObservedSet {
    fn from(observed: Observed) -> Self {
        let set = Self::default();
        set.insert(observed);
        set
    }
}

/// A line of `--output json`, and an element of `/metric`.
#[derive(Serialize)]
pub struct StatusLine<'a> {
    pub name: &'a str,
    pub namespace: &'a str,
    pub status: &'a Status,
}

impl StatusLine<'_> {
    /// Without a newline, within or at the end.
    pub fn to_json(&self) -> String {
        // Strings and integers only: there is nothing in it that JSON cannot say.
        serde_json::to_string(self).unwrap_or_default()
    }
}
