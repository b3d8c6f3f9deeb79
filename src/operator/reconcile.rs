//! One object, step by step, until there is nothing left to do for now.

mod ending;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use kube::runtime::controller::Action;
use thiserror::Error;

use super::api::{ApiError, Target, fresh, set_finalizer, shown};
use super::claims::Claimed;
use super::context::{Context, generation};
use super::decide::{Run, Step, Why, decide};
use super::members::modesty;
use super::placing::{Placing, Shared};
use super::runs::{Ended, Start, by};
use super::secrets::Secrets;
use super::status::{Told, is_finished};
use crate::api::conditions::{self, is_true, reason};
use crate::api::plan::{SpecFault, validate};
use crate::api::{Phase, Plan, RedisMigration, Status};
use crate::migration::Outcome;

/// Far more than any object needs at once.
const STEPS_MAX: usize = 20;
/// A Lease that was deleted while somebody holds on to it.
const LEFT_TO_HOLDER: Duration = Duration::from_secs(2);
/// Who ran a migration ends it first, and has the Secrets that it needs for that.
const LEFT_TO_RUNNER: Duration = Duration::from_secs(15);
const SOON: Duration = Duration::from_millis(500);

#[derive(Debug, Error)]
pub enum ReconcileError {
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// Where a step leads.
enum Next {
    Again(Box<RedisMigration>),
    Rest(Action),
}

pub async fn reconcile(object: Arc<RedisMigration>, context: Arc<Context>) -> Result<Action, ReconcileError> {
    if object.uid().is_none() || context.is_leaving() {
        return Ok(Action::await_change());
    }
    if !context.members.is_synced() || !context.health.leases_listed() {
        return Ok(Action::requeue(SOON));
    }
    let mut object = Box::new(RedisMigration::clone(&object));
    for _ in 0..STEPS_MAX {
        let step = decide(&context.situation(&object));
        tracing::debug!(migration = %shown(&object), ?step);
        match context.act(step, object).await? {
            Next::Again(now) => object = now,
            Next::Rest(action) => return Ok(action),
        }
        if context.is_leaving() {
            return Ok(Action::await_change());
        }
    }
    tracing::warn!(migration = %shown(&object), "reconciling does not come to rest");
    Ok(Action::requeue(Duration::from_secs(10)))
}

impl Context {
    async fn act(self: &Arc<Self>, step: Step, object: Box<RedisMigration>) -> Result<Next, ReconcileError> {
        let uid = object.uid().unwrap_or_default();
        match step {
            Step::Wait => {
                self.not_free(&uid);
                if self.is_elsewhere(&object) {
                    self.runs.unlearn(&uid);
                    self.tell_left_alone(&object).await;
                }
                let rest = self.runs.waits(&uid).map_or_else(Action::await_change, Action::requeue);
                Ok(Next::Rest(rest))
            }
            Step::Claim => self.claim(object).await,
            Step::Release => {
                self.release(&Target::of(&object)).await?;
                Ok(Next::Rest(Action::await_change()))
            }
            Step::Start => self.start(object).await,
            Step::Update => self.update(object).await,
            Step::Stop(why) => {
                tracing::info!(migration = %shown(&object), ?why, "stopping");
                self.runs.stop(&uid, why);
                Ok(Next::Rest(Action::await_change()))
            }
            Step::Forget => {
                let mut object = object;
                if let Some(ended) = self.runs.ended(&uid) {
                    object.status = Some(self.merged(&object, ended.status));
                }
                self.runs.forget(&uid);
                Ok(Next::Again(object))
            }
            Step::PutOff => self.run_put_off(object).await,
            Step::Conclude => self.conclude(object).await,
            Step::ShowSuspended => self.show_suspended(object).await,
            Step::CleanUp => self.clean_up(object).await,
            Step::DropFinalizer => self.drop_finalizer(object).await,
            Step::Acknowledge => {
                let before = object.status.clone().unwrap_or_default();
                let status = self.told(&object, &before).same();
                self.write(object, status).await
            }
        }
    }

    async fn drop_finalizer(&self, object: Box<RedisMigration>) -> Result<Next, ReconcileError> {
        let Some(object) = fresh(&self.client, &object).await? else {
            return Ok(Next::Rest(Action::await_change()));
        };
        if decide(&self.situation(&object)) != Step::DropFinalizer {
            return Ok(Next::Again(Box::new(object)));
        }
        Ok(match gone(set_finalizer(&self.client, &object, false).await)? {
            Some(object) => Next::Again(Box::new(object)),
            None => Next::Rest(Action::await_change()),
        })
    }

    async fn claim(&self, object: Box<RedisMigration>) -> Result<Next, ReconcileError> {
        let target = Target::of(&object);
        let running = matches!(self.runs.view(&target.uid, generation(&object)), Run::Running { .. });
        let (held, all) = self.claims.count();
        let mut wait = modesty(held, all + 1, self.members.alive());
        let works = |status: &Status| {
            !status.shards.is_empty() && !is_finished(status) && status.phase != Phase::Suspended
        };
        if object.status.as_ref().is_some_and(works) && self.claims.is_missing(&target.uid) {
            // Whoever works on it makes it anew at once.
            wait = wait.max(LEFT_TO_HOLDER);
        }
        let deleting = object.metadata.deletion_timestamp.is_some() && !running;
        let left = wait.saturating_sub(self.free_for(&target.uid));
        if !running && !left.is_zero() {
            return Ok(Next::Rest(Action::requeue(left)));
        }
        let claimed = match self.claims.claim(&object).await {
            // Its Lease went with the namespace, and nobody can have another one.
            Err(error) if deleting && error.is_namespace_terminating() => {
                let left = LEFT_TO_RUNNER.saturating_sub(self.free_for(&target.uid));
                if self.runs.latest(&target.uid).is_none() && !left.is_zero() {
                    return Ok(Next::Rest(Action::requeue(left)));
                }
                return self.clean_up(object).await;
            }
            claimed => claimed?,
        };
        match claimed {
            Claimed::Missed => Ok(Next::Rest(Action::requeue(SOON))),
            Claimed::Ours => {
                self.not_free(&target.uid);
                tracing::info!(migration = %shown(&object), "claimed");
                // What the watch has told may be older than what the last holder wrote.
                match fresh(&self.client, &object).await? {
                    Some(now) => Ok(Next::Again(Box::new(now))),
                    None => {
                        self.release(&target).await?;
                        Ok(Next::Rest(Action::await_change()))
                    }
                }
            }
        }
    }

    async fn start(self: &Arc<Self>, object: Box<RedisMigration>) -> Result<Next, ReconcileError> {
        let Some(object) = fresh(&self.client, &object).await? else {
            return Ok(Next::Rest(Action::await_change()));
        };
        // So may the claim be, while the watch of the Leases stands still.
        self.claims.read(&Target::of(&object)).await?;
        if decide(&self.situation(&object)) != Step::Start {
            return Ok(Next::Again(Box::new(object)));
        }
        let resolved = match self.resolve(&object, &Secrets::default()).await {
            // As good as missing, until somebody grants it.
            Err(ReconcileError::Api(error)) if error.code() == Some(403) => {
                let object = Box::new(object);
                return self.put_off(object, reason::SECRET_NOT_FOUND, &error.to_string(), false).await;
            }
            resolved => resolved?,
        };
        let (plan, secrets) = match resolved {
            Ok(resolved) => resolved,
            Err(faults) if faults.iter().all(|fault| fault.secret_missing) => {
                return self
                    .put_off(Box::new(object), reason::SECRET_NOT_FOUND, &lines(&faults), false)
                    .await;
            }
            Err(faults) => {
                let before = object.status.clone().unwrap_or_default();
                let status = self.told(&object, &before).invalid(&lines(&faults));
                self.park(&object);
                return self.write(Box::new(object), status).await;
            }
        };
        let object = match super::api::has_finalizer(&object) {
            true => object,
            false => match gone(set_finalizer(&self.client, &object, true).await)? {
                Some(object) => object,
                None => return Ok(Next::Rest(Action::await_change())),
            },
        };
        let target = Target::of(&object);
        let writer = self.writer(&object, object.status.as_ref());
        tracing::info!(migration = %shown(&object), generation = plan.generation, "starting");
        let start = Start {
            target: target.clone(),
            plan: Arc::new(plan),
            secrets,
            data_dir: self.data_dir.clone(),
            earlier: object.status.clone(),
            writer,
            identity: self.members.identity.clone(),
            place: Box::new({
                let (context, object) = (Arc::clone(self), object.clone());
                move |plans| Arc::new(Shared(Arc::new(Placing::new(context, object, plans))))
            }),
        };
        let context = Arc::clone(self);
        self.runs.start(start, move || {
            tokio::spawn(async move { context.trigger(&target).await });
        });
        Ok(Next::Rest(Action::await_change()))
    }

    /// The plan and the Secrets behind it, or what is wrong with the spec.
    pub(super) async fn resolve(
        &self,
        object: &RedisMigration,
        earlier: &Secrets,
    ) -> Result<Result<(Plan, Secrets), Vec<SpecFault>>, ReconcileError> {
        let namespace = object.namespace().unwrap_or_default();
        let secrets = Secrets::look_up(&self.client, &namespace, &object.spec, earlier).await?;
        // Whether to suspend is decided here; a run knows nothing of it.
        let mut asked = object.clone();
        asked.spec.suspend = false;
        Ok(validate(&asked, &secrets.store()).and_then(|plan| {
            let faults = self.files.faults(&plan);
            if faults.is_empty() { Ok((plan, secrets)) } else { Err(faults) }
        }))
    }

    async fn update(self: &Arc<Self>, object: Box<RedisMigration>) -> Result<Next, ReconcileError> {
        let uid = object.uid().unwrap_or_default();
        match self.resolve(&object, &self.runs.secrets(&uid)).await? {
            Ok((plan, secrets)) => {
                if !self.runs.update(&uid, &Arc::new(plan), secrets) {
                    tracing::info!(migration = %shown(&object), "what was changed takes another run");
                    self.runs.stop(&uid, Why::Suspended);
                }
            }
            Err(faults) => self.runs.reject(&uid, generation(&object), lines(&faults)),
        }
        Ok(Next::Rest(Action::await_change()))
    }

    async fn run_put_off(&self, object: Box<RedisMigration>) -> Result<Next, ReconcileError> {
        let uid = object.uid().unwrap_or_default();
        let Some(Ended { outcome, status, .. }) = self.runs.ended(&uid) else {
            return Ok(Next::Again(object));
        };
        let (reason, message) = match outcome {
            Outcome::Failed { reason, message, .. } => (reason, message),
            Outcome::Superseded { message } => {
                // Most likely the Lease goes, too; what is true of the migration its new holder says.
                tracing::warn!(migration = %shown(&object), message, "shut out");
                let (_, wait) = self.runs.put_off(&Target::of(&object), generation(&object), true);
                return Ok(Next::Rest(Action::requeue(wait)));
            }
            Outcome::Done | Outcome::Differences { .. } | Outcome::Stopped => return Ok(Next::Again(object)),
        };
        let mut object = object;
        let followed = is_true(&status.conditions, conditions::FULL_SYNCED);
        object.status = Some(self.merged(&object, status));
        self.put_off(object, reason, &message, followed).await
    }

    /// Tries again later, or gives up after `progressDeadlineSeconds`. `afresh`: there was progress meanwhile.
    async fn put_off(
        &self,
        object: Box<RedisMigration>,
        reason: &str,
        message: &str,
        afresh: bool,
    ) -> Result<Next, ReconcileError> {
        let target = Target::of(&object);
        let (attempts, wait) = self.runs.put_off(&target, generation(&object), afresh);
        let before = object.status.clone().unwrap_or_default();
        let told = self.told(&object, &before);
        let deadline =
            u64::try_from(object.spec.failure_policy.progress_deadline_seconds).unwrap_or_default();
        let late = deadline > 0 && attempts.since.elapsed() > Duration::from_secs(deadline);
        let status = if late {
            self.runs.forget(&target.uid);
            told.failed(reason::DEADLINE_EXCEEDED, &format!("not for {deadline} s: {message}"))
        } else {
            told.waiting(reason, message)
        };
        let next = self.write(object, status).await?;
        Ok(if late { next } else { Next::Rest(Action::requeue(wait)) })
    }

    /// The run's status with what only the object's has.
    fn merged(&self, object: &RedisMigration, status: Status) -> Status {
        let before = object.status.as_ref();
        let mut status = by(status, &self.members.identity);
        if status.shards.is_empty() {
            status.shards = before.map(|before| before.shards.clone()).unwrap_or_default();
        }
        status
    }

    fn told<'a>(&self, object: &RedisMigration, before: &'a Status) -> Told<'a> {
        Told { before, generation: generation(object), now: Time(Timestamp::now()) }
    }

    /// Writes a status that no run tells.
    async fn write(&self, mut object: Box<RedisMigration>, status: Status) -> Result<Next, ReconcileError> {
        let mut writer = self.writer(&object, object.status.as_ref());
        match writer.write_if_new(status.clone()).await {
            Err(error) if error.is_not_found() => return Ok(Next::Rest(Action::await_change())),
            written => written?,
        }
        object.status = Some(status);
        Ok(Next::Again(object))
    }
}

/// `None`: the object is gone. A conflict is left to the next attempt.
fn gone(result: Result<RedisMigration, ApiError>) -> Result<Option<RedisMigration>, ApiError> {
    match result {
        Ok(object) => Ok(Some(object)),
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

fn lines(faults: &[SpecFault]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
