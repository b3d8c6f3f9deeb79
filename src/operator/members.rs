//! Which replicas of the operator are alive.
//!
//! Each replica renews one Lease of its own in the operator's namespace, and all watch these. So a migration's
//! Lease is written only when it changes hands, and costs nothing while it is held. Another's clock is never
//! compared with ours: what counts is how long ago its last renewal was seen here. Nor does silence count while
//! we could not have heard anything ourselves.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams};

use super::api::{ApiError, call};

pub const RENEW: Duration = Duration::from_secs(4);
/// A replica that was not heard of for so long is gone. Three renewals are missed by then.
pub const GONE_AFTER: Duration = Duration::from_secs(12);
/// Renewals that lie further apart than this were not a conversation without a gap.
const GAP: Duration = Duration::from_secs(8);
/// Its Lease is removed after so long, as nobody will ever renew it.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(300);

pub const LABEL: &str = "redis-migration.io/lease";
pub const REPLICA: &str = "replica";

fn lease_name(identity: &str) -> String {
    format!("redis-migration-{identity}")
}

pub struct Members {
    pub identity: String,
    pub namespace: String,
    client: Client,
    seen: Mutex<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    sightings: HashMap<String, Sighting>,
    /// The first list has been read.
    synced: bool,
    /// Since when the API server has answered without a gap; `None`: it does not.
    contact: Option<Instant>,
    last_contact: Option<Instant>,
}

/// When another replica was heard of last.
#[derive(Clone, Debug)]
struct Sighting {
    renewal: Option<MicroTime>,
    at: Instant,
    /// It removed its Lease itself.
    left: bool,
}

impl Members {
    pub fn new(client: Client, identity: String, namespace: String) -> Self {
        Self { identity, namespace, client, seen: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Says that we are alive.
    pub async fn renew(&self) -> Result<(), ApiError> {
        let name = lease_name(&self.identity);
        let labels = BTreeMap::from([
            (LABEL.to_owned(), REPLICA.to_owned()),
            ("app.kubernetes.io/managed-by".to_owned(), "redis-migration".to_owned()),
        ]);
        let lease = Lease {
            metadata: ObjectMeta { name: Some(name.clone()), labels: Some(labels), ..ObjectMeta::default() },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(GONE_AFTER.as_secs()).ok(),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..LeaseSpec::default()
            }),
        };
        let what = format!("renew Lease {}/{name}", self.namespace);
        let params = PatchParams::apply("redis-migration").force();
        let renewed = call(what, self.leases().patch(&name, &params, &Patch::Apply(&lease))).await;
        let mut seen = self.lock();
        if renewed.is_ok() {
            let now = Instant::now();
            let gap = seen.last_contact.is_none_or(|last| now.saturating_duration_since(last) > GAP);
            if gap || seen.contact.is_none() {
                seen.contact = Some(now);
            }
            seen.last_contact = Some(now);
        } else {
            seen.contact = None;
        }
        renewed.map(drop)
    }

    /// We leave in good order.
    pub async fn leave(&self) -> Result<(), ApiError> {
        self.remove(&lease_name(&self.identity)).await
    }

    async fn remove(&self, name: &str) -> Result<(), ApiError> {
        let what = format!("delete Lease {}/{name}", self.namespace);
        match call(what, self.leases().delete(name, &DeleteParams::default())).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    pub fn saw(&self, lease: &Lease) {
        let Some(spec) = &lease.spec else { return };
        let Some(identity) = spec.holder_identity.clone() else { return };
        let mut seen = self.lock();
        let known = seen.sightings.get(&identity);
        if known.is_none_or(|known| known.left || known.renewal != spec.renew_time) {
            let sighting = Sighting { renewal: spec.renew_time.clone(), at: Instant::now(), left: false };
            seen.sightings.insert(identity, sighting);
        }
    }

    pub fn left(&self, lease: &Lease) {
        if let Some(identity) = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_ref()) {
            let sighting = Sighting { renewal: None, at: Instant::now(), left: true };
            self.lock().sightings.insert(identity.clone(), sighting);
        }
    }

    pub fn synced(&self) {
        self.lock().synced = true;
    }

    pub fn is_synced(&self) -> bool {
        self.lock().synced
    }

    /// Whether this replica must be taken for dead. One whose Lease is gone has left.
    pub fn is_gone(&self, identity: &str) -> bool {
        if identity == self.identity {
            return false;
        }
        let mut seen = self.lock();
        let now = Instant::now();
        let hears = seen.last_contact.is_some_and(|last| now.saturating_duration_since(last) <= GAP);
        let Some(contact) = seen.contact.filter(|_| seen.synced && hears) else { return false };
        // Its own Lease may be about to be told of.
        let first_heard_of = || Sighting { renewal: None, at: now, left: false };
        let sighting = seen.sightings.entry(identity.to_owned()).or_insert_with(first_heard_of);
        sighting.left || is_gone(sighting.at, contact, now)
    }

    /// Replicas that share the work, ourselves included.
    pub fn alive(&self) -> usize {
        let identities: Vec<String> = self.lock().sightings.keys().cloned().collect();
        let others = identities.iter().filter(|identity| **identity != self.identity);
        1 + others.filter(|identity| !self.is_gone(identity)).count()
    }

    /// The API server has answered within the last few seconds.
    pub fn has_contact(&self) -> bool {
        self.lock().last_contact.is_some_and(|at| at.elapsed() < GONE_AFTER)
    }

    /// We have not been heard of for so long that others may soon take over what we hold.
    pub fn may_be_taken_for_gone(&self) -> bool {
        self.lock().last_contact.is_some_and(|last| last.elapsed() > GAP)
    }

    /// Removes Leases of replicas that will not come back.
    pub async fn sweep(&self) {
        let old: Vec<String> = {
            let mut seen = self.lock();
            let Some(contact) = seen.contact else { return };
            let old = |sighting: &Sighting| sighting.at.max(contact).elapsed() > FORGOTTEN_AFTER;
            let own = &self.identity;
            let sightings = seen.sightings.iter();
            let found: Vec<String> = sightings
                .filter(|(identity, sighting)| *identity != own && old(sighting))
                .map(|(identity, _)| identity.clone())
                .collect();
            seen.sightings.retain(|identity, _| !found.contains(identity));
            found
        };
        for identity in old {
            if let Err(error) = self.remove(&lease_name(&identity)).await {
                tracing::debug!(%error, "the Lease of a replica that is gone stays");
            }
        }
    }
}

/// `contact`: since when we can hear anything.
fn is_gone(sighting: Instant, contact: Instant, now: Instant) -> bool {
    now.saturating_duration_since(sighting.max(contact)) > GONE_AFTER
}

/// How long to leave a free migration to others: those who hold less than their share come first.
pub fn modesty(held: usize, all: usize, replicas: usize) -> Duration {
    let share = all.div_ceil(replicas.max(1));
    if held < share { Duration::ZERO } else { Duration::from_secs(2) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_counts_only_while_we_can_hear() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!is_gone(at(0), at(0), at(11)));
        assert!(is_gone(at(0), at(0), at(13)));
        // The API server was away for a minute and answers again since second 60.
        assert!(!is_gone(at(0), at(60), at(65)));
        assert!(is_gone(at(0), at(60), at(73)));
    }

    #[test]
    fn who_has_its_share_waits_for_the_others() {
        assert_eq!(modesty(0, 10, 2), Duration::ZERO);
        assert_eq!(modesty(4, 10, 2), Duration::ZERO);
        assert!(modesty(5, 10, 2) > Duration::ZERO);
        assert_eq!(modesty(3, 7, 2), Duration::ZERO);
        assert_eq!(modesty(0, 1, 0), Duration::ZERO);
        assert_eq!(modesty(9, 10, 1), Duration::ZERO);
    }
}
