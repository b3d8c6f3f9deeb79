//! What a script costs that keeps everything: workload I with it and without, in turns.

use anyhow::Result;
use serde_json::Value;

use crate::figures::Row;
use crate::incremental::{Run, migrate};
use crate::server::Target;
use crate::settings::{Settings, say};
use crate::workload;

pub const ROWS: [&str; 1] = [LUA];

const LUA: &str = "lua-standalone";

const KEEPS: &str = "function key(k) return k.key ~= '' end\nfunction command(c) return c.name ~= 'NOTHING' and c.args[1] ~= '' end";

pub fn measure(settings: &Settings) -> Result<Vec<Row>> {
    let mut row = Row::new(LUA, "I → standalone, Lua keeps everything", "without Lua").within(2.0, 1.4);
    if settings.limits_only {
        return Ok(vec![row]);
    }
    let (commands, count) = workload::incremental(settings.scale);
    for run in 1..=settings.runs {
        let once = |script: &str| -> Result<Run> {
            let fields = [("/spec/filter/lua/inline", Value::from(script))];
            let made = migrate(&Target::standalone()?, &commands, count, run == 1, &fields)?;
            let with = if script.is_empty() { "without" } else { "with" };
            say(&format!("{LUA} {with} the script: {:.2} s, CPU {:.2} s", made.seconds, made.cpu));
            Ok(made)
        };
        // Each is first as often as the other, as a machine grows warm.
        let both = if run % 2 == 1 {
            once(KEEPS).and_then(|with| Ok((with, once("")?)))
        } else {
            once("").and_then(|without| Ok((once(KEEPS)?, without)))
        };
        match both {
            Ok((with, without)) => {
                row.ours.push(with.seconds);
                row.limit.push(without.seconds);
                row.cpu.push(with.cpu);
                row.peak.push(with.peak);
            }
            Err(error) => row.fail(&error),
        }
    }
    Ok(vec![row])
}
