//! How a worker begins: it takes the shard over from whoever had it, finds out where that one stopped, and
//! takes up what it left on disk, if that reaches on from there.

use tokio::sync::watch;

use super::keeper::{Found, Keeper};
use super::progress::ShardProgress;
use super::route::Router;
use super::{Feed, TargetShape, Upstream, WorkerError, WorkerSetup};
use crate::backoff::Backoff;
use crate::object::SourceFile;
use crate::source::file::origin;
use crate::spool::{self, Origin, Recovered, SpoolLimits, SpoolReader, SpoolWriter};
use crate::target::keys::Load;
use crate::topology::{Role, discover, server_info};

/// Where the target stands, and with it what is to come.
pub struct Taken {
    /// With `delivery: ExactlyOnce`.
    pub keeper: Option<Keeper>,
    /// In the middle of the full sync; in the stream it is in the setup.
    pub loading: Option<Load>,
}

/// A spool of an earlier run, and where to go on in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Left {
    pub origin: Origin,
    /// Spool position of the first stream byte.
    pub stream_at: u64,
    /// All before it stands on the target.
    pub position: u64,
    pub part: LeftPart,
}

impl Left {
    /// Bytes of the RDB, while it is not yet on the target.
    pub fn snapshot_bytes(&self) -> Option<u64> {
        matches!(self.part, LeftPart::Snapshot(_)).then_some(self.stream_at)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LeftPart {
    Snapshot(Load),
    /// The source's database there.
    Stream {
        db: u64,
    },
}

/// Makes this worker the only one that writes, and finds out where an earlier one stopped. `None`: asked to
/// stop before that was known. `router` is left as it served for that.
pub async fn take_over(
    setup: &mut WorkerSetup,
    router: &mut Router,
    progress: &ShardProgress,
    drain: &mut watch::Receiver<bool>,
) -> Result<Option<Taken>, WorkerError> {
    if !setup.exactly_once {
        return Ok(Some(Taken { keeper: None, loading: None }));
    }
    let mut backoff = Backoff::default();
    let (mut keeper, found) = loop {
        let error = match Keeper::take(setup, router, &progress.epoch).await {
            Ok(taken) => break taken,
            Err(error) => error,
        };
        let again = error.connection().is_some_and(|error| error.is_transient());
        if !again {
            let denied = error.connection().is_some_and(|error| error.is_auth());
            let text = error.to_string();
            return Err(match error.connection() {
                Some(_) if denied => WorkerError::Denied(text),
                Some(_) => WorkerError::Target(text),
                None => WorkerError::Fenced(text),
            });
        }
        tracing::warn!(shard = %setup.shard, %error, "the target cannot be asked where it stands, trying again");
        progress.numbers.send_modify(|numbers| numbers.waiting = error.to_string());
        tokio::select! {
            () = backoff.wait() => {}
            Ok(_) = drain.wait_for(|drain| *drain) => return Ok(None),
        }
        // Slots may have changed hands, or the Sentinels promoted another server; when that cannot be asked now,
        // the next attempt does.
        let dialer = &setup.target_dialer;
        match (&mut *router, &mut setup.target) {
            (Router::Slots(map), _) => {
                let _ = map.refresh(dialer).await;
            }
            (Router::Single, TargetShape::Watched(address)) => {
                if let Ok(found) = discover(dialer.access(), dialer, Role::Target).await
                    && let Some(shard) = found.shards.first()
                {
                    *address = shard.master.address.clone();
                }
            }
            (Router::Single, _) => {}
        }
    };
    progress.numbers.send_modify(|numbers| numbers.waiting.clear());
    let mut loading = None;
    let found = match &setup.feed {
        Feed::File(file) => of_file(file, found),
        Feed::Replication(_) | Feed::Scan(..) => found,
    };
    match found {
        Found::Nothing => {
            if setup.resume.take().is_some() {
                tracing::warn!(shard = %setup.shard, "the target has nothing of what an earlier run left there: it is copied again");
                setup.restarted = true;
            }
        }
        Found::Resume(_) | Found::Loading(_) if setup.anew => setup.own_keys = true,
        Found::Resume(checkpoint) => {
            tracing::info!(shard = %setup.shard, offset = checkpoint.offset, "going on from what the target has");
            // What an earlier run may have applied, it had received by now.
            keeper.replay_until = i64::MAX;
            if let Some(Upstream { dialer, address, .. }) = setup.feed.upstream()
                && let Ok(info) = server_info(dialer, address).await
            {
                keeper.replay_until = info.offset.max(checkpoint.offset);
            }
            setup.resume = Some(checkpoint);
        }
        Found::Loading(load) => {
            loading = Some(load);
            setup.restarted |= setup.resume.take().is_some();
            setup.own_keys = true;
        }
        Found::Begun(why) => {
            tracing::info!(shard = %setup.shard, why, "an earlier run was here: copying anew");
            setup.restarted |= setup.resume.take().is_some();
            setup.own_keys = true;
        }
    }
    Ok(Some(Taken { keeper: Some(keeper), loading }))
}

/// What was recorded of another content of the file is no place to go on from.
fn of_file(file: &SourceFile, found: Found) -> Found {
    let same = match &found {
        Found::Loading(load) => load.spool == file.fingerprint() && load.waypoint.position <= file.size,
        Found::Resume(checkpoint) => checkpoint.replication_id == origin(file).replication_id,
        Found::Nothing | Found::Begun(_) => true,
    };
    if same { found } else { Found::Begun("the file is another than the one of an earlier run") }
}

/// The spool to work with: that of an earlier run, when it reaches on from where the target stands, else a
/// new one. To be called once nobody else writes to the shard's folder any more.
pub async fn open_spool(setup: &WorkerSetup, taken: &Taken) -> (SpoolWriter, SpoolReader, Option<Left>) {
    let limits = setup.spool.limits(&setup.file_name);
    if let Feed::File(file) = &setup.feed {
        return open_on_file(limits, file, taken.loading);
    }
    let Taken { keeper, loading } = taken;
    let resume = setup.resume.as_ref().filter(|_| keeper.is_some());
    if loading.is_none() && resume.is_none() {
        let (writer, reader) = spool::spool(limits);
        return (writer, reader, None);
    }
    let shard = &setup.shard;
    let why = match spool::recover(limits.clone()).await {
        None => "nothing of use is left of its spool",
        Some((writer, reader, recovered)) => {
            let fitting = match (loading, resume) {
                (Some(load), _) => in_snapshot(&recovered, load),
                (None, Some(checkpoint)) => {
                    in_stream(&recovered, &checkpoint.replication_id, checkpoint.offset)
                        .map(|position| (position, LeftPart::Stream { db: checkpoint.db }))
                }
                (None, None) => Err("there is no place to go on from"),
            };
            match fitting.and_then(|(position, part)| {
                let stream_at = recovered.stream_at.ok_or(INCOMPLETE)?;
                Ok(Left { origin: recovered.origin.clone(), stream_at, position, part })
            }) {
                Ok(left) => {
                    let Recovered { from, end, .. } = recovered;
                    tracing::info!(%shard, position = left.position, from, end, "going on with the spool that an earlier run left");
                    return (writer, reader, Some(left));
                }
                Err(why) => why,
            }
        }
    };
    if loading.is_some() {
        tracing::warn!(%shard, why, "an earlier run was in the middle of the full sync: copying anew");
    } else {
        tracing::debug!(%shard, why, "what follows is asked of the source");
    }
    let (writer, reader) = spool::spool(limits);
    (writer, reader, None)
}

/// A file holds the rest by itself.
fn open_on_file(
    limits: SpoolLimits,
    file: &SourceFile,
    loading: Option<Load>,
) -> (SpoolWriter, SpoolReader, Option<Left>) {
    let Some(load) = loading else {
        let (writer, reader) = spool::spool(limits);
        return (writer, reader, None);
    };
    let (origin, position) = (origin(file), load.waypoint.position);
    tracing::info!(file = %file.uri, position, "going on with the file where an earlier run stopped");
    let (writer, reader) = spool::spool_from(limits, (file.fingerprint(), origin.clone()), position);
    let left = Left { origin, stream_at: file.size, position, part: LeftPart::Snapshot(load) };
    (writer, reader, Some(left))
}

const INCOMPLETE: &str = "the end of the RDB had not arrived";

/// An RDB cannot be asked for from its middle: all of the rest must be there.
fn in_snapshot(recovered: &Recovered, load: &Load) -> Result<(u64, LeftPart), &'static str> {
    let position = load.waypoint.position;
    let stream_at = recovered.stream_at.ok_or(INCOMPLETE)?;
    if recovered.history != load.spool || !recovered.snapshot {
        return Err("its spool is of another full sync than the target");
    }
    if recovered.origin.is_unnamed() {
        return Err("the source did not tell which history it sent, and could not go on behind it");
    }
    // `recover` leaves nothing whose end lies before that of the RDB.
    if position > stream_at || recovered.end < stream_at {
        return Err(INCOMPLETE);
    }
    if position < recovered.from {
        return Err("its spool begins behind what the target has");
    }
    Ok((position, LeftPart::Snapshot(*load)))
}

fn in_stream(recovered: &Recovered, replication_id: &str, offset: i64) -> Result<u64, &'static str> {
    if recovered.origin.replication_id != replication_id || recovered.origin.is_unnamed() {
        return Err("its spool is of another history than the target");
    }
    recovered.position_of(offset).ok_or("its spool does not hold the place that the target has reached")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rdb::Waypoint;
    use crate::version::Flavor;

    fn recovered() -> Recovered {
        Recovered {
            history: 7,
            origin: Origin { replication_id: "a".repeat(40), offset: 500 },
            snapshot: true,
            stream_at: Some(10_000),
            from: 4_000,
            end: 12_000,
        }
    }

    fn load(position: u64) -> Load {
        let waypoint = Waypoint { position, flavor: Flavor::Redis, version: 10, db: 0 };
        Load { spool: 7, waypoint, crc: 1, stream_db: 0, keys: 0, keys_total: 0 }
    }

    #[test]
    fn a_spool_goes_on_with_the_rdb_only_where_it_has_all_the_rest_of_the_same_one() {
        let fits = |recovered: &Recovered, position| in_snapshot(recovered, &load(position)).is_ok();
        assert!(fits(&recovered(), 4_000) && fits(&recovered(), 10_000));
        assert!(!fits(&recovered(), 3_999) && !fits(&recovered(), 10_001));
        for other in [
            Recovered { history: 8, ..recovered() },
            Recovered { snapshot: false, ..recovered() },
            Recovered { stream_at: None, ..recovered() },
            Recovered { end: 9_999, ..recovered() },
            Recovered { origin: Origin::unnamed(), ..recovered() },
        ] {
            assert!(!fits(&other, 5_000), "{other:?}");
        }
    }

    #[test]
    fn a_spool_goes_on_in_the_stream_of_the_same_history_between_its_ends() {
        let id = "a".repeat(40);
        assert_eq!(in_stream(&recovered(), &id, 500), Ok(10_000));
        assert_eq!(in_stream(&recovered(), &id, 2_500), Ok(12_000));
        for (id, offset) in [(&id, 499), (&id, 2_501), (&"b".repeat(40), 500)] {
            assert!(in_stream(&recovered(), id, offset).is_err());
        }
        let unnamed = Recovered { origin: Origin { offset: 500, ..Origin::unnamed() }, ..recovered() };
        assert!(in_stream(&unnamed, "?", 500).is_err());
    }
}
