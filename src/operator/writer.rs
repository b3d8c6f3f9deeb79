//! Brings a migration's status to the API server: what has changed, seldom, and by one field manager for the
//! whole and one for each shard.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder};
use serde_json::{Value, json};

use super::api::{ApiError, Target, apply_status};
use super::status::{Change, change, keep_times, shard_change};
use crate::api::conditions::{self, is_true};
use crate::api::status::ShardStatus;
use crate::api::{Phase, Status};

/// Between two writes that tell of progress.
const PROGRESS: Duration = Duration::from_secs(5);
/// Between two writes of a migration that nobody writes to. With 200 of them, this is what they cost.
const IDLE: Duration = Duration::from_secs(300);

/// The API server takes 1 kB.
const NOTE_MAX: usize = 250;
const MANAGER: &str = "redis-migration";
/// The API server takes no longer names of field managers.
const MANAGER_MAX: usize = 128;

/// One migration's.
pub struct Writer {
    client: Client,
    recorder: Recorder,
    target: Target,
    /// Whose entries are written: those of other replicas' shards they write themselves.
    identity: String,
    told: Option<Status>,
    told_at: Option<Instant>,
    shards: BTreeMap<String, (ShardStatus, Instant)>,
    /// Entries of shards that there are no more.
    outdated: Vec<String>,
}

impl Writer {
    /// `before`: the status as it is.
    pub fn new(
        client: Client,
        recorder: Recorder,
        target: Target,
        identity: String,
        before: Option<&Status>,
    ) -> Self {
        let outdated = before.iter().flat_map(|status| &status.shards).map(|shard| shard.id.clone());
        let outdated = outdated.collect();
        let told = before.cloned();
        Self { client, recorder, target, identity, told, told_at: None, shards: BTreeMap::new(), outdated }
    }

    /// When `status` should be written; `None`: never, as it says nothing new.
    pub fn due(&self, status: &Status, now: Instant) -> Option<Instant> {
        let (Some(told), Some(told_at)) = (&self.told, self.told_at) else { return Some(now) };
        let whole = when(change(told, status), told_at);
        let ours = status.shards.iter().filter(|shard| shard.worker == self.identity);
        ours.filter_map(|shard| self.shard_due(shard, now)).chain(whole).min()
    }

    /// As [`Self::due`], of one shard's entry.
    pub fn shard_due(&self, shard: &ShardStatus, now: Instant) -> Option<Instant> {
        match self.shards.get(&shard.id) {
            Some((before, at)) => when(shard_change(Some(before), shard), *at),
            None => Some(now),
        }
    }

    /// Writes one shard's entry, if it says anything new.
    pub async fn write_shard(&mut self, shard: &ShardStatus) -> Result<(), ApiError> {
        let before = self.shards.get(&shard.id).map(|(before, _)| before);
        if shard_change(before, shard) == Change::Nothing {
            return Ok(());
        }
        self.apply(&manager(&shard.id), &json!({"shards": [shard]})).await?;
        self.shards.insert(shard.id.clone(), (shard.clone(), Instant::now()));
        Ok(())
    }

    /// Writes what is new; a status whose change is not due yet may be among it.
    pub async fn write(&mut self, mut status: Status) -> Result<(), ApiError> {
        if let Some(told) = &self.told {
            keep_times(&mut status, &told.conditions);
        }
        let now = Instant::now();
        for shard in &status.shards {
            if shard.worker == self.identity {
                self.write_shard(shard).await?;
            } else {
                // Should it come back, its entry is another one by then.
                self.shards.remove(&shard.id);
            }
        }
        if !status.shards.is_empty() {
            self.remove_outdated(&status.shards).await?;
        }
        let news = self.told.as_ref().is_none_or(|told| change(told, &status) != Change::Nothing);
        if news || self.told_at.is_none() {
            let mut whole = serde_json::to_value(&status).unwrap_or_default();
            if let Value::Object(fields) = &mut whole {
                fields.remove("shards");
            }
            self.apply(MANAGER, &whole).await?;
            let before = self.told.replace(status);
            self.told_at = Some(now);
            self.record(before.as_ref()).await;
        }
        Ok(())
    }

    /// As `write`, unless it says the same as what was found.
    pub async fn write_if_new(&mut self, mut status: Status) -> Result<(), ApiError> {
        if let Some(told) = &self.told {
            keep_times(&mut status, &told.conditions);
            if *told == status {
                return Ok(());
            }
        }
        self.write(status).await
    }

    async fn remove_outdated(&mut self, shards: &[ShardStatus]) -> Result<(), ApiError> {
        while let Some(id) = self.outdated.pop() {
            if shards.iter().all(|shard| shard.id != id)
                && let Err(error) = self.apply(&manager(&id), &json!({})).await
            {
                self.outdated.push(id);
                return Err(error);
            }
        }
        Ok(())
    }

    async fn apply(&self, manager: &str, status: &Value) -> Result<(), ApiError> {
        apply_status(&self.client, &self.target, manager, status).await
    }

    /// An event that no status tells of.
    pub async fn warn(&self, reason: &str, note: &str) {
        let event = Event {
            type_: EventType::Warning,
            reason: reason.to_owned(),
            note: Some(note.chars().take(NOTE_MAX).collect()),
            action: reason.to_owned(),
            secondary: None,
        };
        self.publish(&[event]).await;
    }

    async fn record(&self, before: Option<&Status>) {
        let Some(now) = &self.told else { return };
        self.publish(&events(before, now)).await;
    }

    /// Events are a courtesy: one that is not taken is not sent again.
    async fn publish(&self, events: &[Event]) {
        let Target { namespace, name, uid } = &self.target;
        let about = ObjectReference {
            api_version: Some("redis-migration.io/v1alpha1".to_owned()),
            kind: Some("RedisMigration".to_owned()),
            namespace: Some(namespace.clone()),
            name: Some(name.clone()),
            uid: Some(uid.clone()),
            ..ObjectReference::default()
        };
        for event in events {
            let published = self.recorder.publish(event, &about);
            match tokio::time::timeout(Duration::from_secs(10), published).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "an event was not taken"),
                Err(_) => tracing::debug!("an event was not taken in time"),
            }
        }
    }
}

/// Names the owner of one shard's entry.
fn manager(shard: &str) -> String {
    let name = format!("{MANAGER}/shard/{shard}");
    if name.len() <= MANAGER_MAX {
        return name;
    }
    let mut digest = crc64fast::Digest::new();
    digest.write(shard.as_bytes());
    format!("{MANAGER}/shard/{:016x}", digest.sum64())
}

fn when(change: Change, told_at: Instant) -> Option<Instant> {
    match change {
        Change::Nothing => None,
        Change::Idle => Some(told_at + IDLE),
        Change::Progress => Some(told_at + PROGRESS),
        Change::Transition => Some(told_at),
    }
}

/// What the step from one status to the next is worth telling.
fn events(before: Option<&Status>, now: &Status) -> Vec<Event> {
    let event = |type_, reason: &str, note: &str| Event {
        type_,
        reason: reason.to_owned(),
        note: Some(note.chars().take(NOTE_MAX).collect()),
        action: now.phase.as_str().to_owned(),
        secondary: None,
    };
    let mut events = Vec::new();
    let changed = |type_: &str| {
        let find =
            |status: &Status| status.conditions.iter().find(|condition| condition.type_ == type_).cloned();
        let found = find(now)?;
        let same =
            before.and_then(find).is_some_and(|old| old.status == found.status && old.reason == found.reason);
        (!same).then_some(found)
    };
    if before.is_none_or(|before| before.phase != now.phase) && now.phase != Phase::Failed {
        events.push(event(EventType::Normal, now.phase.as_str(), &now.message));
    }
    for (type_, type_of_event) in [
        (conditions::STALLED, EventType::Warning),
        (conditions::DEGRADED, EventType::Warning),
        (conditions::IN_SYNC, EventType::Normal),
        (conditions::CUTOVER_READY, EventType::Normal),
    ] {
        if let Some(condition) = changed(type_).filter(|condition| condition.status == "True") {
            let reason =
                if type_of_event == EventType::Warning { &condition.reason } else { &condition.type_ };
            events.push(event(type_of_event, reason, &condition.message));
        }
    }
    if is_true(&now.conditions, conditions::RECONCILING)
        && let Some(condition) = changed(conditions::READY)
        && now.phase == Phase::Pending
    {
        events.push(event(EventType::Warning, &condition.reason, &condition.message));
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operator::status::Told;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    #[test]
    fn names_of_managers_are_short_enough() {
        assert_eq!(manager("10.0.0.1:6379"), "redis-migration/shard/10.0.0.1:6379");
        let (one, other) = (manager(&"a".repeat(300)), manager(&"b".repeat(300)));
        assert!(one != other && one.len() <= MANAGER_MAX);
    }

    #[test]
    fn an_event_tells_a_transition_once() {
        let told =
            |before: &Status| Told { before, generation: 1, now: Time(Timestamp::UNIX_EPOCH) }.invalid("x");
        let first = told(&Status::default());
        let reasons = |before: Option<&Status>, now: &Status| {
            events(before, now).iter().map(|event| event.reason.clone()).collect::<Vec<_>>()
        };
        assert_eq!(reasons(None, &first), ["Pending", "InvalidSpec"]);
        assert_eq!(reasons(Some(&first), &told(&first)), [""; 0]);
    }
}
