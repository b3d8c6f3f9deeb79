//! Logs, metrics and the HTTP endpoints. All of it reads what the engine publishes; none of it is
//! on the way of the data.

pub mod http;
pub mod logging;
pub mod metrics;

use std::sync::{Arc, PoisonError, RwLock};

use serde::Serialize;
use tokio::sync::watch;

use crate::api::Status;

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

/// The migrations that are shown, which may change while they are.
#[derive(Clone, Debug, Default)]
pub struct ObservedSet(Arc<RwLock<Vec<Observed>>>);

impl ObservedSet {
    pub fn list(&self) -> Vec<Observed> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// In the place of one of the same name, if there is one.
    pub fn insert(&self, observed: Observed) {
        self.remove(&observed.namespace, &observed.name);
        self.0.write().unwrap_or_else(PoisonError::into_inner).push(observed);
    }

    pub fn remove(&self, namespace: &str, name: &str) {
        let mut list = self.0.write().unwrap_or_else(PoisonError::into_inner);
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
