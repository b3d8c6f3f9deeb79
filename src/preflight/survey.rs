//! What one server tells about itself.

use super::permissions::{optional, permissions};
use super::{Claimed, PreflightError};
use crate::connection::{Address, Connection, ConnectionError, Dialer};
use crate::resp::Reply;
use crate::target::keys::PREFIX;
use crate::topology::{Role, ServerInfo, config, read_info};

/// A page of keys; our own few are all on the first pages of a target that is otherwise empty.
const PAGE: &str = "1000";

pub(super) struct Survey {
    pub(super) address: Address,
    pub(super) info: ServerInfo,
    /// Bytes and policy; `None`: the server does not tell.
    pub(super) maxmemory: Option<u64>,
    pub(super) policy: Option<String>,
    /// `None`: the server does not tell.
    pub(super) modules: Option<Vec<String>>,
    /// `client-output-buffer-limit`, as CONFIG prints it.
    pub(super) output_limits: Option<String>,
    /// Why it is not known whether the user may do what is needed.
    pub(super) unchecked: Option<String>,
}

/// Asks the server at `address`; on a source to be replicated, `psync` is the name of that command there.
pub(super) async fn survey(
    dialer: &Dialer,
    address: &Address,
    role: Role,
    psync: Option<&str>,
) -> Result<Survey, PreflightError> {
    let failed = |source| PreflightError::Connection { role, source };
    let mut connection = dialer.connect(address).await.map_err(failed)?;
    let info = read_info(&mut connection).await.map_err(failed)?;
    if info.loading {
        let (address, eta_seconds) = (address.clone(), info.loading_eta_seconds);
        return Err(PreflightError::Loading { role, address, eta_seconds });
    }
    if let Some(name) = psync {
        psync_exists(&mut connection, name).await?;
    }
    let unchecked = permissions(&mut connection, role, psync).await?;
    let maxmemory = match info.maxmemory {
        Some(bytes) => Some(bytes),
        None => config(&mut connection, "maxmemory").await.and_then(|bytes| bytes.parse().ok()),
    };
    let policy = match &info.maxmemory_policy {
        Some(policy) => Some(policy.clone()),
        None => config(&mut connection, "maxmemory-policy").await,
    };
    Ok(Survey {
        address: address.clone(),
        maxmemory,
        policy,
        modules: modules(&mut connection).await,
        output_limits: config(&mut connection, "client-output-buffer-limit").await,
        info,
        unchecked,
    })
}

/// Fails when one of `servers` holds a key that is not ours and that is `claimed` (`None`: any).
pub(super) async fn empty(
    dialer: &Dialer,
    servers: &[Survey],
    claimed: Option<&Claimed>,
) -> Result<(), PreflightError> {
    let looked = servers.iter().map(|survey| async move {
        let failed = |source| PreflightError::Connection { role: Role::Target, source };
        let mut connection = dialer.connect(&survey.address).await.map_err(failed)?;
        // Servers that only look like Redis may not count their keys (Kvrocks): SCAN tells whether there are any.
        let counted = survey.info.keyspace.iter().map(|(database, _)| *database);
        for database in std::iter::once(0).chain(counted.filter(|database| *database != 0)) {
            if holds_foreign_key(&mut connection, database, claimed).await.map_err(failed)? {
                let (address, keys) = (survey.address.clone(), survey.info.keys().max(1));
                return Err(PreflightError::TargetNotEmpty { address, database, keys });
            }
        }
        Ok(())
    });
    futures::future::try_join_all(looked).await.map(|_| ())
}

async fn holds_foreign_key(
    connection: &mut Connection,
    database: u64,
    claimed: Option<&Claimed>,
) -> Result<bool, ConnectionError> {
    if database != 0 {
        connection.query(&[b"SELECT", database.to_string().as_bytes()]).await?;
    }
    let mut cursor = b"0".to_vec();
    loop {
        let reply = connection.query(&[b"SCAN", &cursor, b"COUNT", PAGE.as_bytes()]).await?;
        let [next, keys] = reply.items() else { return Err(connection.unexpected(b"SCAN")) };
        let foreign = |key: &Reply| {
            key.bytes().is_none_or(|key| {
                !key.starts_with(PREFIX) && claimed.is_none_or(|claimed| claimed(database, key))
            })
        };
        if keys.items().iter().any(foreign) {
            return Ok(true);
        }
        cursor = next.bytes().ok_or_else(|| connection.unexpected(b"SCAN"))?.to_vec();
        if cursor == b"0" {
            return Ok(false);
        }
    }
}

/// COMMAND INFO (2.8.13 and newer) knows renamed commands by their new name only.
async fn psync_exists(connection: &mut Connection, name: &str) -> Result<(), PreflightError> {
    match connection.query(&[b"COMMAND", b"INFO", name.as_bytes()]).await {
        Ok(reply) if matches!(reply.items(), [Reply::Array(None) | Reply::Bulk(None)]) => {
            Err(PreflightError::NoPsync { address: connection.address().clone(), command: name.to_owned() })
        }
        Ok(_) => Ok(()),
        Err(error) => optional(error, Role::Source),
    }
}

/// Names, in any order. MODULE exists from 4.0: a server without it has none.
async fn modules(connection: &mut Connection) -> Option<Vec<String>> {
    let reply = connection.query(&[b"MODULE", b"LIST"]).await.ok()?;
    let name = |module: &Reply| {
        let mut fields = module.items().chunks_exact(2);
        let name = fields.find(|pair| pair.first().and_then(Reply::text) == Some("name"))?;
        name.get(1)?.text().map(str::to_owned)
    };
    Some(reply.items().iter().filter_map(name).collect())
}
