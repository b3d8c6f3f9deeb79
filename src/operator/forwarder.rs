//! Beside each run: brings its status to the API server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::watch;

use super::api::ApiError;
use super::runs::by;
use super::status::{is_finished, with_fault};
use super::writer::Writer;
use crate::api::Status;

/// Between two attempts to reach an API server that does not answer.
const WRITE_AGAIN: Duration = Duration::from_secs(2);

pub type SharedWriter = Arc<tokio::sync::Mutex<Writer>>;

/// A changed spec that cannot be carried out: its generation, and what is wrong.
pub type Fault = Option<(i64, String)>;

/// Writes a run's status, as often as it is worth it, for as long as it runs.
pub struct Forwarder {
    pub status: watch::Receiver<Status>,
    pub fault: watch::Receiver<Fault>,
    pub writer: SharedWriter,
    /// Shown as the worker of all shards.
    pub identity: String,
}

impl Forwarder {
    pub async fn run(mut self) {
        let mut again_at: Option<Instant> = None;
        let mut complained = false;
        loop {
            tokio::select! {
                changed = self.status.changed() => if changed.is_err() { return },
                Ok(()) = self.fault.changed() => {}
            }
            let now = Instant::now();
            let status = self.status.borrow_and_update().clone();
            // What an outcome means for the object is not for the run to say.
            if is_finished(&status) || status.conditions.is_empty() || again_at.is_some_and(|at| now < at) {
                continue;
            }
            let status = self.composed(status);
            let mut writer = self.writer.lock().await;
            if writer.due(&status, now).is_none_or(|at| at > now) {
                continue;
            }
            again_at = None;
            let written = writer.write(status).await;
            complained &= written.is_err();
            if let Err(error) = written {
                self.complain(&error, &mut complained);
                again_at = Some(Instant::now() + WRITE_AGAIN);
            }
        }
    }

    fn composed(&self, status: Status) -> Status {
        let mut status = by(status, &self.identity);
        if let Some((generation, message)) = &*self.fault.borrow() {
            status = with_fault(status, *generation, message, &Time(Timestamp::now()));
        }
        status
    }

    /// Once, until it works again.
    fn complain(&self, error: &ApiError, complained: &mut bool) {
        if error.is_not_found() || std::mem::replace(complained, true) {
            tracing::debug!(%error, "the status cannot be written");
        } else {
            tracing::warn!(%error, "the status cannot be written now; the migration goes on");
        }
    }
}
