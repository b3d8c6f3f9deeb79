//! Paths in a RedisMigration are those of the operator's own Pod, and not everybody who may create one may read and
//! write there (PURE).

use std::path::{Component, Path, PathBuf};

use crate::api::Plan;
use crate::api::plan::{SourcePlan, SpecFault, TargetPlace};
use crate::object::FileUri;

/// The folder in which paths must lie; `None`: none is allowed.
#[derive(Clone, Debug, Default)]
pub struct AllowedFiles(pub Option<PathBuf>);

impl AllowedFiles {
    /// What there is to say against the plan.
    pub fn faults(&self, plan: &Plan) -> Vec<SpecFault> {
        let mut faults = Vec::new();
        if let SourcePlan::RdbFile(files) = &plan.source {
            for (index, uri) in files.uris.iter().enumerate() {
                faults.extend(self.fault(&format!("spec.source.rdbFile.uris[{index}]"), uri));
            }
        }
        let written = match &plan.target.place {
            TargetPlace::Redis(_) => None,
            TargetPlace::RdbFile(files) => Some(("spec.target.rdbFile.uri", files)),
            TargetPlace::Json(files) => Some(("spec.target.json.uri", files)),
        };
        if let Some((path, files)) = written
            && let Ok(uri) = FileUri::parse(&files.uri)
        {
            faults.extend(self.fault(path, &uri));
        }
        faults
    }

    fn fault(&self, path: &str, uri: &FileUri) -> Option<SpecFault> {
        let FileUri::Local(file) = uri else { return None };
        let message = match &self.0 {
            None => "is a path, and this operator was given no folder for files (--allow-files, in the chart files.volume); allowed: s3://, gs:// or az://, as source also http:// or https://".to_owned(),
            Some(folder) if is_within(folder, file) => return None,
            Some(folder) => format!(
                "is outside of the folder that this operator has for files; allowed: absolute paths in {}, without \"..\"",
                folder.display()
            ),
        };
        Some(SpecFault { path: path.to_owned(), message, secret_missing: false })
    }
}

/// By its text: who can make links in the folder could as well put the files there.
fn is_within(folder: &Path, file: &str) -> bool {
    let file = Path::new(file);
    // Of patterns only those that begin with a dot stand for "..", too.
    let dotted = |name: &str| name.starts_with('.') && name.contains(['*', '?', '[']);
    let plain = |part: Component| match part {
        Component::RootDir => true,
        Component::Normal(name) => !dotted(&name.to_string_lossy()),
        _ => false,
    };
    file.is_absolute()
        && file.components().all(plain)
        && file.strip_prefix(folder).is_ok_and(|rest| rest != "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_in_the_folder_are_allowed() {
        let fault = |folder: Option<&str>, uri: &str| {
            let allowed = AllowedFiles(folder.map(PathBuf::from));
            allowed.fault("p", &FileUri::parse(uri).unwrap()).map(|fault| fault.message)
        };
        for uri in
            ["/files/a.rdb", "file:///files/x/{shard}.rdb", "/files/*/dump.rdb", "/files//a", "/files/..a"]
        {
            assert_eq!(fault(Some("/files"), uri), None, "{uri}");
            assert!(fault(None, uri).unwrap().contains("--allow-files"));
        }
        for uri in [
            "/filesystem/a",
            "/files",
            "/files/",
            "/files/../etc/passwd",
            "/files/x/../../y",
            "/files/.?/etc/dump.rdb",
            "/files/x/.*/dump.rdb",
            "/files/.[.]/dump.rdb",
            "a.rdb",
            "files/a",
        ] {
            assert!(fault(Some("/files"), uri).unwrap().contains("/files, without"), "{uri}");
        }
        assert_eq!(fault(None, "s3://bucket/key"), None);
        assert_eq!(fault(None, "https://host/file"), None);
    }
}
