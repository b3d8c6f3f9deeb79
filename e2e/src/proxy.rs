//! A TCP proxy between two parties that can cut, stall, slow down, freeze and refuse.

mod link;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::Result;

use link::Link;

/// Where bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the client to the server behind the proxy.
    Up,
    /// From that server to the client.
    Down,
}

/// Forwards connections until it is dropped.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    upstream: String,
    refuse: AtomicBool,
    ended: AtomicBool,
    control: Mutex<Control>,
    /// Tells those who wait that `control` or the state of a link is another now.
    changed: Condvar,
    links: Mutex<Vec<Arc<Link>>>,
    forwarded: AtomicU64,
    awaited: Mutex<Option<Awaited>>,
}

/// Bytes on their way up, and what is done before they go on.
struct Awaited {
    bytes: Vec<u8>,
    act: Box<dyn FnOnce() + Send>,
}

#[derive(Default)]
struct Control {
    /// Up, and down.
    stalled: [bool; 2],
    /// Bytes a second, for each connection and way.
    limit: Option<u64>,
    /// All connections break once so many more bytes went up, or down.
    fuses: [Option<u64>; 2],
}

impl Proxy {
    pub fn start(upstream: &str) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            refuse: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            control: Mutex::default(),
            changed: Condvar::new(),
            links: Mutex::default(),
            forwarded: AtomicU64::new(0),
            awaited: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if accepting.ended.load(SeqCst) {
                    return;
                }
                if !accepting.refuse.load(SeqCst) {
                    // The upstream being down looks to the client as it does without a proxy: closed.
                    let _ = link::open(&accepting, client);
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
        self.shared.cut();
    }

    /// Breaks all connections as soon as exactly so many more bytes went this way, counted over all of them.
    pub fn cut_after(&self, bytes: u64, way: Way) {
        self.shared.set(|control| control.fuses[way as usize] = Some(bytes));
    }

    /// Forgets a `cut_after` that has not happened; says whether there was one.
    pub fn defuse(&self) -> bool {
        let mut armed = false;
        self.shared.set(|control| {
            armed = control.fuses.iter().any(Option::is_some);
            control.fuses = [None; 2];
        });
        armed
    }

    /// Holds back everything, connections staying open, until called with `false`.
    pub fn stall(&self, stalled: bool) {
        self.shared.set(|control| control.stalled = [stalled; 2]);
    }

    /// Holds back what goes one way, until `stall(false)`.
    pub fn stall_way(&self, way: Way) {
        self.shared.set(|control| control.stalled[way as usize] = true);
    }

    /// Forwards so many bytes a second and no more, on each connection and in each direction.
    pub fn limit(&self, bytes_per_second: Option<u64>) {
        self.shared.set(|control| control.limit = bytes_per_second);
    }

    /// The connections that there are now pass nothing on any more, not even their end; new ones work.
    pub fn freeze(&self) {
        for link in self.shared.links().iter() {
            link.freeze();
        }
    }

    /// Once `bytes`, sent in one piece, are on their way up, `act` is done before they go on.
    pub fn before(&self, bytes: &[u8], act: impl FnOnce() + Send + 'static) {
        let awaited = Awaited { bytes: bytes.to_vec(), act: Box::new(act) };
        *self.shared.awaited.lock().unwrap_or_else(PoisonError::into_inner) = Some(awaited);
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
        self.shared.set(|control| *control = Control::default());
        self.cut();
        // Wakes the accepting thread, which then sees that it has ended.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn cut(&self) {
        let links = std::mem::take(&mut *self.links());
        links.iter().for_each(|link| link.close());
        // Those who wait hold the lock until they wait: none of them misses it.
        self.set(|_| {});
    }

    fn set(&self, change: impl FnOnce(&mut Control)) {
        change(&mut self.control.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn look_out(&self, sent: &[u8]) {
        let mut awaited = self.awaited.lock().unwrap_or_else(PoisonError::into_inner);
        let here =
            |awaited: &mut Awaited| sent.windows(awaited.bytes.len()).any(|part| part == awaited.bytes);
        let found = awaited.take_if(here);
        drop(awaited);
        if let Some(Awaited { act, .. }) = found {
            act();
        }
    }

    fn links(&self) -> MutexGuard<'_, Vec<Arc<Link>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
