//! Rows of what exactly once costs: workload I with it and without, in turns.

use anyhow::Result;
use serde_json::Value;

use crate::figures::Row;
use crate::incremental::{Run, migrate};
use crate::server::Target;
use crate::settings::{Settings, say};
use crate::workload;

pub const ROWS: [&str; 2] = [STANDALONE, CLUSTER];

const STANDALONE: &str = "exactly-once-standalone";
const CLUSTER: &str = "exactly-once-cluster";

pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let row = |id, what| Row::new(id, what, "AtLeastOnce");
    let mut rows = [
        row(STANDALONE, "I → standalone, ExactlyOnce").within(1.15, 1.0),
        row(CLUSTER, "I → 3-node cluster, ExactlyOnce").within(1.4, 1.0),
    ];
    if settings.limits_only {
        return Ok(rows.into_iter().filter(|row| settings.wants(row.id)).collect());
    }
    let (commands, count) = workload::incremental(settings.scale);
    for run in 1..=settings.runs {
        for row in rows.iter_mut().filter(|row| settings.wants(row.id)) {
            let once = |delivery: &str| -> Result<Run> {
                let target = if row.id == CLUSTER { Target::cluster()? } else { Target::standalone()? };
                let fields = [("/spec/delivery", Value::from(delivery))];
                let run = migrate(&target, &commands, count, run == 1, &fields)?;
                say(&format!("{} with {delivery}: {:.2} s, CPU {:.2} s", row.id, run.seconds, run.cpu));
                Ok(run)
            };
            // Each is first as often as the other, as a machine grows warm.
            let both = if run % 2 == 1 {
                once("ExactlyOnce").and_then(|exactly| Ok((exactly, once("AtLeastOnce")?)))
            } else {
                once("AtLeastOnce").and_then(|least| Ok((once("ExactlyOnce")?, least)))
            };
            match both {
                Ok((exactly, least)) => {
                    row.ours.push(exactly.seconds);
                    row.limit.push(least.seconds);
                    row.cpu.push(exactly.cpu);
                    row.peak.push(exactly.peak);
                }
                Err(error) => row.fail(&error),
            }
        }
    }
    Ok(rows.into_iter().filter(|row| settings.wants(row.id)).collect())
}
