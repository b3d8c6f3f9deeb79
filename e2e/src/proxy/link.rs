//! One connection through the proxy.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Result;

use super::{Shared, Way};

/// How often a connection with a limit passes on its share.
const SHARE: Duration = Duration::from_millis(50);

pub(super) struct Link {
    client: TcpStream,
    upstream: TcpStream,
    frozen: AtomicBool,
    closed: AtomicBool,
}

impl Link {
    pub fn freeze(&self) {
        self.frozen.store(true, SeqCst);
    }

    pub fn close(&self) {
        self.closed.store(true, SeqCst);
        let _ = self.client.shutdown(Shutdown::Both);
        let _ = self.upstream.shutdown(Shutdown::Both);
    }

    fn is_held(&self) -> bool {
        self.frozen.load(SeqCst) && !self.closed.load(SeqCst)
    }
}

/// Two threads copy until either end closes, or the proxy breaks the connection.
pub(super) fn open(shared: &Arc<Shared>, client: TcpStream) -> Result<()> {
    let upstream = TcpStream::connect(&shared.upstream)?;
    client.set_nodelay(true)?;
    upstream.set_nodelay(true)?;
    let pairs = [
        (client.try_clone()?, upstream.try_clone()?, Way::Up),
        (upstream.try_clone()?, client.try_clone()?, Way::Down),
    ];
    let link =
        Arc::new(Link { client, upstream, frozen: AtomicBool::new(false), closed: AtomicBool::new(false) });
    let mut links = shared.links();
    links.retain(|link| !link.closed.load(SeqCst));
    links.push(Arc::clone(&link));
    drop(links);
    for (from, to, way) in pairs {
        let (shared, link) = (Arc::clone(shared), Arc::clone(&link));
        thread::spawn(move || {
            copy(&shared, &link, way, from, to);
            // The other party of a frozen connection does not learn that this one has gone.
            let control = shared.control.lock().unwrap_or_else(PoisonError::into_inner);
            drop(shared.changed.wait_while(control, |_| link.is_held()));
            link.close();
        });
    }
    Ok(())
}

fn copy(shared: &Shared, link: &Link, way: Way, mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let mut rest = buffer.get(..n).unwrap_or_default();
        if way == Way::Up {
            shared.look_out(rest);
        }
        while !rest.is_empty() {
            let (count, fused) = admit(shared, link, way, rest.len());
            let (piece, later) = rest.split_at(count);
            if link.closed.load(SeqCst) || to.write_all(piece).is_err() {
                return;
            }
            if way == Way::Down {
                shared.forwarded.fetch_add(count as u64, SeqCst);
            }
            if fused {
                shared.cut();
                return;
            }
            rest = later;
        }
    }
}

/// Waits until something may pass: how many bytes, at most `wanted`, and whether these are the last.
fn admit(shared: &Shared, link: &Link, way: Way, wanted: usize) -> (usize, bool) {
    let mut control = shared.control.lock().unwrap_or_else(PoisonError::into_inner);
    let mut paid = false;
    loop {
        if link.closed.load(SeqCst) {
            return (wanted, false);
        }
        if control.stalled[way as usize] || link.is_held() {
            control = shared.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let mut count = wanted;
        if let Some(limit) = control.limit {
            // Each share is waited for, and a change of the limit is heeded at once.
            if !paid {
                let waited = shared.changed.wait_timeout(control, SHARE);
                control = waited.unwrap_or_else(PoisonError::into_inner).0;
                paid = true;
                continue;
            }
            let share = limit * SHARE.as_millis() as u64 / 1000;
            count = count.min(usize::try_from(share).unwrap_or(usize::MAX).max(1));
        }
        let fuse = &mut control.fuses[way as usize];
        let Some(left) = *fuse else { return (count, false) };
        if let Ok(left) = usize::try_from(left)
            && left <= count
        {
            *fuse = None;
            return (left, true);
        }
        *fuse = Some(left - count as u64);
        return (count, false);
    }
}
