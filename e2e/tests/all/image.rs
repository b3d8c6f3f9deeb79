//! The Dockerfile, built by buildah without a registry: on a base of this machine's own libraries, with
//! the binary under test. The stage that compiles is the same command as `cargo build`, and not run here.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

/// Images and containers of one test.
struct Store {
    folder: TempDir,
}

impl Store {
    fn new() -> Result<Self> {
        let found = Command::new("buildah").arg("--version").output();
        ensure!(found.is_ok(), "buildah is missing: run `make setup`");
        let user = Command::new("id").arg("-u").output()?;
        ensure!(user.stdout == b"0\n", "this test mounts and changes its root: run it as root");
        let folder = tempfile::tempdir()?;
        // Nothing of the machine's own: neither its registries nor its policy.
        std::fs::write(
            folder.path().join("policy.json"),
            r#"{"default": [{"type": "insecureAcceptAnything"}]}"#,
        )?;
        std::fs::write(folder.path().join("registries.conf"), "unqualified-search-registries = []\n")?;
        Ok(Self { folder })
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        let folder = self.folder.path();
        let at = |name: &str| folder.join(name).display().to_string();
        let output = Command::new("buildah")
            .args(["--storage-driver", "vfs", "--root", &at("root"), "--runroot", &at("run")])
            .args(["--registries-conf", &at("registries.conf")])
            .args(arguments)
            .env("BUILDAH_ISOLATION", "chroot")
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "buildah {arguments:?}: {said}");
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// An image of these files, by their paths in it, and nothing else.
    fn image(&self, name: &str, files: &[(&Path, &str)]) -> Result<()> {
        let container = self.run(&["from", "--name", name, "scratch"])?;
        for (file, place) in files {
            self.run(&["copy", &container, &file.display().to_string(), place])?;
        }
        self.run(&["commit", "--signature-policy", &self.policy(), &container, name])?;
        Ok(())
    }

    fn policy(&self) -> String {
        self.folder.path().join("policy.json").display().to_string()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Mounts would keep the folder.
        let _ = self.run(&["rm", "--all"]);
    }
}

/// The libraries that the binary is linked to, as the loader finds them.
fn libraries(binary: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(binary).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found = text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect();
    Ok(found)
}

#[test]
fn the_image_runs_without_root_and_without_writing() -> Result<()> {
    let store = Store::new()?;
    let binary = e2e::tool::binary()?;
    let stripped = store.folder.path().join("redis-migration");
    let strip = Command::new("strip").arg("-o").arg(&stripped).arg(&binary).status()?;
    ensure!(strip.success(), "strip");
    let libraries = libraries(&binary)?;
    ensure!(libraries.iter().any(|library| library.contains("libc.so")), "{libraries:?}");
    let base: Vec<(&Path, &str)> =
        libraries.iter().map(|library| (Path::new(library.as_str()), library.as_str())).collect();
    store.image("base", &base)?;
    store.image("binary", &[(&stripped, "/src/target/release/redis-migration")])?;

    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").display().to_string();
    let words = [
        "bud",
        "--isolation",
        "chroot",
        "--pull-never",
        "--layers=false",
        "--signature-policy",
        &store.policy(),
        "--build-arg",
        "BUILDER=localhost/base",
        "--build-arg",
        "RUNTIME=localhost/base",
        "--build-arg",
        "BINARY=localhost/binary",
        "--tag",
        "redis-migration",
        &repository,
    ]
    .map(str::to_owned);
    store.run(&words.iter().map(String::as_str).collect::<Vec<_>>())?;

    let about = store.run(&["inspect", "--type", "image", "redis-migration"])?;
    let about: serde_json::Value = serde_json::from_str(&about)?;
    let config = &about["OCIv1"]["config"];
    assert_eq!(config["User"], "65532:65532");
    assert_eq!(config["Entrypoint"], serde_json::json!(["/usr/local/bin/redis-migration"]));
    ensure!(config["ExposedPorts"]["9320/tcp"].is_object(), "{config}");

    // As the chart runs it: that user, and nothing that could be written.
    let container = store.run(&["from", "--pull-never", "redis-migration"])?;
    let root = store.run(&["mount", &container])?;
    let added: Vec<String> = files(Path::new(&root))?;
    let known = |file: &String| {
        file == "/usr/local/bin/redis-migration" || libraries.iter().any(|library| library == file)
    };
    ensure!(added.iter().all(known), "more in the image than the binary and its base: {added:?}");
    let read_only = "mount --bind \"$1\" \"$1\" && mount -o remount,bind,ro \"$1\" && shift && exec chroot --userspec=65532:65532 \"$@\"";
    let run = |arguments: &[&str]| {
        Command::new("unshare")
            .args(["--mount", "sh", "-c", read_only, "sh", &root, &root, "/usr/local/bin/redis-migration"])
            .args(arguments)
            .output()
    };
    let definition = run(&["crd"])?;
    let committed = std::fs::read(Path::new(&repository).join("crds/redismigrations.yaml"))?;
    ensure!(definition.status.success(), "{}", String::from_utf8_lossy(&definition.stderr));
    ensure!(definition.stdout == committed, "not the committed definition: is the binary an old one?");
    let version = String::from_utf8(run(&["--version"])?.stdout)?;
    ensure!(version.starts_with("redis-migration "), "{version}");
    Ok(())
}

/// Nothing of the build context goes into the image but the binary; what is large is not even sent.
#[test]
fn the_context_leaves_out_what_is_large() -> Result<()> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let ignored = std::fs::read_to_string(repository.join(".dockerignore"))?;
    for name in ["target", ".git", ".cache"] {
        ensure!(ignored.lines().any(|line| line == name), "{name}");
    }
    // What the build needs is there.
    let manifest = std::fs::read_to_string(repository.join("Cargo.toml"))?;
    let members = manifest.lines().find(|line| line.starts_with("members")).context("members")?;
    ensure!(members.contains("e2e") && !ignored.lines().any(|line| line == "e2e"), "the workspace needs e2e");
    Ok(())
}

/// Paths of all files below a folder, from it as the root.
fn files(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                found.push(format!("/{}", entry.path().strip_prefix(root)?.display()));
            }
        }
    }
    Ok(found)
}
