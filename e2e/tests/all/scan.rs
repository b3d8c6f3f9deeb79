//! A source that is read by SCAN: changes followed by notifications and by passes, values in pieces, kills,
//! servers that forbid almost everything.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use e2e::client::bytes;
use e2e::compare::{Rules, wait_equal_with};
use e2e::dataset::Dataset;
use e2e::load::{Load, Writer};
use e2e::scenario::{PATIENCE, copy_at_rest, copy_under_load, stop, verify};
use e2e::{Batch, Cluster, Endpoint, Manifest, Options, Proxy, Server, Tool, Version, args, wait_until};
use serde_json::json;

const VERSION: Version = Version::REDIS_7_0;
const NOTIFICATIONS: &str = "notify-keyspace-events";
/// All that a scan and its verification need of a server that has nothing else to give.
const LEAST: &str = "~* +@read +select +info +ping +function|list";
const PASSWORD: &str = "scan-secret";

fn manifest(source: &Endpoint, target: &Endpoint) -> Manifest {
    Manifest::between(source, target).set("/spec/source/type", "Scan")
}

/// What a scan leaves is complete at once: expiries are true, counters that only exist at the source are copied.
fn rules() -> Rules {
    Rules::complete()
}

#[test]
fn notifications_are_followed() -> Result<()> {
    let source = Options::new(VERSION).with(NOTIFICATIONS, "AE").start()?;
    let target = Server::start(VERSION)?;
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    // FLUSHDB and SWAPDB among it, of which no notification tells.
    let load = Load { databases: vec![0, 1, 9], across_databases: true, ..Load::default() };
    let manifest = manifest(&source.endpoint(), &target.endpoint());
    let report = copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), load, &rules())?;
    ensure!(report.keys > 300, "{report}");
    Ok(())
}

/// Neither PSYNC nor CONFIG, CLIENT or notifications: keys that change, vanish and come are found by passes, and
/// the cutover takes a last one.
#[test]
fn passes_do_with_few_permissions() -> Result<()> {
    let user = format!("migrator on >{PASSWORD} {LEAST}");
    let source = Options::new(VERSION).with("user", &user).start()?;
    let target = Server::start(VERSION)?;
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    let manifest = manifest(&source.endpoint(), &target.endpoint()).login("source", "migrator", PASSWORD);
    let load = Load { rate: 1_000, databases: vec![0, 1, 9], across_databases: true, ..Load::default() };
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), load, &rules())?;

    let (mut from, mut to) = (source.conn()?, target.conn()?);
    from.run(args!["DEL", "load:gone"])?;
    from.run(args!["SET", "cut:over", "1"])?;
    to.run(args!["FLUSHALL"])?;
    // Nobody writes any more, and nobody may be held without the right to it.
    let manifest =
        manifest.set("/spec/cutover/mode", "Automatic").set("/spec/cutover/pauseSourceWrites", false);
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("Verified", PATIENCE)?;
    let finished = tool.expect_exit(0, PATIENCE)?;
    let status = finished.status()?;
    ensure!(status["phase"] == "Completed", "{status}");
    wait_equal_with(&source.endpoint(), &target.endpoint(), &rules(), std::time::Duration::ZERO)?;
    Ok(())
}

/// Without DUMP every value is read by the commands of its type.
#[test]
fn values_are_read_without_dump() -> Result<()> {
    let user = format!("migrator on >{PASSWORD} {LEAST} -dump");
    let source = Options::new(VERSION).with("user", &user).start()?;
    let target = Server::start(VERSION)?;
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    let manifest = manifest(&source.endpoint(), &target.endpoint())
        .login("source", "migrator", PASSWORD)
        // Which needs DUMP itself.
        .set("/spec/verification/mode", "Off");
    copy_at_rest(&manifest, &source.endpoint(), &target.endpoint(), &rules()).map(drop)
}

/// Notifications are turned on for the time of the migration, and off again.
#[test]
fn cluster_to_cluster_with_notifications_turned_on() -> Result<()> {
    let (source, target) = (Cluster::start(VERSION, 3, 0)?, Cluster::start(VERSION, 2, 0)?);
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    let manifest = manifest(&source.endpoint(), &target.endpoint())
        .set("/spec/source/redis/keyspaceNotifications", "Enable");
    copy_under_load(&manifest, &source.endpoint(), &target.endpoint(), Load::default(), &rules())?;
    for node in &source.nodes {
        let setting = node.conn()?.run(args!["CONFIG", "GET", NOTIFICATIONS])?;
        let setting: Vec<String> = e2e::client::array(&setting).iter().map(e2e::client::text).collect();
        ensure!(setting.get(1).is_some_and(String::is_empty), "{setting:?}");
    }
    Ok(())
}

/// Values beyond a bound come in pieces, with their expiry, and again when they change.
#[test]
fn big_values_come_in_pieces() -> Result<()> {
    let source = Options::new(VERSION).with(NOTIFICATIONS, "AKE").start()?;
    let target = Server::start(VERSION)?;
    let data = Dataset { rounds: 1, large: 20_000, long: 3 << 20, ..Dataset::default() };
    data.fill(&mut source.client()?)?;
    let mut from = source.conn()?;
    for key in ["large:list", "large:hash", "large:prose", "large:noise", "large:stream"] {
        from.run(args!["EXPIRE", key, "100000"])?;
    }
    let manifest =
        manifest(&source.endpoint(), &target.endpoint()).set("/spec/limits/maxRestoreBytes", "256Ki");
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("Verified", PATIENCE)?;
    wait_equal_with(&source.endpoint(), &target.endpoint(), &rules(), PATIENCE)?;
    for change in [
        &args!["LPUSH", "large:list", "one more"][..],
        &args!["HSET", "large:hash", "one", "more"][..],
        &args!["DEL", "large:prose"][..],
        &args!["APPEND", "large:noise", "one more"][..],
        &args!["XADD", "large:stream", "*", "one", "more"][..],
    ] {
        from.run(change)?;
    }
    wait_equal_with(&source.endpoint(), &target.endpoint(), &rules(), PATIENCE)?;
    e2e::scenario::stop(tool).map(drop)
}

/// After a kill all keys are read again; what vanished meanwhile does not stay on the target.
#[test]
fn a_killed_scan_begins_anew() -> Result<()> {
    let (source, target) = (Server::start(VERSION)?, Server::start(VERSION)?);
    Dataset::default().rounds(1).databases(&[]).fill(&mut source.client()?)?;
    let mut from = source.conn()?;
    from.run(args!["SET", "vanishes", "meanwhile"])?;
    let manifest = manifest(&source.endpoint(), &target.endpoint());
    let folder = Arc::new(tempfile::tempdir()?);
    let mut tool = Tool::run_in(Arc::clone(&folder), &manifest, &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    tool.kill()?;
    drop(tool);
    from.run(args!["DEL", "vanishes"])?;
    from.run(args!["SET", "comes", "meanwhile"])?;
    let tool = Tool::run_in(folder, &manifest, &[])?;
    tool.wait_condition("Verified", PATIENCE)?;
    wait_equal_with(&source.endpoint(), &target.endpoint(), &rules(), PATIENCE)?;
    e2e::scenario::stop(tool).map(drop)
}

/// A lost connection for notifications is made up for by a pass.
#[test]
fn what_was_not_heard_is_found() -> Result<()> {
    let source = Options::new(VERSION).with(NOTIFICATIONS, "AE").start()?;
    let target = Server::start(VERSION)?;
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    let mut from = source.conn()?;
    from.run(args!["SET", "vanishes", "unheard"])?;
    let tool = Tool::run(&manifest(&source.endpoint(), &target.endpoint()), &[])?;
    tool.wait_condition("Verified", PATIENCE)?;
    // All at once, so that the keys change while nobody listens.
    from.run(args![
        "EVAL",
        "redis.call('CLIENT', 'KILL', 'TYPE', 'pubsub') redis.call('DEL', 'vanishes') redis.call('SET', 'comes', '1')",
        "0"
    ])
    .or_else(|_| {
        // Scripts may not call CLIENT: then one behind the other has to do.
        from.run(args!["CLIENT", "KILL", "TYPE", "pubsub"])?;
        from.run(args!["DEL", "vanishes"])?;
        from.run(args!["SET", "comes", "1"])
    })?;
    wait_until("the keys are as at the source", PATIENCE, || {
        let mut to = target.conn()?;
        let found = (to.number(args!["EXISTS", "vanishes"])?, to.number(args!["EXISTS", "comes"])?);
        Ok((found == (0, 1)).then_some(()))
    })?;
    wait_equal_with(&source.endpoint(), &target.endpoint(), &rules(), PATIENCE)?;
    e2e::scenario::stop(tool).map(drop)
}

/// Nor is it noticed by a look at the setting before and after.
#[test]
fn what_changed_while_notifications_were_off_for_a_moment_is_found() -> Result<()> {
    let source = Options::new(VERSION).with(NOTIFICATIONS, "AE").start()?;
    let target = Server::start(VERSION)?;
    Dataset::default().rounds(1).databases(&[]).fill(&mut source.client()?)?;
    let tool = Tool::run(&manifest(&source.endpoint(), &target.endpoint()), &[])?;
    tool.wait_condition("InSync", PATIENCE)?;
    source.conn()?.run(args!["SET", "heard", "1"])?;
    wait_equal_with(&source.endpoint(), &target.endpoint(), &rules(), PATIENCE)?;
    let mut off = Batch::default();
    off.add(args!["CONFIG", "SET", NOTIFICATIONS, ""]);
    off.add(args!["SET", "unheard", "1"]);
    off.add(args!["CONFIG", "SET", NOTIFICATIONS, "AE"]);
    source.conn()?.pipeline(&off)?;
    wait_equal_with(&source.endpoint(), &target.endpoint(), &rules(), PATIENCE)?;
    e2e::scenario::stop(tool).map(drop)
}

/// Runs `act` before the `count`th time that these bytes pass.
fn before_the(proxy: &Arc<Proxy>, count: usize, bytes: &'static [u8], act: impl FnOnce() + Send + 'static) {
    let again = Arc::clone(proxy);
    proxy.before(bytes, move || match count {
        0 | 1 => act(),
        _ => before_the(&again, count - 1, bytes, act),
    });
}

/// A pass that goes on where it broke off does not see what changed behind it meanwhile.
#[test]
fn what_changed_behind_a_pass_that_broke_off_is_found() -> Result<()> {
    let source = Options::new(VERSION).with(NOTIFICATIONS, "AE").start()?;
    let target = Server::start(VERSION)?;
    let write = |batch: &mut Batch, value: &str| {
        (0..20_000).for_each(|key| batch.add(args!["SET", format!("key:{key}"), value]));
    };
    let mut batch = Batch::default();
    write(&mut batch, "before");
    source.conn()?.pipeline(&batch)?;
    let proxy = Arc::new(Proxy::start(&source.address())?);
    let proxied = Endpoint { address: proxy.address(), ..source.endpoint() };
    let tool = Tool::run(&manifest(&proxied, &target.endpoint()), &[])?;
    tool.wait_condition("Verified", PATIENCE)?;

    let mut meddler = source.conn()?;
    before_the(&proxy, 10, b"\r\nSCAN\r\n", move || {
        let mut batch = Batch::default();
        batch.add(args!["MULTI"]);
        for kind in ["pubsub", "normal"] {
            batch.add(args!["CLIENT", "KILL", "TYPE", kind]);
        }
        write(&mut batch, "since");
        batch.add(args!["EXEC"]);
        drop(meddler.pipeline(&batch));
    });
    // Calls for the pass.
    source.conn()?.run(args!["CLIENT", "KILL", "TYPE", "pubsub"])?;
    wait_until("all keys to be read again", PATIENCE, || {
        let first = target.conn()?.run(args!["GET", "key:0"])?;
        Ok((bytes(&first) == b"since").then_some(()))
    })?;
    wait_equal_with(&source.endpoint(), &target.endpoint(), &rules(), PATIENCE)?;
    e2e::scenario::stop(tool).map(drop)
}

/// Its connection is lost when a part of it stands on the target.
#[test]
fn a_big_value_that_broke_off_is_read_again_or_goes() -> Result<()> {
    let source = Options::new(VERSION).with(NOTIFICATIONS, "AE").start()?;
    let target = Server::start(VERSION)?;
    let fill = |key: &str, value: &str| -> Result<()> {
        let mut batch = Batch::default();
        batch.add(args!["MULTI"]);
        batch.add(args!["DEL", key]);
        let element = value.repeat(1024);
        for _ in 0..600 {
            let mut push: Vec<&[u8]> = vec![b"RPUSH", key.as_bytes()];
            push.extend((0..32).map(|_| element.as_bytes()));
            batch.add(&push);
        }
        batch.add(args!["EXEC"]);
        source.conn()?.pipeline(&batch).map(drop)
    };
    fill("known", "a")?;
    let proxy = Arc::new(Proxy::start(&source.address())?);
    let proxied = Endpoint { address: proxy.address(), ..source.endpoint() };
    let manifest = manifest(&proxied, &target.endpoint()).set("/spec/limits/maxRestoreBytes", "256Ki");
    let tool = Tool::run(&manifest, &[])?;
    tool.wait_condition("Verified", PATIENCE)?;
    let cut = |mut conn: e2e::Conn, key: Option<&'static str>| {
        let proxy = Arc::clone(&proxy);
        move || {
            key.into_iter().for_each(|key| drop(conn.run(args!["DEL", key])));
            proxy.cut();
        }
    };
    // Read once to see whether it changed, then once more in pieces.
    before_the(&proxy, 60, b"\r\nLRANGE\r\n", cut(source.conn()?, None));
    fill("known", "b")?;
    wait_until("the value to be broken off and read again", PATIENCE, || {
        let (length, last) = {
            let mut to = target.conn()?;
            (to.number(args!["LLEN", "known"])?, to.run(args!["LINDEX", "known", "-1"])?)
        };
        Ok((length == 600 * 32 && bytes(&last).starts_with(b"b")).then_some(()))
    })?;

    before_the(&proxy, 10, b"\r\nLRANGE\r\n$3\r\nnew\r\n", cut(source.conn()?, Some("new")));
    fill("new", "c")?;
    wait_until("the part of it to go", PATIENCE, || {
        let there = |server: &Server| server.conn()?.number(args!["EXISTS", "new"]);
        Ok((there(&source)? == 0 && there(&target)? == 0).then_some(()))
    })?;
    wait_equal_with(&source.endpoint(), &target.endpoint(), &rules(), PATIENCE)?;
    e2e::scenario::stop(tool).map(drop)
}

/// What the filter leaves out is never read, neither at first nor by name nor in a pass: the user may not.
#[test]
fn what_a_filter_leaves_out_is_not_read() -> Result<()> {
    let user = format!(
        "migrator on >{PASSWORD} %R~keep:* &* +@read +select +info +ping +function|list +psubscribe +config|get"
    );
    let source = Options::new(VERSION).with("user", &user).with(NOTIFICATIONS, "AE").start()?;
    let target = Server::start(VERSION)?;
    Dataset::default().rounds(1).databases(&[1]).fill(&mut source.client()?)?;
    let (mut from, mut to) = (source.conn()?, target.conn()?);
    for db in [0, 9] {
        from.select(db)?;
        for key in 0..30 {
            // Of database 9 under a name that says where it is.
            let name = if db == 9 { "keep:nine" } else { "keep" };
            from.run(args!["SET", format!("{name}:{key}"), key.to_string()])?;
            from.run(args!["SET", format!("{name}:{key}:tmp"), key.to_string()])?;
        }
    }
    for db in [0, 1] {
        to.select(db)?;
        to.run(args!["SET", "skip:own", "1"])?;
    }
    let manifest =
        manifest(&source.endpoint(), &target.endpoint()).login("source", "migrator", PASSWORD).set(
            "/spec/filter",
            json!({
                "databases": {"exclude": [9]},
                "keys": {"include": [{"prefix": "keep:"}], "exclude": [{"glob": "*:tmp"}]},
            }),
        );
    let mut all = 0;
    for db in [0, 1, 9] {
        from.select(db)?;
        // The count is to hold for as long as this takes.
        for key in [0, 1] {
            from.run(args!["DEL", format!("expiring:string:0:{key}"), format!("expiring:list:0:{key}")])?;
        }
        all += from.number(args!["DBSIZE"])?;
    }
    let tool = Tool::run(&manifest, &[])?;
    let status = tool.wait_condition("InSync", PATIENCE)?;
    assert_eq!(status["progress"]["keysFiltered"], all - 30, "{}", status["progress"]);
    assert_eq!(status["progress"]["keysApplied"], 30, "{}", status["progress"]);
    // FLUSHDB and SWAPDB among it, of which no notification tells.
    let load =
        Load { prefix: "keep:".into(), databases: vec![0, 1], across_databases: true, ..Load::default() };
    let writer = Writer::start(&source.endpoint(), load)?;
    for (db, name) in [(0, "skip:new"), (0, "keep:new:tmp"), (9, "keep:nine:new"), (0, "keep:new")] {
        from.select(db)?;
        from.run(args!["SET", name, "1"])?;
    }
    writer.wait_more(2_000, PATIENCE)?;
    writer.stop()?;
    // What a FLUSHDB at the source removes is what was copied.
    for db in [0, 1] {
        to.select(db)?;
        assert_eq!(to.text(args!["GETDEL", "skip:own"])?, "1", "database {db}");
    }
    fn left_out(key: &[u8]) -> bool {
        // Libraries of functions are no keys.
        let library = [b"counters".as_slice(), b"lists", b"load"].contains(&key);
        !(library || key.starts_with(b"keep:")) || key.starts_with(b"keep:nine") || key.ends_with(b":tmp")
    }
    let rules = Rules { ignore: left_out, ..rules() };
    let report = wait_equal_with(&source.endpoint(), &target.endpoint(), &rules, PATIENCE)?;
    ensure!(report.keys > 100, "{report}");
    let status = tool.wait_condition("Verified", PATIENCE)?;
    ensure!(status["quarantine"]["commands"] == 0, "{}", status["quarantine"]);
    verify(&manifest, 0)?;
    stop(tool).map(drop)
}

#[test]
fn every_version_is_a_source() -> Result<()> {
    for source in Version::ALL {
        let newest =
            if Version::VALKEY_9_1.loads_from(source) { Version::VALKEY_9_1 } else { Version::REDIS_8_2 };
        pair(source, newest).with_context(|| format!("{source} to {newest}"))?;
    }
    Ok(())
}

fn pair(source: Version, target: Version) -> Result<()> {
    let (source, target) = (Server::start(source)?, Server::start(target)?);
    Dataset::default().rounds(1).fill(&mut source.client()?)?;
    let manifest = manifest(&source.endpoint(), &target.endpoint());
    copy_at_rest(&manifest, &source.endpoint(), &target.endpoint(), &rules()).map(drop)
}
