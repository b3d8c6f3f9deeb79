//! What every reconcile shares.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::ObjectRef;
use kube::{Client, ResourceExt};
use tokio::sync::{mpsc, watch};

use super::agents::Agents;
use super::api::{ApiError, Target, has_finalizer, shown};
use super::claims::Claims;
use super::decide::{Claim, Recorded, Situation};
use super::files::AllowedFiles;
use super::health::Health;
use super::members::Members;
use super::runs::Runs;
use super::seats::Seats;
use super::writer::Writer;
use crate::api::{Phase, RedisMigration, Status};
use crate::migration::DataDir;

/// Requests to reconcile that wait for their turn; whoever asks for more waits, too.
pub const QUEUE: usize = 1024;

pub type Trigger = mpsc::Sender<ObjectRef<RedisMigration>>;

pub struct Context {
    pub client: Client,
    pub members: Members,
    pub claims: Claims,
    pub seats: Seats,
    pub agents: Agents,
    pub runs: Arc<Runs>,
    pub health: Arc<Health>,
    pub data_dir: Option<DataDir>,
    pub files: AllowedFiles,
    /// All that there are.
    pub objects: Objects,
    recorder: Recorder,
    /// By namespace; one without a name serves all.
    triggers: HashMap<Option<String>, Trigger>,
    /// Generations that this process has judged and has nothing to do for, by uid.
    parked: Mutex<HashMap<String, i64>>,
    /// Said of migrations that another installation of the operator holds, by uid.
    left_alone: Mutex<HashMap<String, String>>,
    /// Since when nobody has held what we leave to others.
    free_since: Mutex<HashMap<String, Instant>>,
    leaving: watch::Sender<bool>,
    /// Counts how often all watches had to begin anew.
    pub anew: watch::Sender<u64>,
}

/// Namespaces of the RedisMigrations that the API server has told of, by uid.
#[derive(Default)]
pub struct Objects(Mutex<HashMap<String, String>>);

impl Objects {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, target: &Target) {
        self.lock().insert(target.uid.clone(), target.namespace.clone());
    }

    pub fn remove(&self, uid: &str) {
        self.lock().remove(uid);
    }

    /// After a list of one namespace, or of all.
    pub fn keep_only(&self, scope: Option<&str>, listed: &HashSet<String>) {
        let elsewhere = |namespace: &String| scope.is_some_and(|scope| scope != namespace);
        self.lock().retain(|uid, namespace| elsewhere(namespace) || listed.contains(uid));
    }

    pub fn has(&self, uid: &str) -> bool {
        self.lock().contains_key(uid)
    }
}

impl Context {
    pub fn new(
        client: Client,
        identity: String,
        namespace: String,
        (data_dir, files): (Option<DataDir>, AllowedFiles),
        runs: Runs,
        health: Arc<Health>,
        triggers: HashMap<Option<String>, Trigger>,
    ) -> Self {
        let reporter = Reporter {
            controller: "redis-migration.io/operator".to_owned(),
            instance: Some(identity.clone()),
        };
        Self {
            claims: Claims::new(client.clone(), identity.clone(), namespace.clone()),
            members: Members::new(client.clone(), identity.clone(), namespace),
            seats: Seats::new(client.clone(), identity),
            agents: Agents::default(),
            runs: Arc::new(runs),
            health,
            data_dir,
            files,
            objects: Objects::default(),
            recorder: Recorder::new(client.clone(), reporter),
            client,
            triggers,
            parked: Mutex::default(),
            left_alone: Mutex::default(),
            free_since: Mutex::default(),
            anew: watch::Sender::new(0),
            leaving: watch::Sender::new(false),
        }
    }

    pub fn situation(&self, object: &RedisMigration) -> Situation {
        let uid = object.uid().unwrap_or_default();
        let generation = generation(object);
        let status = object.status.as_ref();
        let finished = status.is_some_and(super::status::is_finished);
        let completed = status.is_some_and(|status| status.phase == Phase::Completed);
        Situation {
            deleting: object.metadata.deletion_timestamp.is_some(),
            finalizer: has_finalizer(object),
            suspend: object.spec.suspend,
            recorded: match (finished, completed) {
                (true, true) => Recorded::Completed,
                (true, false) => Recorded::Failed,
                (false, _) => Recorded::Nothing,
            },
            kept: status.is_some_and(|status| !status.shards.is_empty()),
            observed: status.is_some_and(|status| status.observed_generation == generation),
            parked: self.parked.lock().unwrap_or_else(PoisonError::into_inner).get(&uid) == Some(&generation),
            claim: self.claims.of(&uid, |identity| self.members.is_gone(identity)),
            run: self.runs.view(&uid, generation),
        }
    }

    /// Another replica holds the migration.
    pub fn is_elsewhere(&self, object: &RedisMigration) -> bool {
        let uid = object.uid().unwrap_or_default();
        self.claims.of(&uid, |identity| self.members.is_gone(identity)) == Claim::Theirs
    }

    pub fn writer(&self, object: &RedisMigration, before: Option<&Status>) -> Writer {
        self.writer_of(Target::of(object), before)
    }

    /// Of a shard whose migration another replica coordinates.
    pub fn shard_writer(&self, target: &Target) -> Writer {
        self.writer_of(target.clone(), None)
    }

    fn writer_of(&self, target: Target, before: Option<&Status>) -> Writer {
        let identity = self.members.identity.clone();
        Writer::new(self.client.clone(), self.recorder.clone(), target, identity, before)
    }

    /// Gives the migration up, and with it its shards.
    pub async fn release(&self, target: &Target) -> Result<(), ApiError> {
        self.seats.remove_all(target).await?;
        self.claims.release(target).await
    }

    pub fn park(&self, object: &RedisMigration) {
        let mut parked = self.parked.lock().unwrap_or_else(PoisonError::into_inner);
        parked.insert(object.uid().unwrap_or_default(), generation(object));
    }

    /// Says once why a migration is left alone.
    pub async fn tell_left_alone(&self, object: &RedisMigration) {
        let uid = object.uid().unwrap_or_default();
        let Some(why) = self.claims.held_elsewhere(&uid) else { return };
        let before = {
            let mut left = self.left_alone.lock().unwrap_or_else(PoisonError::into_inner);
            left.insert(uid, why.clone())
        };
        if before.as_ref() != Some(&why) {
            tracing::warn!(migration = %shown(object), "{why}");
            self.writer(object, None).warn("HeldElsewhere", &why).await;
        }
    }

    /// How long nobody has held it, as far as we know.
    pub fn free_for(&self, uid: &str) -> std::time::Duration {
        let mut free = self.free_since.lock().unwrap_or_else(PoisonError::into_inner);
        free.entry(uid.to_owned()).or_insert_with(Instant::now).elapsed()
    }

    pub fn not_free(&self, uid: &str) {
        self.free_since.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
    }

    /// The object is no more.
    pub fn forget(&self, uid: &str) {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        self.left_alone.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        self.not_free(uid);
        self.claims.forget(uid);
        self.runs.forget(uid);
        self.runs.unlearn(uid);
    }

    /// Has the object looked at soon.
    pub async fn trigger(&self, target: &Target) {
        if let Some(trigger) = self.trigger_of(&target.namespace) {
            let object = ObjectRef::new(&target.name).within(&target.namespace);
            // An error means that the operator ends.
            let _ = trigger.send(object).await;
        }
    }

    pub fn trigger_of(&self, namespace: &str) -> Option<&Trigger> {
        self.triggers.get(&Some(namespace.to_owned())).or_else(|| self.triggers.get(&None))
    }

    pub fn leave(&self) {
        self.leaving.send_replace(true);
    }

    pub fn is_leaving(&self) -> bool {
        *self.leaving.borrow()
    }

    pub fn leaving(&self) -> watch::Receiver<bool> {
        self.leaving.subscribe()
    }
}

pub fn generation(object: &RedisMigration) -> i64 {
    object.metadata.generation.unwrap_or_default()
}
