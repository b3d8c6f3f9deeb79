//! A TCP proxy before a source that damages the RDB on its way to the replica.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::Result;

/// What happens to an RDB. Positions count from its first byte.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The bits of this mask are turned over.
    Flip { at: u64, mask: u8 },
    /// These bytes are left out, and the rest follows.
    Remove { at: u64, bytes: u64 },
    /// The connection ends here.
    Cut { at: u64 },
    /// These bytes stand instead of those behind the first occurrence of the marker.
    Behind { marker: &'static [u8], bytes: Vec<u8> },
}

/// Forwards connections until it is dropped.
pub struct FaultProxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    upstream: String,
    fault: Fault,
    /// RDBs that are still to be damaged.
    left: AtomicU64,
    damaged: AtomicU64,
    ended: AtomicBool,
    streams: Mutex<Vec<TcpStream>>,
}

impl FaultProxy {
    /// Damages the first `times` RDBs.
    pub fn start(upstream: &str, fault: Fault, times: u64) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: upstream.to_owned(),
            fault,
            left: AtomicU64::new(times),
            damaged: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            streams: Mutex::default(),
        });
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if accepting.ended.load(SeqCst) {
                    return;
                }
                // The upstream being down looks to the client as it does without a proxy: closed.
                let _ = accepting.forward(client);
            }
        });
        Ok(Self { address, shared })
    }

    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// RDBs that a fault has reached so far.
    pub fn damaged(&self) -> u64 {
        self.shared.damaged.load(SeqCst)
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, SeqCst);
        for stream in self.shared.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
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
        let (mut up_from, mut up_to) = (client.try_clone()?, upstream.try_clone()?);
        thread::spawn(move || {
            let _ = std::io::copy(&mut up_from, &mut up_to);
            let _ = up_to.shutdown(Shutdown::Both);
        });
        let shared = Arc::clone(self);
        thread::spawn(move || {
            let _ = shared.pass_down(&upstream, &client);
            let _ = upstream.shutdown(Shutdown::Both);
            let _ = client.shutdown(Shutdown::Both);
        });
        Ok(())
    }

    /// From the source to the replica.
    fn pass_down(&self, mut from: &TcpStream, mut to: &TcpStream) -> std::io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        // Replies before the RDB; the last of them may be split over reads.
        let mut head = Some(Vec::new());
        let mut rdb: Option<Damage> = None;
        loop {
            let count = from.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            let mut bytes = buffer.get(..count).unwrap_or_default().to_vec();
            if let Some(seen) = &mut head {
                let known = seen.len();
                seen.extend_from_slice(&bytes);
                if let Some(start) = rdb_start(seen) {
                    let body = bytes.split_off(start - known);
                    to.write_all(&bytes)?;
                    bytes = body;
                    head = None;
                    let take = self.left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok();
                    rdb = take.then(|| Damage {
                        fault: self.fault.clone(),
                        position: 0,
                        tail: Vec::new(),
                        done: false,
                    });
                }
            }
            if let Some(damage) = &mut rdb {
                let was_done = damage.done;
                let goes_on = damage.inflict(&mut bytes);
                self.damaged.fetch_add(u64::from(damage.done && !was_done), SeqCst);
                to.write_all(&bytes)?;
                if !goes_on {
                    return Ok(());
                }
            } else {
                to.write_all(&bytes)?;
            }
        }
    }
}

/// Where the RDB starts, once all before it is there.
fn rdb_start(seen: &[u8]) -> Option<usize> {
    let find = |from: usize, what: &[u8]| {
        let rest = seen.get(from..)?;
        rest.windows(what.len()).position(|window| window == what).map(|at| from + at)
    };
    let line_end = find(find(0, b"+FULLRESYNC")?, b"\r\n")? + 2;
    let length = find(line_end, b"$")?;
    Some(find(length, b"\n")? + 1)
}

/// One RDB on its way.
struct Damage {
    fault: Fault,
    position: u64,
    /// The last bytes seen, in which a marker may begin.
    tail: Vec<u8>,
    done: bool,
}

impl Damage {
    /// False when the connection is to end behind these bytes.
    fn inflict(&mut self, bytes: &mut Vec<u8>) -> bool {
        let (start, end) = (self.position, self.position + bytes.len() as u64);
        self.position = end;
        if self.done {
            return true;
        }
        match &mut self.fault {
            Fault::Flip { at, mask } if (start..end).contains(at) => {
                if let Some(byte) = bytes.get_mut((*at - start) as usize) {
                    *byte ^= *mask;
                }
                self.done = true;
            }
            Fault::Cut { at } if (start..end).contains(at) => {
                bytes.truncate((*at - start) as usize);
                self.done = true;
                return false;
            }
            Fault::Remove { at, bytes: count } if (start..end).contains(at) => {
                let from = (*at - start) as usize;
                let gone = (*count).min(end - *at);
                bytes.drain(from..from + gone as usize);
                *count -= gone;
                *at += gone;
                self.done = *count == 0;
            }
            Fault::Behind { marker, bytes: instead } => {
                let known = self.tail.len();
                self.tail.extend_from_slice(bytes);
                let found = self.tail.windows(marker.len()).position(|window| window == *marker);
                match found {
                    Some(at) => {
                        let from = (at + marker.len()).saturating_sub(known);
                        for (byte, other) in bytes.iter_mut().skip(from).zip(instead.iter()) {
                            *byte = *other;
                        }
                        self.done = true;
                    }
                    None => drop(self.tail.drain(..self.tail.len().saturating_sub(marker.len() - 1))),
                }
            }
            _ => {}
        }
        true
    }
}
