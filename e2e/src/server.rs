//! One server of any version, in a folder of its own, that ends with its handle.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::tls::Certificates;
use crate::{Client, Conn, Endpoint, Version, port, reaper, wait_until};

const START: Duration = Duration::from_secs(20);

/// What a server is to be like; the rest is chosen for tests (no persistence, no delay before a diskless sync).
#[derive(Clone)]
pub struct Options {
    pub version: Version,
    config: Vec<(String, String)>,
    password: Option<String>,
    tls: Option<(PathBuf, bool)>,
    port: Option<u16>,
    snapshot: Option<PathBuf>,
    sentinel: bool,
    wait: bool,
}

impl Options {
    pub fn new(version: Version) -> Self {
        Self {
            version,
            config: Vec::new(),
            password: None,
            tls: None,
            port: None,
            snapshot: None,
            sentinel: false,
            wait: true,
        }
    }

    /// A line of the configuration file, e.g. `maxmemory`, `10mb`, or `user`, `app on >secret ~* +@all`.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.config.push((name.to_owned(), value.to_owned()));
        self
    }

    /// As `with`, for what lines added otherwise override.
    pub(crate) fn before(mut self, name: &str, value: &str) -> Self {
        self.config.insert(0, (name.to_owned(), value.to_owned()));
        self
    }

    pub fn password(mut self, password: &str) -> Self {
        self.password = Some(password.to_owned());
        self
    }

    /// TLS on a second port; `mutual`: only with a certificate of the same authority.
    pub fn tls(mut self, certificates: &Certificates, mutual: bool) -> Self {
        self.tls = Some((certificates.folder().to_owned(), mutual));
        self
    }

    /// A port that others know, as for the demo; taken by another it is an error.
    pub fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// Starts with this RDB file loaded.
    pub fn snapshot(mut self, file: &Path) -> Self {
        self.snapshot = Some(file.to_owned());
        self
    }

    /// `start` returns as soon as the port answers, though the server may still be loading.
    pub fn without_waiting(mut self) -> Self {
        self.wait = false;
        self
    }

    pub(crate) fn fixed_port(&self) -> Option<u16> {
        self.port
    }

    pub(crate) fn sentinel(mut self) -> Self {
        self.sentinel = true;
        self
    }

    pub fn start(self) -> Result<Server> {
        let mut taken = None;
        for _ in 0..5 {
            let port = self.port.map_or_else(port::free, Ok)?;
            let tls_port = self.tls.is_some().then(port::free).transpose()?;
            let mut server = Server::prepare(self.clone(), port, tls_port)?;
            match server.launch() {
                Ok(()) => return Ok(server),
                Err(_) if self.port.is_none() && server.log().contains("in use") => taken = Some(port),
                Err(error) => return Err(error.context(server.log_tail())),
            }
        }
        bail!("five ports were taken by others, the last one {taken:?}")
    }
}

pub struct Server {
    pub version: Version,
    pub port: u16,
    pub tls_port: Option<u16>,
    options: Options,
    folder: TempDir,
    child: Option<Child>,
}

impl Server {
    pub fn start(version: Version) -> Result<Self> {
        Options::new(version).start()
    }

    /// A copy that the server keeps itself, in step with this one when it returns.
    pub fn replica(&self) -> Result<Self> {
        self.replica_with(Options::new(self.version))
    }

    pub fn replica_with(&self, mut options: Options) -> Result<Self> {
        let word = if options.version.has(5, 0) { "replicaof" } else { "slaveof" };
        if let Some(password) = &self.options.password {
            options = options.with("masterauth", password).password(password);
        }
        let replica = options.with(word, &format!("127.0.0.1 {}", self.port)).start()?;
        replica.wait_linked()?;
        Ok(replica)
    }

    /// The link to the master is up.
    pub fn wait_linked(&self) -> Result<()> {
        wait_until("link to the master", START, || {
            let status = self.conn()?.info("replication", "master_link_status")?;
            Ok((status.as_deref() == Some("up")).then_some(()))
        })
    }

    pub fn endpoint(&self) -> Endpoint {
        let auth = self.options.password.clone().map(|password| (String::new(), password));
        Endpoint { address: self.address(), cluster: false, auth }
    }

    pub fn address(&self) -> String {
        format!("{}:{}", Ipv4Addr::LOCALHOST, self.port)
    }

    /// The TLS port, by the name that the certificate holds.
    pub fn tls_address(&self) -> Result<String> {
        Ok(format!("localhost:{}", self.tls_port.context("started without TLS")?))
    }

    pub fn conn(&self) -> Result<Conn> {
        Conn::open(&self.address(), self.endpoint().auth.as_ref())
    }

    /// What the server itself counted: full and partial resynchronizations granted.
    pub fn syncs(&self) -> Result<(i64, i64)> {
        let mut conn = self.conn()?;
        let mut count =
            |field| Ok::<i64, anyhow::Error>(conn.info("stats", field)?.unwrap_or_default().parse()?);
        Ok((count("sync_full")?, count("sync_partial_ok")?))
    }

    pub fn client(&self) -> Result<Client> {
        Client::open(&self.endpoint())
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Ends the process at once, as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The same port, folder and configuration again.
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        self.launch()
    }

    /// As `restart`, with another line at the end of the configuration for this time.
    pub fn restart_with(&mut self, name: &str, value: &str) -> Result<()> {
        self.options = self.options.clone().with(name, value);
        let started = self.restart();
        self.options.config.pop();
        started
    }

    /// Writes a snapshot and says where it is.
    pub fn save(&self) -> Result<PathBuf> {
        self.conn()?.run(args!["SAVE"])?;
        Ok(self.folder.path().join("dump.rdb"))
    }

    fn prepare(options: Options, port: u16, tls_port: Option<u16>) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("redis-migration-e2e-").tempdir()?;
        if let Some(file) = &options.snapshot {
            std::fs::copy(file, folder.path().join("dump.rdb"))?;
        }
        Ok(Self { version: options.version, port, tls_port, options, folder, child: None })
    }

    fn launch(&mut self) -> Result<()> {
        let file = self.folder.path().join("conf");
        // A sentinel keeps its state in this file; a restart must not lose it.
        if !(self.options.sentinel && file.exists()) {
            std::fs::write(&file, self.config())?;
        }
        let mut command = Command::new(self.version.binary()?);
        command.arg(&file).current_dir(self.folder.path()).stdin(Stdio::null());
        if self.options.sentinel {
            command.arg("--sentinel");
        }
        // Complaints about the configuration come before the log file is open.
        let log = std::fs::File::options().create(true).append(true).open(self.folder.path().join("log"))?;
        let child = command.stdout(log.try_clone()?).stderr(log).spawn()?;
        reaper::watch(child.id(), self.port, self.folder.path());
        self.child = Some(child);
        let wait = self.options.wait;
        wait_until("start of the server", START, || {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().transpose()) {
                return Ok(Some(Err(anyhow::anyhow!("the server ended: {}", status?))));
            }
            let mut conn = self.conn()?;
            match conn.run(args!["PING"]) {
                Err(error) if wait => Err(error),
                _ => Ok(Some(Ok(()))),
            }
        })?
    }

    fn config(&self) -> String {
        let Options { version, config, password, tls, .. } = &self.options;
        let folder = self.folder.path().display();
        let mut text = format!("port {}\nbind 127.0.0.1\ndir {folder}\nlogfile {folder}/log\n", self.port);
        if !self.options.sentinel {
            text += "save \"\"\nappendonly no\nstop-writes-on-bgsave-error no\n";
            if version.has(3, 0) {
                text += "repl-diskless-sync-delay 0\n";
            }
            if version.has(7, 0) {
                text += "enable-debug-command yes\n";
            }
        }
        if let (Some(port), Some((certificates, mutual))) = (self.tls_port, tls) {
            let certificates = certificates.display();
            let clients = if *mutual { "yes" } else { "no" };
            let _ = write!(
                text,
                "tls-port {port}\ntls-cert-file {certificates}/server.crt\ntls-key-file {certificates}/server.key\n\
                 tls-ca-cert-file {certificates}/ca.crt\ntls-auth-clients {clients}\n"
            );
        }
        if let Some(password) = password {
            let _ = writeln!(text, "requirepass {password}");
        }
        for (name, value) in config {
            let _ = writeln!(text, "{name} {value}");
        }
        text
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        // Neither the logo of old versions nor advice on the kernel says why a test failed.
        let told = |line: &&str| {
            !line.contains("WARNING")
                && line.trim_start().starts_with(|c: char| c.is_alphanumeric() || "*>".contains(c))
        };
        let lines: Vec<&str> = log.lines().filter(told).collect();
        lines.get(lines.len().saturating_sub(25)..).unwrap_or_default().join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("--- {} on port {}:\n{}", self.version, self.port, self.log_tail());
        }
    }
}
