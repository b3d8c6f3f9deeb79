//! Plays the node: runs the Pods of one namespace as processes on this machine.
//!
//! A Pod's process gets exactly the arguments, the environment and the ServiceAccount token that
//! its spec asks for, and the Pod is Ready when its own probe answers. Three things cannot be as on
//! a node, as all Pods share this machine's network and files: the Pod's IP (127.x.y.z, one each)
//! stands where an argument says 0.0.0.0, a folder stands where it names a mounted volume, and the
//! token reaches the process by a kubeconfig.

mod container;

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Api, ControlPlane};
use crate::tool;
use container::Container;

const LOOK: Duration = Duration::from_millis(100);

/// Runs Pods until it is dropped, and ends them then.
pub struct Kubelet {
    node: Arc<Node>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// A Pod that runs here.
#[derive(Clone, Debug)]
pub struct Running {
    pub name: String,
    pub pid: u32,
    /// Where its ports are.
    pub ip: Ipv4Addr,
    pub ready: bool,
    pub restarts: u32,
}

struct Node {
    name: String,
    namespace: String,
    api: Api,
    program: PathBuf,
    /// The authority of the API server's certificate.
    authority: PathBuf,
    folder: TempDir,
    stop: AtomicBool,
    pods: Mutex<HashMap<String, Pod>>,
    /// What went wrong last, for whoever waits in vain.
    trouble: Mutex<String>,
}

struct Pod {
    name: String,
    container: Container,
    /// What the API server was last told.
    told: Option<(&'static str, bool, u32)>,
    /// When it was asked to end.
    ending: Option<Instant>,
    /// As if its node had gone: neither restarted nor reported.
    lost: bool,
}

impl Kubelet {
    pub fn start(plane: &ControlPlane, namespace: &str) -> Result<Self> {
        Self::with_program(plane, namespace, &tool::binary()?)
    }

    /// This program in place of the image's.
    pub fn with_program(plane: &ControlPlane, namespace: &str, program: &Path) -> Result<Self> {
        let name = format!("node-of-{namespace}");
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
        plane.api().post("/api/v1/nodes", &node)?.expect(&[201, 409])?;
        let node = Arc::new(Node {
            name,
            namespace: namespace.to_owned(),
            api: plane.api().clone(),
            program: program.to_owned(),
            authority: plane.authority(),
            folder: tempfile::Builder::new().prefix("redis-migration-e2e-").tempdir()?,
            stop: AtomicBool::new(false),
            pods: Mutex::default(),
            trouble: Mutex::default(),
        });
        let of_thread = Arc::clone(&node);
        let thread = std::thread::spawn(move || of_thread.run());
        Ok(Self { node, thread: Some(thread) })
    }

    /// The Pods that run now, by name.
    pub fn pods(&self) -> Vec<Running> {
        let mut running: Vec<Running> = self.node.pods().values().filter_map(Pod::running).collect();
        running.sort_by(|a, b| a.name.cmp(&b.name));
        running
    }

    /// Waits until so many Pods are Ready.
    pub fn wait_ready(&self, count: usize, timeout: Duration) -> Result<Vec<Running>> {
        let ready = || {
            let pods = self.pods();
            let ready = pods.iter().filter(|pod| pod.ready).count();
            ensure!(ready == count && pods.len() == count, "{pods:?}");
            Ok(Some(pods))
        };
        crate::wait_until(&format!("{count} Pods being ready"), timeout, ready)
            .with_context(|| format!("{}\n{}", self.trouble(), self.tails()))
    }

    /// SIGKILL to the Pod's process, which is started again as the same Pod.
    pub fn kill(&self, pod: &str) -> Result<()> {
        self.with(pod, |pod| pod.container.kill())
    }

    /// SIGKILL, and nobody notices, as when the whole node goes.
    pub fn lose(&self, pod: &str) -> Result<()> {
        self.with(pod, |pod| {
            pod.lost = true;
            pod.container.kill();
        })
    }

    /// What the Pod's process wrote, restarts included.
    pub fn log(&self, pod: &str) -> String {
        std::fs::read_to_string(self.node.folder.path().join(format!("{pod}.log"))).unwrap_or_default()
    }

    /// What went wrong last in playing a node.
    pub fn trouble(&self) -> String {
        self.node.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The last lines of all logs, for a test that fails.
    pub fn tails(&self) -> String {
        let names: Vec<String> = self.node.pods().values().map(|pod| pod.name.clone()).collect();
        let tail = |name: &String| {
            let log = self.log(name);
            let lines: Vec<&str> = log.lines().collect();
            let last = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default().join("\n");
            format!("--- Pod {name}:\n{last}")
        };
        names.iter().map(tail).collect::<Vec<_>>().join("\n")
    }

    fn with(&self, name: &str, act: impl FnOnce(&mut Pod)) -> Result<()> {
        let mut pods = self.node.pods();
        let pod = pods.values_mut().find(|pod| pod.name == name);
        act(pod.with_context(|| format!("no Pod {name} runs here"))?);
        Ok(())
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}\n{}", self.trouble(), self.tails());
        }
        self.node.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.node.pods().clear();
    }
}

impl Node {
    fn run(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            // Without the API server, what runs goes on.
            if let Err(error) = self.look() {
                *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = format!("{error:#}");
            }
            std::thread::sleep(LOOK);
        }
    }

    fn look(&self) -> Result<()> {
        self.pods().values_mut().for_each(Pod::tend);
        let list = self.api.get(&self.path(""))?.expect(&[200])?;
        let wanted = list["items"].as_array().context("a list without items")?;
        for pod in wanted {
            let uid = pod["metadata"]["uid"].as_str().unwrap_or_default();
            let ending = pod["metadata"]["deletionTimestamp"].is_string();
            if !self.pods().contains_key(uid) && !ending {
                self.admit(pod).with_context(|| format!("Pod {}", pod["metadata"]["name"]))?;
            }
        }
        let uids: Vec<String> = self.pods().keys().cloned().collect();
        for uid in uids {
            self.report(&uid, wanted.iter().find(|pod| pod["metadata"]["uid"] == uid.as_str()))?;
        }
        Ok(())
    }

    /// Binds the Pod to this node and starts it.
    fn admit(&self, pod: &Value) -> Result<()> {
        let name = pod["metadata"]["name"].as_str().context("no name")?;
        let uid = pod["metadata"]["uid"].as_str().context("no uid")?;
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": self.name},
        });
        self.api.post(&self.path(&format!("/{name}/binding")), &binding)?.expect(&[201, 409])?;

        let folder = self.folder.path().join(uid);
        std::fs::create_dir_all(&folder)?;
        let token_file = folder.join("token");
        if pod["spec"]["automountServiceAccountToken"] != false {
            std::fs::write(&token_file, self.token(name, uid, &pod["spec"])?)?;
        }
        let kubeconfig = folder.join("kubeconfig");
        let user = json!({"tokenFile": token_file});
        let config = super::kubeconfig(self.api.url(), &self.authority, &user, &self.namespace)?;
        std::fs::write(&kubeconfig, config)?;

        let log = self.folder.path().join(format!("{name}.log"));
        let mut container = Container::new(pod, &self.program, &self.name, address(), folder, log)?;
        container.env("KUBECONFIG", &kubeconfig.to_string_lossy());
        for host in container.hosts() {
            container.replace(&host, &self.behind(&host)?);
        }
        container.start()?;
        let pod = Pod { name: name.to_owned(), container, told: None, ending: None, lost: false };
        self.pods().insert(uid.to_owned(), pod);
        Ok(())
    }

    /// As the kubelet asks for what it projects into the Pod: bound to it.
    fn token(&self, name: &str, uid: &str, spec: &Value) -> Result<String> {
        let account = spec["serviceAccountName"].as_str().unwrap_or("default");
        let path = format!("/api/v1/namespaces/{}/serviceaccounts/{account}/token", self.namespace);
        let bound = json!({"kind": "Pod", "apiVersion": "v1", "name": name, "uid": uid});
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"boundObjectRef": bound}
        });
        let answer = self.api.post(&path, &request)?.expect(&[201])?;
        Ok(answer["status"]["token"].as_str().context("no token in the answer")?.to_owned())
    }

    /// The IP of a ready Pod of a Service, which is named as SERVICE.NAMESPACE.
    fn behind(&self, host: &str) -> Result<String> {
        let (name, namespace) = host.split_once('.').with_context(|| format!("no Service: {host}"))?;
        let service =
            self.api.get(&format!("/api/v1/namespaces/{namespace}/services/{name}"))?.expect(&[200])?;
        let selector = service["spec"]["selector"].as_object().context("no selector")?;
        let pods = self.api.get(&format!("/api/v1/namespaces/{namespace}/pods"))?.expect(&[200])?;
        let is_ready = |pod: &&Value| {
            let labels = &pod["metadata"]["labels"];
            let conditions = pod["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
            selector.iter().all(|(label, value)| labels[label] == *value)
                && conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
        };
        let pod = pods["items"].as_array().context("no items")?.iter().find(is_ready);
        let ip = pod.and_then(|pod| pod["status"]["podIP"].as_str());
        Ok(ip.with_context(|| format!("no Pod of {host} is ready"))?.to_owned())
    }

    /// Tells the API server of a Pod; ends one that is to go. `wanted` is `None` when it is gone there.
    fn report(&self, uid: &str, wanted: Option<&Value>) -> Result<()> {
        let mut pods = self.pods();
        let Some(pod) = pods.get_mut(uid) else { return Ok(()) };
        let Some(wanted) = wanted else {
            pods.remove(uid);
            return Ok(());
        };
        if pod.lost {
            return Ok(());
        }
        if wanted["metadata"]["deletionTimestamp"].is_string() {
            let asked = *pod.ending.get_or_insert_with(|| {
                pod.container.terminate();
                Instant::now()
            });
            let grace = wanted["metadata"]["deletionGracePeriodSeconds"].as_u64().unwrap_or(30);
            if pod.container.ended() || asked.elapsed() > Duration::from_secs(grace) {
                let path = self.path(&format!("/{}?gracePeriodSeconds=0", pod.name));
                pods.remove(uid);
                drop(pods);
                self.api.delete(&path)?;
            }
            return Ok(());
        }
        let phase = match pod.container.outcome() {
            None => "Running",
            Some(true) => "Succeeded",
            Some(false) => "Failed",
        };
        let state = (phase, pod.container.ready, pod.container.restarts);
        if pod.told != Some(state) {
            let path = self.path(&format!("/{}/status", pod.name));
            self.api.strategic(&path, &pod.status(phase))?.expect(&[200])?;
            pod.told = Some(state);
        }
        Ok(())
    }

    fn path(&self, rest: &str) -> String {
        format!("/api/v1/namespaces/{}/pods{rest}", self.namespace)
    }

    fn pods(&self) -> MutexGuard<'_, HashMap<String, Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pod {
    /// Starts what has ended, and asks the probes.
    fn tend(&mut self) {
        if self.lost || self.ending.is_some() {
            return;
        }
        self.container.tend();
    }

    fn running(&self) -> Option<Running> {
        let pid = self.container.pid()?;
        let Container { ip, ready, restarts, .. } = self.container;
        Some(Running { name: self.name.clone(), pid, ip, ready, restarts })
    }

    fn status(&self, phase: &str) -> Value {
        let container = &self.container;
        let ready = if container.ready { "True" } else { "False" };
        let ip = container.ip.to_string();
        json!({"status": {
            "phase": phase, "podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "127.0.0.1",
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Initialized", "status": "True"},
                {"type": "ContainersReady", "status": ready},
                {"type": "Ready", "status": ready},
            ],
            "containerStatuses": [{
                "name": container.name, "ready": container.ready, "started": true,
                "restartCount": container.restarts, "image": container.image, "imageID": "",
                "state": {"running": {}},
            }],
        }})
    }
}

/// Every process of tests has a net of its own, every Pod an address in it.
fn address() -> Ipv4Addr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let net = 10 + (std::process::id() % 200) as u8;
    Ipv4Addr::new(127, net, (number / 250) as u8, 1 + (number % 250) as u8)
}
