//! Which replica works on which shard of a migration (PURE).

use std::collections::BTreeMap;

/// One shard, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placed {
    pub shard: String,
    /// Who works on it; `None`: nobody.
    pub at: Option<String>,
    /// It may go to another replica without being copied anew.
    pub movable: bool,
    /// No other replica than the coordinator's could begin with it.
    pub stays: bool,
}

/// The owner of each shard. A shard stays where it is while its replica lives, as long as no replica has two
/// shards more than another; `calm`: replicas did not just come or go, so that such a shard may move.
/// `living` is not empty; `own` is the coordinator's replica, which gets what is left over.
pub fn balance(shards: &[Placed], living: &[String], own: &str, calm: bool) -> BTreeMap<String, String> {
    let mut owners: BTreeMap<String, String> = BTreeMap::new();
    let mut loads: BTreeMap<&str, usize> = living.iter().map(|replica| (replica.as_str(), 0)).collect();
    for placed in shards {
        let at = placed.at.as_deref().filter(|at| loads.contains_key(at) || *at == own && placed.stays);
        let at = if placed.stays && at.is_none() { Some(own) } else { at };
        if let Some(at) = at {
            owners.insert(placed.shard.clone(), at.to_owned());
            loads.entry(at).and_modify(|load| *load += 1);
        }
    }
    for placed in shards.iter().filter(|placed| !placed.stays) {
        if owners.contains_key(&placed.shard) {
            continue;
        }
        let least = loads.iter().min_by_key(|(replica, load)| (**load, **replica != own, **replica));
        let replica = least.map_or(own, |(replica, _)| *replica).to_owned();
        if let Some(load) = loads.get_mut(replica.as_str()) {
            *load += 1;
        }
        owners.insert(placed.shard.clone(), replica);
    }
    if !calm {
        return owners;
    }
    loop {
        let least =
            loads.iter().min_by_key(|(replica, load)| (**load, **replica)).map(|(at, load)| (*at, *load));
        let Some((to, few)) = least else { break };
        let crowded = |placed: &&Placed| {
            let at = owners.get(&placed.shard).map(String::as_str).unwrap_or_default();
            let many = loads.get(at).copied().unwrap_or_default();
            placed.movable && !placed.stays && placed.at.is_some() && many > few + 1
        };
        let load_of = |placed: &&Placed| {
            owners.get(&placed.shard).and_then(|at| loads.get(at.as_str())).copied().unwrap_or_default()
        };
        let Some(moved) = shards.iter().filter(crowded).max_by_key(load_of) else { break };
        if let Some(from) = owners.insert(moved.shard.clone(), to.to_owned())
            && let Some(load) = loads.get_mut(from.as_str())
        {
            *load -= 1;
        }
        if let Some(load) = loads.get_mut(to) {
            *load += 1;
        }
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `1a` is on replica a and may move, `1a!` is there and may not, `1` is nowhere, `1=` stays with the coordinator.
    fn placed(text: &str) -> Vec<Placed> {
        let one = |word: &str| Placed {
            shard: word[..1].to_owned(),
            at: word.get(1..2).filter(|at| *at != "=").map(str::to_owned),
            movable: !word.ends_with('!'),
            stays: word.ends_with('='),
        };
        text.split_whitespace().map(one).collect()
    }

    fn balanced(shards: &str, living: &str, own: &str, calm: bool) -> String {
        let living: Vec<String> = living.chars().map(String::from).collect();
        let owners = balance(&placed(shards), &living, own, calm);
        owners.iter().map(|(shard, at)| format!("{shard}{at}")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn shards_are_shared_out_with_as_few_moves_as_can_be() {
        let table = [
            // One replica has all.
            ("1 2 3", "a", "a", "1a 2a 3a"),
            // The coordinator's own gets what is left over.
            ("1 2 3", "ab", "a", "1a 2b 3a"),
            ("1 2 3", "ab", "b", "1b 2a 3b"),
            ("1 2 3 4", "abc", "b", "1b 2a 3c 4b"),
            // What fits stays, whoever coordinates.
            ("1a 2b 3a", "ab", "b", "1a 2b 3a"),
            ("1a 2b 3b", "ab", "a", "1a 2b 3b"),
            // A replica is gone.
            ("1a 2b 3a", "a", "a", "1a 2a 3a"),
            ("1a 2b 3c", "ac", "c", "1a 2c 3c"),
            ("1a 2b 3a 4b", "bc", "b", "1c 2b 3c 4b"),
            // One has come.
            ("1a 2a 3a", "ab", "a", "1a 2a 3b"),
            ("1a 2a 3a 4a", "ab", "a", "1a 2a 3b 4b"),
            ("1a 2a 3b", "abc", "a", "1a 2c 3b"),
            // Not in the full sync.
            ("1a! 2a! 3a!", "ab", "a", "1a 2a 3a"),
            ("1a! 2a 3a!", "ab", "a", "1a 2b 3a"),
            // Others could not begin with it.
            ("1= 2= 3", "ab", "a", "1a 2a 3b"),
            ("1= 2= 3= 4=", "ab", "a", "1a 2a 3a 4a"),
        ];
        for (shards, living, own, expected) in table {
            let expected = expected.to_owned();
            assert_eq!(balanced(shards, living, own, true), expected, "{shards} on {living} by {own}");
            // It comes to rest: what is balanced stays as it is.
            let again = balanced(&expected, living, own, true);
            if !shards.contains('!') && !shards.contains('=') {
                assert_eq!(again, expected, "{shards} on {living} by {own}, once more");
            }
        }
    }

    #[test]
    fn nothing_moves_for_balance_while_replicas_come_and_go() {
        assert_eq!(balanced("1a 2a 3a", "ab", "a", false), "1a 2a 3a");
        assert_eq!(balanced("1a 2a 3b", "a", "a", false), "1a 2a 3a");
    }
}
