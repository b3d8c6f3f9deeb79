use super::*;
use crate::api::plan::{CutoverMode, Delivery, ExistingKeys, ReadFrom, VerificationMode};
use crate::connection::TopologyChoice;

const HEAD: &str =
    "apiVersion: redis-migration.io/v1alpha1\nkind: RedisMigration\nmetadata: {name: orders}\n";
const SOURCE: &str = "  source: {type: Replication, redis: {endpoints: [\"a:1\"]}}\n";
const TARGET: &str = "  target: {type: Redis, redis: {endpoints: [\"b:2\"]}}\n";

fn spec(rest: &str) -> String {
    format!("{HEAD}spec:\n{SOURCE}{TARGET}{rest}")
}

fn complaint(text: &str) -> String {
    match Manifest::parse("m.yaml", text).and_then(|manifest| manifest.plan(None)) {
        Ok(_) => String::from("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_smallest_manifest_gets_every_default() {
    let plan = Manifest::parse("m.yaml", &spec("")).unwrap().plan(None).unwrap();
    assert_eq!(
        (plan.name.as_str(), plan.namespace.as_str(), plan.uid.as_str()),
        ("orders", "default", "default.orders")
    );
    let source = plan.source.redis().unwrap();
    assert_eq!(source.access.topology, TopologyChoice::Auto);
    assert_eq!(source.access.endpoints[0].port, 1);
    assert_eq!(source.read_from, ReadFrom::Master);
    assert_eq!(source.psync_command, "PSYNC");
    assert!(source.access.credentials.is_none() && source.access.tls.is_none());
    assert_eq!(plan.target.existing_keys, ExistingKeys::Fail);
    assert_eq!(plan.delivery, Delivery::ExactlyOnce);
    assert_eq!(plan.limits.pipeline_commands, 1024);
    assert_eq!(plan.limits.pipeline_bytes, 16 << 20);
    assert_eq!(plan.limits.spool_disk, 10 << 30);
    assert_eq!(plan.verification.mode, VerificationMode::Full);
    assert_eq!(plan.cutover.mode, CutoverMode::Manual);
    assert_eq!(plan.failure_policy.max_quarantined, 1000);
    assert_eq!(plan.generation, 1);
}

/// Each fault is one line that names file, line, column, field and what is allowed.
#[test]
fn faults_are_named_with_their_place() {
    let table: &[(String, &str)] = &[
        (String::new(), "m.yaml: holds no RedisMigration"),
        ("# nothing\n---\n".into(), "m.yaml: holds no RedisMigration"),
        (
            "kind: RedisMigration\n".into(),
            "m.yaml:1:1: apiVersion: \"\" is not known; allowed: redis-migration.io/v1alpha1",
        ),
        (
            "apiVersion: v1\nkind: Pod\n".into(),
            "m.yaml:2:1: kind: \"Pod\" of v1 is not known; allowed: RedisMigration of redis-migration.io/v1alpha1, Secret and ConfigMap of v1",
        ),
        (
            format!("{}---\n{}", spec(""), spec("")),
            "m.yaml:8:1: a second RedisMigration (the first is on line 1); allowed: one in a file",
        ),
        (
            spec("  suspnd: true\n"),
            "m.yaml:7:3: spec.suspnd: unknown field; allowed: cutover, databaseMap, delivery, failurePolicy, filter, limits, source, suspend, target, verification; did you mean suspend?",
        ),
        (
            spec("  limits: {pipelineCommands: many}\n"),
            "m.yaml:7:30: spec.limits.pipelineCommands: must be a whole number; allowed: 1 to 1000000",
        ),
        (
            spec("  limits: {pipelineCommands: 0}\n"),
            "m.yaml:7:30: spec.limits.pipelineCommands: 0 is out of range; allowed: 1 to 1000000",
        ),
        (
            spec("  limits:\n    spoolMemory: 64MB\n"),
            "m.yaml:8:18: spec.limits.spoolMemory: not a size; allowed: a whole number of bytes below 2^63, or a number with k, M, G, T, P, Ki, Mi, Gi, Ti or Pi, such as 64Mi",
        ),
        (
            spec("  limits: {spoolMemory: 1Ki}\n"),
            "m.yaml:7:12: spec.limits.spoolMemory: 1Ki is out of range; allowed: 1Mi to 1Ti",
        ),
        (
            spec("  verification: {mode: Off}\n"),
            "m.yaml:7:24: spec.verification.mode: must be a string; allowed: Full, Sample, Keys, Off; unquoted, YAML takes it for true or false",
        ),
        (
            spec("  cutover: {mode: automatic}\n"),
            "m.yaml:7:19: spec.cutover.mode: \"automatic\" is not known; allowed: Manual, Automatic, Never; did you mean Automatic?",
        ),
        (spec("  cutover: Never\n"), "m.yaml:7:12: spec.cutover: must be a map"),
        (spec("  suspend: maybe\n"), "m.yaml:7:12: spec.suspend: must be true or false"),
        (format!("{HEAD}spec:\n{TARGET}"), "m.yaml:4:1: spec.source: is missing"),
        (
            format!("{HEAD}spec:\n  source: {{redis: {{endpoints: [\"a:1\"]}}}}\n{TARGET}"),
            "m.yaml:5:3: spec.source.type: is missing; allowed: Replication, Scan, RdbFile",
        ),
        (
            format!("{HEAD}spec:\n  source: {{type: Replication}}\n{TARGET}"),
            "m.yaml:5:3: spec.source.redis: is missing; needed by type Replication",
        ),
        (
            format!(
                "{HEAD}spec:\n{SOURCE}  target:\n    type: Redis\n    redis: {{endpoints: [\"b:2\"]}}\n    json: {{uri: \"file:///x\"}}\n"
            ),
            "m.yaml:9:5: spec.target.json: not allowed with type Redis",
        ),
        (
            format!("{HEAD}spec:\n  source: {{type: Replication, redis: {{endpoints: []}}}}\n{TARGET}"),
            "m.yaml:5:50: spec.source.redis.endpoints: has 0 entries; allowed: at least 1",
        ),
        (
            format!(
                "{HEAD}spec:\n  source: {{type: Replication, redis: {{endpoints: [\"redis\"]}}}}\n{TARGET}"
            ),
            "m.yaml:5:51: spec.source.redis.endpoints[0]: \"redis\" has no port; write host:port",
        ),
        (
            format!(
                "{HEAD}spec:\n  source: {{type: Replication, redis: {{endpoints: [\"redis://:sesame@a:1\"]}}}}\n{TARGET}"
            ),
            "m.yaml:5:51: spec.source.redis.endpoints[0]: is a URL; allowed: host:port, user and password belong under auth",
        ),
        (
            format!(
                "{HEAD}spec:\n  source: {{type: Replication, redis: {{endpoints: [\"a:1\"], topology: Sentinel}}}}\n{TARGET}"
            ),
            "m.yaml:5:31: spec.source.redis.sentinel: is missing; needed by topology Sentinel",
        ),
        (
            spec("  databaseMap: {\"1\": 1000000000}\n"),
            "m.yaml:7:17: spec.databaseMap.1: must map a database number to a database number, such as \"1\": 0",
        ),
        (
            format!(
                "{HEAD}spec:\n{SOURCE}  target: {{type: Redis, redis: {{endpoints: [\"b:2\"], topology: Cluster}}}}\n  databaseMap: {{\"1\": 2}}\n"
            ),
            "m.yaml:7:17: spec.databaseMap.1: a cluster has database 0 only; allowed: 0, or clusterDatabases: true under spec.target.redis",
        ),
        (
            spec("").replace("orders", "Orders_1"),
            "m.yaml:3:12: metadata.name: allowed: lower case letters, digits, - and ., beginning and ending with a letter or digit",
        ),
        (
            spec("").replace("orders", &"x".repeat(53)),
            "m.yaml:3:12: metadata.name: has 53 characters; allowed: at most 52",
        ),
        (
            format!(
                "{HEAD}spec:\n  source: {{type: Replication, redis: {{endpoints: [\"a:1\"], auth: {{passwordSecretRef: {{name: old, key: password}}}}}}}}\n{TARGET}"
            ),
            "m.yaml:5:66: spec.source.redis.auth.passwordSecretRef: secret \"old\" with key \"password\" not found; allowed: a Secret document in the file, or the file old/password under --secrets",
        ),
        (
            format!(
                "{HEAD}spec:\n  source: {{type: Replication, redis: {{endpoints: [\"a:1\"], auth: {{username: me}}}}}}\n{TARGET}"
            ),
            "m.yaml:5:59: spec.source.redis.auth.passwordSecretRef: is missing; needed by username",
        ),
        (
            format!(
                "{HEAD}spec:\n  source: {{type: Replication, redis: {{endpoints: [\"a:1\"], tls: {{serverName: x}}}}}}\n{TARGET}"
            ),
            "m.yaml:5:59: spec.source.redis.tls.enabled: is false, but other fields of tls are set",
        ),
        (
            format!(
                "apiVersion: v1\nkind: Secret\nmetadata: {{name: old}}\ndata:\n  password: \"hunter2!\"\n---\n{}",
                spec("")
            ),
            "m.yaml:5:3: data.password: is not base64; plain text belongs under stringData",
        ),
        (
            spec("  delivery: AtLeastOnce\n  delivery: ExactlyOnce\n"),
            "m.yaml:8:3: \"delivery\" is given twice",
        ),
    ];
    let mut wrong = Vec::new();
    for (text, expected) in table {
        let said = complaint(text);
        if said != *expected {
            wrong.push(format!("said:     {said}\nexpected: {expected}\nof:\n{text}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn broken_yaml_is_one_line_with_its_place() {
    let said = complaint(&format!("{HEAD}spec:\n  source: {{type: [\n"));
    assert!(said.starts_with("m.yaml:") && said.contains(": not YAML: "), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn all_faults_are_told_at_once_in_order() {
    let said = complaint(&spec("  suspend: 1\n  limits: {bytsPerSecond: 1, rounds: 2}\n  delivery: Twice\n"));
    let places: Vec<&str> = said.lines().filter_map(|line| line.split(": ").next()).collect();
    assert_eq!(places, ["m.yaml:7:12", "m.yaml:8:12", "m.yaml:8:30", "m.yaml:9:13"], "{said}");
}

/// Each feature that is not built yet is refused by its own name.
#[test]
fn what_is_not_built_is_refused_by_name() {
    for (rest, path) in [
        ("  cutover: {switch: {service: {name: redis, to: {externalName: new}}}}\n", "spec.cutover.switch"),
        ("  suspend: true\n", "spec.suspend"),
    ] {
        let said = complaint(&spec(rest));
        assert!(said.starts_with("m.yaml:7:"), "{said}");
        assert!(said.ends_with(&format!(": {path}: not supported by this version yet")), "{said}");
    }
    let said = complaint(&format!(
        "{HEAD}spec:\n  source: {{type: Scan, redis: {{endpoints: [\"a:1\"]}}}}\n{TARGET}"
    ));
    assert_eq!(said, "accepted");
    // The documentation writes these out empty.
    let empty = "  filter: {databases: {include: [], exclude: []}, keys: {include: []}, lua: {inline: \"\", configMapRef: {name: \"\", key: \"\"}}}\n";
    assert_eq!(complaint(&spec(empty)), "accepted");
}

#[test]
fn a_script_is_found_in_a_config_map_of_the_file() {
    let text = |namespace: &str, script: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: scripts{namespace}}}\ndata:\n  a.lua: |\n    {script}\n---\n{}",
            spec("  filter: {lua: {configMapRef: {name: scripts, key: a.lua}}}\n")
        )
    };
    assert_eq!(complaint(&text("", "function command(c) end")), "accepted");
    let wrong = complaint(&text("", "function command(c) en"));
    assert!(wrong.contains("spec.filter.lua.configMapRef: filter.lua:"), "{wrong}");
    let missing = complaint(&text(", namespace: elsewhere", "function command(c) end"));
    assert!(missing.contains("a ConfigMap document in the file"), "{missing}");
}

fn with_secrets() -> String {
    format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: old}}\ndata: {{password: c2VzYW1l}}\nstringData:\n  ca.crt: |\n    -----BEGIN\n    swordfish\n---\n\
         apiVersion: v1\nkind: Secret\nmetadata: {{name: old, namespace: elsewhere}}\nstringData: {{password: wrong}}\n---\n\
         apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: x}}\ndata: {{a: b}}\n---\n\
         {HEAD}spec:\n  source:\n    type: Replication\n    redis:\n      endpoints: [\"a:1\"]\n      auth: {{username: me, passwordSecretRef: {{name: old, key: password}}}}\n      tls: {{enabled: true, caSecretRef: {{name: old, key: ca.crt}}}}\n{TARGET}"
    )
}

#[test]
fn secrets_are_taken_from_documents_of_the_same_namespace() {
    let plan = Manifest::parse("m.yaml", &with_secrets()).unwrap().plan(None).unwrap();
    let access = plan.source.redis().unwrap().access.clone();
    let credentials = access.credentials.unwrap();
    assert_eq!(credentials.username.as_deref(), Some("me"));
    assert!(matches!(credentials.password, Secret::Literal(bytes) if bytes == b"sesame"));
    let ca = access.tls.unwrap().ca.unwrap();
    assert!(matches!(ca, Secret::Literal(bytes) if bytes == b"-----BEGIN\nswordfish\n"));
}

#[test]
fn secrets_never_show() {
    let manifest = Manifest::parse("m.yaml", &with_secrets()).unwrap();
    let plan = manifest.plan(None).unwrap();
    let shown = format!("{manifest:?} {plan:?} {:?}", manifest.secrets);
    for secret in ["sesame", "c2VzYW1l", "swordfish", "wrong"] {
        assert!(!shown.contains(secret), "{secret} in {shown}");
    }
    assert!(shown.contains("password"));
    let broken = with_secrets().replace("c2VzYW1l", "swordfish!");
    assert!(!complaint(&broken).contains("swordfish"));
    let broken = with_secrets().replace("passwordSecretRef: {name: old", "passwordSecretRef: {name: older");
    assert!(!complaint(&broken).contains("sesame"));
}

#[test]
fn secrets_directory_is_read_at_connect_time() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("old")).unwrap();
    std::fs::write(dir.path().join("old/password"), "sesame").unwrap();
    let text = format!(
        "{HEAD}spec:\n  source: {{type: Replication, redis: {{endpoints: [\"a:1\"], auth: {{passwordSecretRef: {{name: old, key: password}}}}}}}}\n{TARGET}"
    );
    let manifest = Manifest::parse("m.yaml", &text).unwrap();
    let plan = manifest.plan(Some(dir.path())).unwrap();
    let file = dir.path().join("old/password");
    assert!(
        matches!(plan.source.redis().unwrap().access.clone().credentials.unwrap().password, Secret::File(found) if found == file)
    );
    let outside = text.replace("name: old", "name: \"../old\"");
    assert!(complaint_with(&outside, dir.path()).contains("not found"));
}

fn complaint_with(text: &str, dir: &Path) -> String {
    match Manifest::parse("m.yaml", text).and_then(|manifest| manifest.plan(Some(dir))) {
        Ok(_) => String::from("accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn an_exported_object_runs_again() {
    let text = format!("{HEAD}spec:\n{SOURCE}{TARGET}status: {{phase: Completed, someday: 1}}\n")
        .replace("{name: orders}", "{name: orders, namespace: shop, uid: 0b5c, generation: 3, creationTimestamp: \"2026-01-01T00:00:00Z\", labels: {a: b}}");
    let plan = Manifest::parse("m.yaml", &text).unwrap().plan(None).unwrap();
    assert_eq!((plan.uid.as_str(), plan.namespace.as_str(), plan.generation), ("0b5c", "shop", 3));
}

#[test]
fn every_example_is_a_plan() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "yaml") {
            continue;
        }
        let manifest = Manifest::read(&path).unwrap_or_else(|error| panic!("{error}"));
        manifest.plan(None).unwrap_or_else(|error| panic!("{error}"));
        names.push(path.file_stem().unwrap().to_string_lossy().into_owned());
    }
    for source in ["standalone", "replica", "sentinel", "cluster"] {
        for target in ["standalone", "sentinel", "cluster"] {
            let name = format!("{source}-to-{target}");
            assert!(names.contains(&name), "examples/{name}.yaml is missing");
        }
    }
}

/// What does not go together with a file on a side, and names of files that cannot be used.
#[test]
fn files_are_checked() {
    let source = |rest: &str| format!("{HEAD}spec:\n  source: {{type: RdbFile, rdbFile: {rest}}}\n{TARGET}");
    let target = |kind: &str, rest: &str| format!("{HEAD}spec:\n{SOURCE}  target: {{{kind}: {rest}");
    let json = |uri: &str, rest: &str| target("type: Json, json", &format!("{{uri: \"{uri}\"}}{rest}\n"));
    let off = "  verification: {mode: \"Off\"}\n";
    assert_eq!(complaint(&(source("{uris: [\"/a/*.rdb\", \"s3://b/k\"]}") + off)), "accepted");
    assert_eq!(complaint(&json("/a/{shard}.json", "}")), "accepted");
    assert_eq!(complaint(&json("gs://b/{shard}", ", existingKeys: Replace}")), "accepted");
    let scanned = |rest: &str| {
        let scan = json("/a", "}").replace("type: Replication", "type: Scan");
        scan.replace("redis: {endpoints", &format!("redis: {{{rest}endpoints"))
    };
    let filter = "  filter: {databases: {exclude: [1]}, keys: {include: [{prefix: a}]}}\n";
    assert_eq!(complaint(&(scanned("") + filter)), "accepted");
    assert_eq!(complaint(&(json("/a", "}") + filter)), "accepted");
    // Nothing follows that `command` would be needed for.
    for defined in ["function key(k) end", "function key(k) end function command(c) end"] {
        let filter = format!("  filter: {{lua: {{inline: \"{defined}\"}}}}\n");
        assert_eq!(complaint(&(scanned("") + &filter)), "accepted");
        assert_eq!(complaint(&(json("/a", "}") + &filter)), "accepted");
    }
    for (text, said) in [
        (source("{uris: [\"/a\"]}"), "spec.verification.mode: Full (the default is Full) compares servers"),
        (
            source("{uris: [\"ftp://h/a\"]}") + off,
            "spec.source.rdbFile.uris[0]: is of unknown kind \"ftp://\"",
        ),
        (source("{uris: [\"file://h/a\"]}") + off, "spec.source.rdbFile.uris[0]: names a host"),
        (
            source("{uris: [\"s3://b\"]}") + off,
            "spec.source.rdbFile.uris[0]: names no file behind the bucket",
        ),
        (source("{uris: [\"/a***\"]}") + off, "spec.source.rdbFile.uris[0]: is no glob"),
        (json("https://h/a", "}"), "spec.target.json.uri: cannot be written to"),
        (json("/a/", "}"), "spec.target.json.uri: names a folder"),
        (json("/a/*.json", "}"), "spec.target.json.uri: is a glob"),
        (json("/a", ", existingKeys: Skip}"), "spec.target.existingKeys: Skip is of keys"),
        (json("/a", "}") + "  databaseMap: {\"1\": 0}\n", "spec.databaseMap: not allowed with a file"),
        (
            json("/a", "}") + "  filter: {lua: {inline: \"function command(c) end\"}}\n",
            "spec.filter.lua.inline: defines no key(k), and target type Json takes keys and no commands",
        ),
        (
            scanned("") + "  filter: {lua: {inline: \"function command(c) end\"}}\n",
            "spec.filter.lua.inline: defines no key(k), and target type Json takes keys and no commands",
        ),
        (
            scanned("") + "  filter: {commands: {exclude: [PUBLISH]}}\n",
            "spec.filter.commands: is of the commands of a replication stream, and source type Scan has none",
        ),
        (
            source("{uris: [\"/a\"]}") + off + "  filter: {commands: {exclude: [PUBLISH]}}\n",
            "spec.filter.commands: is of the commands of a replication stream, and source type RdbFile has none",
        ),
        (
            json("/a", "}") + "  filter: {commands: {exclude: [PUBLISH]}}\n",
            "spec.filter.commands: is of commands, which no file takes",
        ),
        (
            scanned("keyspaceNotifications: Enable, "),
            "spec.source.redis.keyspaceNotifications: Enable is for changes, which no file takes",
        ),
        (json("/a", "}") + "  verification: {mode: Keys}\n", "spec.verification.mode: Keys compares servers"),
        (
            source("{uris: [\"s3://b/k\"], credentialsSecretRef: {name: s}}") + off,
            "spec.source.rdbFile.credentialsSecretRef: secret \"s\" with one of the keys aws_access_key_id",
        ),
    ] {
        let complaint = complaint(&text);
        assert!(complaint.contains(said), "{complaint}\nlacks {said}");
    }
}
