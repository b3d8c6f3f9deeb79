//! What people and scripts see of a run: JSON lines, plain lines or a live view, and a summary.

mod json;
mod live;
mod plain;
mod statistics;
mod summary;
mod units;

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::MultiProgress;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::api::status::{Phase, Status};

pub use statistics::{statistics_page, statistics_table};
pub use summary::{check_report, run_summary, verification_summary};

/// `--output` as given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OutputFormat {
    /// Live on a terminal, plain otherwise.
    #[default]
    Auto,
    Plain,
    Json,
}

type Out = Box<dyn Write + Send>;

/// How a run is shown on standard output.
pub enum View {
    Json(json::JsonLines<Out>),
    Plain(plain::PlainLines<Out>),
    Live(live::LiveView),
}

/// Why a status is shown now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Tick,
    /// The phase or a condition changed.
    Transition,
    End,
}

impl View {
    pub fn new(format: OutputFormat, name: &str, namespace: &str) -> Self {
        match format {
            OutputFormat::Json => View::Json(json::JsonLines::new(stdout(), name, namespace)),
            OutputFormat::Auto if io::stdout().is_terminal() => View::Live(live::LiveView::new(name)),
            OutputFormat::Auto | OutputFormat::Plain => View::Plain(plain::PlainLines::new(stdout())),
        }
    }

    /// What log lines must step around.
    pub fn live(&self) -> Option<MultiProgress> {
        match self {
            View::Live(live) => Some(live.bars()),
            View::Json(_) | View::Plain(_) => None,
        }
    }

    /// For people, rather than for a program that reads JSON.
    pub fn is_for_people(&self) -> bool {
        !matches!(self, View::Json(_))
    }

    /// Shows `status` until its sender is gone, and answers the last one. Writes block: run it where
    /// a slow reader of standard output holds up nothing else.
    pub async fn follow(mut self, mut status: watch::Receiver<Status>) -> Status {
        let mut ticks = interval(self.period());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut marks = Marks::default();
        loop {
            tokio::select! {
                changed = status.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let turned = {
                        let now = status.borrow_and_update();
                        marks.turn(&now).then(|| now.clone())
                    };
                    if let Some(now) = turned {
                        self.show(&now, Moment::Transition);
                    }
                }
                _ = ticks.tick() => {
                    let now = status.borrow().clone();
                    let moment = if marks.turn(&now) { Moment::Transition } else { Moment::Tick };
                    self.show(&now, moment);
                }
            }
        }
        let last = status.borrow().clone();
        self.show(&last, Moment::End);
        last
    }

    fn period(&self) -> Duration {
        match self {
            // Promised at least once a second; the slack is for a busy machine.
            View::Json(_) => Duration::from_millis(900),
            View::Plain(_) => Duration::from_secs(5),
            View::Live(_) => Duration::from_millis(200),
        }
    }

    fn show(&mut self, status: &Status, moment: Moment) {
        match self {
            View::Json(lines) => lines.show(status),
            View::Plain(lines) => lines.show(status, moment),
            View::Live(live) => live.show(status, moment),
        }
    }
}

fn stdout() -> Out {
    Box::new(io::stdout())
}

/// What counts as a transition.
#[derive(Default)]
struct Marks {
    phase: Option<Phase>,
    /// Type, status, reason.
    conditions: Vec<(String, String, String)>,
}

impl Marks {
    /// Takes the new marks; answers whether they differ from the old.
    fn turn(&mut self, status: &Status) -> bool {
        let same = self.phase == Some(status.phase)
            && self.conditions.len() == status.conditions.len()
            && self.conditions.iter().zip(&status.conditions).all(|((type_, truth, reason), now)| {
                *type_ == now.type_ && *truth == now.status && *reason == now.reason
            });
        if !same {
            self.phase = Some(status.phase);
            self.conditions = status
                .conditions
                .iter()
                .map(|now| (now.type_.clone(), now.status.clone(), now.reason.clone()))
                .collect();
        }
        !same
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::conditions::{self, Conditions, Truth, reason};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    #[test]
    fn phase_and_conditions_are_transitions_counters_are_not() {
        let mut marks = Marks::default();
        let mut status = Status::default();
        assert!(marks.turn(&status), "the first is always one");
        status.progress.keys_applied = 5;
        assert!(!marks.turn(&status));
        status.phase = Phase::FullSync;
        assert!(marks.turn(&status));
        let now = Time(Timestamp::from_second(1).unwrap());
        Conditions::new(&mut status.conditions, 1).set(
            conditions::READY,
            Truth::False,
            reason::FULL_SYNC,
            "",
            &now,
        );
        assert!(marks.turn(&status));
        Conditions::new(&mut status.conditions, 1).set(
            conditions::READY,
            Truth::False,
            reason::FULL_SYNC,
            "x",
            &now,
        );
        assert!(!marks.turn(&status), "a message alone is none");
    }

    #[derive(Clone, Default)]
    struct Shared(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Shared {
        fn lines(&self) -> Vec<serde_json::Value> {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
        }

        async fn until(&self, told: impl Fn(&[serde_json::Value]) -> bool) {
            let wait = async {
                while !told(&self.lines()) {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap();
        }
    }

    #[tokio::test]
    async fn json_tells_transitions_at_once_repeats_itself_and_ends_with_the_last_status() {
        let out = Shared::default();
        let (status, seen) = watch::channel(Status::default());
        let view = View::Json(json::JsonLines::new(Box::new(out.clone()), "orders", "shop"));
        let shown = tokio::spawn(view.follow(seen));
        out.until(|lines| !lines.is_empty()).await;

        let before = std::time::Instant::now();
        status.send_modify(|status| status.phase = Phase::FullSync);
        out.until(|lines| lines.iter().any(|line| line["status"]["phase"] == "FullSync")).await;
        assert!(before.elapsed() < Duration::from_millis(500), "not at once");

        let told = out.lines().len();
        out.until(|lines| lines.len() > told).await;
        assert!(before.elapsed() < Duration::from_secs(3), "not once a second");

        status.send_modify(|status| status.message = "done".to_owned());
        drop(status);
        let last = tokio::time::timeout(Duration::from_secs(10), shown).await.unwrap().unwrap();
        assert_eq!(last.message, "done");
        assert_eq!(out.lines().last().unwrap()["status"]["message"], "done");
    }
}
