//! Ends the servers when the process that started them is killed and runs no destructors: a shell
//! holds the other end of a pipe, and acts when that closes.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock};

/// A process is ended only if its command line still names the port, as its id may be another's by then.
const SCRIPT: &str = r#"
trap '' INT TERM HUP
list=()
while read -r line; do list+=("$line"); done
for line in "${list[@]}"; do
    read -r pid port folder <<<"$line"
    if tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q ":$port\b"; then
        kill -9 "$pid"
    fi
    case $folder in */redis-migration-e2e-*) rm -rf -- "$folder" ;; esac
done
"#;

static PIPE: OnceLock<Option<Mutex<ChildStdin>>> = OnceLock::new();

/// The server with this process id and port, and its folder, are to go with us, however we end.
pub fn watch(pid: u32, port: u16, folder: &Path) {
    let pipe = PIPE.get_or_init(|| {
        let shell = Command::new("bash")
            .args(["-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn();
        shell.ok().and_then(|mut child| child.stdin.take()).map(Mutex::new)
    });
    if let Some(Ok(mut pipe)) = pipe.as_ref().map(Mutex::lock) {
        // Without the shell only a killed run leaves servers behind; that is no reason to fail.
        let _ = writeln!(pipe, "{pid} {port} {}", folder.display());
    }
}
