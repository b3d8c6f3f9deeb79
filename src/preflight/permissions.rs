//! Whether the user may do what is needed, as far as the server tells.

use super::PreflightError;
use crate::connection::{Connection, ConnectionError};
use crate::resp::Reply;
use crate::topology::Role;

/// A command that is needed for a start; the run finds out about the rest.
struct Needed {
    /// As ACL DRYRUN takes it.
    words: &'static [&'static str],
    /// Its ACL categories (`commands/*.json` of Redis 7.0), but for `@all`.
    categories: &'static [&'static str],
}

const ON_SOURCE: [Needed; 2] = [
    Needed { words: &["PSYNC", "?", "-1"], categories: &["admin", "slow", "dangerous"] },
    Needed { words: &["REPLCONF", "listening-port", "0"], categories: &["admin", "slow", "dangerous"] },
];
/// Where nothing is replicated but read.
const TO_SCAN: [Needed; 4] = [
    Needed { words: &["SCAN", "0"], categories: &["keyspace", "read", "slow"] },
    Needed { words: &["TYPE", "redis-migration:probe"], categories: &["keyspace", "read", "fast"] },
    Needed { words: &["PTTL", "redis-migration:probe"], categories: &["keyspace", "read", "fast"] },
    Needed { words: &[DUMP, "redis-migration:probe"], categories: &["keyspace", "read", "slow"] },
];
/// The one of them that can be done without.
const DUMP: &str = "DUMP";
const ON_TARGET: [Needed; 3] = [
    Needed { words: &["SET", "redis-migration:probe", ""], categories: &["write", "string", "slow"] },
    Needed {
        words: &["RESTORE", "redis-migration:probe", "0", ""],
        categories: &["keyspace", "write", "slow", "dangerous"],
    },
    Needed { words: &["DEL", "redis-migration:probe"], categories: &["keyspace", "write", "slow"] },
];

/// By ACL DRYRUN (7.0 and newer), which runs nothing; where that is not known or not allowed, by the user's
/// rules as ACL GETUSER tells them. Only a refusal of the command itself counts: which keys a user may touch
/// is the manifest's business. Gives a warning when nothing tells. `psync`: the name of that command there.
pub(super) async fn permissions(
    connection: &mut Connection,
    role: Role,
    psync: Option<&str>,
) -> Result<Option<String>, PreflightError> {
    if role == Role::Source && psync.is_some() {
        may_replconf(connection).await?;
    }
    let needed: &[Needed] = match (role, psync) {
        (Role::Source, Some(_)) => &ON_SOURCE,
        (Role::Source, None) => &TO_SCAN,
        (Role::Target, _) => &ON_TARGET,
    };
    let user = match connection.query_text(&[b"ACL", b"WHOAMI"]).await {
        Ok(user) => user,
        Err(error) if is_forbidden(&error) => {
            return Ok(Some(unchecked(connection, role, needed, psync)));
        }
        // Before 6.0 there are no users.
        Err(error) => return optional(error, role).map(|()| None),
    };
    let mut slower = None;
    for command in needed {
        let name = name(command, psync);
        let mut args: Vec<&[u8]> = vec![b"ACL", b"DRYRUN", user.as_bytes(), name.as_bytes()];
        args.extend(command.words.iter().skip(1).map(|word| word.as_bytes()));
        match connection.query(&args).await {
            // Refusals come as a text, not as an error.
            Ok(reply) => match reply.text() {
                Some(text) if text.contains("permissions to run the") && name == DUMP => {
                    slower = Some(without_dump(connection));
                }
                Some(text) if text.contains("permissions to run the") => {
                    return Err(forbidden(connection, role, name, text.to_owned()));
                }
                _ => {}
            },
            Err(error) => {
                optional(error, role)?;
                return by_rules(connection, role, needed, psync, &user).await;
            }
        }
    }
    Ok(slower)
}

async fn by_rules(
    connection: &mut Connection,
    role: Role,
    needed: &[Needed],
    psync: Option<&str>,
    user: &str,
) -> Result<Option<String>, PreflightError> {
    let reply = match connection.query(&[b"ACL", b"GETUSER", user.as_bytes()]).await {
        Ok(reply) => reply,
        Err(error) => {
            optional(error, role)?;
            return Ok(Some(unchecked(connection, role, needed, psync)));
        }
    };
    let field = |name: &str| {
        let mut pairs = reply.items().chunks_exact(2);
        pairs.find(|pair| pair.first().and_then(Reply::text) == Some(name))?.get(1)
    };
    // Selectors (7.0) may allow what the rules themselves do not.
    let has_selectors = field("selectors").is_some_and(|selectors| !selectors.items().is_empty());
    let Some(rules) = field("commands").and_then(Reply::text).filter(|_| !has_selectors) else {
        return Ok(Some(unchecked(connection, role, needed, psync)));
    };
    for command in needed {
        let name = name(command, psync);
        if !allows(rules, name, command.categories) {
            if name == DUMP {
                return Ok(Some(without_dump(connection)));
            }
            let text = format!("the rules of the user {user} do not allow it: {rules}");
            return Err(forbidden(connection, role, name, text));
        }
    }
    Ok(None)
}

/// What the rules say in the end; a later one overrides an earlier one.
fn allows(rules: &str, command: &str, categories: &[&str]) -> bool {
    let mut allowed = false;
    for rule in rules.split_ascii_whitespace() {
        let (allow, what) = match (rule.strip_prefix('+'), rule.strip_prefix('-')) {
            (Some(what), _) => (true, what),
            (_, Some(what)) => (false, what),
            _ => continue,
        };
        let meant = match what.strip_prefix('@') {
            Some(category) => category == "all" || categories.contains(&category),
            None => what.eq_ignore_ascii_case(command),
        };
        if meant {
            allowed = allow;
        }
    }
    allowed
}

fn name<'a>(command: &Needed, psync: Option<&'a str>) -> &'a str {
    let name = command.words.first().copied().unwrap_or_default();
    match psync {
        Some(renamed) if name == "PSYNC" => renamed,
        _ => name,
    }
}

fn forbidden(connection: &Connection, role: Role, command: &str, text: String) -> PreflightError {
    let (address, command) = (connection.address().clone(), command.to_owned());
    PreflightError::Forbidden { role, address, command, text }
}

fn without_dump(connection: &Connection) -> String {
    format!(
        "source: {}: the user may not run DUMP; values are read element by element, which takes longer",
        connection.address()
    )
}

fn unchecked(connection: &Connection, role: Role, needed: &[Needed], psync: Option<&str>) -> String {
    let side = match role {
        Role::Source => "source",
        Role::Target => "target",
    };
    let names: Vec<_> = needed.iter().map(|command| name(command, psync)).collect();
    format!(
        "{side}: {}: the user may not ask for its own permissions, so whether it may run {} could not be checked; allow it +acl|whoami and +acl|dryrun (before 7.0 +acl|getuser) to have it checked",
        connection.address(),
        names.join(", ")
    )
}

fn is_forbidden(error: &ConnectionError) -> bool {
    matches!(error, ConnectionError::Server { text, .. } if text.starts_with("NOPERM"))
}

/// Tried, as a user who may not replicate seldom may run ACL DRYRUN. It does nothing by itself, and only
/// a refusal of the command counts: old servers do not know the option.
async fn may_replconf(connection: &mut Connection) -> Result<(), PreflightError> {
    match connection.call(&[b"REPLCONF", b"capa", b"psync2"]).await {
        Ok(Reply::Error(text)) if text.starts_with(b"NOPERM") => Err(PreflightError::Forbidden {
            role: Role::Source,
            address: connection.address().clone(),
            command: "REPLCONF".to_owned(),
            text: String::from_utf8_lossy(&text).into_owned(),
        }),
        Ok(_) => Ok(()),
        Err(source) => Err(PreflightError::Connection { role: Role::Source, source }),
    }
}

/// An answer that was not given does not matter; a broken connection does.
pub(super) fn optional(error: ConnectionError, role: Role) -> Result<(), PreflightError> {
    match error {
        ConnectionError::Server { .. } | ConnectionError::UnexpectedReply { .. } => Ok(()),
        source => Err(PreflightError::Connection { role, source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_rules_override_earlier_ones() {
        let psync = |rules| allows(rules, "PSYNC", ON_SOURCE[0].categories);
        for rules in ["+@all", "-@all +psync", "+@all -@admin +psync", "-@all +@dangerous", "+@all -sync"] {
            assert!(psync(rules), "{rules}");
        }
        for rules in ["", "-@all", "+@all -psync", "+psync -@all", "+@all -@admin", "-@all +@write +get"] {
            assert!(!psync(rules), "{rules}");
        }
    }
}
