//! Logs, metrics and the HTTP endpoints.

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
