use super::*;
use crate::connection::{RedisAccess, TopologyChoice};
use crate::topology::parse_cluster_nodes;

fn dialer() -> Dialer {
    let access = RedisAccess {
        topology: TopologyChoice::Cluster,
        endpoints: vec![Address::new("h", 1)],
        sentinel: None,
        credentials: None,
        tls: None,
        endpoint_map: BTreeMap::new(),
    };
    Dialer::new(access, "test")
}

fn slots(text: &str) -> SlotRanges {
    text.parse().unwrap()
}

fn node(id: &str, port: u16) -> Node {
    let address = Address::new("h", port);
    Node { address: address.clone(), announced: address, id: id.into(), failing: false }
}

/// Shard `a` with replica `b` on 0-99, shard `c` with replica `d` on 100-199; ports 1 to 4.
fn families() -> Vec<Family> {
    let shard = |master, replica, ranges: &str| Shard {
        id: String::new(),
        master,
        replicas: vec![replica],
        slots: slots(ranges),
    };
    let [first, second] =
        [shard(node("a", 1), node("b", 2), "0-99"), shard(node("c", 3), node("d", 4), "100-199")];
    [first, second].iter().map(|shard| Family::new(shard, shard.slots.clone())).collect()
}

/// One view out of (port asked, CLUSTER NODES without the fields that do not matter).
fn view(words: &[(u16, &str)]) -> ClusterView {
    let mut view = ClusterView::default();
    for (port, text) in words {
        let lines: Vec<String> = text
            .lines()
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let [id, port, flags, master, epoch, slots @ ..] = words.as_slice() else { panic!("{line}") };
                format!("{id} h:{port}@1 {flags} {master} 0 0 {epoch} connected {}", slots.join(" "))
            })
            .collect();
        let nodes = parse_cluster_nodes(&lines.join("\n")).unwrap();
        view.add(&Address::new("h", *port), &nodes, &dialer());
    }
    view
}

fn follow(families: &mut [Family], view: &ClusterView) {
    for index in 0..families.len() {
        let others = families.iter().enumerate().filter(|(other, _)| *other != index);
        let foreign = others.map(|(_, family)| family.master_id().to_owned()).collect();
        families[index].follow(view, &foreign);
    }
}

fn served(shards: &[Family]) -> Vec<String> {
    shards.iter().map(|shard| shard.serves().to_string()).collect()
}

fn all(shards: &[Family]) -> BTreeSet<String> {
    shards.iter().flat_map(|shard| shard.members().iter().cloned()).collect()
}

#[test]
fn at_rest_nothing_changes() {
    let mut shards = families();
    let at_rest =
        view(&[(1, "a 1 myself,master - 1 0-99\nb 2 slave a 1\nc 3 master - 2 100-199\nd 4 slave c 2")]);
    follow(&mut shards, &at_rest);
    assert_eq!((shards[0].master().port, shards[1].master().port), (1, 3));
    assert_eq!(shards[0].replicas(), [Address::new("h", 2)]);
    assert_eq!(served(&shards), ["0-99", "100-199"]);
    assert!(at_rest.strange(&all(&shards)).is_empty());
}

/// The old master is cut off and still calls itself the owner; the others know better.
#[test]
fn a_promoted_replica_is_followed_against_the_old_masters_word() {
    let mut shards = families();
    let split = view(&[
        (
            1,
            "a 1 myself,master - 1 0-99\nb 2 slave,fail? a 1\nc 3 master,fail? - 2 100-199\nd 4 slave,fail? c 2",
        ),
        (3, "a 1 master,fail - 1\nb 2 master - 3 0-99\nc 3 myself,master - 2 100-199\nd 4 slave c 2"),
    ]);
    follow(&mut shards, &split);
    assert_eq!(shards[0].master().port, 2);
    assert_eq!(served(&shards), ["0-99", "100-199"], "a failover moves no slots");
    // It comes back as a replica, and takes over again.
    let back =
        view(&[(3, "a 1 master - 5 0-99\nb 2 slave a 5\nc 3 myself,master - 2 100-199\nd 4 slave c 2")]);
    follow(&mut shards, &back);
    assert_eq!(shards[0].master().port, 1);
    assert_eq!(served(&shards), ["0-99", "100-199"]);
}

#[test]
fn slots_that_move_are_followed() {
    let mut shards = families();
    let moved_back = "a 1 myself,master - 6 0-99\nb 2 slave a 6\nc 3 master - 4 100-199\nd 4 slave c 4";
    let moved = view(&[(
        1,
        "a 1 myself,master - 1 10-99 [10->-c]\nb 2 slave a 1\nc 3 master - 4 0-9 100-199\nd 4 slave c 4",
    )]);
    follow(&mut shards, &moved);
    assert_eq!(served(&shards), ["10-99", "0-9,100-199"]);
    assert_eq!(shards[0].leaving().to_string(), "10");
    assert_eq!(shards[0].master().port, 1);
    follow(&mut shards, &view(&[(1, moved_back)]));
    assert_eq!(served(&shards), ["0-99", "100-199"]);
    assert!(shards[0].leaving().is_empty());
}

/// All slots moved to the other shard, and the emptied master became its replica: that is no failover, and
/// the other shard's data are not ours to read.
#[test]
fn a_shard_that_was_emptied_is_not_looked_for_at_another() {
    let mut shards = families();
    let emptied = "a 1 slave c 4\nb 2 slave c 4\nc 3 myself,master - 4 0-199\nd 4 slave c 4";
    follow(&mut shards, &view(&[(3, emptied)]));
    assert_eq!(served(&shards), ["", "0-199"]);
    assert_eq!(shards[0].master().port, 1);
    let own =
        parse_cluster_nodes("a h:1@1 myself,slave c 0 0 4 connected\nc h:3@1 master - 0 0 4 connected 0-199")
            .unwrap();
    assert_eq!(is_of(&own, shards[0].members()), Some(false));
    assert_eq!(is_of(&own, shards[1].members()), Some(true));
}

/// Promoted before it was ever seen as a replica.
#[test]
fn a_node_never_seen_before_takes_over_from_a_dead_master() {
    let mut shards = families();
    let text = "a 1 master,fail - 1\nb 2 slave e 3\ne 5 master - 3 0-99\nc 3 myself,master - 2 100-199\nd 4 slave c 2";
    follow(&mut shards, &view(&[(3, text)]));
    assert_eq!(shards[0].master().port, 5);
    assert_eq!(served(&shards), ["0-99", "100-199"]);
    // While the old master lives, the same is a move.
    let mut shards = families();
    let lives = view(&[(3, &text.replace("master,fail - 1", "master - 1"))]);
    follow(&mut shards, &lives);
    assert_eq!(shards[0].master().port, 1);
    assert_eq!(served(&shards), ["", "100-199"]);
    assert_eq!(lives.strange(&all(&shards)).to_string(), "0-99");
}

#[test]
fn a_replica_that_went_to_another_shard_is_not_read_from() {
    let mut shards = families();
    let text = "a 1 master - 1 0-99\nb 2 slave c 2\nc 3 myself,master - 2 100-199\nd 4 slave c 2";
    follow(&mut shards, &view(&[(3, text)]));
    assert!(shards[0].replicas().is_empty());
    let own = "a h:1@1 master - 0 0 1 connected 0-99\nb h:2@1 myself,slave c 0 0 2 connected";
    assert_eq!(is_of(&parse_cluster_nodes(own).unwrap(), shards[0].members()), Some(false));
}
