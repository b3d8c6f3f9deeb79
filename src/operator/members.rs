//! Which replicas of the operator are alive.
//!
//! Each replica renews one Lease of its own in the operator's namespace, and all watch these. So a migration's
//! Lease is written only when it changes hands, and costs nothing while it is held. Another's clock is never
//! compared with ours: what counts is how long ago its last renewal was seen here. Nor does silence count while
//! we could not have heard anything ourselves: what shows that we can is our own renewals, as the watch tells them
//! back to us. That a request was answered does not show it, as the watch may be the last to come back.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use kube::{Client, ResourceExt};

use super::api::{ApiError, call, call_within};

pub const RENEW: Duration = Duration::from_secs(4);
/// A replica that was not heard of for so long is gone. Three renewals are missed by then.
pub const GONE_AFTER: Duration = Duration::from_secs(12);
/// A replica that missed a renewal may turn out to be gone.
const DOUBTED_AFTER: Duration = Duration::from_secs(6);
/// Renewals that lie further apart than this were not a conversation without a gap.
const GAP: Duration = Duration::from_secs(8);
/// So many of our own renewals were heard of since another's last one.
const MISSED: u64 = 3;
/// A watch that does not tell even what we write ourselves is not one.
const DEAF_AFTER: Duration = Duration::from_secs(20);
/// Its Lease is removed after so long, as nobody will ever renew it.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(300);

pub const LABEL: &str = "redis-migration.io/lease";
pub const REPLICA: &str = "replica";
const LEAVING: &str = "redis-migration.io/leaving";

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
    /// When the API server took a renewal of ours.
    last_contact: Option<Instant>,
    echo: Echo,
}

/// Our own renewals, as the watch tells them.
#[derive(Clone, Copy, Debug, Default)]
struct Echo {
    count: u64,
    /// Since when there was no gap; and the last one.
    heard: Option<(Instant, Instant)>,
}

impl Echo {
    fn hear(&mut self, now: Instant) {
        self.count += 1;
        let since = self.heard.filter(|(_, last)| now.saturating_duration_since(*last) <= GAP);
        self.heard = Some((since.map_or(now, |(since, _)| since), now));
    }

    /// Whether a replica whose last renewal was heard of `at`, when `count` of our own had been, is gone.
    fn outlasts(&self, at: Instant, count: u64, now: Instant) -> bool {
        let Some((since, last)) = self.heard else { return false };
        now.saturating_duration_since(last) <= GAP
            && now.saturating_duration_since(at.max(since)) > GONE_AFTER
            && self.count.saturating_sub(count) >= MISSED
    }
}

/// When another replica was heard of last.
#[derive(Clone, Debug)]
struct Sighting {
    renewal: Option<MicroTime>,
    at: Instant,
    /// How many renewals of our own had been heard of by then.
    echoes: u64,
    /// It removed its Lease itself.
    left: bool,
    /// It is about to, and takes nothing more.
    leaving: bool,
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

    /// Says that we are alive, and whether we are about to leave.
    pub async fn renew(&self, leaving: bool) -> Result<(), ApiError> {
        let name = lease_name(&self.identity);
        let labels = BTreeMap::from([
            (LABEL.to_owned(), REPLICA.to_owned()),
            ("app.kubernetes.io/managed-by".to_owned(), "redis-migration".to_owned()),
        ]);
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(name.clone()),
                labels: Some(labels),
                annotations: leaving.then(|| BTreeMap::from([(LEAVING.to_owned(), "true".to_owned())])),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(GONE_AFTER.as_secs()).ok(),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..LeaseSpec::default()
            }),
        };
        let what = format!("renew Lease {}/{name}", self.namespace);
        let params = PatchParams::apply("redis-migration").force();
        // Another attempt is of more use than an answer that comes after it was due.
        call_within(RENEW, what, self.leases().patch(&name, &params, &Patch::Apply(&lease))).await?;
        self.lock().last_contact = Some(Instant::now());
        Ok(())
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
            let (at, leaving) = (Instant::now(), lease.annotations().contains_key(LEAVING));
            if identity == self.identity {
                seen.echo.hear(at);
            }
            let (renewal, echoes) = (spec.renew_time.clone(), seen.echo.count);
            seen.sightings.insert(identity, Sighting { renewal, at, echoes, left: false, leaving });
        }
    }

    pub fn left(&self, lease: &Lease) {
        if let Some(identity) = lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_ref()) {
            let sighting =
                Sighting { renewal: None, at: Instant::now(), echoes: 0, left: true, leaving: true };
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
        if !seen.synced {
            return false;
        }
        let (now, echo) = (Instant::now(), seen.echo);
        // Its own Lease may be about to be told of.
        let first_heard_of =
            || Sighting { renewal: None, at: now, echoes: echo.count, left: false, leaving: false };
        let sighting = seen.sightings.entry(identity.to_owned()).or_insert_with(first_heard_of);
        sighting.left || echo.outlasts(sighting.at, sighting.echoes, now)
    }

    /// It said so in another way than by its own Lease, whose message may come later.
    pub fn leaves(&self, identity: &str) {
        if let Some(sighting) = self.lock().sightings.get_mut(identity) {
            sighting.leaving = true;
        }
    }

    /// Replicas that may be given something, ourselves included.
    pub fn living(&self) -> Vec<String> {
        let staying = |(identity, sighting): (&String, &Sighting)| {
            (*identity != self.identity && !sighting.leaving).then(|| identity.clone())
        };
        let mut living: Vec<String> = self.lock().sightings.iter().filter_map(staying).collect();
        living.retain(|identity| !self.is_gone(identity));
        living.push(self.identity.clone());
        living.sort();
        living
    }

    /// Each of these replicas, but ourselves, was heard of when it was due. While one is not, nothing is moved for
    /// balance, as it might have to be moved again.
    pub fn are_heard(&self, replicas: &[String]) -> bool {
        let seen = self.lock();
        let heard = |identity: &String| {
            let sighting = seen.sightings.get(identity).filter(|_| *identity != self.identity);
            sighting.is_none_or(|sighting| sighting.at.elapsed() < DOUBTED_AFTER)
        };
        replicas.iter().all(heard)
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

    /// What we write is not told by a watch that began at `since`.
    pub fn is_deaf(&self, since: Instant) -> bool {
        let seen = self.lock();
        let last = seen.echo.heard.map_or(since, |(_, last)| last.max(since));
        seen.last_contact.is_some_and(|contact| contact.saturating_duration_since(last) > DEAF_AFTER)
    }

    /// Removes Leases of replicas that will not come back.
    pub async fn sweep(&self) {
        let old: Vec<String> = {
            let mut seen = self.lock();
            let Some((since, _)) = seen.echo.heard else { return };
            let old = |sighting: &Sighting| sighting.at.max(since).elapsed() > FORGOTTEN_AFTER;
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
        let mut echo = Echo::default();
        assert!(!echo.outlasts(at(0), 0, at(60)));
        [1, 5, 9].into_iter().for_each(|second| echo.hear(at(second)));
        assert!(!echo.outlasts(at(0), 0, at(12)));
        // It is so long since we heard anything at all; and what we heard was not more than two renewals.
        assert!(echo.outlasts(at(0), 0, at(14)));
        assert!(!echo.outlasts(at(0), 1, at(14)));
        assert!(!echo.outlasts(at(0), 0, at(18)));
        // The API server was away for a minute, and the watch tells of renewals again since second 60.
        echo.hear(at(60));
        assert!(!echo.outlasts(at(9), 3, at(65)));
        [64, 68].into_iter().for_each(|second| echo.hear(at(second)));
        assert!(!echo.outlasts(at(9), 3, at(72)));
        assert!(echo.outlasts(at(9), 3, at(73)));
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
