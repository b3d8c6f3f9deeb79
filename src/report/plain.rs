//! Timestamped lines: each transition once, and how far the work is every few seconds.

use std::io::Write;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::jiff::Timestamp;

use super::Moment;
use super::units::{bytes, counted, grouped, millis, seconds};
use crate::api::status::{Phase, Status};

/// A line that says nothing new is left out so many ticks in a row.
const QUIET_TICKS: u32 = 6;

pub struct PlainLines<W> {
    /// `None` once the reader has gone; the migration goes on without it.
    out: Option<W>,
    phase: Option<Phase>,
    conditions: Vec<Condition>,
    last: String,
    quiet: u32,
}

impl<W: Write> PlainLines<W> {
    pub fn new(out: W) -> Self {
        Self { out: Some(out), phase: None, conditions: Vec::new(), last: String::new(), quiet: 0 }
    }

    pub(super) fn show(&mut self, status: &Status, moment: Moment) {
        self.transitions(status);
        if moment == Moment::Tick {
            let line = progress(status);
            self.quiet = if line == self.last { self.quiet + 1 } else { 0 };
            if !line.is_empty() && self.quiet.is_multiple_of(QUIET_TICKS) {
                self.line(&line);
            }
            self.last = line;
        }
    }

    fn transitions(&mut self, status: &Status) {
        if self.phase != Some(status.phase) {
            self.phase = Some(status.phase);
            let message =
                if status.message.is_empty() { String::new() } else { format!(": {}", status.message) };
            self.line(&format!("{}{message}", status.phase.as_str()));
        }
        let news: Vec<String> = status
            .conditions
            .iter()
            .filter(|now| {
                let before = self.conditions.iter().find(|before| before.type_ == now.type_);
                before.is_none_or(|before| before.status != now.status || before.reason != now.reason)
            })
            .map(|now| {
                let Condition { type_, status, reason, message, .. } = now;
                let message = if message.is_empty() { String::new() } else { format!(": {message}") };
                format!("  {type_} {status} ({reason}){message}")
            })
            .collect();
        for line in &news {
            self.line(line);
        }
        if !news.is_empty() || self.conditions.len() != status.conditions.len() {
            self.conditions.clone_from(&status.conditions);
        }
    }

    fn line(&mut self, text: &str) {
        let Some(out) = &mut self.out else { return };
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ");
        if writeln!(out, "{now} {text}").and_then(|()| out.flush()).is_err() {
            self.out = None;
        }
    }
}

/// How far the work is, in one line; empty when there is nothing to tell.
pub(super) fn progress(status: &Status) -> String {
    let progress = &status.progress;
    match status.phase {
        Phase::FullSync => {
            let mut parts = vec![format!("{} %", progress.percent), copied_keys(status)];
            parts.push(if progress.bytes_total > 0 {
                format!("{} of {}", bytes(progress.bytes_read), bytes(progress.bytes_total))
            } else {
                bytes(progress.bytes_read)
            });
            parts.push(format!("{} keys/s", grouped(progress.keys_per_second)));
            if progress.eta_seconds > 0 {
                parts.push(format!("{} left", seconds(progress.eta_seconds)));
            }
            parts.join(", ")
        }
        Phase::IncrementalSync | Phase::CuttingOver => {
            let replication = &status.replication;
            format!(
                "{} shards in sync, lag {} ({}), {}",
                replication.shards_in_sync,
                bytes(replication.lag_bytes),
                millis(replication.lag_millis),
                counted(progress.commands_applied, "command")
            )
        }
        Phase::Verifying => {
            let verification = &status.verification;
            format!(
                "round {}: {} compared, {}",
                verification.round,
                counted(verification.keys_compared, "key"),
                counted(verification.differences, "difference")
            )
        }
        Phase::Pending | Phase::Preflight | Phase::Completed | Phase::Failed | Phase::Suspended => {
            String::new()
        }
    }
}

fn copied_keys(status: &Status) -> String {
    let progress = &status.progress;
    if progress.keys_total > 0 {
        format!("{} of {}", grouped(progress.keys_applied), counted(progress.keys_total, "key"))
    } else {
        counted(progress.keys_applied, "key")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::conditions::{self, Conditions, Truth, reason};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    fn text(lines: PlainLines<Vec<u8>>) -> Vec<String> {
        let text = String::from_utf8(lines.out.unwrap()).unwrap();
        text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    #[test]
    fn transitions_are_told_once_and_progress_at_ticks() {
        let mut lines = PlainLines::new(Vec::new());
        let mut status =
            Status { phase: Phase::FullSync, message: "copying".to_owned(), ..Status::default() };
        let now = Time(Timestamp::from_second(1).unwrap());
        Conditions::new(&mut status.conditions, 1).set(
            conditions::PREFLIGHT_PASSED,
            Truth::True,
            reason::FULL_SYNC,
            "",
            &now,
        );
        lines.show(&status, Moment::Transition);
        lines.show(&status, Moment::Transition);
        status.progress = crate::api::status::Progress {
            percent: 45,
            keys_applied: 1_035_000,
            keys_total: 2_300_000,
            bytes_read: 95 << 20,
            bytes_total: 203 << 20,
            keys_per_second: 310_000,
            eta_seconds: 4,
            commands_applied: 0,
            keys_filtered: 0,
            commands_filtered: 0,
        };
        lines.show(&status, Moment::Tick);
        lines.show(&status, Moment::Tick);
        status.phase = Phase::Completed;
        status.message.clear();
        lines.show(&status, Moment::End);
        assert_eq!(
            text(lines),
            [
                "FullSync: copying",
                "  PreflightPassed True (FullSync)",
                "45 %, 1,035,000 of 2,300,000 keys, 95.0 MiB of 203.0 MiB, 310,000 keys/s, 4.0 s left",
                "Completed",
            ]
        );
    }
}
