//! What the operator hears of the cluster: the objects, their Leases, the other replicas.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{FutureExt, StreamExt, stream};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::Api;
use kube::runtime::controller::{self, Action};
use kube::runtime::reflector::{self, ObjectRef};
use kube::runtime::{WatchStreamExt, applier, watcher};
use kube::{Client, ResourceExt};
use tokio::sync::mpsc;

use super::agents;
use super::api::{Target, shown};
use super::claims::MIGRATION;
use super::context::Context;
use super::members::{LABEL, RENEW, REPLICA};
use super::reconcile::{ReconcileError, reconcile};
use super::seats::SHARD;
use crate::api::RedisMigration;
use crate::backoff::Backoff;

const RENEW_AGAIN: Duration = Duration::from_secs(1);
/// How often it is looked whether the watch of the replicas is one.
const LOOK: Duration = Duration::from_secs(1);
/// After a reconcile that failed, mostly as the API server did not answer.
const RECONCILE_AGAIN: Duration = Duration::from_secs(3);

const MEMBERS: &str = "Leases of the replicas";

/// Pauses of a watch that broke off. They stay short: a replica that does not hear cannot tell who is alive, and an
/// approval should not wait.
#[derive(Default)]
struct Pauses(Backoff);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.0.pause())
    }
}

impl kube::runtime::utils::Backoff for Pauses {
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// Name of a watch, for messages.
fn name_of(what: &str, scope: Option<&str>) -> String {
    match scope {
        Some(namespace) => format!("{what} in {namespace}"),
        None => format!("{what} in all namespaces"),
    }
}

fn leases_in(scope: Option<&str>) -> String {
    name_of("Leases", scope)
}

fn migrations_in(scope: Option<&str>) -> String {
    name_of("RedisMigrations", scope)
}

/// All watches that there will be: nothing is claimed before the Leases were read.
pub fn expect(context: &Context, scopes: &[Option<String>]) {
    context.health.expect(MEMBERS, true);
    for scope in scopes {
        context.health.expect(&leases_in(scope.as_deref()), true);
        context.health.expect(&migrations_in(scope.as_deref()), false);
    }
}

/// Says that we are alive, for as long as we are.
pub async fn renew(context: Arc<Context>) {
    let mut warned = false;
    loop {
        let renewed = context.members.renew(context.is_leaving()).await;
        match &renewed {
            Ok(()) if warned => {
                warned = false;
                tracing::info!("the API server answers again");
            }
            Err(error) if !warned => {
                warned = true;
                tracing::warn!(%error, "this replica cannot say that it is alive; migrations go on");
            }
            _ => {}
        }
        if context.members.may_be_taken_for_gone() {
            context.runs.stop_unfenced();
        }
        tokio::time::sleep(if renewed.is_ok() { RENEW } else { RENEW_AGAIN }).await;
    }
}

/// A watch over a connection that has died in silence would tell of nobody: one that does not tell what we write
/// ourselves is begun anew.
pub async fn members(context: Arc<Context>) {
    loop {
        let since = Instant::now();
        let deaf = async {
            while !context.members.is_deaf(since) {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            () = hear_members(&context) => {}
            () = deaf => {
                tracing::warn!("nothing is told of this replica's own renewals; listening anew");
                // The others may be over the same connection.
                context.anew.send_modify(|count| *count += 1);
            }
        }
    }
}

async fn hear_members(context: &Context) {
    let config = watcher::Config::default().labels(&format!("{LABEL}={REPLICA}"));
    let events = watcher(context.members.leases(), config).backoff(Pauses::default());
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                context.health.heard(MEMBERS);
                match event {
                    watcher::Event::Apply(lease) | watcher::Event::InitApply(lease) => {
                        context.members.saw(&lease);
                    }
                    watcher::Event::Delete(lease) => context.members.left(&lease),
                    watcher::Event::InitDone => {
                        context.members.synced();
                        context.health.listed(MEMBERS);
                    }
                    watcher::Event::Init => {}
                }
            }
            Err(error) => failed(context, MEMBERS, &error),
        }
    }
}

fn scoped<K>(client: &Client, scope: Option<&str>) -> Api<K>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
{
    match scope {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

/// A watch that begins anew when one has turned out to be deaf.
fn watched<K>(
    api: Api<K>,
    config: watcher::Config,
    context: &Context,
) -> impl stream::Stream<Item = watcher::Result<watcher::Event<K>>> + Send + use<K>
where
    K: kube::Resource + Clone + std::fmt::Debug + serde::de::DeserializeOwned + Send + 'static,
{
    let begin = move || watcher(api.clone(), config.clone()).backoff(Pauses::default()).boxed();
    let begun = begin();
    stream::unfold((begun, context.anew.subscribe()), move |(mut events, mut anew)| {
        let begin = begin.clone();
        async move {
            loop {
                tokio::select! {
                    biased;
                    Ok(()) = anew.changed() => events = begin(),
                    event = events.next() => return Some((event?, (events, anew))),
                }
            }
        }
    })
}

/// Who holds what.
pub async fn leases(context: Arc<Context>, scope: Option<String>) {
    let name = leases_in(scope.as_deref());
    let config = watcher::Config::default().labels(&format!("{LABEL} in ({MIGRATION},{SHARD})"));
    let api = scoped::<Lease>(&context.client, scope.as_deref());
    let mut events = std::pin::pin!(watched(api, config, &context));
    let mut listed = HashSet::new();
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                failed(&context, &name, &error);
                continue;
            }
        };
        context.health.heard(&name);
        tracing::trace!(?event, "{name}");
        let concerned: Vec<Target> = match event {
            watcher::Event::Init => {
                listed.clear();
                Vec::new()
            }
            watcher::Event::InitApply(lease) => {
                listed.extend(lease.uid());
                saw(&context, &lease)
            }
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut listed);
                context.seats.keep_only(scope.as_deref(), &listed);
                let lost = context.claims.keep_only(scope.as_deref(), &listed);
                context.health.listed(&name);
                lost
            }
            watcher::Event::Apply(lease) => saw(&context, &lease),
            watcher::Event::Delete(lease) if is_of_shard(&lease) => {
                context.seats.saw_deleted(&lease);
                Vec::new()
            }
            watcher::Event::Delete(lease) => context.claims.saw_deleted(&lease).into_iter().collect(),
        };
        for target in concerned {
            context.trigger(&target).await;
        }
    }
}

fn is_of_shard(lease: &Lease) -> bool {
    lease.labels().get(LABEL).is_some_and(|kind| kind == SHARD)
}

/// The objects that the message matters to.
fn saw(context: &Arc<Context>, lease: &Lease) -> Vec<Target> {
    if !is_of_shard(lease) {
        return context.claims.saw(lease).into_iter().collect();
    }
    context.seats.saw(lease);
    agents::attend(context);
    Vec::new()
}

/// The objects themselves, and the work on them.
pub async fn migrations(
    context: Arc<Context>,
    scope: Option<String>,
    queue: mpsc::Receiver<ObjectRef<RedisMigration>>,
) {
    let (store, writer) = reflector::store();
    let api: Api<RedisMigration> = scoped(&context.client, scope.as_deref());
    let events = watched(api, watcher::Config::default(), &context).reflect(writer);
    let queue = stream::unfold(queue, async |mut queue| {
        queue.recv().await.map(|next| (Ok::<_, Infallible>(next), queue))
    });
    let work = applier(
        |object, context| reconcile(object, context).boxed(),
        again,
        Arc::clone(&context),
        store.clone(),
        queue.boxed(),
        controller::Config::default(),
    );
    let worked = work.for_each(|done| async {
        if let Err(controller::Error::RunnerError(error)) = done {
            tracing::error!(%error, "reconciling broke off");
        }
    });
    let heard = hear(&context, scope.as_deref(), events, &store);
    tokio::select! {
        () = worked => {}
        () = heard => {}
    }
}

async fn hear(
    context: &Arc<Context>,
    scope: Option<&str>,
    events: impl stream::Stream<Item = watcher::Result<watcher::Event<RedisMigration>>>,
    store: &reflector::Store<RedisMigration>,
) {
    let name = migrations_in(scope);
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                context.health.heard(&name);
                match event {
                    watcher::Event::Apply(object) | watcher::Event::InitApply(object) => {
                        context.objects.add(&Target::of(&object));
                        context.runs.show(&object);
                        context.trigger(&Target::of(&object)).await;
                    }
                    watcher::Event::Delete(object) => {
                        context.objects.remove(&object.uid().unwrap_or_default());
                        context.runs.hide(&Target::of(&object));
                        abandon(context, &Target::of(&object));
                    }
                    watcher::Event::InitDone => {
                        context.health.listed(&name);
                        abandon_missing(context, scope, store);
                    }
                    watcher::Event::Init => {}
                }
            }
            Err(error) => failed(context, &name, &error),
        }
    }
}

/// What was deleted while nobody listened.
fn abandon_missing(context: &Arc<Context>, scope: Option<&str>, store: &reflector::Store<RedisMigration>) {
    let state = store.state();
    let there: HashSet<String> = state.iter().filter_map(|object| object.uid()).collect();
    context.objects.keep_only(scope, &there);
    let named = state.iter().map(|object| (object.namespace().unwrap_or_default(), object.name_any()));
    context.runs.show_only(scope, &named.collect());
    let ours = context.runs.targets().into_iter();
    let missing = ours
        .filter(|target| scope.is_none_or(|namespace| target.namespace == namespace))
        .filter(|target| !there.contains(&target.uid));
    missing.for_each(|target| abandon(context, &target));
}

/// The object is gone, in good order or with its finalizer taken away by force.
fn abandon(context: &Arc<Context>, target: &Target) {
    let (context, target) = (Arc::clone(context), target.clone());
    tokio::spawn(async move {
        context.runs.stop(&target.uid, super::decide::Why::Lost);
        if let Err(error) = context.release(&target).await {
            tracing::debug!(%error, "the Lease goes with its owner");
        }
        context.forget(&target.uid);
    });
}

fn again(object: Arc<RedisMigration>, error: &ReconcileError, context: Arc<Context>) -> Action {
    context.health.reconcile_failed();
    tracing::warn!(migration = %shown(&object), %error, "trying again");
    Action::requeue(RECONCILE_AGAIN)
}

fn failed(context: &Context, name: &str, error: &watcher::Error) {
    tracing::debug!(%error, "{name}: the watch broke off, trying again");
    context.health.failed(name, Instant::now());
}
