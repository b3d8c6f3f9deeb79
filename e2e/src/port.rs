//! Ports for servers: below the range that outgoing connections take theirs from, and with the
//! cluster bus port (10,000 higher) free too.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Result, bail};

const FIRST: u16 = 11_000;
const COUNT: u16 = 11_000;

static NEXT: AtomicU16 = AtomicU16::new(0);

/// A port that nobody listens on now. Another process may still be quicker: callers that find it
/// taken ask for the next one.
pub fn free() -> Result<u16> {
    // Processes start at different places, so that those running side by side rarely meet.
    let start = (std::process::id() % u32::from(COUNT)) as u16;
    for _ in 0..COUNT {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = FIRST + ((u32::from(start) * 37 + u32::from(step)) % u32::from(COUNT)) as u16;
        let free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if free(port) && free(port + 10_000) {
            return Ok(port);
        }
    }
    bail!("no free port from {FIRST} to {}", FIRST + COUNT)
}
