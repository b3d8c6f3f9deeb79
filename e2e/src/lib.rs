//! Real servers, workloads and independent comparison for the tests, the demo and the benchmarks.
//!
//! Nothing here uses the engine: what a migration did is read back through the `redis` crate with
//! ordinary commands, so that the engine's own verifier is checked too.

/// The words of a command as byte slices, whatever each of them is made from.
///
/// The array borrows temporaries: use it inside the call that takes it.
#[macro_export]
macro_rules! args {
    ($($word:expr),* $(,)?) => { &[$(AsRef::<[u8]>::as_ref(&$word)),*] };
}

pub mod chaos;
pub mod client;
pub mod cluster;
pub mod compare;
pub mod controlplane;
pub mod dataset;
pub mod fault_proxy;
pub mod load;
pub mod manifest;
pub mod operator;
pub mod proxy;
pub mod scenario;
pub mod sentinel;
pub mod server;
pub mod tls;
pub mod tool;
pub mod version;

mod port;
mod reaper;

pub use client::{Batch, Client, Conn, Endpoint};
pub use cluster::Cluster;
pub use controlplane::{ControlPlane, Kubelet};
pub use fault_proxy::{Fault, FaultProxy};
pub use manifest::Manifest;
pub use operator::{Migration, Operator};
pub use proxy::Proxy;
pub use sentinel::Sentinels;
pub use server::{Options, Server};
pub use tool::Tool;
pub use version::Version;

use std::time::{Duration, Instant};

/// Asks again every few milliseconds until there is an answer; an error names what was waited for.
pub fn wait_until<T>(
    what: &str,
    timeout: Duration,
    mut ask: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        let last = match ask() {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => String::from("not yet"),
            Err(error) => format!("{error:#}"),
        };
        if start.elapsed() > timeout {
            anyhow::bail!("{what}: not within {timeout:?} (last: {last})");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
