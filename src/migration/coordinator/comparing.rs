//! The last comparison: while the source's writers wait, and nothing is on its way any more.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::watch;

use super::live::Switch;
use super::{Ended, Run};
use crate::api::Plan;
use crate::api::conditions::{self, reason};
use crate::migration::cutover::Measured;
use crate::migration::{MigrationError, verification};
use crate::verify::{
    Settle, VerifyError, VerifyInput, VerifyMode, VerifyProgress, VerifyReport, count_keys, verify,
};

/// Prepared before writers are made to wait.
pub(super) struct Comparison {
    input: VerifyInput,
    measured: Measured,
}

pub(super) enum Compared {
    Whole(Box<VerifyReport>),
    /// Its time was over.
    BrokenOff {
        budget: Duration,
        seen: VerifyProgress,
    },
    Failed(VerifyError),
}

impl Comparison {
    pub async fn within(self, budget: Duration) -> Compared {
        let Self { mut input, measured } = self;
        let (progress, seen) = watch::channel(VerifyProgress::default());
        // Who waits for it drops it.
        let (_stop, stopped) = watch::channel(false);
        let compared = async {
            let keys = count_keys(input.source.clone()).await?;
            input.mode = measured.fitting(input.mode, keys, budget);
            verify(input, progress, stopped).await
        };
        match tokio::time::timeout(budget, compared).await {
            Ok(Ok(report)) => Compared::Whole(Box::new(report)),
            Ok(Err(error)) => Compared::Failed(error),
            Err(_) => Compared::BrokenOff { budget, seen: *seen.borrow() },
        }
    }
}

impl Run {
    /// `None`: the plan asks for no verification.
    pub(super) fn comparison(&self) -> Result<Option<Comparison>, Ended> {
        let Some(measured) = self.measured else { return Ok(None) };
        // What the target lacks by then it lacks for good.
        let at_rest: Settle = Arc::new(|| std::future::ready(()).boxed());
        let input = verification::input(&self.plan, &self.report, &self.shards, at_rest)
            .map_err(|MigrationError { reason, message, .. }| Ended::Other { reason, message })?;
        Ok(input.map(|input| Comparison { input: VerifyInput { rounds: 1, ..input }, measured }))
    }

    /// What there is to say against the switch; `plan` is what was compared by.
    pub(super) fn judge_compared(
        &mut self,
        compared: Option<Compared>,
        plan: &Plan,
    ) -> Result<Switch, Ended> {
        let allowed = plan.verification.max_differences;
        match compared {
            None => Ok(Switch::Done),
            Some(Compared::Whole(report)) if report.differences() > allowed => {
                let when = format!("with writes paused, {}: ", share(report.mode));
                verification::show_report(&mut self.state, plan, &report, &when);
                Ok(Switch::Differs { count: report.differences() })
            }
            Some(Compared::Whole(report)) => {
                let found = verification::in_words(plan, &report);
                self.say_compared(&format!("with writes paused, {}: {found}", share(report.mode)));
                Ok(Switch::Done)
            }
            Some(Compared::BrokenOff { seen, .. }) if seen.differences > allowed => {
                let count = seen.differences;
                verification::show_progress(&mut self.state, &seen);
                let message =
                    format!("with writes paused: {count} key(s) differ of those that were looked at in time");
                self.state.set(conditions::VERIFIED, false, reason::VERIFICATION_FAILED, &message);
                self.state.publish();
                Ok(Switch::Differs { count })
            }
            Some(Compared::BrokenOff { budget, seen }) => {
                let VerifyProgress { keys_compared, suspects, .. } = seen;
                let message = format!(
                    "with writes paused: not compared to the end within the {:.1} s there were; {keys_compared} keys were, {suspects} of them not equal at first sight and not looked at again",
                    budget.as_secs_f64()
                );
                tracing::warn!("{message}");
                self.say_compared(&message);
                Ok(Switch::Done)
            }
            Some(Compared::Failed(error)) if error.is_transient() => Ok(Switch::NotDone {
                why: format!(
                    "source and target could not be compared with writes paused ({error}); writes go on at the source"
                ),
            }),
            Some(Compared::Failed(error)) => Err(Ended::Other {
                reason: reason::VERIFICATION_FAILED,
                message: format!("source and target could not be compared with writes paused: {error}"),
            }),
        }
    }

    /// Behind what the condition says of the verification before.
    fn say_compared(&mut self, message: &str) {
        let found = self.state.status.conditions.iter().find(|found| found.type_ == conditions::VERIFIED);
        let Some(found) = found else { return };
        let (truth, why) = (found.status == "True", found.reason.clone());
        let message = format!("{}; {message}", found.message);
        self.state.set(conditions::VERIFIED, truth, &why, &message);
    }
}

fn share(mode: VerifyMode) -> String {
    match mode {
        VerifyMode::Full => "all keys".to_owned(),
        VerifyMode::Sample { percent } => format!("a sample of {percent} %"),
        VerifyMode::Keys => "all keys without their values".to_owned(),
    }
}
