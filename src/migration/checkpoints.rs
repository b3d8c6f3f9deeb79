//! Where a stopped migration goes on: one small file in the data directory, replaced as a whole.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::MigrationError;
use super::identity::KnownShard;
use crate::api::conditions::reason;
use crate::api::plan::{CopiedBy, Delivery};
use crate::api::status::ShardStatus;
use crate::api::{Plan, Status};
use crate::slot::SlotRanges;
use crate::worker::Checkpoint;

/// What an earlier run of the same migration left.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Checkpoints {
    /// It began to write: keys on the target are its own. Written before the first key, so that a run
    /// that was killed is known, too.
    pub begun: bool,
    /// Where it stopped, by shard id; empty when it did not stop in an orderly way.
    pub shards: BTreeMap<String, Checkpoint>,
    /// Which shards there are, so that each keeps its id through failovers.
    pub known: Vec<KnownShard>,
    /// What each shard set aside, by the kinds' names: the target lacks it until the shard is copied anew.
    pub set_aside: SetAside,
    /// By which it was copied; empty when an earlier version wrote this.
    pub copied_by: CopiedBy,
}

/// By shard id, then by kind.
pub type SetAside = BTreeMap<String, BTreeMap<String, i64>>;

impl Checkpoints {
    /// Of a run that has not stopped.
    pub fn begun(plan: &Plan, known: Vec<KnownShard>, set_aside: SetAside) -> Self {
        let copied_by = plan.copied_by.clone();
        Self { begun: true, shards: BTreeMap::new(), known, set_aside, copied_by }
    }

    /// What is on the target must not be gone on with by other rules.
    pub fn goes_on_with(&self, plan: &Plan) -> Result<(), MigrationError> {
        if self.begun { goes_on(&self.copied_by, plan) } else { Ok(()) }
    }

    /// Takes in what an earlier run told, which may have been another process's and later than this one's.
    pub fn learn(&mut self, told: &Status, delivery: Delivery) {
        if delivery == Delivery::ExactlyOnce {
            // The target itself tells, and its word counts.
            self.known.clear();
            return;
        }
        self.begun |= !told.shards.is_empty();
        for shard in &told.shards {
            let outdated = |own: &Checkpoint| {
                own.replication_id != shard.replication_id || own.offset < shard.applied_offset
            };
            if self.shards.get(&shard.id).is_some_and(outdated) {
                self.shards.remove(&shard.id);
            }
        }
        let known: Vec<KnownShard> = told.shards.iter().filter_map(|shard| self.known_as(shard)).collect();
        if !known.is_empty() {
            self.known = known;
        }
    }

    /// `None`: without a cluster there is nothing to recognise it by.
    fn known_as(&self, shard: &ShardStatus) -> Option<KnownShard> {
        let slots: SlotRanges = shard.slots.parse().ok()?;
        let lowest = slots.iter().next()?;
        let own = self.known.iter().find(|known| known.id == shard.id);
        let lineage = own.map_or_else(|| lowest.to_string(), |own| own.lineage.clone());
        Some(KnownShard { id: shard.id.clone(), lineage, slots })
    }
}

/// `copied_by`: what the target has.
pub fn goes_on(copied_by: &CopiedBy, plan: &Plan) -> Result<(), MigrationError> {
    let Some(changed) = plan.copied_by.changed_since(copied_by) else { return Ok(()) };
    Err(MigrationError {
        reason: reason::INVALID_SPEC,
        message: format!(
            "{changed} changed after copying had begun, and the target would hold a mixture: put it back, or begin anew with an empty target and another name"
        ),
        transient: false,
    })
}

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot read the checkpoint {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("the checkpoint {} cannot be understood ({source}); remove it to start with a full sync", path.display())]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("cannot write the checkpoint {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

fn path(data_dir: &Path, uid: &str) -> PathBuf {
    data_dir.join(format!("{uid}.checkpoint.json"))
}

/// As if nothing had begun when there is none.
pub fn load(data_dir: &Path, uid: &str) -> Result<Checkpoints, CheckpointError> {
    let path = path(data_dir, uid);
    match std::fs::read(&path) {
        Ok(bytes) => {
            serde_json::from_slice(&bytes).map_err(|source| CheckpointError::Damaged { path, source })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Checkpoints::default()),
        Err(source) => Err(CheckpointError::Read { path, source }),
    }
}

/// Takes the checkpoint away: the migration is over.
pub fn clear(data_dir: &Path, uid: &str) -> Result<(), CheckpointError> {
    let path = path(data_dir, uid);
    match std::fs::remove_file(&path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(CheckpointError::Write { path, source }),
    }
}

/// Written beside and moved over, so that a crash leaves the old one or the new one.
pub fn save(data_dir: &Path, uid: &str, checkpoints: &Checkpoints) -> Result<(), CheckpointError> {
    let path = path(data_dir, uid);
    let beside = path.with_extension("json.new");
    let written = serde_json::to_vec_pretty(checkpoints).map_err(io::Error::other).and_then(|bytes| {
        std::fs::create_dir_all(data_dir)?;
        let mut file = std::fs::File::create(&beside)?;
        io::Write::write_all(&mut file, &bytes)?;
        file.sync_all()?;
        std::fs::rename(&beside, &path)
    });
    written.map_err(|source| CheckpointError::Write { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded_and_can_be_cleared() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        assert!(load(&data, "a.b").unwrap() == Checkpoints::default());
        let checkpoint = Checkpoint { replication_id: "f".repeat(40), offset: 77, db: 3 };
        let shards = BTreeMap::from([("10.0.0.1:6379".to_owned(), checkpoint)]);
        let known = vec![KnownShard {
            id: "10.0.0.1:6379".to_owned(),
            lineage: "0".to_owned(),
            slots: "0-99".parse().unwrap(),
        }];
        let set_aside = SetAside::from([("10.0.0.1:6379".to_owned(), [("Commands".to_owned(), 2)].into())]);
        let copied_by = serde_json::from_str(r#"{"spec.filter": "77"}"#).unwrap();
        let all = Checkpoints { begun: true, shards, known, set_aside, copied_by };
        save(&data, "a.b", &all).unwrap();
        assert_eq!(load(&data, "a.b").unwrap(), all);
        // As an earlier version wrote it.
        std::fs::write(path(&data, "a.b"), r#"{"begun":true,"shards":{}}"#).unwrap();
        assert_eq!(load(&data, "a.b").unwrap(), Checkpoints { begun: true, ..Checkpoints::default() });
        clear(&data, "a.b").unwrap();
        clear(&data, "a.b").unwrap();
        assert!(load(&data, "a.b").unwrap() == Checkpoints::default());
        std::fs::write(path(&data, "a.b"), "{").unwrap();
        assert!(matches!(load(&data, "a.b"), Err(CheckpointError::Damaged { .. })));
    }
}
