//! How a migration's work ends: its outcome, suspended, deleted.

use std::sync::Arc;
use std::time::Duration;

use kube::ResourceExt;
use kube::runtime::controller::Action;

use super::{Next, ReconcileError, gone, lines};
use crate::api::{Phase, RedisMigration, Status};
use crate::migration::{self, MigrationError, Outcome};
use crate::operator::api::{ApiError, Target, fresh, set_finalizer, shown};
use crate::operator::context::{Context, generation};
use crate::operator::decide::{Step, decide};
use crate::operator::runs::{Ended, Latest, by};
use crate::operator::secrets::Secrets;
use crate::operator::status::is_transient;

/// Removing what is kept in a target that may be gone, too.
const CLEAN_UP_MAX: Duration = Duration::from_secs(30);
const CLEAN_UP_AGAIN: Duration = Duration::from_secs(2);
/// Asking the sources what their backlogs hold.
const BACKLOG_MAX: Duration = Duration::from_secs(5);

impl Context {
    pub(super) async fn conclude(&self, object: Box<RedisMigration>) -> Result<Next, ReconcileError> {
        let uid = object.uid().unwrap_or_default();
        let Some(Ended { outcome, status, writer }) = self.runs.ended(&uid) else {
            return Ok(Next::Again(object));
        };
        if matches!(outcome, Outcome::Done) {
            self.runs.unlearn(&uid);
        } else {
            self.claims.read(&Target::of(&object)).await?;
            if decide(&self.situation(&object)) != Step::Conclude {
                return Ok(Next::Again(object));
            }
        }
        let mut object = object;
        let mut status = by(status, &self.members.identity);
        if status.observed_generation != generation(&object) && status.phase == Phase::Completed {
            // Changed at the last moment: what is done is done.
            status = self.told(&object, &status).same();
        }
        if let Err(error) = writer.lock().await.write(status.clone()).await
            && !error.is_not_found()
        {
            return Err(error.into());
        }
        self.runs.forget(&uid);
        object.status = Some(status);
        Ok(Next::Again(object))
    }

    /// Before we leave: an outcome that nobody else can know.
    pub async fn tell_outcome(&self, uid: &str) -> Result<(), ApiError> {
        let Some(Ended { outcome: Outcome::Done, status, writer }) = self.runs.ended(uid) else {
            return Ok(());
        };
        writer.lock().await.write(by(status, &self.members.identity)).await
    }

    pub(super) async fn show_suspended(&self, object: Box<RedisMigration>) -> Result<Next, ReconcileError> {
        let before = object.status.clone().unwrap_or_default();
        let mut message = "suspended".to_owned();
        if !before.shards.is_empty()
            && let Ok(Ok((plan, _))) = self.resolve(&object, &Secrets::default()).await
            && let Ok(room) = tokio::time::timeout(BACKLOG_MAX, migration::backlog(&plan, &before)).await
        {
            message = format!("suspended; {room}");
        }
        let status = self.told(&object, &before).suspended(&message);
        self.park(&object);
        self.runs.forget(&object.uid().unwrap_or_default());
        self.write(object, status).await
    }

    pub(super) async fn clean_up(&self, object: Box<RedisMigration>) -> Result<Next, ReconcileError> {
        // What the run told last may not have been written.
        let told = object.status.clone().unwrap_or_default();
        let Some(object) = fresh(&self.client, &object).await? else {
            return Ok(Next::Rest(Action::await_change()));
        };
        let target = Target::of(&object);
        let mut status = object.status.clone().unwrap_or_default();
        if status.shards.len() < told.shards.len() || status.phase == Phase::Preflight {
            (status.shards, status.phase) = (told.shards, told.phase);
        }
        let never_begun =
            status.shards.is_empty() && matches!(status.phase, Phase::Pending | Phase::Preflight);
        if status.phase != Phase::Completed && !never_begun {
            let cleaning = tokio::time::timeout(CLEAN_UP_MAX, self.clean_target(&object, &status)).await;
            let left = match cleaning {
                Ok(Ok(())) => None,
                Ok(Err(why)) => Some(why),
                Err(_) => Some(format!("not done within {} s", CLEAN_UP_MAX.as_secs())),
            };
            if let Some(why) = left {
                let told = format!("keys that begin with redis-migration: may stay on the target: {why}");
                tracing::warn!(migration = %shown(&object), "{told}");
                self.writer(&object, None).warn("CleanUpFailed", &told).await;
            }
        }
        if let Some(data_dir) = &self.data_dir {
            migration::forget(data_dir, &target.uid);
        }
        gone(set_finalizer(&self.client, &object, false).await)?;
        self.release(&target).await?;
        self.forget(&target.uid);
        Ok(Next::Rest(Action::await_change()))
    }

    /// `Err`: why keys may be left.
    async fn clean_target(&self, object: &RedisMigration, status: &Status) -> Result<(), String> {
        let latest = self.runs.latest(&object.uid().unwrap_or_default());
        let earlier = latest.as_ref().map(|latest| latest.secrets.clone()).unwrap_or_default();
        let resolved = match self.resolve(object, &earlier).await {
            Ok(Ok((plan, secrets))) => Ok((Arc::new(plan), secrets)),
            Ok(Err(faults)) => {
                // Such a spec has never run.
                let never = faults.iter().any(|fault| !fault.secret_missing);
                if never && latest.is_none() {
                    return Ok(());
                }
                Err(lines(&faults))
            }
            Err(error) => Err(error.to_string()),
        };
        let (plan, secrets) = match (resolved, latest) {
            (Ok(resolved), _) => resolved,
            // Deleted with its Secrets, as its whole namespace may be.
            (Err(_), Some(Latest { plan, secrets })) => (plan, secrets),
            (Err(why), None) => return Err(why),
        };
        // They may go at any moment.
        secrets.outlive();
        loop {
            let Err(MigrationError { reason, message, transient }) = migration::clean_up(&plan, status).await
            else {
                return Ok(());
            };
            if !transient && !is_transient(reason) {
                return Err(message);
            }
            tracing::info!(migration = %shown(object), message, "what is kept on the target cannot be removed yet");
            tokio::time::sleep(CLEAN_UP_AGAIN).await;
        }
    }
}
