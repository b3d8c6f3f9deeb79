//! A TCP proxy between two parties that can cut, stall and refuse.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use anyhow::Result;

/// Forwards connections until it is dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    upstream: String,
    refuse: AtomicBool,
    ended: AtomicBool,
    stalled: (Mutex<bool>, Condvar),
    streams: Mutex<Vec<TcpStream>>,
    forwarded: AtomicU64,
}

impl Proxy {
    pub fn start(upstream: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            refuse: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            stalled: (Mutex::new(false), Condvar::new()),
            streams: Mutex::default(),
            forwarded: AtomicU64::new(0),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if accepting.ended.load(SeqCst) {
                    return;
                }
                if !accepting.refuse.load(SeqCst) {
                    // The upstream being down looks to the client as it does without a proxy: closed.
                    let _ = accepting.forward(client);
                }
            }
        });
        Ok(Self { address, shared })
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Breaks all connections that there are now.
    pub fn cut(&self) {
        let mut streams = self.shared.streams.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Holds back everything, connections staying open, until called with `false`.
    pub fn stall(&self, stalled: bool) {
        let (lock, changed) = &self.shared.stalled;
        *lock.lock().unwrap_or_else(PoisonError::into_inner) = stalled;
        changed.notify_all();
    }

    /// New connections are closed at once while this holds.
    pub fn refuse(&self, refuse: bool) {
        self.shared.refuse.store(refuse, SeqCst);
    }

    /// Bytes from the upstream to its clients so far.
    pub fn forwarded(&self) -> u64 {
        self.shared.forwarded.load(SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, SeqCst);
        self.stall(false);
        self.cut();
        // Wakes the accepting thread, which then sees that it has ended.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn forward(self: &Arc<Self>, client: TcpStream) -> Result<()> {
        let upstream = TcpStream::connect(&self.upstream)?;
        client.set_nodelay(true)?;
        upstream.set_nodelay(true)?;
        {
            let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
            streams.extend([client.try_clone()?, upstream.try_clone()?]);
        }
        let (down, up) = (Arc::clone(self), Arc::clone(self));
        let (client_writer, upstream_writer) = (client.try_clone()?, upstream.try_clone()?);
        thread::spawn(move || down.copy(upstream, client_writer, true));
        thread::spawn(move || up.copy(client, upstream_writer, false));
        Ok(())
    }

    fn copy(&self, mut from: TcpStream, mut to: TcpStream, count: bool) {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            let (lock, changed) = &self.stalled;
            let mut stalled = lock.lock().unwrap_or_else(PoisonError::into_inner);
            while *stalled {
                stalled = changed.wait(stalled).unwrap_or_else(PoisonError::into_inner);
            }
            drop(stalled);
            if to.write_all(buffer.get(..n).unwrap_or_default()).is_err() {
                break;
            }
            if count {
                self.forwarded.fetch_add(n as u64, SeqCst);
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}
