//! The Lease of each shard whose migration is shared by several replicas: who works on it.
//!
//! It is written only when something changes; whether the holder is alive tells its own Lease (`members`). In
//! annotations it carries what the coordinator orders and what the worker tells, so that the API server's watch
//! brings either to the other. Whoever writes has read before what it changes: a coordinator that was replaced, or a
//! worker, finds out by that and writes nothing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, PostParams};
use kube::{Client, ResourceExt};
use tokio::sync::watch;

use super::api::{ApiError, Target, call};
use super::claims::{metadata, owner};
use super::members::GONE_AFTER;
use crate::api::RedisMigration;
use crate::migration::shard::{Orders, Report};
use crate::migration::spool_name;

pub const SHARD: &str = "shard";
const LINEAGE: &str = "redis-migration.io/shard";
const COORDINATOR: &str = "redis-migration.io/coordinator";
const ORDERS: &str = "redis-migration.io/orders";
const REPORT: &str = "redis-migration.io/report";
/// Both sides write to the same object.
const ATTEMPTS: u32 = 8;

/// One shard of one migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub uid: String,
    pub lineage: String,
}

/// What a shard's Lease says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// Empty: nobody.
    pub holder: String,
    /// Counts the holders.
    pub epoch: i32,
    /// The run that gives the orders.
    pub coordinator: String,
    /// `None`: the coordinator itself works on the shard.
    pub orders: Option<Orders>,
    pub report: Option<Report>,
}

impl Seat {
    fn of(lease: &Lease) -> Self {
        let spec = lease.spec.clone().unwrap_or_default();
        let text = |name: &str| lease.annotations().get(name).cloned().unwrap_or_default();
        // What a newer version wrote, and this one cannot read, counts as nothing.
        Self {
            holder: spec.holder_identity.unwrap_or_default(),
            epoch: spec.lease_transitions.unwrap_or_default(),
            coordinator: text(COORDINATOR),
            orders: serde_json::from_str(&text(ORDERS)).ok(),
            report: serde_json::from_str(&text(REPORT)).ok(),
        }
    }

    fn put_into(&self, lease: &mut Lease) {
        let Self { holder, epoch, coordinator, orders, report } = self;
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(holder.clone()).filter(|holder| !holder.is_empty());
        spec.lease_transitions = Some(*epoch);
        let json = |value: Option<serde_json::Result<String>>| value.and_then(Result::ok).unwrap_or_default();
        let texts = [
            (COORDINATOR, coordinator.clone()),
            (ORDERS, json(orders.as_ref().map(serde_json::to_string))),
            (REPORT, json(report.as_ref().map(serde_json::to_string))),
        ];
        for (name, text) in texts {
            if text.is_empty() {
                lease.annotations_mut().remove(name);
            } else {
                lease.annotations_mut().insert(name.to_owned(), text);
            }
        }
    }

    /// Its work has come to an end.
    pub fn is_over(&self) -> bool {
        self.report.as_ref().is_some_and(|report| report.over.is_some())
    }

    /// A worker in the holder's process is at it, or about to be.
    pub fn is_worked_on(&self) -> bool {
        !self.holder.is_empty() && self.orders.is_some() && !self.is_over()
    }
}

/// All shards' Leases.
pub struct Seats {
    client: Client,
    identity: String,
    state: Mutex<HashMap<Key, Known>>,
}

struct Known {
    lease: Option<Lease>,
    told: watch::Sender<Option<Seat>>,
}

impl Default for Known {
    fn default() -> Self {
        Self { lease: None, told: watch::Sender::new(None) }
    }
}

impl Seats {
    pub fn new(client: Client, identity: String) -> Self {
        Self { client, identity, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Known>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of a Lease, from now on; `None` while there is none.
    pub fn follow(&self, key: &Key) -> watch::Receiver<Option<Seat>> {
        self.lock().entry(key.clone()).or_default().told.subscribe()
    }

    pub fn now(&self, key: &Key) -> Option<Seat> {
        self.lock().get(key).and_then(|known| known.told.borrow().clone())
    }

    /// Of the shard whose spool has this name.
    pub fn of_spool(&self, name: &str) -> Option<Seat> {
        let state = self.lock();
        let (_, known) = state.iter().find(|(key, _)| spool_name(&key.uid, &key.lineage) == name)?;
        known.told.borrow().clone()
    }

    /// Those that name this replica as the one to work on them.
    pub fn ours(&self) -> Vec<(Key, Target)> {
        let state = self.lock();
        let ours = state.iter().filter_map(|(key, known)| {
            let told = known.told.borrow();
            let ours = told.as_ref().is_some_and(|seat| seat.holder == self.identity && seat.is_worked_on());
            Some((key.clone(), owner(known.lease.as_ref().filter(|_| ours)?)?))
        });
        ours.collect()
    }

    /// How many Leases name this replica.
    pub fn count(&self) -> usize {
        let state = self.lock();
        let ours =
            |known: &&Known| known.told.borrow().as_ref().is_some_and(|seat| seat.holder == self.identity);
        state.values().filter(ours).count()
    }

    /// A message of the watch; also what a request answered.
    pub fn saw(&self, lease: &Lease) -> Option<Key> {
        let key = key_of(lease)?;
        let mut state = self.lock();
        let known = state.entry(key.clone()).or_default();
        if known.lease.as_ref().is_some_and(|before| is_newer(before, lease)) {
            return None;
        }
        known.lease = Some(lease.clone());
        let seat = Some(Seat::of(lease));
        known.told.send_if_modified(|told| {
            let news = *told != seat;
            *told = seat;
            news
        });
        Some(key)
    }

    pub fn saw_deleted(&self, lease: &Lease) {
        let Some(key) = key_of(lease) else { return };
        let mut state = self.lock();
        // Another one may stand in its place by now.
        if let Some(known) = state.get_mut(&key)
            && known.lease.as_ref().is_some_and(|known| known.uid() == lease.uid())
        {
            known.lease = None;
            known.told.send_replace(None);
        }
        state.retain(|_, known| known.lease.is_some() || known.told.receiver_count() > 0);
    }

    /// After a list: what is not in it is gone.
    pub fn keep_only(&self, namespace: Option<&str>, listed: &HashSet<String>) {
        let mut state = self.lock();
        for known in state.values_mut() {
            let Some(lease) = &known.lease else { continue };
            let here = namespace.is_none_or(|one| lease.namespace().as_deref() == Some(one));
            if here && lease.uid().is_none_or(|uid| !listed.contains(&uid)) {
                known.lease = None;
                known.told.send_replace(None);
            }
        }
        state.retain(|_, known| known.lease.is_some() || known.told.receiver_count() > 0);
    }

    /// Gives the shard to `holder`, whoever has it; its worker begins with `orders`. The new epoch.
    pub async fn give(
        &self,
        object: &RedisMigration,
        key: &Key,
        holder: &str,
        coordinator: &str,
        orders: Option<Orders>,
    ) -> Result<i32, ApiError> {
        let target = Target::of(object);
        let what = format!("give shard {} of {}/{} to {holder}", key.lineage, target.namespace, target.name);
        let api = self.leases(&target.namespace);
        let known = self.lock().get(key).and_then(|known| known.lease.clone());
        let mut known = match known {
            Some(lease) => Some(lease),
            None => call(what.clone(), api.get_opt(&name_of(key))).await?,
        };
        let mut attempts = 0;
        loop {
            attempts += 1;
            let mut seat =
                Seat { holder: holder.to_owned(), coordinator: coordinator.to_owned(), ..Seat::default() };
            seat.orders.clone_from(&orders);
            let now = MicroTime(Timestamp::now());
            let mut lease = known.clone().unwrap_or_else(|| {
                let mut metadata = metadata(object, &name_of(key), SHARD);
                let lineage = (LINEAGE.to_owned(), key.lineage.clone());
                metadata.annotations = Some(BTreeMap::from([lineage]));
                Lease { metadata, spec: None }
            });
            let before = lease.spec.as_ref().and_then(|spec| spec.lease_transitions);
            seat.epoch = before.map_or(0, |before| before.saturating_add(1));
            lease.spec = Some(LeaseSpec {
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                lease_duration_seconds: i32::try_from(GONE_AFTER.as_secs()).ok(),
                ..LeaseSpec::default()
            });
            seat.put_into(&mut lease);
            let written = match &known {
                Some(_) => {
                    call(what.clone(), api.replace(&name_of(key), &PostParams::default(), &lease)).await
                }
                None => call(what.clone(), api.create(&PostParams::default(), &lease)).await,
            };
            match written {
                Ok(lease) => {
                    self.saw(&lease);
                    return Ok(seat.epoch);
                }
                Err(error) if attempts < ATTEMPTS && (error.is_conflict() || error.is_not_found()) => {
                    known = call(what.clone(), api.get_opt(&name_of(key))).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Changes a Lease that is there; `change` says whether it still is what it must be. False: it is not, and
    /// nothing was written.
    pub async fn edit(
        &self,
        target: &Target,
        key: &Key,
        mut change: impl FnMut(&mut Seat) -> bool,
    ) -> Result<bool, ApiError> {
        let what = format!("write Lease {}/{}", target.namespace, name_of(key));
        let api = self.leases(&target.namespace);
        let mut known = self.lock().get(key).and_then(|known| known.lease.clone());
        let mut attempts = 0;
        loop {
            attempts += 1;
            let Some(mut lease) = known else { return Ok(false) };
            let before = Seat::of(&lease);
            let mut seat = before.clone();
            if !change(&mut seat) {
                return Ok(false);
            }
            if seat == before {
                return Ok(true);
            }
            seat.put_into(&mut lease);
            match call(what.clone(), api.replace(&name_of(key), &PostParams::default(), &lease)).await {
                Ok(lease) => {
                    self.saw(&lease);
                    return Ok(true);
                }
                Err(error) if error.is_not_found() => return Ok(false),
                Err(error) if error.is_conflict() && attempts < ATTEMPTS => {
                    known = call(what.clone(), api.get_opt(&name_of(key))).await?;
                    if let Some(lease) = &known {
                        self.saw(lease);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The migration is not worked on any more: its shards' Leases go.
    pub async fn remove_all(&self, target: &Target) -> Result<(), ApiError> {
        let keys: Vec<Key> = {
            let state = self.lock();
            let of_target =
                state.iter().filter(|(key, known)| key.uid == target.uid && known.lease.is_some());
            of_target.map(|(key, _)| key.clone()).collect()
        };
        for key in keys {
            let name = name_of(&key);
            let what = format!("delete Lease {}/{name}", target.namespace);
            match call(what, self.leases(&target.namespace).delete(&name, &DeleteParams::default())).await {
                Err(error) if !error.is_not_found() => return Err(error),
                _ => {}
            }
            if let Some(known) = self.lock().get_mut(&key) {
                known.lease = None;
                known.told.send_replace(None);
            }
        }
        Ok(())
    }

    fn leases(&self, namespace: &str) -> Api<Lease> {
        Api::namespaced(self.client.clone(), namespace)
    }
}

/// Letters, digits, `-` and `.` only, as names of objects are.
fn name_of(key: &Key) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c.to_ascii_lowercase() } else { '-' };
    format!("redis-migration-{}-{}", key.uid, key.lineage.chars().map(safe).collect::<String>())
}

fn key_of(lease: &Lease) -> Option<Key> {
    let lineage = lease.annotations().get(LINEAGE)?.clone();
    Some(Key { uid: owner(lease)?.uid, lineage })
}

/// What was answered to a write may come before what the watch tells of the time before it. The API server counts
/// versions upwards, which newer ones promise; where they cannot be compared, what came last counts.
fn is_newer(known: &Lease, other: &Lease) -> bool {
    let version = |lease: &Lease| lease.resource_version().and_then(|version| version.parse::<u64>().ok());
    known.uid() == other.uid()
        && matches!((version(known), version(other)), (Some(known), Some(other)) if known > other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::shard::{Over, Start};

    fn key(lineage: &str) -> Key {
        Key { uid: "0f1e".to_owned(), lineage: lineage.to_owned() }
    }

    #[test]
    fn names_are_names_of_objects() {
        assert_eq!(name_of(&key("5461")), "redis-migration-0f1e-5461");
        assert_eq!(name_of(&key("Node_1:6379")), "redis-migration-0f1e-node-1-6379");
    }

    #[test]
    fn a_seat_is_read_back_from_its_lease() {
        let mut lease = Lease::default();
        assert_eq!(Seat::of(&lease), Seat::default());
        let start = Start { lineage: "0".to_owned(), slots: "0-99".parse().unwrap(), ..Start::default() };
        let orders =
            Orders { start, release: true, wanted: Some("1-5".parse().unwrap()), ..Orders::default() };
        let over = Over::KeyExists { key: "k".to_owned() };
        let report = Report { answered: 7, over: Some(over), ..Report::default() };
        let seat = Seat {
            holder: "a".to_owned(),
            epoch: 3,
            coordinator: "b/1".to_owned(),
            orders: Some(orders),
            report: Some(report),
        };
        seat.put_into(&mut lease);
        assert_eq!(Seat::of(&lease), seat);
        assert!(seat.is_over() && !seat.is_worked_on());
        // The same without what there is no more.
        let seat = Seat { holder: String::new(), orders: None, report: None, ..seat };
        seat.put_into(&mut lease);
        assert_eq!(Seat::of(&lease), seat);
        assert_eq!(lease.annotations().len(), 1);
    }
}
