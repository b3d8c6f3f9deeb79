//! What the kernel knows of a process (proc(5)), read from outside so that it costs the process nothing.

use std::fs;
use std::process::Child;

use anyhow::{Context, Result};

/// USER_HZ: the unit of CPU times in /proc, 100 on every Linux that Rust runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// User and system time of all threads, ended ones included, in seconds. Also true of a zombie.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let fields = stat(pid)?;
    let ticks = |index: usize| -> Result<f64> {
        Ok(fields.get(index).context("/proc/PID/stat is short")?.parse::<f64>()?)
    };
    // After the name in parentheses, which may hold blanks, utime and stime are fields 14 and 15 of all.
    Ok((ticks(11)? + ticks(12)?) / TICKS_PER_SECOND)
}

/// Whether the process has ended and waits to be reaped.
pub fn is_zombie(pid: u32) -> bool {
    stat(pid).is_ok_and(|fields| fields.first().is_some_and(|state| state == "Z"))
}

/// Highest resident memory so far, in bytes; `None` once the process has ended.
pub fn peak_memory(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Ends a child at once and reaps it.
pub fn end(child: &mut Child) {
    // Both fail only when it has ended and been reaped already.
    let _ = child.kill();
    let _ = child.wait();
}

/// The part of all processors' time that was not spent idle.
#[derive(Default)]
pub struct Busy {
    all: f64,
    idle: f64,
}

impl Busy {
    /// 0 to 1, since the last call; 1 at the first.
    pub fn since_last(&mut self) -> Result<f64> {
        let text = fs::read_to_string("/proc/stat")?;
        let line = text.lines().next().context("/proc/stat is empty")?;
        let times: Vec<f64> = line.split(' ').filter_map(|time| time.parse().ok()).collect();
        // user, nice, system, idle, iowait, irq, softirq, steal; guest times are part of the first two.
        let all: f64 = times.iter().take(8).sum();
        let idle: f64 = times.iter().skip(3).take(2).sum();
        let before = std::mem::replace(self, Busy { all, idle });
        let spent = all - before.all;
        Ok(if before.all > 0.0 && spent > 0.0 { 1.0 - (idle - before.idle) / spent } else { 1.0 })
    }
}

fn stat(pid: u32) -> Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, rest) = text.rsplit_once(") ").context("/proc/PID/stat has no name")?;
    Ok(rest.split(' ').map(str::to_owned).collect())
}
