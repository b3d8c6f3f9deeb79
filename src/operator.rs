//! `redis-migration operator`: performs the RedisMigrations of a Kubernetes cluster.
//!
//! Reconciling never runs a migration: it decides one step (`decide`, PURE), and starts, observes or stops a
//! task of its own. Replicas share the migrations by one Lease each, and the shards of one by one Lease each.

mod agents;
mod api;
mod balance;
mod claims;
mod context;
mod decide;
mod files;
mod following;
mod forwarder;
mod health;
mod members;
mod placing;
mod reconcile;
mod runs;
mod seats;
mod secrets;
mod spools;
mod status;
mod watching;
mod writer;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use kube::{Client, Config};
use prometheus_client::metrics::gauge::ConstGauge;
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::migration::{DataDir, StopRequest};
use crate::telemetry::ObservedSet;
use crate::telemetry::http::{Endpoints, HttpError, Shown};
use context::{Context, QUEUE};
use files::AllowedFiles;
use health::Health;
use runs::Runs;

/// How often somebody who is gone is looked for.
const LOOK: Duration = Duration::from_secs(1);
const SWEEP_EVERY: u32 = 60;
const TIDY_EVERY: u32 = 10;
/// The API server may be away just when we leave.
const FAREWELL_MAX: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Options {
    /// Empty: all.
    pub namespaces: Vec<String>,
    pub listen: SocketAddr,
    /// `None`: the temporary directory.
    pub data_dir: Option<DataDir>,
    /// The folder for files that RedisMigrations name by their path; `None`: they may not.
    pub files: Option<PathBuf>,
    /// Tells this replica from the others; `None`: the host's name.
    pub identity: Option<String>,
    /// Where the replicas' own Leases are; `None`: the namespace of the service account or kubeconfig.
    pub namespace: Option<String>,
}

#[derive(Debug, Error)]
pub enum OperatorError {
    #[error("no Kubernetes cluster: {0}; set KUBECONFIG, or run in a Pod with a service account")]
    Config(#[from] Box<kube::config::InferConfigError>),
    #[error("no client for the Kubernetes API: {0}")]
    Client(#[from] Box<kube::Error>),
    #[error("the host has no name that could be used ({0}); give one with --identity")]
    Identity(String),
    #[error(transparent)]
    Http(#[from] HttpError),
}

/// Works until `stop` asks for the end, then hands over what runs here.
pub async fn run(options: Options, mut stop: watch::Receiver<StopRequest>) -> Result<(), OperatorError> {
    let endpoints = Endpoints::bind(options.listen).await?;
    if options.listen.port() == 0 {
        eprintln!("listening on {}", endpoints.address());
    }
    let config = Config::infer().await.map_err(Box::new)?;
    let identity = match options.identity {
        Some(identity) => identity,
        None => host_name()?,
    };
    let own_namespace = options.namespace.unwrap_or_else(|| config.default_namespace.clone());
    let client = Client::try_from(config).map_err(Box::new)?;

    let scopes: Vec<Option<String>> = match options.namespaces.is_empty() {
        true => vec![None],
        false => options.namespaces.into_iter().map(Some).collect(),
    };
    let (mut triggers, mut queues) = (HashMap::new(), Vec::new());
    for scope in &scopes {
        let (trigger, queue) = mpsc::channel(QUEUE);
        triggers.insert(scope.clone(), trigger);
        queues.push((scope.clone(), queue));
    }
    let observed = ObservedSet::default();
    let runs = Runs::new(observed.clone());
    let health = Arc::new(Health::default());
    tracing::info!(identity, namespace = own_namespace, ?scopes, "the operator begins");
    let context = Arc::new(Context::new(
        client,
        identity,
        own_namespace,
        (options.data_dir, AllowedFiles(options.files)),
        runs,
        Arc::clone(&health),
        triggers,
    ));

    let (close, closed) = watch::channel(false);
    let served = tokio::spawn(endpoints.serve_shown(shown(&context, observed), closed));
    let mut tasks = JoinSet::new();
    // Before anything is claimed, so that nobody takes us for dead.
    watching::expect(&context, &scopes);
    tasks.spawn(watching::renew(Arc::clone(&context)));
    tasks.spawn(watching::members(Arc::clone(&context)));
    tasks.spawn(look_for_orphans(Arc::clone(&context)));
    for (scope, queue) in queues {
        tasks.spawn(watching::leases(Arc::clone(&context), scope.clone()));
        tasks.spawn(watching::migrations(Arc::clone(&context), scope, queue));
    }

    // An error means that nobody is left who could ask: then it never ends by itself.
    if stop.wait_for(|stop| *stop != StopRequest::Run).await.is_err() {
        std::future::pending::<()>().await;
    }
    context.leave();
    hand_over(&context).await;
    tasks.shutdown().await;
    let _ = close.send(true);
    let _ = tokio::time::timeout(LOOK, served).await;
    Ok(())
}

/// Stops what runs here and gives each migration up as soon as it has stopped.
async fn hand_over(context: &Arc<Context>) {
    let began = Instant::now();
    let targets = context.runs.targets();
    let count = targets.len();
    // Nobody gives us a shard that we leave.
    if let Ok(Err(error)) = tokio::time::timeout(FAREWELL_MAX, context.members.renew(true)).await {
        tracing::debug!(%error, "the others do not know that this replica leaves");
    }
    let each = targets.into_iter().map(|target| async move {
        context.runs.hand_over(&target.uid).await;
        if let Ok(Err(error)) = tokio::time::timeout(FAREWELL_MAX, context.tell_outcome(&target.uid)).await {
            tracing::warn!(%error, "the outcome of {}/{} could not be told", target.namespace, target.name);
        }
        let released = tokio::time::timeout(FAREWELL_MAX, context.claims.hand_over(&target)).await;
        if let Ok(Err(error)) = released {
            tracing::warn!(%error, "others go on once they take this replica for gone");
        }
    });
    let shards = tokio::time::timeout(FAREWELL_MAX, context.agents.ended());
    let _ = tokio::join!(join_all(each), shards);
    if let Ok(Err(error)) = tokio::time::timeout(FAREWELL_MAX, context.members.leave()).await {
        tracing::warn!(%error, "the replica's Lease stays until it is swept");
    }
    tracing::info!(migrations = count, millis = began.elapsed().as_millis(), "handed over");
}

/// Has what a dead replica held looked at.
async fn look_for_orphans(context: Arc<Context>) {
    let mut tick = tokio::time::interval(LOOK);
    let mut looks = 0u32;
    loop {
        tick.tick().await;
        for target in context.claims.orphans(|identity| context.members.is_gone(identity)) {
            context.trigger(&target).await;
        }
        agents::attend(&context);
        looks = looks.wrapping_add(1);
        if looks.is_multiple_of(SWEEP_EVERY) {
            context.members.sweep().await;
        }
        if let Some(data_dir) = context.data_dir.as_ref().filter(|_| looks.is_multiple_of(TIDY_EVERY)) {
            spools::tidy(&context, data_dir);
        }
    }
}

fn shown(context: &Arc<Context>, observed: ObservedSet) -> Shown {
    let mut shown = Shown::new(observed);
    let of = Arc::clone(context);
    shown.healthy = Box::new(move || of.health.healthy(of.members.has_contact(), Instant::now()));
    let of = Arc::clone(context);
    shown.ready = Box::new(move || of.health.ready());
    shown.registry.register_collector(Box::new(Replica(Arc::clone(context))));
    shown
}

fn host_name() -> Result<String, OperatorError> {
    let name = hostname::get().map_err(|error| OperatorError::Identity(error.to_string()))?;
    let name = name.to_string_lossy().to_ascii_lowercase();
    let usable =
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte));
    if usable { Ok(name) } else { Err(OperatorError::Identity(name)) }
}

/// This replica's share, for `/metrics`.
struct Replica(Arc<Context>);

impl std::fmt::Debug for Replica {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Replica")
    }
}

impl prometheus_client::collector::Collector for Replica {
    fn encode(&self, mut encoder: prometheus_client::encoding::DescriptorEncoder<'_>) -> std::fmt::Result {
        use prometheus_client::encoding::EncodeMetric;
        let (held, all) = self.0.claims.count();
        let shards = self.0.seats.count();
        let gauges = [
            ("operator_held_migrations", "Migrations that this replica holds", held),
            ("operator_claimed_migrations", "Migrations that any replica holds", all),
            ("operator_held_shards", "Shards of shared migrations that this replica works on", shards),
            ("operator_replicas", "Replicas that are alive, as this one sees it", self.0.members.alive()),
            ("operator_reconcile_errors", "Reconciles that failed since the start", self.0.health.errors()),
            (
                "operator_api_contact",
                "1 while the API server answers",
                usize::from(self.0.members.has_contact()),
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}
