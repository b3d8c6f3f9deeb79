//! The harness itself, without the engine: a server's own replica must compare equal, and whatever
//! is changed on one side must be found.

use std::io::{ErrorKind, Read, Write};
use std::time::Duration;

use anyhow::Result;
use e2e::compare::{self, compare, wait_equal};
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::proxy::Way;
use e2e::{Cluster, Options, Proxy, Sentinels, Server, Version, args, wait_until};

const SETTLE: Duration = Duration::from_secs(20);

/// Data of every type, and every command family meanwhile, against Redis's own replication.
fn replica_is_equal(version: Version) -> Result<()> {
    let source = Server::start(version)?;
    Dataset::default().rounds(3).fill(&mut source.client()?)?;
    let load = Load {
        databases: vec![0, 1, 9],
        across_databases: true,
        additive: 30,
        // Older replicas show keys that have expired until the master says so.
        renewals: version.has(5, 0),
        ..Load::default()
    };
    let writer = Writer::start(&source.endpoint(), load)?;
    writer.wait_more(1_000, SETTLE)?;
    let replica = source.replica()?;
    writer.wait_more(8_000, SETTLE)?;
    let written = writer.stop()?;
    let report = wait_equal(&source.endpoint(), &replica.endpoint(), SETTLE)?;
    assert!(report.keys > 300, "{report}");
    assert!(written.commands > 8_000);
    Ok(())
}

#[test]
fn replica_of_redis_2_8() -> Result<()> {
    replica_is_equal(Version::REDIS_2_8)
}

#[test]
fn replica_of_redis_3_0() -> Result<()> {
    replica_is_equal(Version::REDIS_3_0)
}

#[test]
fn replica_of_redis_3_2() -> Result<()> {
    replica_is_equal(Version::REDIS_3_2)
}

#[test]
fn replica_of_redis_5_0() -> Result<()> {
    replica_is_equal(Version::REDIS_5_0)
}

#[test]
fn replica_of_redis_6_2() -> Result<()> {
    replica_is_equal(Version::REDIS_6_2)
}

#[test]
fn replica_of_redis_7_0() -> Result<()> {
    replica_is_equal(Version::REDIS_7_0)
}

#[test]
fn replica_of_redis_8_2() -> Result<()> {
    replica_is_equal(Version::REDIS_8_2)
}

#[test]
fn replica_of_valkey_8_1() -> Result<()> {
    replica_is_equal(Version::VALKEY_8_1)
}

#[test]
fn replica_of_valkey_9_1() -> Result<()> {
    replica_is_equal(Version::VALKEY_9_1)
}

#[test]
fn planted_differences_are_found() -> Result<()> {
    let version = Version::VALKEY_9_1;
    let (source, target) = (Server::start(version)?, Server::start(version)?);
    let data = Dataset::default().rounds(1).databases(&[3]);
    data.fill(&mut source.client()?)?;
    let copy = Options::new(version).snapshot(&source.save()?).start()?;
    assert!(compare(&source.endpoint(), &copy.endpoint())?.differences.is_empty());
    let empty = compare(&source.endpoint(), &target.endpoint())?;
    assert_eq!(empty.differences.len(), empty.keys);

    let plants: [(&str, &[&[u8]]); 15] = [
        ("string:int:0:1", args!["SET", "string:int:0:1", "-2"]),
        ("extra", args!["SET", "extra", "here"]),
        ("string:prose:0:5000", args!["SETRANGE", "string:prose:0:5000", "4000", "x"]),
        ("list:many:0", args!["RPOPLPUSH", "list:many:0", "list:many:0"]),
        ("set:pack:0", args!["SADD", "set:pack:0", "one more"]),
        ("hash:pack:0", args!["HSET", "hash:pack:0", "field 1", "other"]),
        ("hash:expiring:pack:0", args!["HPEXPIRE", "hash:expiring:pack:0", "9000000", "FIELDS", "1", "0"]),
        ("hash:expiring:table:0", args!["HPERSIST", "hash:expiring:table:0", "FIELDS", "1", "3"]),
        ("zset:pack:0", args!["ZINCRBY", "zset:pack:0", "0.0000001", "element 2"]),
        ("stream:0", args!["XACK", "stream:0", "readers", "4-0"]),
        ("stream:empty:0", args!["XSETID", "stream:empty:0", "9-9"]),
        ("expiring:list:0:2", args!["PEXPIRE", "expiring:list:0:2", "3500000"]),
        ("expiring:string:0:2", args!["PERSIST", "expiring:string:0:2"]),
        ("bitmap:0", args!["DEL", "bitmap:0"]),
        ("counters", args!["FUNCTION", "DELETE", "counters"]),
    ];
    let mut conn = copy.conn()?;
    for (_, plant) in plants {
        conn.run(plant)?;
    }
    conn.select(3)?;
    conn.run(args!["RENAME", "geo:0", "moved"])?;
    let report = compare(&source.endpoint(), &copy.endpoint())?;
    let mut found: Vec<String> =
        report.differences.iter().map(|d| String::from_utf8_lossy(&d.key).into_owned()).collect();
    let mut planted: Vec<String> = plants.iter().map(|(key, _)| (*key).to_owned()).collect();
    planted.extend(["geo:0".to_owned(), "moved".to_owned()]);
    found.sort();
    planted.sort();
    assert_eq!(found, planted, "{report}");
    Ok(())
}

#[test]
fn cluster_and_standalone_compare() -> Result<()> {
    let source = Cluster::start(Version::REDIS_7_0, 3, 1)?;
    Dataset::default().rounds(2).fill(&mut source.client()?)?;
    let writer = Writer::start(&source.endpoint(), Load::default())?;
    writer.wait_more(3_000, SETTLE)?;
    writer.stop()?;
    let report = compare(&source.endpoint(), &source.endpoint())?;
    assert!(report.differences.is_empty() && report.keys > 200, "{report}");

    // The same keys on one server, carried over one by one.
    let target = Server::start(Version::REDIS_7_0)?;
    let mut to = target.conn()?;
    for node in &mut source.client()?.nodes {
        for key in e2e::client::array(&node.run(args!["KEYS", "*"])?) {
            let key = e2e::client::bytes(&key);
            let dump = e2e::client::bytes(&node.run(args!["DUMP", key])?);
            let expiry = node.text(args!["PEXPIRETIME", key])?.replace("-1", "0");
            if !dump.is_empty() {
                to.run(args!["RESTORE", key, expiry, dump, "ABSTTL"])?;
            }
        }
        let library = e2e::client::bytes(&node.run(args!["FUNCTION", "DUMP"])?);
        to.run(args!["FUNCTION", "RESTORE", library, "REPLACE"])?;
    }
    let report = compare(&source.endpoint(), &target.endpoint())?;
    assert!(report.differences.is_empty(), "{report}");
    Ok(())
}

#[test]
fn clusters_of_every_version_start() -> Result<()> {
    for version in [Version::REDIS_3_0, Version::REDIS_5_0, Version::REDIS_8_2, Version::VALKEY_9_1] {
        let cluster = Cluster::start(version, 2, 0)?;
        let mut client = cluster.client()?;
        assert_eq!(client.nodes.len(), 2);
        assert_eq!(client.version, version);
        Dataset::default().rounds(1).fill(&mut client)?;
        assert!(compare::compare(&cluster.endpoint(), &cluster.endpoint())?.keys > 60);
    }
    Ok(())
}

#[test]
fn sentinels_fail_over() -> Result<()> {
    let master = Server::start(Version::REDIS_7_0)?;
    let replica = master.replica()?;
    let sentinels = Sentinels::start(Version::REDIS_7_0, 3, "mymaster", &master, 1)?;
    assert_eq!(sentinels.master_port()?, master.port);
    assert_eq!(sentinels.fail_over()?, replica.port);
    Ok(())
}

#[test]
fn proxy_forwards_cuts_stalls_and_refuses() -> Result<()> {
    let server = Server::start(Version::REDIS_7_0)?;
    let proxy = Proxy::start(&server.address())?;
    let endpoint = e2e::Endpoint { address: proxy.address(), cluster: false, auth: None };
    let open = || e2e::Conn::open(&endpoint.address, None);
    let mut conn = open()?;
    conn.run(args!["SET", "k", "v"])?;
    // Counted once it is passed on, which the client may hear of first.
    e2e::wait_until("bytes to be counted", Duration::from_secs(10), || {
        Ok((proxy.forwarded() > 0).then_some(()))
    })?;
    proxy.cut();
    assert!(conn.run(args!["GET", "k"]).is_err());
    assert_eq!(open()?.text(args!["GET", "k"])?, "v");

    proxy.stall(true);
    let waiting = std::thread::spawn({
        let mut conn = server.conn()?;
        let address = proxy.address();
        move || -> Result<String> {
            let answer = e2e::Conn::open(&address, None)?.text(args!["GET", "k"])?;
            conn.run(args!["SET", "answered", "1"])?;
            Ok(answer)
        }
    });
    assert_eq!(server.conn()?.number(args!["EXISTS", "answered"])?, 0);
    proxy.stall(false);
    assert_eq!(waiting.join().expect("the thread ends")?, "v");

    proxy.refuse(true);
    assert!(open().and_then(|mut conn| conn.run(args!["PING"])).is_err());
    proxy.refuse(false);
    wait_until("connection", SETTLE, || open().map(Some))?;
    Ok(())
}

#[test]
fn proxy_cuts_in_the_middle_limits_and_freezes() -> Result<()> {
    let server = Server::start(Version::REDIS_7_0)?;
    let proxy = Proxy::start(&server.address())?;
    let open = || e2e::Conn::open(&proxy.address(), None);
    let append = |conn: &mut e2e::Conn, bytes: usize| conn.run(args!["APPEND", "k", vec![b'x'; bytes]]);

    // 100 commands of 25 bytes, broken off within the 51st.
    let mut batch = e2e::Batch::default();
    (0..100).for_each(|_| batch.add(args!["INCR", "count"]));
    assert_eq!(batch.bytes.len(), 25 * 100);
    let mut conn = open()?;
    proxy.cut_after(25 * 50 + 10, Way::Up);
    assert!(conn.pipeline(&batch).is_err());
    wait_until("50 commands", SETTLE, || {
        Ok((server.conn()?.text(args!["GET", "count"])? == "50").then_some(()))
    })?;
    assert!(!proxy.defuse(), "it went off");
    append(&mut open()?, 1)?;

    // Half a second's worth.
    proxy.limit(Some(20_000));
    let mut conn = open()?;
    let started = std::time::Instant::now();
    append(&mut conn, 10_000)?;
    assert!(started.elapsed() > Duration::from_millis(400), "{:?}", started.elapsed());
    proxy.limit(None);

    // Frozen: open, and silent; what is new is not.
    let mut frozen = std::net::TcpStream::connect(proxy.address())?;
    frozen.write_all(b"PING\r\n")?;
    let mut answer = [0; 7];
    frozen.read_exact(&mut answer)?;
    proxy.freeze();
    frozen.write_all(b"PING\r\n")?;
    frozen.set_read_timeout(Some(Duration::from_millis(100)))?;
    let error = frozen.read(&mut answer).map_err(|error| error.kind());
    assert!(matches!(error, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)), "{error:?}");
    append(&mut open()?, 1)?;
    proxy.cut();
    frozen.set_read_timeout(Some(SETTLE))?;
    assert!(matches!(frozen.read(&mut answer), Ok(0) | Err(_)));
    Ok(())
}

/// A writer that follows goes on with the promoted master.
#[test]
fn writer_follows_a_failover() -> Result<()> {
    let mut master = Server::start(Version::REDIS_7_0)?;
    let replica = master.replica()?;
    let addresses = [master.endpoint(), replica.endpoint()];
    let locate = move || {
        let mut last = Err(anyhow::anyhow!("nobody"));
        for endpoint in &addresses {
            last = e2e::Client::open(endpoint);
            let writable = last.as_mut().is_ok_and(|client| {
                client.nodes.iter_mut().all(|node| node.run(args!["SET", "probe", "1"]).is_ok())
            });
            if writable {
                break;
            }
        }
        last
    };
    let load = Load { additive: 50, ..Load::default() };
    let writer = Writer::follow(locate, load)?;
    writer.wait_more(500, SETTLE)?;
    master.kill();
    replica.conn()?.run(args!["REPLICAOF", "NO", "ONE"])?;
    let before = replica.conn()?.number(args!["DBSIZE"])?;
    writer.wait_more(3_000, SETTLE)?;
    writer.stop()?;
    assert!(replica.conn()?.number(args!["DBSIZE"])? > before);
    Ok(())
}

#[test]
fn password_and_tls() -> Result<()> {
    let certificates = e2e::tls::Certificates::new()?;
    for version in [Version::REDIS_7_0, Version::REDIS_8_2, Version::VALKEY_8_1, Version::VALKEY_9_1] {
        let server = match Options::new(version).password("secret").tls(&certificates, true).start() {
            Ok(server) => server,
            // Not every build has TLS; Debian's must.
            Err(error) if version != Version::REDIS_7_0 => {
                eprintln!("{version} without TLS: {error:#}");
                continue;
            }
            Err(error) => return Err(error),
        };
        assert!(server.tls_address()?.starts_with("localhost:"));
        assert!(e2e::Conn::open(&server.address(), None)?.run(args!["GET", "k"]).is_err());
        assert_eq!(server.conn()?.text(args!["PING"])?, "PONG");
    }
    Ok(())
}
