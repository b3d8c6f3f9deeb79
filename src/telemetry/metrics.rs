//! `/metrics`: Prometheus. Values are read from what the engine last published when a scrape asks
//! for them, so that nothing is counted twice and the hot path counts nothing for us.
//!
//! Labels are bounded: namespace, migration, shard (one for each source master), phase.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::{EngineGauges, Observed, ObservedSet, ShardGauges, Stand};
use crate::api::status::{Phase, ShardStatus, Status};

/// A registry whose scrape shows the migrations as they are at that moment.
pub fn registry(migrations: ObservedSet) -> Registry {
    let mut registry = Registry::with_prefix("redis_migration");
    registry.register_collector(Box::new(Migrations(migrations)));
    registry
}

#[derive(Debug)]
struct Migrations(ObservedSet);

/// One migration's values, held still for the length of a scrape.
struct Snapshot<'a> {
    migration: &'a Observed,
    status: Status,
    gauges: EngineGauges,
}

/// Namespace and name.
type Labels<'a> = [(&'static str, &'a str); 2];

/// Name, help, and where the value comes from.
type OfStatus = (&'static str, &'static str, MetricType, fn(&Status) -> i64);
type OfShard = (&'static str, &'static str, MetricType, fn(&ShardStatus) -> i64);
type OfGauges = (&'static str, &'static str, MetricType, fn(&ShardGauges) -> u64);

// prometheus-client appends `_total` to the name of a counter.
const STATUS_METRICS: &[OfStatus] = &[
    ("keys_per_second", "Keys applied per second of late", MetricType::Gauge, |s| s.progress.keys_per_second),
    ("keys_expected", "Keys that the snapshots announce", MetricType::Gauge, |s| s.progress.keys_total),
    ("keys_compared", "Keys compared by verification", MetricType::Gauge, |s| s.verification.keys_compared),
    ("differences", "Keys on which source and target differ", MetricType::Gauge, |s| {
        s.verification.differences
    }),
    ("quarantined_commands", "Commands that the target refused for good", MetricType::Counter, |s| {
        s.quarantine.commands
    }),
    ("write_pause_milliseconds", "How long cutover held the source's writes", MetricType::Gauge, |s| {
        s.cutover.write_pause_millis
    }),
];

const SHARD_METRICS: &[OfShard] = &[
    ("snapshot_read_bytes", "Bytes of the snapshot read", MetricType::Gauge, |s| s.bytes_read),
    ("snapshot_bytes", "Bytes of the snapshot, 0 while unknown", MetricType::Gauge, |s| s.bytes_total),
    ("keys_applied", "Keys of the snapshot acknowledged by the target", MetricType::Counter, |s| {
        s.keys_applied
    }),
    ("commands_applied", "Commands of the stream acknowledged by the target", MetricType::Counter, |s| {
        s.commands_applied
    }),
    ("keys_filtered", "Keys of the snapshot that the filter left out", MetricType::Counter, |s| {
        s.keys_filtered
    }),
    (
        "commands_filtered",
        "Commands of the stream that the filter left out, in whole or in part",
        MetricType::Counter,
        |s| s.commands_filtered,
    ),
    ("received_offset", "Replication offset read from the source", MetricType::Gauge, |s| s.received_offset),
    ("applied_offset", "Replication offset acknowledged by the target", MetricType::Gauge, |s| {
        s.applied_offset
    }),
    ("lag_bytes", "Bytes not yet acknowledged by the target", MetricType::Gauge, |s| s.lag_bytes),
    ("lag_milliseconds", "Age of the oldest byte not yet acknowledged", MetricType::Gauge, |s| s.lag_millis),
    ("resumes", "Reconnections that went on where they had stopped", MetricType::Counter, |s| s.resumes),
    ("full_resyncs", "Full syncs that had to be repeated", MetricType::Counter, |s| s.full_resyncs),
    ("expiries_held", "1 while the target expires nothing by itself", MetricType::Gauge, |s| {
        i64::from(s.expiries_held)
    }),
    (
        "expiries_released",
        "Keys and hash fields that got their own expiries back",
        MetricType::Counter,
        |s| s.expiries_released,
    ),
];

const GAUGE_METRICS: &[OfGauges] = &[
    ("received_bytes", "Bytes received from the source", MetricType::Counter, |g| g.received_bytes),
    ("sent_bytes", "Bytes written to the target", MetricType::Counter, |g| g.sent_bytes),
    ("batches", "Batches acknowledged by the target", MetricType::Counter, |g| g.batches),
    ("source_reconnects", "Connections to the source beyond the first", MetricType::Counter, |g| {
        g.source_reconnects
    }),
    ("target_reconnects", "Connections to the target beyond the first", MetricType::Counter, |g| {
        g.target_reconnects
    }),
    ("spool_memory_bytes", "Bytes of the spool in memory", MetricType::Gauge, |g| g.spool_memory_bytes),
    ("spool_disk_bytes", "Bytes of the spool on disk", MetricType::Gauge, |g| g.spool_disk_bytes),
];

impl Collector for Migrations {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let migrations = self.0.list();
        let snapshots: Vec<Snapshot<'_>> = migrations.iter().map(Snapshot::of).collect();
        let at_rest = self.0.at_rest();
        let running = snapshots.iter().map(|snapshot| (snapshot.labels(), Stand::of(&snapshot.status)));
        let resting = at_rest.iter().map(|((namespace, migration), stand)| {
            ([("namespace", namespace.as_str()), ("migration", migration.as_str())], *stand)
        });
        let stands: Vec<(Labels<'_>, Stand)> = running.chain(resting).collect();
        phases(&mut encoder, &stands)?;
        stalled(&mut encoder, &stands)?;
        for (name, help, kind, value) in STATUS_METRICS {
            let mut family = encoder.encode_descriptor(name, help, None, *kind)?;
            for snapshot in &snapshots {
                let labels = snapshot.labels();
                sample(family.encode_family(&labels)?, *kind, count(value(&snapshot.status)))?;
            }
        }
        for (name, help, kind, value) in SHARD_METRICS {
            let mut family = encoder.encode_descriptor(name, help, None, *kind)?;
            for snapshot in &snapshots {
                for shard in &snapshot.status.shards {
                    let labels = snapshot.shard_labels(&shard.id);
                    sample(family.encode_family(&labels)?, *kind, count(value(shard)))?;
                }
            }
        }
        for (name, help, kind, value) in GAUGE_METRICS {
            let mut family = encoder.encode_descriptor(name, help, None, *kind)?;
            for snapshot in &snapshots {
                for shard in &snapshot.gauges.shards {
                    let labels = snapshot.shard_labels(&shard.id);
                    sample(family.encode_family(&labels)?, *kind, value(shard))?;
                }
            }
        }
        lag_seconds(&mut encoder, &snapshots)
    }
}

impl<'a> Snapshot<'a> {
    fn of(migration: &'a Observed) -> Self {
        let status = migration.status.borrow().clone();
        let gauges = migration.gauges.borrow().clone();
        Self { migration, status, gauges }
    }

    fn labels(&self) -> Labels<'a> {
        [("namespace", &self.migration.namespace), ("migration", &self.migration.name)]
    }

    fn shard_labels<'b>(&'b self, shard: &'b str) -> [(&'static str, &'b str); 3] {
        let [namespace, migration] = self.labels();
        [namespace, migration, ("shard", shard)]
    }
}

/// 1 for the phase that holds, 0 for the others, so that a query can wait for one by name.
fn phases(encoder: &mut DescriptorEncoder<'_>, stands: &[(Labels<'_>, Stand)]) -> fmt::Result {
    let mut family = encoder.encode_descriptor("phase", "Phase of the migration", None, MetricType::Gauge)?;
    for ([namespace, migration], stand) in stands {
        for phase in Phase::ALL {
            let labels = [*namespace, *migration, ("phase", phase.as_str())];
            sample(family.encode_family(&labels)?, MetricType::Gauge, u64::from(stand.phase == phase))?;
        }
    }
    Ok(())
}

fn stalled(encoder: &mut DescriptorEncoder<'_>, stands: &[(Labels<'_>, Stand)]) -> fmt::Result {
    let help = "1 while the condition Stalled holds";
    let mut family = encoder.encode_descriptor("stalled", help, None, MetricType::Gauge)?;
    for (labels, stand) in stands {
        sample(family.encode_family(labels)?, MetricType::Gauge, u64::from(stand.stalled))?;
    }
    Ok(())
}

/// Prometheus' own unit for time, beside the milliseconds of the status.
fn lag_seconds(encoder: &mut DescriptorEncoder<'_>, snapshots: &[Snapshot<'_>]) -> fmt::Result {
    let help = "Age of the oldest byte not yet acknowledged";
    let mut family = encoder.encode_descriptor("lag_seconds", help, None, MetricType::Gauge)?;
    for snapshot in snapshots {
        for shard in &snapshot.status.shards {
            let labels = snapshot.shard_labels(&shard.id);
            family.encode_family(&labels)?.encode_gauge(&(shard.lag_millis as f64 / 1000.0))?;
        }
    }
    Ok(())
}

fn sample(mut encoder: MetricEncoder<'_>, kind: MetricType, value: u64) -> fmt::Result {
    match kind {
        MetricType::Counter => encoder.encode_counter::<NoLabelSet, _, u64>(&value, None),
        _ => encoder.encode_gauge(&value),
    }
}

fn count(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}
