//! The figures of a run: rows, their medians, the verdict, the table and the JSON.

use serde_json::{Value, json};

/// What a row's numbers are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Unit {
    Seconds,
    Milliseconds,
    Mebibytes,
    Commands,
    PerSecond,
}

/// What is held against `must` and `aim`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Judged {
    /// The median of ours ÷ limit, each of one run.
    Ratio,
    /// The median of ours.
    Ours,
}

/// One line of the table. `ours` and `limit` hold one number a run, in the same order.
#[derive(Debug, Clone)]
pub struct Row {
    pub id: &'static str,
    pub what: &'static str,
    /// What `limit` is.
    pub against: &'static str,
    pub unit: Unit,
    pub judged: Judged,
    pub must: f64,
    pub aim: f64,
    pub ours: Vec<f64>,
    pub limit: Vec<f64>,
    /// CPU seconds of the tool.
    pub cpu: Vec<f64>,
    /// Highest memory of the tool, in bytes.
    pub peak: Vec<u64>,
    /// Why there is no number, or a number not to be trusted.
    pub failed: Option<String>,
}

/// Pass, miss, or nothing to judge.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    AimMet,
    MustMet,
    Missed,
    Failed,
    NotMeasured,
}

impl Row {
    pub fn new(id: &'static str, what: &'static str, against: &'static str) -> Row {
        Row {
            id,
            what,
            against,
            unit: Unit::Seconds,
            judged: Judged::Ratio,
            must: f64::INFINITY,
            aim: f64::INFINITY,
            ours: Vec::new(),
            limit: Vec::new(),
            cpu: Vec::new(),
            peak: Vec::new(),
            failed: None,
        }
    }

    pub fn within(mut self, must: f64, aim: f64) -> Row {
        (self.must, self.aim) = (must, aim);
        self
    }

    /// Judges ours by itself, in `unit`.
    pub fn absolute(mut self, unit: Unit) -> Row {
        (self.unit, self.judged) = (unit, Judged::Ours);
        self
    }

    /// Keeps the first reason that the row failed.
    pub fn fail(&mut self, error: &anyhow::Error) {
        self.failed.get_or_insert_with(|| format!("{error:#}"));
    }

    pub fn ratio(&self) -> Option<f64> {
        let ratios: Vec<f64> = self
            .ours
            .iter()
            .zip(&self.limit)
            .filter(|(_, limit)| **limit > 0.0)
            .map(|(o, l)| o / l)
            .collect();
        median(&ratios)
    }

    /// The number that `must` is about.
    pub fn judged_value(&self) -> Option<f64> {
        match self.judged {
            Judged::Ratio => self.ratio(),
            Judged::Ours => median(&self.ours),
        }
    }

    pub fn verdict(&self) -> Verdict {
        match self.judged_value() {
            _ if self.failed.is_some() => Verdict::Failed,
            None => Verdict::NotMeasured,
            Some(value) if value <= self.aim => Verdict::AimMet,
            Some(value) if value <= self.must => Verdict::MustMet,
            Some(_) => Verdict::Missed,
        }
    }

    fn json(&self) -> Value {
        json!({
            "id": self.id,
            "what": self.what,
            "against": self.against,
            "unit": self.unit.name(),
            "ours": self.ours,
            "limit": self.limit,
            "oursMedian": median(&self.ours),
            "limitMedian": median(&self.limit),
            "ratio": self.ratio(),
            "cpuSeconds": median(&self.cpu),
            "peakBytes": self.peak.iter().max(),
            "must": self.must,
            "aim": self.aim,
            "judged": if self.judged == Judged::Ratio { "ratio" } else { "ours" },
            "verdict": self.verdict().name(),
            "failed": self.failed,
        })
    }
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Unit::Seconds => "s",
            Unit::Milliseconds => "ms",
            Unit::Mebibytes => "MiB",
            Unit::Commands => "commands",
            Unit::PerSecond => "/s",
        }
    }
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Verdict::AimMet => "pass (aim)",
            Verdict::MustMet => "pass",
            Verdict::Missed => "MISSED",
            Verdict::Failed => "FAILED",
            Verdict::NotMeasured => "-",
        }
    }
}

/// The middle of an odd count, the mean of the middle two of an even one.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.len().checked_sub(1)? / 2, sorted.len() / 2);
    Some((sorted.get(low)? + sorted.get(high)?) / 2.0)
}

/// The share `part` (0 to 1) of the values lies at or below the result.
pub fn percentile(values: &[f64], part: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * part).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// The table for people, failures explained below it.
pub fn table(rows: &[Row]) -> String {
    const HEAD: [&str; 10] =
        ["row", "what", "ours", "limit", "ratio", "CPU s", "peak MiB", "must", "aim", "verdict"];
    let mut lines: Vec<Vec<String>> = vec![HEAD.map(str::to_owned).to_vec()];
    for row in rows {
        let with_unit =
            |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.2} {}", row.unit.name()));
        let limit = match median(&row.limit) {
            Some(value) => format!("{value:.2} {} ({})", row.unit.name(), row.against),
            None => "-".to_owned(),
        };
        let peak = row.peak.iter().max().map(|bytes| *bytes as f64 / 1_048_576.0);
        lines.push(vec![
            row.id.to_owned(),
            row.what.to_owned(),
            with_unit(median(&row.ours)),
            limit,
            plain(row.ratio()),
            plain(median(&row.cpu)),
            plain(peak),
            format!("≤ {}", (row.must * 100.0).round() / 100.0),
            format!("{}", row.aim),
            row.verdict().name().to_owned(),
        ]);
    }
    let widths: Vec<usize> = (0..HEAD.len())
        .map(|column| lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max())
        .map(Option::unwrap_or_default)
        .collect();
    let mut text = String::new();
    for line in &lines {
        let cells: Vec<String> =
            line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    for row in rows {
        if let Some(reason) = &row.failed {
            text.push_str(&format!("{}: {reason}\n", row.id));
        }
    }
    text
}

/// The same for programs.
pub fn document(rows: &[Row], machine: &str, runs: usize, scale: f64) -> Value {
    json!({ "machine": machine, "runs": runs, "scale": scale, "rows": rows.iter().map(Row::json).collect::<Vec<_>>() })
}

fn plain(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.2}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles_pick_the_value_a_reader_expects() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 0.5), Some(50.0));
        assert_eq!(percentile(&hundred, 0.99), Some(99.0));
        assert_eq!(percentile(&[7.0], 0.99), Some(7.0));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn a_ratio_is_taken_within_each_run_before_the_median() {
        let mut row = Row::new("x", "", "").within(1.5, 1.0);
        row.ours = vec![10.0, 40.0, 12.0];
        row.limit = vec![10.0, 20.0, 10.0];
        assert_eq!(row.ratio(), Some(1.2));
        assert_eq!(row.verdict(), Verdict::MustMet);
        row.must = 1.1;
        assert_eq!(row.verdict(), Verdict::Missed);
        row.fail(&anyhow::anyhow!("the tool ended"));
        assert_eq!(row.verdict(), Verdict::Failed);
    }
}
