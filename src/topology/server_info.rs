//! What INFO says of a server. Source of the fields: `genRedisInfoString` in server.c (redis.c in
//! 2.8) of Redis 2.8 to 8.2 and Valkey 8.1 and 9.1.

use std::collections::HashMap;

use crate::connection::Address;
use crate::version::{Flavor, ServerVersion};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    #[default]
    Standalone,
    Sentinel,
    Cluster,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ServerRole {
    #[default]
    Master,
    Replica,
}

/// One line of a master's replica list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaInfo {
    pub address: Address,
    pub online: bool,
    pub offset: i64,
}

/// The fields of INFO that matter here. A field that the server does not print is `None`, 0 or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerInfo {
    pub version: Option<ServerVersion>,
    pub mode: Mode,
    /// New at every start of the server.
    pub run_id: String,
    pub role: ServerRole,
    /// Of a replica.
    pub master: Option<Address>,
    /// Of a replica.
    pub master_link_up: bool,
    /// A replica that is receiving its first copy.
    pub sync_in_progress: bool,
    pub replicas: Vec<ReplicaInfo>,
    /// Redis 4.0 and newer. A replica shows its master's.
    pub replication_id: String,
    /// The history that a promoted replica goes on with under an id of its own; empty when there is none.
    pub former_replication_id: String,
    /// First offset that it does not have of that history; -1 when there is none.
    pub former_until: i64,
    /// First offset in the backlog; `None` without a backlog.
    pub backlog_from: Option<i64>,
    /// How far this server's own data is.
    pub offset: i64,
    pub backlog_size: u64,
    pub loading: bool,
    pub loading_eta_seconds: Option<u64>,
    pub used_memory: u64,
    /// Part of `used_memory` that an empty server takes; 0 before Redis 4.0.
    pub startup_memory: u64,
    /// Bytes; 0: no limit. `None` before Redis 3.2.
    pub maxmemory: Option<u64>,
    pub maxmemory_policy: Option<String>,
    /// (database, keys), without the empty ones.
    pub keyspace: Vec<(u64, u64)>,
}

impl ServerInfo {
    /// Reads the text of INFO; sections and their order do not matter.
    pub fn parse(text: &str) -> ServerInfo {
        let fields: HashMap<&str, &str> =
            text.lines().filter_map(|line| line.trim().split_once(':')).collect();
        let field = |name: &str| fields.get(name).copied();
        let number = |name: &str| field(name).and_then(|value| value.parse::<u64>().ok());
        let flag = |name: &str| field(name) == Some("1");
        let role = match field("role") {
            Some("slave" | "replica") => ServerRole::Replica,
            _ => ServerRole::Master,
        };
        let offset = match role {
            // A replica's master_repl_offset runs on through its own backlog, but is 0 in 2.8 and 3.x.
            ServerRole::Replica => field("slave_repl_offset").or(field("master_repl_offset")),
            ServerRole::Master => field("master_repl_offset"),
        };
        ServerInfo {
            version: version(&field),
            mode: mode(&field),
            run_id: field("run_id").unwrap_or_default().to_owned(),
            role,
            master: master(&field),
            master_link_up: field("master_link_status") == Some("up"),
            sync_in_progress: flag("master_sync_in_progress"),
            replicas: replicas(&field),
            replication_id: field("master_replid").unwrap_or_default().to_owned(),
            former_replication_id: field("master_replid2")
                .filter(|id| id.bytes().any(|byte| byte != b'0'))
                .unwrap_or_default()
                .to_owned(),
            former_until: field("second_repl_offset").and_then(|value| value.parse().ok()).unwrap_or(-1),
            backlog_from: field("repl_backlog_first_byte_offset")
                .filter(|_| flag("repl_backlog_active"))
                .and_then(|value| value.parse().ok()),
            offset: offset.and_then(|value| value.parse().ok()).unwrap_or(0),
            backlog_size: number("repl_backlog_size").unwrap_or(0),
            loading: flag("loading") || flag("async_loading"),
            loading_eta_seconds: number("loading_eta_seconds"),
            used_memory: number("used_memory").unwrap_or(0),
            startup_memory: number("used_memory_startup").unwrap_or(0),
            maxmemory: number("maxmemory"),
            maxmemory_policy: field("maxmemory_policy").map(str::to_owned),
            keyspace: keyspace(&fields),
        }
    }

    /// Keys in all databases.
    pub fn keys(&self) -> u64 {
        self.keyspace.iter().fold(0, |sum, (_, keys)| sum.saturating_add(*keys))
    }

    /// A replica that follows its master and has its data loaded.
    pub fn is_current_replica(&self) -> bool {
        self.role == ServerRole::Replica && self.master_link_up && !self.loading && !self.sync_in_progress
    }
}

/// Valkey keeps printing a `redis_version` of 7.2.4 for old clients, so its own field goes first.
fn version<'a>(field: &impl Fn(&str) -> Option<&'a str>) -> Option<ServerVersion> {
    let (flavor, text) = match field("valkey_version") {
        Some(text) => (Flavor::Valkey, text),
        None if field("server_name") == Some("valkey") => (Flavor::Valkey, field("redis_version")?),
        None => (Flavor::Redis, field("redis_version")?),
    };
    let mut parts = text.split(['.', '-']).map(|part| part.parse::<u16>().ok());
    let major = parts.next().flatten()?;
    let minor = parts.next().flatten().unwrap_or(0);
    Some(ServerVersion { flavor, major, minor, patch: parts.next().flatten().unwrap_or(0) })
}

/// Valkey 9 renamed `redis_mode` to `server_mode`.
fn mode<'a>(field: &impl Fn(&str) -> Option<&'a str>) -> Mode {
    match field("redis_mode").or_else(|| field("server_mode")) {
        Some("sentinel") => Mode::Sentinel,
        Some("cluster") => Mode::Cluster,
        _ if field("cluster_enabled") == Some("1") => Mode::Cluster,
        _ => Mode::Standalone,
    }
}

fn master<'a>(field: &impl Fn(&str) -> Option<&'a str>) -> Option<Address> {
    Some(Address::new(field("master_host")?, field("master_port")?.parse().ok()?))
}

/// `slave0:ip=10.0.0.2,port=6379,state=online,offset=42,lag=0`; 2.6 printed `ip,port,state`.
fn replicas<'a>(field: &impl Fn(&str) -> Option<&'a str>) -> Vec<ReplicaInfo> {
    let mut found = Vec::new();
    for index in 0.. {
        let Some(line) = field(&format!("slave{index}")) else { break };
        let parts: HashMap<&str, &str> = line.split(',').filter_map(|part| part.split_once('=')).collect();
        let (Some(host), Some(port)) = (parts.get("ip"), parts.get("port").and_then(|p| p.parse().ok()))
        else {
            continue;
        };
        found.push(ReplicaInfo {
            address: Address::new(*host, port),
            online: parts.get("state") == Some(&"online"),
            offset: parts.get("offset").and_then(|offset| offset.parse().ok()).unwrap_or(0),
        });
    }
    found
}

/// `db0:keys=1,expires=0,avg_ttl=0`.
fn keyspace(fields: &HashMap<&str, &str>) -> Vec<(u64, u64)> {
    let mut found: Vec<(u64, u64)> = fields
        .iter()
        .filter_map(|(name, value)| {
            let database = name.strip_prefix("db")?.parse().ok()?;
            let keys = value.split(',').find_map(|part| part.strip_prefix("keys="))?.parse().ok()?;
            Some((database, keys))
        })
        .filter(|(_, keys)| *keys > 0)
        .collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(flavor: Flavor, major: u16, minor: u16, patch: u16) -> Option<ServerVersion> {
        Some(ServerVersion { flavor, major, minor, patch })
    }

    #[test]
    fn versions_of_both_flavours() {
        let read = |text: &str| ServerInfo::parse(text).version;
        assert_eq!(read("redis_version:2.8.17\r\n"), version(Flavor::Redis, 2, 8, 17));
        assert_eq!(
            read("redis_version:7.2.4\r\nserver_name:valkey\r\nvalkey_version:9.1.2\r\n"),
            version(Flavor::Valkey, 9, 1, 2)
        );
        assert_eq!(read("redis_version:7.2.5\r\nserver_name:valkey\r\n"), version(Flavor::Valkey, 7, 2, 5));
        assert_eq!(read("redis_version:8.0-rc1\r\n"), version(Flavor::Redis, 8, 0, 0));
        assert_eq!(read("memcached:1\r\n"), None);
    }

    #[test]
    fn a_master_with_replicas() {
        let info = ServerInfo::parse(
            "# Replication\r\nrole:master\r\nconnected_slaves:2\r\n\
             slave0:ip=10.0.0.2,port=6379,state=online,offset=14,lag=1\r\n\
             slave1:ip=fe80::1,port=6380,state=wait_bgsave,offset=0,lag=0\r\n\
             master_replid:aa\r\nmaster_replid2:bb\r\nmaster_repl_offset:15\r\nsecond_repl_offset:12\r\n\
             repl_backlog_active:1\r\nrepl_backlog_size:1048576\r\nrepl_backlog_first_byte_offset:9\r\n\
             db0:keys=3,expires=0,avg_ttl=0\r\ndb11:keys=4,expires=1\r\n",
        );
        assert_eq!(info.replicas[0].address, Address::new("10.0.0.2", 6379));
        assert!(info.replicas[0].online && !info.replicas[1].online);
        assert_eq!((info.offset, info.backlog_size, info.keys()), (15, 1 << 20, 7));
        assert_eq!(info.keyspace, [(0, 3), (11, 4)]);
        assert_eq!(info.replication_id, "aa");
        assert_eq!((info.former_replication_id.as_str(), info.former_until), ("bb", 12));
        assert_eq!(info.backlog_from, Some(9));
        let never =
            ServerInfo::parse("master_replid2:0000\r\nsecond_repl_offset:-1\r\nrepl_backlog_active:0\r\n");
        assert_eq!((never.former_replication_id.as_str(), never.former_until), ("", -1));
        assert_eq!(never.backlog_from, None);
    }

    #[test]
    fn a_replica_and_its_link() {
        let text = "role:slave\r\nmaster_host:10.0.0.1\r\nmaster_port:6379\r\nmaster_link_status:up\r\n\
                    master_sync_in_progress:0\r\nslave_repl_offset:99\r\nmaster_repl_offset:0\r\n";
        let info = ServerInfo::parse(text);
        assert_eq!(info.master, Some(Address::new("10.0.0.1", 6379)));
        assert_eq!(info.offset, 99);
        assert!(info.is_current_replica());
        assert!(!ServerInfo::parse(&text.replace("status:up", "status:down")).is_current_replica());
        assert!(!ServerInfo::parse(&format!("{text}loading:1\r\n")).is_current_replica());
    }

    #[test]
    fn modes() {
        let read = |text: &str| ServerInfo::parse(text).mode;
        assert_eq!(read("redis_mode:sentinel"), Mode::Sentinel);
        assert_eq!(read("server_mode:cluster"), Mode::Cluster);
        assert_eq!(read("cluster_enabled:1"), Mode::Cluster);
        assert_eq!(read("redis_mode:standalone\r\ncluster_enabled:0"), Mode::Standalone);
    }
}
