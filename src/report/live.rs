//! The view on a terminal: phase, a bar, and the lag of each shard.

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::Moment;
use super::plain::progress;
use super::units::{bytes, counted, grouped, millis};
use crate::api::status::{Phase, ShardStatus, Status};

/// Shards with a line of their own; a cluster of hundreds would push the rest off the screen.
const SHARDS_SHOWN: usize = 12;
const BAR_STEPS: u64 = 1000;

pub struct LiveView {
    bars: MultiProgress,
    name: String,
    head: ProgressBar,
    bar: ProgressBar,
    shards: Vec<ProgressBar>,
}

impl LiveView {
    pub fn new(name: &str) -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stdout_with_hz(5));
        let head = bars.add(ProgressBar::new_spinner().with_style(style("{spinner} {msg}")));
        let bar = bars.add(ProgressBar::new(BAR_STEPS).with_style(style("  {bar:40} {msg}")));
        Self { bars, name: name.to_owned(), head, bar, shards: Vec::new() }
    }

    pub fn bars(&self) -> MultiProgress {
        self.bars.clone()
    }

    pub(super) fn show(&mut self, status: &Status, moment: Moment) {
        if moment == Moment::End {
            // The summary says all that is worth keeping.
            self.head.finish_and_clear();
            self.bar.finish_and_clear();
            self.shards.iter().for_each(ProgressBar::finish_and_clear);
            return;
        }
        let message = if status.message.is_empty() { String::new() } else { format!(": {}", status.message) };
        self.head.set_message(format!("{} {}{message}", self.name, status.phase.as_str()));
        self.head.tick();
        self.bar.set_position(steps(status));
        self.bar.set_message(progress(status));
        self.show_shards(&status.shards);
    }

    fn show_shards(&mut self, shards: &[ShardStatus]) {
        let lines = shards.len().min(SHARDS_SHOWN) + usize::from(shards.len() > SHARDS_SHOWN);
        while self.shards.len() > lines {
            if let Some(line) = self.shards.pop() {
                self.bars.remove(&line);
            }
        }
        while self.shards.len() < lines {
            self.shards.push(self.bars.add(ProgressBar::new_spinner().with_style(style("    {msg}"))));
        }
        for (line, shard) in self.shards.iter().zip(shards).take(SHARDS_SHOWN) {
            line.set_message(shard_line(shard));
        }
        if let Some(line) = self.shards.get(SHARDS_SHOWN) {
            let behind = shards.iter().skip(SHARDS_SHOWN).max_by_key(|shard| shard.lag_bytes);
            let lag = behind.map(|shard| bytes(shard.lag_bytes)).unwrap_or_default();
            line.set_message(format!(
                "and {} more, lag at most {lag}",
                grouped((shards.len() - SHARDS_SHOWN) as i64)
            ));
        }
    }
}

/// How much of the bar is full.
fn steps(status: &Status) -> u64 {
    let part = |done: i64, all: i64| {
        if all <= 0 { 0 } else { (done.clamp(0, all) as f64 / all as f64 * BAR_STEPS as f64) as u64 }
    };
    let progress = &status.progress;
    match status.phase {
        Phase::Pending | Phase::Preflight => 0,
        Phase::FullSync if progress.bytes_total > 0 => part(progress.bytes_read, progress.bytes_total),
        Phase::Verifying => {
            part(status.verification.keys_compared, progress.keys_total.max(progress.keys_applied))
        }
        Phase::FullSync | Phase::Failed | Phase::Suspended => part(progress.percent, 100),
        Phase::IncrementalSync | Phase::CuttingOver | Phase::Completed => BAR_STEPS,
    }
}

fn shard_line(shard: &ShardStatus) -> String {
    let ShardStatus { id, slots, phase, last_error, .. } = shard;
    let slots = if slots.is_empty() { String::new() } else { format!(" [{slots}]") };
    let state = match phase {
        Phase::FullSync => {
            format!("{}, {} read", counted(shard.keys_applied, "key"), bytes(shard.bytes_read))
        }
        Phase::IncrementalSync | Phase::Verifying | Phase::CuttingOver => format!(
            "lag {} ({}), {}",
            bytes(shard.lag_bytes),
            millis(shard.lag_millis),
            counted(shard.commands_applied, "command")
        ),
        Phase::Pending | Phase::Preflight | Phase::Completed | Phase::Failed | Phase::Suspended => {
            String::new()
        }
    };
    let error = if last_error.is_empty() { String::new() } else { format!("  {last_error}") };
    format!("{id}{slots} {} {state}{error}", phase.as_str())
}

fn style(template: &str) -> ProgressStyle {
    // A template that does not parse is a slip of ours, and no reason to stop a migration.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_parse() {
        for template in ["{spinner} {msg}", "  {bar:40} {msg}", "    {msg}"] {
            assert!(ProgressStyle::with_template(template).is_ok(), "{template}");
        }
    }

    #[test]
    fn the_bar_follows_bytes_and_keys() {
        let mut status = Status { phase: Phase::FullSync, ..Status::default() };
        assert_eq!(steps(&status), 0);
        (status.progress.bytes_read, status.progress.bytes_total) = (25, 100);
        assert_eq!(steps(&status), 250);
        status.progress.bytes_read = 300;
        assert_eq!(steps(&status), BAR_STEPS, "never past the end");
        status.phase = Phase::Verifying;
        (status.verification.keys_compared, status.progress.keys_total) = (1, 2);
        assert_eq!(steps(&status), 500);
    }

    #[test]
    fn more_shards_than_lines_are_summed_up() {
        let mut view = LiveView::new("orders");
        view.bars.set_draw_target(ProgressDrawTarget::hidden());
        let shards: Vec<ShardStatus> = (0..20)
            .map(|n| ShardStatus { id: n.to_string(), lag_bytes: n, ..ShardStatus::default() })
            .collect();
        view.show(&Status { shards, ..Status::default() }, Moment::Tick);
        assert_eq!(view.shards.len(), SHARDS_SHOWN + 1);
        assert_eq!(view.shards[SHARDS_SHOWN].message(), "and 8 more, lag at most 19 B");
        view.show(&Status { shards: vec![ShardStatus::default()], ..Status::default() }, Moment::Tick);
        assert_eq!(view.shards.len(), 1);
    }
}
