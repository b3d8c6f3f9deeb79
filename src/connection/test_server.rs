//! Real servers for tests: on 127.0.0.1, on a free port, gone when dropped.

use std::fs::File;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::*;

/// What most tests run against; one with TLS.
const USUAL: &str = "redis-7.0.15";

pub(crate) struct Server {
    child: Child,
    pub(crate) address: Address,
    /// Set when started with TLS: the port of `address` then speaks TLS.
    pub(crate) dir: TempDir,
}

impl Server {
    /// The servers of other versions that `make setup` put into the cache: folder name and program.
    pub(crate) fn cached() -> Vec<(String, std::path::PathBuf)> {
        let cache = std::env::var_os("REDIS_MIGRATION_CACHE").map_or_else(
            || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache"),
            std::path::PathBuf::from,
        );
        let folders = std::fs::read_dir(cache.join("servers")).into_iter().flatten().flatten();
        let programs = folders.filter_map(|folder| {
            let name = folder.file_name().into_string().ok()?;
            let program = folder.path().join(format!("{}-server", name.split('-').next()?));
            program.exists().then_some((name, program))
        });
        let programs: Vec<_> = programs.collect();
        assert!(
            programs.len() >= 9,
            "servers are missing in {}: run make setup; found {programs:?}",
            cache.display()
        );
        programs
    }

    /// The version whose folder in the cache has this name.
    pub(crate) fn start_cached(name: &str) -> Server {
        Server::start_program(&Server::program(name))
    }

    fn program(name: &str) -> std::path::PathBuf {
        let found = Server::cached().into_iter().find(|(folder, _)| folder == name);
        found.unwrap_or_else(|| panic!("no {name} in the cache: run make setup")).1
    }

    /// A server of another version.
    pub(crate) fn start_program(program: &std::path::Path) -> Server {
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        let args = ["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""];
        Server::spawn_program(program, dir, port, &args)
    }

    /// Starts a server with these further arguments and waits until it takes connections.
    pub(crate) fn start(args: &[&str]) -> Server {
        Server::start_with(free_port(), "port", args)
    }

    /// The port speaks TLS with `certificates`' server certificate.
    pub(crate) fn start_tls(certificates: &Certificates, args: &[&str]) -> Server {
        let path = |name: &str| certificates.path(name).display().to_string();
        let (cert, key, ca) = (path("server.pem"), path("server.key"), path("ca.pem"));
        let mut all = vec!["--port", "0", "--tls-cert-file", &cert, "--tls-key-file", &key];
        all.extend(["--tls-ca-cert-file", &ca]);
        all.extend(args);
        Server::start_with(free_port(), "tls-port", &all)
    }

    pub(crate) fn start_sentinel(master: &Address, name: &str, lines: &[&str]) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let port = free_port();
        let config = dir.path().join("sentinel.conf");
        let text = format!(
            "port {port}\nbind 127.0.0.1\nsentinel monitor {name} {} {} 1\n{}\n",
            master.host,
            master.port,
            lines.join("\n")
        );
        std::fs::write(&config, text).unwrap();
        Server::spawn(dir, port, &[&config.display().to_string(), "--sentinel"])
    }

    pub(crate) fn access(&self) -> RedisAccess {
        plain_access(&self.address)
    }

    pub(crate) async fn connect(&self) -> Connection {
        Dialer::new(self.access(), "test").connect(&self.address).await.unwrap()
    }

    fn start_with(port: u16, port_option: &str, args: &[&str]) -> Server {
        let dir = tempfile::tempdir().unwrap();
        let (option, number) = (format!("--{port_option}"), port.to_string());
        let mut all =
            vec![option.as_str(), &number, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
        all.extend(args);
        Server::spawn(dir, port, &all)
    }

    fn spawn(dir: TempDir, port: u16, args: &[&str]) -> Server {
        Server::spawn_program(&Server::program(USUAL), dir, port, args)
    }

    fn spawn_program(program: &std::path::Path, dir: TempDir, port: u16, args: &[&str]) -> Server {
        let log = File::create(dir.path().join("log")).unwrap();
        let child = Command::new(program)
            .args(args)
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("the server must be installed");
        let mut server = Server { child, address: Address::new("127.0.0.1", port), dir };
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            let log = || std::fs::read_to_string(server.dir.path().join("log")).unwrap_or_default();
            assert!(server.child.try_wait().unwrap().is_none(), "the server ended: {}", log());
            assert!(Instant::now() < deadline, "the server does not listen: {}", log());
            std::thread::yield_now();
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn plain_access(address: &Address) -> RedisAccess {
    RedisAccess {
        topology: TopologyChoice::Auto,
        endpoints: vec![address.clone()],
        sentinel: None,
        credentials: None,
        tls: None,
        endpoint_map: BTreeMap::new(),
    }
}

/// Cluster nodes need port + 10000 for their bus.
pub(crate) fn free_port() -> u16 {
    loop {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        if port < 55000 && TcpListener::bind(("127.0.0.1", port + 10000)).is_ok() {
            return port;
        }
    }
}

/// Asks again and again, until `attempt` gives a value.
pub(crate) async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut attempt: impl FnMut() -> F,
) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(value) = attempt().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within 30 s: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A CA, a server certificate for `redis.test` and 127.0.0.1, and a client certificate, made by openssl.
pub(crate) struct Certificates(TempDir);

impl Certificates {
    pub(crate) fn make() -> Certificates {
        let made = Certificates(tempfile::tempdir().unwrap());
        made.openssl(&[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
            "-days",
            "2",
            "-subj",
            "/CN=test CA",
        ]);
        made.signed("server", "subjectAltName=DNS:redis.test,IP:127.0.0.1");
        made.signed("client", "extendedKeyUsage=clientAuth");
        made
    }

    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn secret(&self, name: &str) -> Option<Secret> {
        Some(Secret::File(self.path(name)))
    }

    fn signed(&self, name: &str, extension: &str) {
        let (key, request, certificate) =
            (format!("{name}.key"), format!("{name}.csr"), format!("{name}.pem"));
        self.openssl(&[
            "req",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-keyout",
            &key,
            "-out",
            &request,
            "-subj",
            &format!("/CN={name}"),
        ]);
        std::fs::write(self.path("extension"), extension).unwrap();
        self.openssl(&[
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-out",
            &certificate,
            "-days",
            "2",
            "-extfile",
            "extension",
        ]);
    }

    fn openssl(&self, args: &[&str]) {
        let run = Command::new("openssl").args(args).current_dir(self.0.path()).output();
        let run = run.expect("openssl must be installed");
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    }
}

/// Cluster nodes, each with these slots, that all know of one another.
pub(crate) async fn cluster(slots: &[&str]) -> Vec<Server> {
    let timeout = [
        "--cluster-enabled",
        "yes",
        "--cluster-node-timeout",
        "5000",
        "--cluster-require-full-coverage",
        "no",
    ];
    let nodes: Vec<Server> = slots.iter().map(|_| Server::start(&timeout)).collect();
    for (node, ranges) in nodes.iter().zip(slots) {
        let mut admin = node.connect().await;
        for range in ranges.split(',') {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let args: [&[u8]; 4] = [b"CLUSTER", b"ADDSLOTSRANGE", first.as_bytes(), last.as_bytes()];
            admin.query(&args).await.unwrap();
        }
        for other in &nodes {
            let port = other.address.port.to_string();
            admin.query(&[b"CLUSTER", b"MEET", b"127.0.0.1", port.as_bytes()]).await.unwrap();
        }
    }
    eventually("all nodes know all slots", || async {
        let mut views = Vec::new();
        for node in &nodes {
            let text = node.connect().await.query_text(&[b"CLUSTER", b"NODES"]).await.ok()?;
            let known = crate::topology::parse_cluster_nodes(&text).ok()?;
            if known
                .iter()
                .any(|node| !node.usable || node.announced.host.is_empty() || node.slots.is_empty())
            {
                return None;
            }
            views.push(known.len());
        }
        views.iter().all(|count| *count == nodes.len()).then_some(())
    })
    .await;
    nodes
}
