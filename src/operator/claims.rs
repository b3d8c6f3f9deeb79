//! The Lease of each migration: who runs it. It is written only when it changes hands; whether the holder is alive tells its own Lease (`members`).
//!
//! It is no safeguard of the data: that is the epoch in the target (`target/fence.rs`), which shuts out an
//! earlier writer whatever the Leases say. So a holder that cannot reach the API server goes on.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use kube::{Client, Resource, ResourceExt};

use super::api::{ApiError, Target, call};
use super::decide::Claim;
use super::members::{GONE_AFTER, LABEL};
use crate::api::RedisMigration;

pub const MIGRATION: &str = "migration";
/// Where the holder's own Lease is: that of another installation of the operator is not among those that we watch.
const HOME: &str = "redis-migration.io/operator-namespace";

fn lease_name(uid: &str) -> String {
    format!("redis-migration-{uid}")
}

/// What is known of all migrations' Leases.
pub struct Claims {
    client: Client,
    identity: String,
    /// Of the replicas' own Leases.
    home: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By uid of the migration, as watched and as we wrote ourselves.
    leases: HashMap<String, Known>,
    /// Uids of Leases that we gave up; a late message must not bring them back.
    given_up: HashSet<String>,
}

#[derive(Clone, Debug)]
struct Known {
    lease: Lease,
    /// Taken by this process, not by an earlier one of the same name.
    ours: bool,
}

impl Known {
    fn holder(&self) -> &str {
        self.lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()).unwrap_or_default()
    }

    /// The namespace of another installation of the operator, whose replica holds it.
    fn foreign_home(&self, home: &str) -> Option<&str> {
        let theirs = self.lease.annotations().get(HOME).filter(|theirs| *theirs != home)?;
        (!self.holder().is_empty()).then_some(theirs)
    }

    fn transitions(&self) -> i32 {
        self.lease.spec.as_ref().and_then(|spec| spec.lease_transitions).unwrap_or_default()
    }
}

/// What came of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimed {
    Ours,
    /// Somebody else was faster, or what we knew was out of date.
    Missed,
}

impl Claims {
    pub fn new(client: Client, identity: String, home: String) -> Self {
        Self { client, identity, home, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `gone`: tells of an identity that it need not be waited for.
    pub fn of(&self, uid: &str, gone: impl Fn(&str) -> bool) -> Claim {
        let state = self.lock();
        match state.leases.get(uid) {
            None => Claim::Free,
            Some(known) if known.ours => Claim::Mine,
            // Whether it is alive we do not hear.
            Some(known) if known.foreign_home(&self.home).is_some() => Claim::Theirs,
            // An earlier process of our name: there is only one at a time.
            Some(known) if known.holder() == self.identity || known.holder().is_empty() => Claim::Free,
            Some(known) if gone(known.holder()) => Claim::Free,
            Some(_) => Claim::Theirs,
        }
    }

    /// How many we hold, and how many are held in all.
    pub fn count(&self) -> (usize, usize) {
        let state = self.lock();
        (state.leases.values().filter(|known| known.ours).count(), state.leases.len())
    }

    /// Objects whose holder need not be waited for any more.
    pub fn orphans(&self, gone: impl Fn(&str) -> bool) -> Vec<Target> {
        let state = self.lock();
        let others = state.leases.values().filter(|known| !known.ours);
        let here = others.filter(|known| known.foreign_home(&self.home).is_none());
        here.filter(|known| gone(known.holder())).filter_map(|known| owner(&known.lease)).collect()
    }

    /// Why a migration is left alone that another installation of the operator holds.
    pub fn held_elsewhere(&self, uid: &str) -> Option<String> {
        let state = self.lock();
        let known = state.leases.get(uid).filter(|known| !known.ours)?;
        let theirs = known.foreign_home(&self.home)?;
        Some(format!(
            "the operator in namespace {theirs} works on it, the one in namespace {} leaves it alone: let only one of them look after this namespace; if the other one is no more, delete the Lease {}",
            self.home,
            known.lease.name_any()
        ))
    }

    pub async fn claim(&self, object: &RedisMigration) -> Result<Claimed, ApiError> {
        let target = Target::of(object);
        let name = lease_name(&target.uid);
        let known = self.lock().leases.get(&target.uid).cloned();
        let api = self.leases(&target.namespace);
        let now = MicroTime(Timestamp::now());
        let spec = |transitions| LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            acquire_time: Some(now.clone()),
            renew_time: Some(now.clone()),
            lease_duration_seconds: i32::try_from(GONE_AFTER.as_secs()).ok(),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        };
        let what = format!("claim {}/{}", target.namespace, target.name);
        let written = match known {
            Some(known) if !known.ours => {
                let spec = spec(known.transitions().saturating_add(1));
                // The resource version in it keeps us from overwriting who came before us.
                let mut lease = Lease { spec: Some(spec), ..known.lease };
                lease.annotations_mut().insert(HOME.to_owned(), self.home.clone());
                call(what, api.replace(&name, &PostParams::default(), &lease)).await
            }
            Some(_) => return Ok(Claimed::Ours),
            None => {
                let metadata = metadata(object, &name, MIGRATION);
                let mut lease = Lease { metadata, spec: Some(spec(0)) };
                lease.annotations_mut().insert(HOME.to_owned(), self.home.clone());
                call(what, api.create(&PostParams::default(), &lease)).await
            }
        };
        match written {
            Ok(lease) => {
                self.lock().leases.insert(target.uid, Known { lease, ours: true });
                Ok(Claimed::Ours)
            }
            Err(error) if error.is_conflict() || error.is_not_found() => {
                self.read(&target).await?;
                Ok(Claimed::Missed)
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the Lease, as what the watch told may be old: it is late, or this process was frozen.
    pub async fn read(&self, target: &Target) -> Result<(), ApiError> {
        let name = lease_name(&target.uid);
        let found = call(format!("get Lease {name}"), self.leases(&target.namespace).get_opt(&name)).await?;
        match found {
            Some(lease) => drop(self.saw(&lease)),
            None => drop(self.lock().leases.remove(&target.uid)),
        }
        Ok(())
    }

    /// Gives the migration to whoever wants it. Only what is ours is removed.
    pub async fn release(&self, target: &Target) -> Result<(), ApiError> {
        let Some(known) = self.lock().leases.get(&target.uid).filter(|known| known.ours).cloned() else {
            return Ok(());
        };
        let name = lease_name(&target.uid);
        let only = Preconditions { uid: known.lease.uid(), resource_version: known.lease.resource_version() };
        let params = DeleteParams { preconditions: Some(only), ..DeleteParams::default() };
        let what = format!("release {}/{}", target.namespace, target.name);
        let api = self.leases(&target.namespace);
        match call(what.clone(), api.delete(&name, &params)).await {
            Err(error) if error.is_conflict() => {
                // Written by others; to be removed only if it is still ours.
                let found = call(what.clone(), api.get_opt(&name)).await?;
                let ours = found.filter(|lease| {
                    lease.uid() == known.lease.uid()
                        && lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_ref())
                            == Some(&self.identity)
                });
                if let Some(lease) = ours {
                    let version = lease.resource_version();
                    let only = Preconditions { uid: lease.uid(), resource_version: version };
                    let params = DeleteParams { preconditions: Some(only), ..DeleteParams::default() };
                    call(what, api.delete(&name, &params)).await?;
                }
            }
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
        let mut state = self.lock();
        state.leases.remove(&target.uid);
        state.given_up.extend(known.lease.uid());
        Ok(())
    }

    /// Leaves the Lease without a holder, for another replica to go on at once. One that is gone altogether was
    /// taken away from somebody who may still hold on to it.
    pub async fn hand_over(&self, target: &Target) -> Result<(), ApiError> {
        let Some(known) = self.lock().leases.get(&target.uid).filter(|known| known.ours).cloned() else {
            return Ok(());
        };
        let mut lease = known.lease;
        if let Some(spec) = &mut lease.spec {
            spec.holder_identity = None;
        }
        let what = format!("hand over {}/{}", target.namespace, target.name);
        let api = self.leases(&target.namespace);
        match call(what, api.replace(&lease_name(&target.uid), &PostParams::default(), &lease)).await {
            Ok(lease) => drop(self.lock().leases.insert(target.uid.clone(), Known { lease, ours: false })),
            Err(error) if error.is_conflict() => self.release(target).await?,
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// There is no Lease at all.
    pub fn is_missing(&self, uid: &str) -> bool {
        !self.lock().leases.contains_key(uid)
    }

    /// The object is gone, and its Lease with it.
    pub fn forget(&self, uid: &str) {
        self.lock().leases.remove(uid);
    }

    /// A message of the watch. The object whose Lease it is, if that matters to it.
    pub fn saw(&self, lease: &Lease) -> Option<Target> {
        let owner = owner(lease)?;
        let mut state = self.lock();
        if lease.uid().is_some_and(|uid| state.given_up.contains(&uid)) {
            return None;
        }
        let new = Known { lease: lease.clone(), ours: false };
        if let Some(known) = state.leases.get_mut(&owner.uid)
            && known.ours
            && known.lease.uid() == lease.uid()
        {
            // What we wrote, or what was there before we took it.
            if new.holder() == self.identity || new.transitions() < known.transitions() {
                return None;
            }
        }
        state.leases.insert(owner.uid.clone(), new);
        Some(owner)
    }

    pub fn saw_deleted(&self, lease: &Lease) -> Option<Target> {
        let owner = owner(lease)?;
        let mut state = self.lock();
        if let Some(uid) = lease.uid() {
            state.given_up.remove(&uid);
        }
        // Another one may stand in its place by now.
        if state.leases.get(&owner.uid).is_some_and(|known| known.lease.uid() == lease.uid()) {
            state.leases.remove(&owner.uid);
        }
        Some(owner)
    }

    /// After a list: what is not in it is gone.
    pub fn keep_only(&self, namespace: Option<&str>, listed: &HashSet<String>) -> Vec<Target> {
        let mut state = self.lock();
        state.given_up.retain(|uid| listed.contains(uid));
        let lost: Vec<Target> = state
            .leases
            .values()
            .filter(|known| namespace.is_none_or(|one| known.lease.namespace().as_deref() == Some(one)))
            .filter(|known| !known.ours && known.lease.uid().is_none_or(|uid| !listed.contains(&uid)))
            .filter_map(|known| owner(&known.lease))
            .collect();
        for target in &lost {
            state.leases.remove(&target.uid);
        }
        lost
    }

    pub fn leases(&self, namespace: &str) -> Api<Lease> {
        Api::namespaced(self.client.clone(), namespace)
    }
}

/// Of a Lease about `object`; `kind`: what it is the Lease of.
pub fn metadata(object: &RedisMigration, name: &str, kind: &str) -> ObjectMeta {
    let labels = [
        (LABEL, kind.to_owned()),
        ("app.kubernetes.io/managed-by", "redis-migration".to_owned()),
        ("redis-migration.io/name", object.name_any()),
    ];
    let labels: BTreeMap<String, String> = labels.map(|(key, value)| (key.to_owned(), value)).into();
    // Of its uid, so that it goes with the object. Blocking the object's deletion would take a permission
    // more, and the finalizer does that anyway.
    let owner = OwnerReference {
        block_owner_deletion: None,
        controller: None,
        ..object.owner_ref(&()).unwrap_or_default()
    };
    ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some(labels),
        owner_references: Some(vec![owner]),
        ..ObjectMeta::default()
    }
}

/// The migration that a Lease is about.
pub fn owner(lease: &Lease) -> Option<Target> {
    let owners = lease.metadata.owner_references.as_deref().unwrap_or_default();
    let owner = owners.iter().find(|owner| owner.kind == RedisMigration::kind(&()))?;
    Some(Target { namespace: lease.namespace()?, name: owner.name.clone(), uid: owner.uid.clone() })
}
