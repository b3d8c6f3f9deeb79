//! Where the programs of a control plane are: e2e/setup.sh builds one binary that is all of them.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    Etcd,
    ApiServer,
    Controllers,
    Kubectl,
    Helm,
}

impl Program {
    pub fn name(self) -> &'static str {
        match self {
            Program::Etcd => "etcd",
            Program::ApiServer => "kube-apiserver",
            Program::Controllers => "kube-controller-manager",
            Program::Kubectl => "kubectl",
            Program::Helm => "helm",
        }
    }

    /// The executable: of `KUBEBUILDER_ASSETS`, if that is set and has it, or else ours.
    pub fn file(self) -> Result<PathBuf> {
        Ok(self.find()?.0)
    }

    /// Arguments that go before all others.
    pub fn words(self) -> Vec<&'static str> {
        match self.find() {
            Ok((_, true)) => vec![self.name()],
            _ => Vec::new(),
        }
    }

    /// The file, and whether it must be told which program to be.
    fn find(self) -> Result<(PathBuf, bool)> {
        if let Some(assets) = std::env::var_os("KUBEBUILDER_ASSETS") {
            let file = Path::new(&assets).join(self.name());
            if file.exists() {
                return Ok((file, false));
            }
        }
        let cache = std::env::var_os("REDIS_MIGRATION_CACHE")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache"), PathBuf::from);
        let name = if self == Program::Helm { "helm" } else { "controlplane" };
        let file = cache.join("bin").join(name);
        ensure!(file.exists(), "{} is missing: run `make setup`", file.display());
        Ok((file, name == "controlplane"))
    }
}
