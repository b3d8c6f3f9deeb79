//! `redis-migration operator` as a process beside a control plane, and RedisMigrations as their users see them.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::controlplane::{Api, ControlPlane};
use crate::tool::{binary, condition};
use crate::{Manifest, Proxy, wait_until};

/// One replica; killed when dropped.
pub struct Operator {
    child: Child,
    pub identity: String,
    log: Arc<Mutex<String>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Operator {
    /// Looks after `namespace` only, so that tests on one control plane do not meet. As administrator.
    pub fn start(plane: &ControlPlane, namespace: &str, identity: &str) -> Result<Self> {
        Self::start_with(plane, namespace, identity, &[])
    }

    /// Looks after `namespace`, and is at home elsewhere, as if installed there.
    pub fn start_from(plane: &ControlPlane, home: &str, namespace: &str, identity: &str) -> Result<Self> {
        Self::launch(&plane.kubeconfig(), (home, namespace), identity, &[])
    }

    pub fn start_with(
        plane: &ControlPlane,
        namespace: &str,
        identity: &str,
        further: &[&str],
    ) -> Result<Self> {
        Self::launch(&plane.kubeconfig(), (namespace, namespace), identity, further)
    }

    /// As `start`, with a proxy before the API server.
    pub fn start_through(
        plane: &ControlPlane,
        proxy: &Proxy,
        namespace: &str,
        identity: &str,
    ) -> Result<Self> {
        Self::launch(&plane.kubeconfig_through(proxy)?, (namespace, namespace), identity, &[])
    }

    fn launch(
        kubeconfig: &Path,
        (home, namespace): (&str, &str),
        identity: &str,
        further: &[&str],
    ) -> Result<Self> {
        let mut child = Command::new(binary()?)
            .args(["operator", "--namespaces", namespace, "--namespace", home])
            .args(["--identity", identity, "--listen", "127.0.0.1:0", "--log-format", "json"])
            .args(further)
            .env("KUBECONFIG", kubeconfig)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = child.stderr.take().context("no stderr")?;
        let log = Arc::new(Mutex::new(String::new()));
        let of_reader = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut log = of_reader.lock().unwrap_or_else(PoisonError::into_inner);
                log.push_str(&line);
                log.push('\n');
            }
        });
        Ok(Self { child, identity: identity.to_owned(), log, reader: Some(reader) })
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where `/metrics` and the probes are.
    pub fn address(&self) -> Result<String> {
        wait_until("the operator's address", Duration::from_secs(30), || {
            let log = self.log();
            let line = log.lines().find_map(|line| line.strip_prefix("listening on "));
            Ok(line.map(str::to_owned))
        })
    }

    /// Body of an endpoint, and whether the answer was 200.
    pub fn get(&self, path: &str) -> Result<(bool, String)> {
        use std::io::{Read, Write};
        let mut socket = std::net::TcpStream::connect(self.address()?)?;
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(socket, "GET {path} HTTP/1.1\r\nHost: o\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        Ok((answer.starts_with("HTTP/1.1 200"), body.to_owned()))
    }

    /// One number of `/metrics`; `None`: there is none of that name.
    pub fn metric(&self, name: &str) -> Result<Option<f64>> {
        let metrics = self.get("/metrics")?.1;
        let line = metrics.lines().find(|line| line.split([' ', '{']).next() == Some(name));
        Ok(line.and_then(|line| line.rsplit(' ').next()?.parse().ok()))
    }

    /// Waits until it knows of so many replicas, itself included.
    pub fn wait_replicas(&self, count: u32, timeout: Duration) -> Result<()> {
        wait_until(&format!("{} knowing {count} replicas", self.identity), timeout, || {
            let known = self.metric("redis_migration_operator_replicas")?;
            Ok((known == Some(f64::from(count))).then_some(()))
        })
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// A signal by its name without SIG.
    pub fn signal(&self, name: &str) -> Result<()> {
        let status =
            Command::new("kill").args([&format!("-{name}"), &self.child.id().to_string()]).status()?;
        ensure!(status.success(), "no process to send SIG{name} to");
        Ok(())
    }

    /// SIGTERM; how long it took to end.
    pub fn terminate(&mut self, within: Duration) -> Result<Duration> {
        let began = Instant::now();
        self.signal("TERM")?;
        let code = wait_until("the operator's end", within, || self.child.try_wait().map_err(Into::into))?;
        ensure!(code.success(), "the operator ended with {code}\n{}", self.log());
        Ok(began.elapsed())
    }

    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.kill();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let last = lines.get(lines.len().saturating_sub(40)..).unwrap_or_default();
            eprintln!("--- operator {}:\n{}", self.identity, last.join("\n"));
        }
    }
}

/// One RedisMigration on the API server. Every status that it shows is looked at.
pub struct Migration<'a> {
    plane: &'a ControlPlane,
    pub namespace: String,
    pub name: String,
    watched: Watched,
}

impl<'a> Migration<'a> {
    /// Applies it with its Secrets.
    pub fn apply(plane: &'a ControlPlane, namespace: &str, name: &str, manifest: &Manifest) -> Result<Self> {
        let migration = Self::attach(plane, namespace, name)?;
        migration.set(manifest)?;
        Ok(migration)
    }

    /// One that is there, or will be.
    pub fn attach(plane: &'a ControlPlane, namespace: &str, name: &str) -> Result<Self> {
        let path = format!("/apis/redis-migration.io/v1alpha1/namespaces/{namespace}/redismigrations/{name}");
        let watched = Watched::start(plane.api().clone(), path);
        Ok(Self { plane, namespace: namespace.to_owned(), name: name.to_owned(), watched })
    }

    /// `kubectl apply` of this manifest under the migration's name.
    pub fn set(&self, manifest: &Manifest) -> Result<()> {
        let manifest = manifest
            .clone()
            .set("/metadata/name", self.name.as_str())
            .set("/metadata/namespace", self.namespace.as_str());
        let mut documents: Vec<Value> = Vec::new();
        let mut secrets: std::collections::BTreeMap<&str, serde_json::Map<String, Value>> =
            std::collections::BTreeMap::new();
        for (name, key, content) in &manifest.secrets {
            secrets.entry(name).or_default().insert(key.clone(), json!(content));
        }
        for (name, data) in secrets {
            documents.push(json!({
                "apiVersion": "v1", "kind": "Secret",
                "metadata": {"name": name, "namespace": self.namespace}, "stringData": data,
            }));
        }
        documents.push(manifest.document);
        let text: Vec<String> = documents.iter().map(Value::to_string).collect();
        self.plane.apply(&text.join("\n---\n")).map(drop)
    }

    /// `kubectl wait --for=condition=…`
    pub fn wait_condition(&self, kind: &str, timeout: Duration) -> Result<()> {
        let (what, within) = (format!("--for=condition={kind}"), format!("--timeout={}s", timeout.as_secs()));
        let of = format!("redismigration/{}", self.name);
        let waited = self.plane.kubectl(&["wait", "-n", &self.namespace, &of, &what, &within]);
        waited.with_context(|| format!("{}", self.status())).map(drop)
    }

    /// Waits for a status like that.
    pub fn wait_for(&self, what: &str, timeout: Duration, is: impl Fn(&Value) -> bool) -> Result<Value> {
        let found = wait_until(what, timeout, || {
            let status = self.object()?.map(|mut object| object["status"].take());
            Ok(status.filter(|status| is(status)))
        });
        found.with_context(|| format!("{}", self.status()))
    }

    pub fn wait_phase(&self, phase: &str, timeout: Duration) -> Result<Value> {
        self.wait_for(phase, timeout, |status| status["phase"] == phase)
    }

    pub fn object(&self) -> Result<Option<Value>> {
        let answer = self.plane.api().get(&self.watched.path)?;
        match answer.status {
            404 => Ok(None),
            _ => answer.expect(&[200]).map(Some),
        }
    }

    /// Null when there is none.
    pub fn status(&self) -> Value {
        self.object().ok().flatten().map(|mut object| object["status"].take()).unwrap_or_default()
    }

    pub fn patch(&self, patch: &Value) -> Result<Value> {
        self.plane.api().merge(&self.watched.path, patch)?.expect(&[200])
    }

    pub fn approve(&self) -> Result<()> {
        self.patch(&json!({"spec": {"cutover": {"approved": true}}})).map(drop)
    }

    /// Deletes it and waits until it is gone.
    pub fn delete(&self, within: Duration) -> Result<()> {
        self.plane.api().delete(&self.watched.path)?;
        wait_until("the deletion", within, || Ok(self.object()?.is_none().then_some(())))
            .with_context(|| format!("{:?}", self.object()))
    }

    /// The migration's Lease.
    pub fn lease(&self) -> Result<Option<Value>> {
        let list = self.leases()?;
        let ours = |lease: &&Value| {
            let owners = lease["metadata"]["ownerReferences"].as_array();
            owners.is_some_and(|owners| owners.iter().any(|owner| owner["name"] == self.name.as_str()))
        };
        let whole = |lease: &&Value| lease["metadata"]["labels"]["redis-migration.io/lease"] == "migration";
        Ok(list.iter().filter(ours).find(whole).cloned())
    }

    /// How many Leases there are about it, those of its shards included.
    pub fn leases_left(&self) -> Result<usize> {
        let owned = |lease: &&Value| {
            let owners = lease["metadata"]["ownerReferences"].as_array();
            owners.is_some_and(|owners| owners.iter().any(|owner| owner["name"] == self.name.as_str()))
        };
        Ok(self.leases()?.iter().filter(owned).count())
    }

    /// Who works on each shard, by the shard's id.
    pub fn workers(status: &Value) -> std::collections::BTreeMap<String, String> {
        let text = |shard: &Value, field: &str| shard[field].as_str().unwrap_or_default().to_owned();
        let shards = status["shards"].as_array().cloned().unwrap_or_default();
        shards.iter().map(|shard| (text(shard, "id"), text(shard, "worker"))).collect()
    }

    fn leases(&self) -> Result<Vec<Value>> {
        let path = format!("/apis/coordination.k8s.io/v1/namespaces/{}/leases", self.namespace);
        let list = self.plane.api().get(&path)?.expect(&[200])?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    pub fn holder(&self) -> Result<Option<String>> {
        Ok(self.lease()?.and_then(|lease| lease["spec"]["holderIdentity"].as_str().map(str::to_owned)))
    }

    pub fn wait_holder(&self, identity: &str, timeout: Duration) -> Result<()> {
        wait_until(&format!("{identity} holding {}", self.name), timeout, || {
            Ok((self.holder()?.as_deref() == Some(identity)).then_some(()))
        })
    }

    /// Reasons of the events about it.
    pub fn events(&self) -> Result<Vec<String>> {
        let path = format!("/apis/events.k8s.io/v1/namespaces/{}/events", self.namespace);
        let list = self.plane.api().get(&path)?.expect(&[200])?;
        let events = list["items"].as_array().cloned().unwrap_or_default();
        let about = events.iter().filter(|event| event["regarding"]["name"] == self.name.as_str());
        Ok(about.filter_map(|event| event["reason"].as_str().map(str::to_owned)).collect())
    }

    /// All statuses that were seen, each of which obeyed the rules of kstatus.
    pub fn seen(&self) -> Result<Vec<Value>> {
        let seen = self.watched.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for object in seen.iter() {
            obeys_kstatus(object).with_context(|| format!("{:#}", object["status"]))?;
        }
        Ok(seen.clone())
    }
}

/// Looks again and again and keeps what is new.
struct Watched {
    path: String,
    seen: Arc<Mutex<Vec<Value>>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watched {
    fn start(api: Api, path: String) -> Self {
        let (seen, stop) = (Arc::new(Mutex::<Vec<Value>>::default()), Arc::new(AtomicBool::new(false)));
        let (of_thread, ended, at) = (Arc::clone(&seen), Arc::clone(&stop), path.clone());
        let thread = std::thread::spawn(move || {
            let mut version = Value::Null;
            while !ended.load(Ordering::Relaxed) {
                if let Some(object) = api.get(&at).ok().and_then(|answer| answer.found())
                    && object["metadata"]["resourceVersion"] != version
                {
                    version = object["metadata"]["resourceVersion"].clone();
                    of_thread.lock().unwrap_or_else(PoisonError::into_inner).push(object);
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        Self { path, seen, stop, thread: Some(thread) }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What tools that wait for resources count on, at every moment.
pub fn obeys_kstatus(object: &Value) -> Result<()> {
    let (status, generation) = (&object["status"], object["metadata"]["generation"].as_i64().unwrap_or(0));
    let observed = status["observedGeneration"].as_i64().unwrap_or(-1);
    ensure!(observed <= generation, "observedGeneration {observed} is ahead of {generation}");
    let Some(conditions) = status["conditions"].as_array().filter(|list| !list.is_empty()) else {
        ensure!(observed <= 0, "a spec was observed, and no condition says what came of it");
        return Ok(());
    };
    let is = |kind: &str| condition(status, kind).unwrap_or_default();
    for condition in conditions {
        let of = condition["observedGeneration"].as_i64();
        ensure!(of == Some(observed), "{} is of generation {of:?}", condition["type"]);
        ensure!(!condition["reason"].as_str().unwrap_or_default().is_empty(), "no reason: {condition}");
    }
    ensure!(matches!(is("Ready").as_str(), "True" | "False"), "Ready is {}", is("Ready"));
    for kind in ["Reconciling", "Stalled"] {
        ensure!(matches!(is(kind).as_str(), "" | "True"), "{kind} is {}", is(kind));
    }
    ensure!(is("Reconciling").is_empty() || is("Stalled").is_empty(), "both Reconciling and Stalled");
    if is("Ready") == "True" {
        ensure!(is("Stalled").is_empty() && is("Reconciling").is_empty(), "Ready, but not at rest");
    } else if is("Finished").is_empty() {
        let resting = status["phase"] == "Suspended";
        let told = is("Reconciling") == "True" || is("Stalled") == "True" || resting;
        ensure!(told, "not Ready, and nothing says why");
    }
    match (is("Finished").as_str(), is("Succeeded").as_str()) {
        ("", "") => ensure!(status["phase"] != "Completed" && status["phase"] != "Failed", "no outcome"),
        ("True", "True") => {
            ensure!(is("Ready") == "True" && status["phase"] == "Completed", "succeeded, but not completed");
        }
        ("True", "False") => {
            ensure!(is("Ready") == "False" && is("Stalled") == "True", "failed, but not stalled");
            ensure!(status["phase"] == "Failed", "failed in phase {}", status["phase"]);
        }
        (finished, succeeded) => bail!("Finished {finished}, Succeeded {succeeded}"),
    }
    Ok(())
}
