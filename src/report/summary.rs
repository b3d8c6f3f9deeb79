//! What is left on the screen at the end.

use std::time::Duration;

use super::units::{bytes, counted, duration, millis};
use crate::api::spec::VerificationMode;
use crate::api::status::Status;
use crate::migration::{CheckReport, Finding, FindingLevel, Outcome};

/// Differences and refused commands named in a summary; the status has more.
const SAMPLES_SHOWN: usize = 10;

/// What moved, how long it took, what verification found. Ends with a newline.
pub fn run_summary(name: &str, status: &Status, outcome: &Outcome, took: Duration) -> String {
    let mut text = headline(name, outcome, took);
    let progress = &status.progress;
    if progress.bytes_read > 0 || progress.commands_applied > 0 {
        text += &row(
            "moved",
            &format!(
                "{} ({}) in the full sync, then {}",
                counted(progress.keys_applied, "key"),
                bytes(progress.bytes_read),
                counted(progress.commands_applied, "command")
            ),
        );
    }
    if progress.keys_filtered > 0 || progress.commands_filtered > 0 {
        let commands = counted(progress.commands_filtered, "command");
        text += &row("left out", &format!("{}, {commands}", counted(progress.keys_filtered, "key")));
    }
    text += &verification_rows(status);
    if status.cutover.completion_time.is_some() {
        text +=
            &row("cutover", &format!("writes were held for {}", millis(status.cutover.write_pause_millis)));
    }
    let replication = &status.replication;
    if replication.resumes > 0 || replication.full_resyncs > 0 {
        text += &row(
            "interrupted",
            &format!(
                "{}, {}",
                counted(replication.resumes, "resume"),
                counted(replication.full_resyncs, "full resync")
            ),
        );
    }
    text += &quarantine_rows(status);
    text
}

/// For `verify`. Ends with a newline.
pub fn verification_summary(name: &str, status: &Status, outcome: &Outcome, took: Duration) -> String {
    headline(name, outcome, took) + &verification_rows(status)
}

/// For `check`. Ends with a newline.
pub fn check_report(name: &str, report: &CheckReport) -> String {
    let width = report.findings.iter().map(|finding| finding.subject.len()).max().unwrap_or(0);
    let mut text = format!("{name}\n");
    for Finding { subject, level, detail } in &report.findings {
        let level = match level {
            FindingLevel::Passed => "ok",
            FindingLevel::Warning => "warn",
            FindingLevel::Failed => "FAIL",
        };
        text += &format!("  {level:<5}{subject:<width$}  {detail}\n");
    }
    text
}

fn headline(name: &str, outcome: &Outcome, took: Duration) -> String {
    let took = duration(took);
    match outcome {
        Outcome::Done => format!("{name}: done in {took}\n"),
        Outcome::Failed { .. } | Outcome::Superseded { .. } => format!("{name}: failed after {took}\n"),
        Outcome::Differences { count } => {
            let count = i64::try_from(*count).unwrap_or(i64::MAX);
            format!("{name}: {} after {took}\n", counted(count, "difference"))
        }
        // The status' message, shown above, says whether a checkpoint was kept.
        Outcome::Stopped => format!("{name}: stopped after {took}\n"),
    }
}

fn verification_rows(status: &Status) -> String {
    let verification = &status.verification;
    if verification.mode == VerificationMode::Off || verification.round == 0 {
        return String::new();
    }
    let mut text = row(
        "verified",
        &format!(
            "{:?}: {} compared in {}, {}",
            verification.mode,
            counted(verification.keys_compared, "key"),
            counted(verification.round, "round"),
            counted(verification.differences, "difference")
        ),
    );
    for sample in verification.samples.iter().take(SAMPLES_SHOWN) {
        let detail = if sample.detail.is_empty() { String::new() } else { format!(" ({})", sample.detail) };
        text += &row("", &format!("db {} {}: {}{detail}", sample.db, sample.key, sample.kind));
    }
    text
}

fn quarantine_rows(status: &Status) -> String {
    let quarantine = &status.quarantine;
    let mut text = String::new();
    if quarantine.commands > 0 {
        let refused = format!("{} refused by the target", counted(quarantine.commands, "command"));
        text += &row("quarantine", &refused);
    }
    if !quarantine.kinds.is_empty() {
        let kinds: Vec<String> =
            quarantine.kinds.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
        text += &row("left out", &kinds.join(", "));
    }
    for sample in quarantine.samples.iter().take(SAMPLES_SHOWN) {
        text += &row("", &format!("db {} {} {}: {}", sample.db, sample.command, sample.key, sample.error));
    }
    text
}

fn row(label: &str, text: &str) -> String {
    format!("  {label:<12}{text}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::status::{DifferenceSample, QuarantineSample};

    #[test]
    fn a_run_is_summed_up() {
        let mut status = Status::default();
        status.progress.keys_applied = 2_300_000;
        status.progress.bytes_read = 203 << 20;
        status.progress.commands_applied = 1;
        status.verification.round = 2;
        status.verification.keys_compared = 2_300_000;
        status.verification.differences = 1;
        status.verification.samples.push(DifferenceSample {
            db: 0,
            key: "user:1".to_owned(),
            kind: "Different".to_owned(),
            detail: "value".to_owned(),
        });
        status.quarantine.commands = 1;
        status.quarantine.kinds.insert("FieldExpiry".to_owned(), 7);
        status.quarantine.kinds.insert("Modules".to_owned(), 1);
        status.quarantine.samples.push(QuarantineSample {
            command: "JSON.SET".to_owned(),
            key: "doc".to_owned(),
            error: "ERR unknown command".to_owned(),
            ..QuarantineSample::default()
        });
        status.replication.resumes = 2;
        let outcome = Outcome::Differences { count: 1 };
        assert_eq!(
            run_summary("orders", &status, &outcome, Duration::from_secs(72)),
            "orders: 1 difference after 1 m 12 s\n\
             \u{20} moved       2,300,000 keys (203.0 MiB) in the full sync, then 1 command\n\
             \u{20} verified    Full: 2,300,000 keys compared in 2 rounds, 1 difference\n\
             \u{20}             db 0 user:1: Different (value)\n\
             \u{20} interrupted 2 resumes, 0 full resyncs\n\
             \u{20} quarantine  1 command refused by the target\n\
             \u{20} left out    FieldExpiry 7, Modules 1\n\
             \u{20}             db 0 JSON.SET doc: ERR unknown command\n"
        );
        assert_eq!(
            run_summary("orders", &Status::default(), &Outcome::Stopped, Duration::from_millis(20)),
            "orders: stopped after 20 ms\n"
        );
    }

    #[test]
    fn a_check_is_a_table() {
        let finding = |subject: &str, level, detail: &str| Finding {
            subject: subject.to_owned(),
            level,
            detail: detail.to_owned(),
        };
        let report = CheckReport {
            findings: vec![
                finding("source", FindingLevel::Passed, "Redis 7.0.15"),
                finding("target memory", FindingLevel::Failed, "too little"),
            ],
        };
        assert_eq!(
            check_report("orders", &report),
            "orders\n  ok   source         Redis 7.0.15\n  FAIL target memory  too little\n"
        );
    }
}
