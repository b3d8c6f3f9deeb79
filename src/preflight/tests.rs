use std::time::Instant;

use super::*;
use crate::connection::test_server::{Certificates, Server, cluster, eventually, free_port, plain_access};
use crate::connection::{Connection, Credentials, Secret, TlsAccess};
use crate::topology::server_info;

fn input(source: RedisAccess, target: RedisAccess) -> PreflightInput {
    PreflightInput {
        source: Some(SourceSide {
            dialer: Dialer::new(source.clone(), "test"),
            access: source,
            prefer_replica: false,
            psync_command: Some("PSYNC".into()),
            pauses: false,
        }),
        target: Some(TargetSide {
            dialer: Dialer::new(target.clone(), "test"),
            access: target,
            must_be_empty: true,
            claimed: None,
        }),
        database_map: BTreeMap::new(),
        include_databases: Vec::new(),
        exclude_databases: Vec::new(),
        filtered: false,
        nothing_may_be_lost: false,
    }
}

fn password(access: RedisAccess, username: Option<&str>, password: &str) -> RedisAccess {
    let password = Secret::Literal(password.into());
    RedisAccess {
        credentials: Some(Credentials { username: username.map(str::to_owned), password }),
        ..access
    }
}

async fn fault(input: &PreflightInput) -> PreflightError {
    let begun = Instant::now();
    let error = preflight(input).await.map(|report| report.warnings).expect_err("preflight must refuse");
    assert!(begun.elapsed() < Duration::from_secs(5), "{error} took {:?}", begun.elapsed());
    assert!(!error.to_string().contains('\n'), "{error}");
    error
}

async fn passes(input: &PreflightInput) -> PreflightReport {
    preflight(input).await.unwrap_or_else(|error| panic!("{error}"))
}

async fn run(connection: &mut Connection, command: &str) {
    let args: Vec<&[u8]> = command.split(' ').map(str::as_bytes).collect();
    connection.query(&args).await.unwrap();
}

#[tokio::test]
async fn two_fit_servers_pass() {
    let (source, target) = (Server::start(&[]), Server::start(&[]));
    let mut client = source.connect().await;
    run(&mut client, "SET a 1").await;
    run(&mut client, "SELECT 3").await;
    run(&mut client, "SET b 2").await;
    let report = passes(&input(source.access(), target.access())).await;
    let found = report.source.unwrap();
    assert_eq!((found.keys, found.origins), (2, vec![source.address.clone()]));
    assert_eq!(report.target.unwrap().keys, 0);
    assert!(report.warnings.iter().any(|line| line.contains("repl-backlog-size")), "{:?}", report.warnings);
}

#[tokio::test]
async fn nobody_at_the_port_or_a_wrong_password() {
    let server = Server::start(&["--requirepass", "pw"]);
    let nobody = plain_access(&Address::new("127.0.0.1", free_port()));
    let right = password(server.access(), None, "pw");
    let wrong = password(server.access(), None, "hunter2");
    assert_eq!(fault(&input(nobody.clone(), right.clone())).await.reason(), "SourceUnreachable");
    assert_eq!(fault(&input(right.clone(), nobody)).await.reason(), "TargetUnreachable");
    let error = fault(&input(right, wrong)).await;
    assert_eq!(error.reason(), "AuthFailed");
    assert!(error.to_string().starts_with("target: ") && !error.to_string().contains("hunter2"), "{error}");
    assert_eq!(fault(&input(server.access(), server.access())).await.reason(), "AuthFailed");
}

#[tokio::test]
async fn an_address_that_swallows_packets() {
    let server = Server::start(&[]);
    // A full accept queue answers no SYN, as a firewall does.
    let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let at = listener.local_addr().unwrap().as_socket().unwrap();
    let mut filling = Vec::new();
    while let Ok(stream) = std::net::TcpStream::connect_timeout(&at, Duration::from_millis(100)) {
        filling.push(stream);
    }
    let error = fault(&input(plain_access(&Address::new("127.0.0.1", at.port())), server.access())).await;
    assert_eq!(error.reason(), "SourceUnreachable");
}

#[tokio::test]
async fn tls_and_plain_text_mixed_up() {
    let certificates = Certificates::make();
    let (plain, secured) = (Server::start(&[]), Server::start_tls(&certificates, &[]));
    let tls = TlsAccess {
        ca: certificates.secret("ca.pem"),
        client_certificate: None,
        client_key: None,
        server_name: None,
        insecure_skip_verify: false,
    };
    let error = fault(&input(plain.access(), secured.access())).await;
    assert!(error.to_string().contains("speaks TLS, but TLS is not enabled"), "{error}");
    let error = fault(&input(RedisAccess { tls: Some(tls), ..plain.access() }, plain.access())).await;
    assert!(error.to_string().contains("speaks plain text, but TLS is enabled"), "{error}");
}

#[tokio::test]
async fn a_replica_as_the_target() {
    let (source, master) = (Server::start(&[]), Server::start(&[]));
    let port = master.address.port.to_string();
    let replica = Server::start(&["--replicaof", "127.0.0.1", &port]);
    let error = fault(&input(source.access(), replica.access())).await;
    assert!(
        matches!(&error, PreflightError::TargetIsReplica { master: Some(of), .. } if *of == master.address),
        "{error}"
    );
}

#[tokio::test]
async fn a_replica_source_without_its_master() {
    let target = Server::start(&[]);
    let replica = Server::start(&["--replicaof", "127.0.0.1", "1"]);
    let error = fault(&input(replica.access(), target.access())).await;
    assert!(matches!(error, PreflightError::ReplicaUnlinked { .. }) && error.is_transient(), "{error}");
}

#[tokio::test]
async fn a_source_that_is_loading() {
    let (source, target) = (Server::start(&["--enable-debug-command", "yes"]), Server::start(&[]));
    let mut client = source.connect().await;
    run(&mut client, "DEBUG POPULATE 200000").await;
    run(&mut client, "SAVE").await;
    let dir = source.dir.path().display().to_string();
    // Long enough to be seen: 200 µs a key, many keys between two looks at the network.
    let loading = Server::start(&[
        "--dir",
        &dir,
        "--key-load-delay",
        "200",
        "--loading-process-events-interval-bytes",
        "1024",
    ]);
    let error = fault(&input(loading.access(), target.access())).await;
    assert!(matches!(error, PreflightError::Loading { role: Role::Source, .. }), "{error}");
    assert!(error.is_transient());
}

#[tokio::test]
async fn clusters_with_gaps() {
    let (whole, gap) = (Server::start(&[]), cluster(&["0-8000", "8002-16383"]).await);
    let error = fault(&input(whole.access(), gap[0].access())).await;
    assert!(error.to_string().contains("target: nobody serves the cluster slots 8001"), "{error}");
    let error = fault(&input(gap[0].access(), whole.access())).await;
    assert!(error.to_string().starts_with("source: nobody serves"), "{error}");
}

#[tokio::test]
async fn databases_without_a_place() {
    let source = Server::start(&[]);
    let target = cluster(&["0-8191", "8192-16383"]).await;
    let mut client = source.connect().await;
    run(&mut client, "SELECT 2").await;
    run(&mut client, "SET k v").await;
    let mut input = input(source.access(), target[1].access());
    let error = fault(&input).await;
    assert!(error.to_string().contains("database 2, but the target has only 1"), "{error}");
    input.exclude_databases = vec![2];
    passes(&input).await;
    input.exclude_databases.clear();
    input.database_map = BTreeMap::from([(2, 0)]);
    let report = passes(&input).await;
    assert_eq!(report.target.unwrap().topology.shards.len(), 2);
}

#[tokio::test]
async fn too_little_memory_on_the_target() {
    let source = Server::start(&["--enable-debug-command", "yes"]);
    let target = Server::start(&["--maxmemory", "10mb", "--maxmemory-policy", "allkeys-lru"]);
    let mut input = input(source.access(), target.access());
    let warnings = passes(&input).await.warnings;
    assert!(warnings.iter().any(|line| line.contains("allkeys-lru may evict")), "{warnings:?}");
    run(&mut source.connect().await, "DEBUG POPULATE 200 key 100000").await;
    let error = fault(&input).await;
    assert!(matches!(error, PreflightError::TooLittleMemory { .. }), "{error}");
    input.filtered = true;
    let warnings = passes(&input).await.warnings;
    assert!(warnings.iter().any(|line| line.contains("little room")), "{warnings:?}");
}

#[tokio::test]
async fn a_migration_onto_itself() {
    let server = Server::start(&[]);
    let by_name = plain_access(&Address::new("localhost", server.address.port));
    let error = fault(&input(server.access(), by_name)).await;
    assert!(matches!(error, PreflightError::SameServer { what: "the same server", .. }), "{error}");

    let nodes = cluster(&["0-8191", "8192-16383"]).await;
    let error = fault(&input(nodes[0].access(), nodes[1].access())).await;
    assert!(matches!(error, PreflightError::SameServer { .. }), "{error}");
}

#[tokio::test]
async fn a_source_that_replicates_from_the_target() {
    let target = Server::start(&["--repl-diskless-sync-delay", "0"]);
    let port = target.address.port.to_string();
    let source = Server::start(&["--replicaof", "127.0.0.1", &port]);
    let dialer = Dialer::new(source.access(), "test");
    eventually("the replica follows", || async {
        server_info(&dialer, &source.address).await.ok()?.is_current_replica().then_some(())
    })
    .await;
    let error = fault(&input(source.access(), target.access())).await;
    assert!(matches!(error, PreflightError::SameServer { .. }), "{error}");
}

#[tokio::test]
async fn keys_on_the_target() {
    let (source, target) = (Server::start(&[]), Server::start(&[]));
    let mut client = target.connect().await;
    run(&mut client, "SET redis-migration:{x}:uid 1").await;
    let mut input = input(source.access(), target.access());
    passes(&input).await;
    run(&mut client, "SELECT 4").await;
    run(&mut client, "SET theirs 1").await;
    let error = fault(&input).await;
    assert_eq!(error.reason(), "TargetNotEmpty");
    assert!(matches!(error, PreflightError::TargetNotEmpty { database: 4, keys: 2, .. }), "{error}");
    if let Some(target) = &mut input.target {
        target.must_be_empty = false;
    }
    passes(&input).await;
}

#[tokio::test]
async fn psync_renamed_or_forbidden() {
    let (source, target) = (Server::start(&["--rename-command", "PSYNC", "XSYNC"]), Server::start(&[]));
    let mut renamed = input(source.access(), target.access());
    let error = fault(&renamed).await;
    assert!(matches!(error, PreflightError::NoPsync { .. }), "{error}");
    if let Some(source) = &mut renamed.source {
        source.psync_command = Some("XSYNC".into());
    }
    passes(&renamed).await;

    let source = Server::start(&["--user", "few", "on", ">pw", "~*", "+@all", "-psync"]);
    let error = fault(&input(password(source.access(), Some("few"), "pw"), target.access())).await;
    assert!(matches!(&error, PreflightError::Forbidden { command, .. } if command == "PSYNC"), "{error}");
    assert_eq!(error.reason(), "AuthFailed");
}

/// ACL DRYRUN is not known to 6.x, and seldom allowed to a user who may not replicate.
#[tokio::test]
async fn rules_tell_where_nothing_can_be_tried() {
    let target = Server::start(&[]);
    let source = Server::start_cached("redis-6.2.14");
    let mut client = source.connect().await;
    run(&mut client, "ACL SETUSER few on >pw ~* +@all -psync").await;
    let few = |server: &Server| password(server.access(), Some("few"), "pw");
    let error = fault(&input(few(&source), target.access())).await;
    assert!(matches!(&error, PreflightError::Forbidden { command, .. } if command == "PSYNC"), "{error}");
    run(&mut client, "ACL SETUSER few +psync").await;
    let report = passes(&input(few(&source), target.access())).await;
    assert!(!report.warnings.iter().any(|line| line.contains("PSYNC")), "{:?}", report.warnings);
    run(&mut client, "ACL SETUSER few -acl").await;
    let report = passes(&input(few(&source), target.access())).await;
    let told =
        |line: &String| line.starts_with("source: ") && line.contains("PSYNC, REPLCONF could not be checked");
    assert!(report.warnings.iter().any(told), "{:?}", report.warnings);

    let without = ["--user", "few", "on", ">pw", "~*", "+@all", "-psync", "-acl|dryrun"];
    let source = Server::start(&without);
    let error = fault(&input(few(&source), target.access())).await;
    assert!(matches!(&error, PreflightError::Forbidden { command, .. } if command == "PSYNC"), "{error}");
}

#[tokio::test]
async fn what_may_not_be_asked_is_left_out() {
    let args =
        ["--user", "few", "on", ">pw", "~*", "+info", "+psync", "+replconf", "+ping", "+scan", "+select"];
    let (source, target) = (Server::start(&args), Server::start(&args));
    let few = |server: &Server| password(server.access(), Some("few"), "pw");
    let report = passes(&input(few(&source), few(&target))).await;
    let unchecked = report.warnings.iter().filter(|line| line.contains("could not be checked"));
    assert_eq!(unchecked.count(), 2, "{:?}", report.warnings);
    assert_eq!(report.source.unwrap().topology.databases, None);
}

#[tokio::test]
async fn servers_of_every_version_are_understood() {
    for (name, program) in Server::cached() {
        let (source, target) = (Server::start_program(&program), Server::start_program(&program));
        let mut client = source.connect().await;
        run(&mut client, "SET k v").await;
        let report = preflight(&input(source.access(), target.access())).await;
        let report = report.unwrap_or_else(|error| panic!("{name}: {error}"));
        let found = report.source.unwrap();
        let version = found.topology.server.to_string().to_lowercase().replace(' ', "-");
        assert_eq!((version, found.keys, found.topology.databases), (name.clone(), 1, Some(16)));
        run(&mut target.connect().await, "SET k v").await;
        let error = fault(&input(source.access(), target.access())).await;
        assert!(matches!(error, PreflightError::TargetNotEmpty { .. }), "{name}: {error}");
        let error = fault(&input(source.access(), source.access())).await;
        assert!(matches!(error, PreflightError::SameServer { .. }), "{name}: {error}");
    }
}

#[tokio::test]
async fn an_older_target_is_warned_of_unless_nothing_may_be_lost() {
    let (source, target) = (Server::start(&[]), Server::start_cached("redis-3.2.6"));
    let mut strict = input(source.access(), target.access());
    let report = preflight(&strict).await.unwrap();
    let told = |text: &str| report.warnings.iter().any(|warning| warning.contains(text));
    assert!(told("hashes in listpacks (RDB type 16)") && told("rewritten"), "{:?}", report.warnings);
    assert!(
        told("Redis 3.2.6 has no equivalent for streams, functions of Redis 7.0.15"),
        "{:?}",
        report.warnings
    );
    strict.nothing_may_be_lost = true;
    let error = fault(&strict).await;
    assert!(matches!(error, PreflightError::NoEquivalent { .. }), "{error}");
    assert!(error.to_string().contains("maxQuarantined is 0"), "{error}");
    let upward = PreflightInput { nothing_may_be_lost: true, ..input(target.access(), source.access()) };
    let report = preflight(&upward).await.expect("the newer server takes the older one's data");
    assert!(!report.warnings.iter().any(|warning| warning.contains("rewritten")), "{:?}", report.warnings);
}
