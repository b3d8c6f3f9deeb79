//! Limits and policies: numbers and sizes within their bounds.

use super::Validation;
use crate::api::plan::{CutoverPlan, FailurePolicyPlan, LimitsPlan, VerificationPlan};
use crate::api::quantity::Quantity;
use crate::api::spec::{Cutover, FailurePolicy, Limits, SourceLimits, Verification};
use crate::source::pressure::PressureLimits;

impl Validation<'_> {
    pub(super) fn limits(&mut self, limits: &Limits) -> LimitsPlan {
        LimitsPlan {
            pipeline_commands: self.ranged(
                "spec.limits.pipelineCommands",
                limits.pipeline_commands,
                1,
                1_000_000,
            ),
            pipeline_bytes: self.size("spec.limits.pipelineBytes", &limits.pipeline_bytes, 64 << 10, 1 << 30),
            max_restore_bytes: self.size(
                "spec.limits.maxRestoreBytes",
                &limits.max_restore_bytes,
                64 << 10,
                512 << 20,
            ),
            bytes_per_second: self.ranged("spec.limits.bytesPerSecond", limits.bytes_per_second, 0, i64::MAX),
            keys_per_second: self.ranged("spec.limits.keysPerSecond", limits.keys_per_second, 0, i64::MAX),
            parallel_shards: self.ranged("spec.limits.parallelShards", limits.parallel_shards, 0, i64::MAX),
            source: self.source_limits(&limits.source),
            spool_memory: self.size("spec.limits.spoolMemory", &limits.spool_memory, 1 << 20, 1 << 40),
            spool_disk: self.size("spec.limits.spoolDisk", &limits.spool_disk, 0, i64::MAX as u64),
            spool_retain: self.size("spec.limits.spoolRetain", &limits.spool_retain, 0, i64::MAX as u64),
        }
    }

    fn source_limits(&mut self, limits: &SourceLimits) -> PressureLimits {
        let SourceLimits { max_latency_millis, max_fork_memory_percent, max_output_buffer } = limits;
        let path = "spec.limits.source";
        PressureLimits {
            latency_millis: self.ranged(
                &format!("{path}.maxLatencyMillis"),
                *max_latency_millis,
                0,
                i64::MAX,
            ),
            fork_memory_percent: self.ranged(
                &format!("{path}.maxForkMemoryPercent"),
                *max_fork_memory_percent,
                0,
                100,
            ),
            output_buffer: self.size(
                &format!("{path}.maxOutputBuffer"),
                max_output_buffer,
                0,
                i64::MAX as u64,
            ),
        }
    }

    pub(super) fn verification(&mut self, verification: &Verification) -> VerificationPlan {
        let Verification { mode, sample_percent, rounds, max_differences, repair } = verification;
        VerificationPlan {
            mode: *mode,
            sample_percent: self.ranged("spec.verification.samplePercent", *sample_percent, 1, 100),
            rounds: self.ranged("spec.verification.rounds", *rounds, 1, 100),
            max_differences: self.ranged("spec.verification.maxDifferences", *max_differences, 0, i64::MAX),
            repair: *repair,
        }
    }

    pub(super) fn cutover(&mut self, cutover: &Cutover) -> CutoverPlan {
        CutoverPlan {
            mode: cutover.mode,
            approved: cutover.approved,
            max_lag_bytes: self.ranged("spec.cutover.maxLagBytes", cutover.max_lag_bytes, 0, i64::MAX),
            max_lag_millis: self.ranged("spec.cutover.maxLagMillis", cutover.max_lag_millis, 0, i64::MAX),
            pause_source_writes: cutover.pause_source_writes,
            pause_timeout_seconds: self.ranged(
                "spec.cutover.pauseTimeoutSeconds",
                cutover.pause_timeout_seconds,
                1,
                3600,
            ),
        }
    }

    pub(super) fn failure_policy(&mut self, policy: &FailurePolicy) -> FailurePolicyPlan {
        let FailurePolicy { backoff_limit, progress_deadline_seconds, on_full_resync, max_quarantined } =
            policy;
        FailurePolicyPlan {
            backoff_limit: self.ranged("spec.failurePolicy.backoffLimit", *backoff_limit, 0, 1000),
            progress_deadline_seconds: self.ranged(
                "spec.failurePolicy.progressDeadlineSeconds",
                *progress_deadline_seconds,
                0,
                i64::MAX,
            ),
            on_full_resync: *on_full_resync,
            max_quarantined: self.ranged("spec.failurePolicy.maxQuarantined", *max_quarantined, 0, i64::MAX),
        }
    }

    /// The API server checks ranges too, but a spec may come from elsewhere.
    fn ranged<T: TryFrom<i64> + Default>(&mut self, path: &str, value: i64, least: i64, most: i64) -> T {
        match T::try_from(value) {
            Ok(converted) if (least..=most).contains(&value) => converted,
            _ => {
                let most = if most == i64::MAX { "or more".to_owned() } else { format!("to {most}") };
                self.fault(path, format!("{value} is out of range; allowed: {least} {most}"));
                T::default()
            }
        }
    }

    fn size<T: TryFrom<u64> + Default>(&mut self, path: &str, size: &Quantity, least: u64, most: u64) -> T {
        match T::try_from(size.bytes()) {
            Ok(converted) if (least..=most).contains(&size.bytes()) => converted,
            _ => {
                self.fault(
                    path,
                    format!("{size} is out of range; allowed: {} to {}", binary(least), binary(most)),
                );
                T::default()
            }
        }
    }
}

/// A bound as it would be written in a manifest.
fn binary(bytes: u64) -> String {
    [(40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")]
        .into_iter()
        .find(|(shift, _)| bytes != 0 && bytes.trailing_zeros() >= *shift)
        .map_or_else(|| bytes.to_string(), |(shift, unit)| format!("{}{unit}", bytes >> shift))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_read_like_a_manifest() {
        assert_eq!(binary(64 << 10), "64Ki");
        assert_eq!(binary(512 << 20), "512Mi");
        assert_eq!(binary(0), "0");
        assert_eq!(binary(i64::MAX as u64), "9223372036854775807");
    }
}
