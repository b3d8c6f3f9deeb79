//! The one container of a Pod as a process.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::reaper;

/// As long as a kubelet waits for a probe's answer.
const PROBE: Duration = Duration::from_secs(1);

pub struct Container {
    pub name: String,
    pub image: String,
    pub ip: Ipv4Addr,
    pub ready: bool,
    pub restarts: u32,
    program: PathBuf,
    /// Not to be started again when it ends.
    once: bool,
    arguments: Vec<String>,
    env: Vec<(String, String)>,
    readiness: Option<Probe>,
    liveness: Option<Probe>,
    port: u16,
    folder: PathBuf,
    log: PathBuf,
    child: Option<Child>,
}

struct Probe {
    url: String,
    period: Duration,
    /// So many failures in a row count.
    threshold: u64,
    failures: u64,
    next: Instant,
}

impl Container {
    /// `folder` is the Pod's, kept over restarts as its volumes are.
    pub fn new(
        pod: &Value,
        program: &Path,
        node: &str,
        ip: Ipv4Addr,
        folder: PathBuf,
        log: PathBuf,
    ) -> Result<Self> {
        let spec = &pod["spec"];
        let containers = spec["containers"].as_array().context("no containers")?;
        ensure!(containers.len() == 1 && spec["initContainers"].is_null(), "only one container is played");
        let container = &containers[0];
        // Another image's program is taken from this machine.
        let mut command = texts(&container["command"]).into_iter();
        let program = command.next().map_or(program.to_owned(), PathBuf::from);
        // What the image is made for, and what the chart promises.
        let security = &container["securityContext"];
        ensure!(security["readOnlyRootFilesystem"] == true, "the root file system can be written");

        let env = environment(container, pod, node, ip)?;
        let mut arguments = Vec::new();
        for argument in command.chain(texts(&container["args"])) {
            let argument = argument.replace("0.0.0.0", &ip.to_string());
            arguments.push(mounted(expand(&argument, &env), container, &folder)?);
        }
        let probe = |name: &str| Probe::new(&container[name], container, ip).with_context(|| name.to_owned());
        Ok(Self {
            name: container["name"].as_str().unwrap_or_default().to_owned(),
            image: container["image"].as_str().unwrap_or_default().to_owned(),
            ip,
            ready: false,
            restarts: 0,
            readiness: probe("readinessProbe")?,
            liveness: probe("livenessProbe")?,
            port: container["ports"][0]["containerPort"]
                .as_u64()
                .and_then(|port| port.try_into().ok())
                .unwrap_or(0),
            once: spec["restartPolicy"] == "Never",
            program,
            arguments,
            env,
            folder,
            log,
            child: None,
        })
    }

    /// In all arguments.
    pub fn replace(&mut self, name: &str, by: &str) {
        self.arguments.iter_mut().for_each(|argument| *argument = argument.replace(name, by));
    }

    /// Hosts of the URLs among the arguments.
    pub fn hosts(&self) -> Vec<String> {
        let urls = self.arguments.iter().filter_map(|argument| argument.strip_prefix("http://"));
        urls.filter_map(|url| url.split([':', '/']).next()).map(str::to_owned).collect()
    }

    /// Whether it went well, once it has ended for good.
    pub fn outcome(&mut self) -> Option<bool> {
        let status = self.child.as_mut().filter(|_| self.once)?.try_wait().ok()??;
        Some(status.success())
    }

    pub fn env(&mut self, name: &str, value: &str) {
        self.env.push((name.to_owned(), value.to_owned()));
    }

    pub fn start(&mut self) -> Result<()> {
        let log = std::fs::File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).current_dir(&self.folder).env_clear().envs(self.env.iter().cloned());
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        reaper::watch(child.id(), self.port, &self.folder);
        self.child = Some(child);
        Ok(())
    }

    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Starts it again when it has ended; asks the probes that are due.
    pub fn tend(&mut self) {
        if self.ended() {
            if self.once {
                return;
            }
            self.child = None;
            self.ready = false;
            self.restarts += 1;
            // An error shows as a Pod that never becomes ready.
            let _ = self.start();
            return;
        }
        let ready = self.readiness.as_mut().map_or(Some(true), Probe::ask);
        self.ready = ready.unwrap_or(self.ready);
        if self.liveness.as_mut().and_then(Probe::ask) == Some(false) {
            self.kill();
        }
    }

    pub fn ended(&mut self) -> bool {
        !matches!(self.child.as_mut().map(Child::try_wait), Some(Ok(None)))
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM
    pub fn terminate(&mut self) {
        if let Some(pid) = self.pid() {
            let _ = Command::new("kill").arg(pid.to_string()).status();
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Probe {
    fn new(probe: &Value, container: &Value, ip: Ipv4Addr) -> Result<Option<Self>> {
        if probe.is_null() {
            return Ok(None);
        }
        let port = &probe["httpGet"]["port"];
        let ports = container["ports"].as_array().map(Vec::as_slice).unwrap_or_default();
        let named = ports.iter().find(|named| named["name"] == *port).map(|named| &named["containerPort"]);
        let port = named.unwrap_or(port).as_u64().with_context(|| format!("no port {port}"))?;
        let path = probe["httpGet"]["path"].as_str().context("not an HTTP probe")?;
        Ok(Some(Self {
            url: format!("http://{ip}:{port}{path}"),
            period: Duration::from_secs(probe["periodSeconds"].as_u64().unwrap_or(10)),
            threshold: probe["failureThreshold"].as_u64().unwrap_or(3),
            failures: 0,
            next: Instant::now(),
        }))
    }

    /// What it says now, once it is sure: one success, or enough failures.
    fn ask(&mut self) -> Option<bool> {
        if Instant::now() < self.next {
            return None;
        }
        let answer = ureq::get(&self.url).config().timeout_global(Some(PROBE)).build().call();
        if answer.is_ok() {
            self.failures = 0;
        } else {
            self.failures += 1;
        }
        // A node asks every few seconds; until the first success there is no reason to wait here.
        let quick = answer.is_err() && self.failures < self.threshold;
        self.next = Instant::now() + if quick { Duration::from_millis(500) } else { self.period };
        (answer.is_ok() || self.failures >= self.threshold).then_some(answer.is_ok())
    }
}

fn environment(container: &Value, pod: &Value, node: &str, ip: Ipv4Addr) -> Result<Vec<(String, String)>> {
    let mut env = vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
    for variable in container["env"].as_array().into_iter().flatten() {
        let name = variable["name"].as_str().context("a variable without a name")?;
        let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
            Some("metadata.name") => pod["metadata"]["name"].as_str().unwrap_or_default().to_owned(),
            Some("metadata.namespace") => {
                pod["metadata"]["namespace"].as_str().unwrap_or_default().to_owned()
            }
            Some("metadata.uid") => pod["metadata"]["uid"].as_str().unwrap_or_default().to_owned(),
            Some("spec.nodeName") => node.to_owned(),
            Some("status.podIP") => ip.to_string(),
            Some(other) => bail!("the field {other} is not played"),
            None if !variable["valueFrom"].is_null() => bail!("{name}: only fields are played"),
            None => variable["value"].as_str().unwrap_or_default().to_owned(),
        };
        env.push((name.to_owned(), value));
    }
    Ok(env)
}

/// `$(NAME)` becomes the variable's value, as Kubernetes has it.
fn expand(argument: &str, env: &[(String, String)]) -> String {
    env.iter().fold(argument.to_owned(), |text, (name, value)| text.replace(&format!("$({name})"), value))
}

/// A path below a mounted volume becomes one below the Pod's folder.
fn mounted(argument: String, container: &Value, folder: &Path) -> Result<String> {
    for mount in container["volumeMounts"].as_array().into_iter().flatten() {
        let path = mount["mountPath"].as_str().context("a mount without a path")?;
        let volume = folder.join("volumes").join(mount["name"].as_str().context("a mount without a name")?);
        std::fs::create_dir_all(&volume)?;
        if let Some(rest) = argument.strip_prefix(path) {
            return Ok(format!("{}{rest}", volume.display()));
        }
    }
    Ok(argument)
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}
