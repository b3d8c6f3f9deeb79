use std::collections::BTreeMap;

use super::*;
use crate::connection::test_server::{Server, cluster, eventually, plain_access};
use crate::connection::{Credentials, Secret, SentinelAccess};
use crate::version::Flavor;

fn dialer(access: &RedisAccess) -> Dialer {
    Dialer::new(access.clone(), "test")
}

async fn discovered(access: &RedisAccess) -> Topology {
    discover(access, &dialer(access), Role::Source).await.unwrap()
}

async fn linked_replica(master: &Server) -> Server {
    let port = master.address.port.to_string();
    let replica = Server::start(&["--replicaof", "127.0.0.1", &port, "--repl-diskless-sync-delay", "0"]);
    eventually("the replica follows", || async {
        let info = server_info(&dialer(&replica.access()), &replica.address).await.ok()?;
        info.is_current_replica().then_some(())
    })
    .await;
    replica
}

#[tokio::test]
async fn a_master_and_its_replica() {
    let master = Server::start(&["--databases", "5", "--repl-diskless-sync-delay", "0"]);
    let replica = linked_replica(&master).await;
    let access = master.access();
    let topology = discovered(&access).await;
    assert_eq!((topology.kind, topology.databases), (TopologyKind::Standalone, Some(5)));
    assert_eq!(topology.server.flavor, Flavor::Redis);
    let shard = &topology.shards[0];
    assert_eq!((shard.master.address.clone(), shard.replicas.len()), (master.address.clone(), 1));
    assert_eq!(shard.slots.count(), 16384);
    assert_eq!(pick_source(shard, true, &dialer(&access)).await, replica.address);
    assert_eq!(pick_source(shard, false, &dialer(&access)).await, master.address);

    drop(replica);
    assert_eq!(pick_source(shard, true, &dialer(&access)).await, master.address);
}

#[tokio::test]
async fn the_master_is_found_among_several_endpoints() {
    let master = Server::start(&["--repl-diskless-sync-delay", "0"]);
    let replica = linked_replica(&master).await;
    let nobody = Address::new("127.0.0.1", 1);
    let endpoints = vec![nobody, replica.address.clone(), master.address.clone()];
    let access = RedisAccess { endpoints, ..master.access() };
    assert_eq!(discovered(&access).await.shards[0].master.address, master.address);
    let alone = discovered(&replica.access()).await;
    assert_eq!(alone.shards[0].master.address, replica.address);
}

#[tokio::test]
async fn a_cluster_from_any_one_node() {
    let nodes = cluster(&["0-5460", "5461-10922", "10923-16383"]).await;
    for node in &nodes {
        let topology = discovered(&node.access()).await;
        assert_eq!((topology.kind, topology.databases), (TopologyKind::Cluster, Some(1)));
        assert!(topology.uncovered().is_empty());
        let masters: Vec<_> = topology.shards.iter().map(|shard| shard.master.address.clone()).collect();
        assert_eq!(masters, nodes.iter().map(|node| node.address.clone()).collect::<Vec<_>>());
        assert_eq!(topology.shards[1].slots.to_string(), "5461-10922");
    }
    let asked_wrongly = RedisAccess { topology: TopologyChoice::Standalone, ..nodes[0].access() };
    let error = discover(&asked_wrongly, &dialer(&asked_wrongly), Role::Target).await.unwrap_err();
    assert!(error.to_string().contains("in cluster mode"), "{error}");

    let moved_to = nodes[2].address.clone();
    let mut access = nodes[0].access();
    access.endpoint_map = BTreeMap::from([(moved_to.clone(), Address::new("localhost", moved_to.port))]);
    let topology = discovered(&access).await;
    assert_eq!(topology.shards[2].master.announced, moved_to);
    assert_eq!(topology.shards[2].master.address.host, "localhost");
}

#[tokio::test]
async fn cluster_slots_where_nodes_is_forbidden() {
    let nodes = cluster(&["0-8191", "8192-16383"]).await;
    let mut admin = nodes[0].connect().await;
    admin.query(&[b"ACL", b"SETUSER", b"few", b"on", b">pw", b"+@all", b"-cluster|nodes"]).await.unwrap();
    let credentials = Credentials { username: Some("few".into()), password: Secret::Literal(b"pw".to_vec()) };
    let access = RedisAccess { credentials: Some(credentials), ..nodes[0].access() };
    let topology = discovered(&access).await;
    assert!(topology.uncovered().is_empty());
    assert_eq!(topology.shards[1].master.announced, nodes[1].address);
}

#[tokio::test]
async fn uncovered_slots_show() {
    let nodes = cluster(&["0-100", "102-16383"]).await;
    assert_eq!(discovered(&nodes[1].access()).await.uncovered().to_string(), "101");
}

#[tokio::test]
async fn the_slot_map_follows_moves() {
    let nodes = cluster(&["0-8191", "8192-16383"]).await;
    let access = nodes[0].access();
    let dialer = dialer(&access);
    let mut map = SlotMap::new(&discovered(&access).await);
    assert_eq!(
        (map.owner(0), map.owner(8191), map.owner(8192), map.owner(16384)),
        (Some(0), Some(0), Some(1), None)
    );

    let mut ids = Vec::new();
    for node in &nodes {
        ids.push(node.connect().await.query_text(&[b"CLUSTER", b"MYID"]).await.unwrap());
    }
    for node in &nodes {
        let mut admin = node.connect().await;
        admin.query(&[b"CLUSTER", b"SETSLOT", b"7", b"NODE", ids[1].as_bytes()]).await.unwrap();
    }
    assert_eq!(map.moved(8, &nodes[1].address, &dialer), Some(1));
    assert_eq!(map.owner(8), Some(1));
    map.refresh(&dialer).await.unwrap();
    assert_eq!((map.owner(7), map.owner(8), map.nodes().len()), (Some(1), Some(0), 2));
    let newcomer = Address::new("10.0.0.9", 6379);
    assert_eq!(map.moved(9, &newcomer, &dialer), Some(2));
    assert_eq!(map.number_of(&newcomer), Some(2));
}

#[tokio::test]
async fn sentinels_name_the_master() {
    let master = Server::start(&["--requirepass", "pw", "--repl-diskless-sync-delay", "0"]);
    let sentinel = Server::start_sentinel(
        &master.address,
        "orders",
        &["sentinel auth-pass orders pw", "requirepass guard"],
    );
    let secret = |text: &str| Some(Credentials { username: None, password: Secret::Literal(text.into()) });
    let watched = |name: &str| RedisAccess {
        endpoints: vec![Address::new("127.0.0.1", 1), sentinel.address.clone()],
        sentinel: Some(SentinelAccess { master: name.into(), credentials: secret("guard") }),
        credentials: secret("pw"),
        ..plain_access(&sentinel.address)
    };
    let topology = discovered(&watched("orders")).await;
    assert_eq!(topology.kind, TopologyKind::Sentinel);
    assert_eq!(topology.shards[0].id, "orders");
    assert_eq!(topology.shards[0].master.address, master.address);

    let access = watched("nothing");
    let error = discover(&access, &dialer(&access), Role::Source).await.unwrap_err();
    assert!(matches!(error, TopologyError::UnknownMaster { .. }), "{error}");

    let unnamed = RedisAccess { sentinel: None, credentials: secret("guard"), ..watched("orders") };
    let unnamed = RedisAccess { endpoints: vec![sentinel.address.clone()], ..unnamed };
    let error = discover(&unnamed, &dialer(&unnamed), Role::Source).await.unwrap_err();
    assert!(matches!(error, TopologyError::SentinelMasterUnset { .. }), "{error}");
}

#[tokio::test]
async fn a_data_server_is_no_sentinel() {
    let server = Server::start(&[]);
    let sentinel = Some(SentinelAccess { master: "orders".into(), credentials: None });
    let access = RedisAccess { sentinel, ..server.access() };
    let error = discover(&access, &dialer(&access), Role::Source).await.unwrap_err();
    assert!(error.to_string().contains("not a Sentinel"), "{error}");
}

#[tokio::test]
async fn the_most_telling_failure_is_shown() {
    let guarded = Server::start(&["--requirepass", "pw"]);
    let endpoints = vec![guarded.address.clone(), Address::new("127.0.0.1", 1)];
    let access = RedisAccess { endpoints, ..guarded.access() };
    let error = discover(&access, &dialer(&access), Role::Source).await.unwrap_err();
    assert!(matches!(error.connection(), Some(ConnectionError::NoAuth { .. })), "{error}");
    assert!(!error.is_transient());
}
