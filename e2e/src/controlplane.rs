//! A real Kubernetes control plane without nodes: etcd, API server and controllers on free ports.
//!
//! The API server authorizes by RBAC, admits by Pod Security, and issues the tokens of
//! ServiceAccounts. What nodes would do is played by [`Kubelet`].

mod api;
mod kubelet;
mod process;
mod programs;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rcgen::KeyPair;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::tls::Certificates;
use crate::{Proxy, port, reaper, wait_until};

pub use api::{Answer, Api};
pub use kubelet::{Kubelet, Running};
pub use programs::Program;

use process::Process;

/// With other builds and tests on two cores; alone it takes two to four seconds.
const START: Duration = Duration::from_secs(120);
const ADMIN: &str = "token-of-the-tests-admin";

/// Which of its processes is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Etcd,
    ApiServer,
    Controllers,
}

pub struct ControlPlane {
    // Processes before the folder that they write into: fields are dropped in this order.
    controllers: Process,
    api_server: Process,
    etcd: Process,
    api: Api,
    certificates: Certificates,
    folder: TempDir,
}

impl ControlPlane {
    /// Everything answers when this returns. Of one test's own, which may stop parts of it.
    pub fn start() -> Result<Self> {
        let mut taken = None;
        for _ in 0..5 {
            match Self::prepare()?.launch() {
                Ok(plane) => return Ok(plane),
                Err(error) if format!("{error:#}").contains("address already in use") => taken = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(taken.context("never started")?.context("five times a port was taken by others"))
    }

    /// One for all tests of a process, which use namespaces of their own and stop nothing. The
    /// definition of RedisMigrations is there.
    pub fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<Result<ControlPlane, String>> = OnceLock::new();
        let start = || {
            let plane = Self::start()?;
            plane.install_definition()?;
            Ok(plane)
        };
        let shared = SHARED.get_or_init(|| start().map_err(|error: anyhow::Error| format!("{error:#}")));
        shared.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
    }

    /// `https://127.0.0.1:PORT`
    pub fn url(&self) -> &str {
        self.api.url()
    }

    /// Requests as the cluster's administrator.
    pub fn api(&self) -> &Api {
        &self.api
    }

    /// Requests as the holder of this token.
    pub fn api_as(&self, token: &str) -> Result<Api> {
        Api::new(self.url(), &self.certificates.pem("ca.crt")?, token)
    }

    /// Of the administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubeconfig")
    }

    /// The same by way of a proxy before the API server.
    pub fn kubeconfig_through(&self, proxy: &Proxy) -> Result<PathBuf> {
        let path = self.folder.path().join(format!("kubeconfig-{}", proxy.address().replace(':', "-")));
        let url = format!("https://{}", proxy.address());
        std::fs::write(&path, kubeconfig(&url, &self.authority(), &json!({"token": ADMIN}), "default")?)?;
        Ok(path)
    }

    /// Host and port of the API server.
    pub fn address(&self) -> &str {
        self.url().trim_start_matches("https://").trim_end_matches('/')
    }

    /// The authority of the API server's certificate, PEM.
    pub fn authority(&self) -> PathBuf {
        self.certificates.folder().join("ca.crt")
    }

    /// Standard output of `kubectl`, or what it complained of.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.run(Program::Kubectl, arguments, None)
    }

    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        self.run(Program::Helm, arguments, None)
    }

    /// `kubectl get … -o json`
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "-o", "json"], arguments].concat())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// `kubectl apply -f -`; JSON is YAML.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        self.kubectl_with(&["apply", "-f", "-"], yaml)
    }

    /// `kubectl` with this on its standard input.
    pub fn kubectl_with(&self, arguments: &[&str], input: &str) -> Result<String> {
        self.run(Program::Kubectl, arguments, Some(input))
    }

    /// Waits until its ServiceAccount is there, without which no Pod is.
    pub fn namespace(&self, name: &str, labels: &[(&str, &str)]) -> Result<()> {
        let labels: serde_json::Map<String, Value> =
            labels.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        let namespace = json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}
        });
        self.api.post("/api/v1/namespaces", &namespace)?.expect(&[201, 409])?;
        let path = format!("/api/v1/namespaces/{name}/serviceaccounts/default");
        wait_until(&path, START, || Ok(self.api.get(&path)?.found()))?;
        Ok(())
    }

    /// Installs crds/redismigrations.yaml and waits until it is served.
    pub fn install_definition(&self) -> Result<()> {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crds/redismigrations.yaml");
        self.kubectl(&["apply", "--server-side", "-f", &file.to_string_lossy()])?;
        self.wait_for_definition()
    }

    /// Waits until RedisMigrations are served.
    pub fn wait_for_definition(&self) -> Result<()> {
        let path = "/apis/redis-migration.io/v1alpha1/redismigrations";
        wait_until("RedisMigrations being served", START, || Ok(self.api.get(path)?.found()))?;
        Ok(())
    }

    /// A token of this ServiceAccount, as `kubectl create token` gives it.
    pub fn token(&self, namespace: &str, account: &str) -> Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
        let answer = self.api.post(&path, &request)?.expect(&[201])?;
        Ok(answer["status"]["token"].as_str().context("no token in the answer")?.to_owned())
    }

    /// Requests so far that are about migrations, by verb, resource and answer, as the API server counts them.
    pub fn requests(&self) -> Result<BTreeMap<String, f64>> {
        let text = self.api().get("/metrics")?.text;
        let ours = ["redismigrations", "leases", "events", "secrets"]
            .map(|resource| format!("resource=\"{resource}\""));
        let lines = text.lines().filter(|line| {
            line.starts_with("apiserver_request_total{")
                && ours.iter().any(|resource| line.contains(resource))
        });
        let counted = lines.filter_map(|line| {
            let (kind, count) = line.rsplit_once(' ')?;
            Some((kind.to_owned(), count.parse().ok()?))
        });
        Ok(counted.collect())
    }

    /// Ends a process at once, as a crash would.
    pub fn kill(&mut self, part: Part) {
        self.process(part).kill();
    }

    /// Starts it again with the same port and data, and waits until it answers.
    pub fn restart(&mut self, part: Part) -> Result<()> {
        self.process(part).start()?;
        match part {
            Part::Etcd => self.wait_etcd(),
            Part::ApiServer => self.wait_api_server(),
            Part::Controllers => Ok(()),
        }
        .with_context(|| self.tails())
    }

    /// What the processes wrote last, for a test that fails.
    pub fn tails(&self) -> String {
        [&self.etcd, &self.api_server, &self.controllers].map(Process::tail).join("\n")
    }

    fn process(&mut self, part: Part) -> &mut Process {
        match part {
            Part::Etcd => &mut self.etcd,
            Part::ApiServer => &mut self.api_server,
            Part::Controllers => &mut self.controllers,
        }
    }

    fn prepare() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("redis-migration-e2e-").tempdir()?;
        let certificates = Certificates::new()?;
        // Nobody drops the one that tests share.
        reaper::watch(std::process::id(), 0, certificates.folder());
        let (etcd_port, peer_port, api_port) = (port::free()?, port::free()?, port::free()?);
        let url = format!("https://127.0.0.1:{api_port}");
        let at = |name: &str| folder.path().join(name).display().to_string();
        let tls = |name: &str| certificates.folder().join(name).display().to_string();

        std::fs::write(folder.path().join("tokens.csv"), format!("{ADMIN},admin,admin,system:masters\n"))?;
        let accounts = KeyPair::generate()?;
        std::fs::write(folder.path().join("accounts.key"), accounts.serialize_pem())?;
        std::fs::write(folder.path().join("accounts.pub"), accounts.public_key_pem())?;

        let (client, peer) =
            (format!("http://127.0.0.1:{etcd_port}"), format!("http://127.0.0.1:{peer_port}"));
        let etcd = Process::new(
            Program::Etcd,
            folder.path(),
            etcd_port,
            vec![
                format!("--data-dir={}", at("etcd")),
                format!("--listen-client-urls={client}"),
                format!("--advertise-client-urls={client}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=default={peer}"),
                // Only processes are killed here, not machines.
                "--unsafe-no-fsync".to_owned(),
                "--log-level=warn".to_owned(),
            ],
        )?;
        let api_server = Process::new(
            Program::ApiServer,
            folder.path(),
            api_port,
            vec![
                format!("--etcd-servers={client}"),
                "--bind-address=127.0.0.1".to_owned(),
                "--advertise-address=127.0.0.1".to_owned(),
                format!("--secure-port={api_port}"),
                format!("--tls-cert-file={}", tls("server.crt")),
                format!("--tls-private-key-file={}", tls("server.key")),
                format!("--token-auth-file={}", at("tokens.csv")),
                "--authorization-mode=RBAC".to_owned(),
                format!("--service-account-issuer={url}"),
                format!("--service-account-signing-key-file={}", at("accounts.key")),
                format!("--service-account-key-file={}", at("accounts.pub")),
                "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
                "--endpoint-reconciler-type=none".to_owned(),
            ],
        )?;
        let controllers = Process::new(
            Program::Controllers,
            folder.path(),
            api_port,
            vec![
                format!("--kubeconfig={}", at("kubeconfig")),
                format!("--master={url}"),
                "--leader-elect=false".to_owned(),
                "--secure-port=0".to_owned(),
                "--use-service-account-credentials".to_owned(),
                format!("--service-account-private-key-file={}", at("accounts.key")),
                format!("--root-ca-file={}", tls("ca.crt")),
                // The node that a test's kubelet makes renews no lease, and is not to be drained for it.
                "--controllers=*,-node-lifecycle-controller,-taint-eviction-controller".to_owned(),
            ],
        )?;
        let api = Api::new(&url, &certificates.pem("ca.crt")?, ADMIN)?;
        let plane = Self { etcd, api_server, controllers, api, certificates, folder };
        let config = kubeconfig(plane.url(), &plane.authority(), &json!({"token": ADMIN}), "default")?;
        std::fs::write(plane.kubeconfig(), config)?;
        Ok(plane)
    }

    fn launch(mut self) -> Result<Self> {
        match self.start_all() {
            Ok(()) => Ok(self),
            Err(error) => Err(error.context(self.tails())),
        }
    }

    fn start_all(&mut self) -> Result<()> {
        self.etcd.start()?;
        self.api_server.start()?;
        self.wait_api_server()?;
        self.controllers.start()?;
        let path = "/api/v1/namespaces/default/serviceaccounts/default";
        wait_until("the controllers' first work", START, || {
            if let Err(error) = self.controllers.check() {
                return Ok(Some(Err(error)));
            }
            Ok(self.api.get(path)?.found().map(|_| Ok(())))
        })?
    }

    /// A listening socket; the API server waits for what else it needs.
    fn wait_etcd(&mut self) -> Result<()> {
        let address = self.etcd.address();
        wait_until("start of etcd", START, || {
            if let Err(error) = self.etcd.check() {
                return Ok(Some(Err(error)));
            }
            std::net::TcpStream::connect(&address)?;
            Ok(Some(Ok(())))
        })?
    }

    fn wait_api_server(&mut self) -> Result<()> {
        wait_until("start of the API server", START, || {
            if let Err(error) = self.etcd.check().and_then(|()| self.api_server.check()) {
                return Ok(Some(Err(error)));
            }
            let answer = self.api.get("/readyz")?;
            ensure!(answer.status == 200, "{}", answer.text);
            Ok(Some(Ok(())))
        })?
    }

    fn run(&self, program: Program, arguments: &[&str], input: Option<&str>) -> Result<String> {
        let mut command = Command::new(program.file()?);
        command.args(program.words()).args(arguments).env("KUBECONFIG", self.kubeconfig());
        // Nothing of the user's own: neither caches nor plugins nor repositories.
        command.env("HOME", self.folder.path()).env("KUBERC", "off");
        for name in ["CACHE", "CONFIG", "DATA"] {
            command.env(format!("HELM_{name}_HOME"), self.folder.path().join(format!("helm-{name}")));
        }
        command.stdin(Stdio::null());
        if let Some(input) = input {
            let file = tempfile::NamedTempFile::new_in(self.folder.path())?;
            std::fs::write(file.path(), input)?;
            command.stdin(file.reopen()?);
        }
        let output = command.output().with_context(|| format!("{program:?}"))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!(
                "{program:?} {arguments:?}: {}\n{said}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(said)
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.tails());
        }
    }
}

/// JSON is YAML.
fn kubeconfig(url: &str, authority: &Path, user: &Value, namespace: &str) -> Result<String> {
    Ok(serde_json::to_string(&json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "tests",
        "clusters": [{"name": "tests", "cluster": {"server": url, "certificate-authority": authority}}],
        "users": [{"name": "user", "user": user}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "user", "namespace": namespace}}],
    }))?)
}
