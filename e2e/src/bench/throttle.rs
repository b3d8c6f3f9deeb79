//! A slow network to a target: a proxy that lets only so many bytes a second through towards it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Small, so that the rate holds over short times too; the kernel's socket buffers come on top.
const CHUNK: usize = 16 * 1024;

/// A listening proxy. Its threads end with their connections, and with the process.
pub struct Throttle {
    port: u16,
}

impl Throttle {
    /// Forwards to 127.0.0.1:`target`, all connections together at `bytes_per_second` towards it.
    pub fn start(target: u16, bytes_per_second: f64) -> Result<Throttle> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let pace = Arc::new(Mutex::new(Pace { free_at: Instant::now(), bytes_per_second }));
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                // A target that is gone shows at the tool as a closed connection.
                let Ok(far) = TcpStream::connect((Ipv4Addr::LOCALHOST, target)) else { continue };
                let (Ok(near_copy), Ok(far_copy)) = (near.try_clone(), far.try_clone()) else { continue };
                let pace = pace.clone();
                thread::spawn(move || copy(near, far, Some(&pace)));
                thread::spawn(move || copy(far_copy, near_copy, None));
            }
        });
        Ok(Throttle { port })
    }

    pub fn port(&self) -> u16 {
        self.port
    }
}

/// When the line is free again, were every byte so far sent at the rate.
struct Pace {
    free_at: Instant,
    bytes_per_second: f64,
}

impl Pace {
    /// Takes the line for `bytes`; when they may be sent.
    fn reserve(&mut self, bytes: usize) -> Instant {
        let start = self.free_at.max(Instant::now());
        self.free_at = start + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second);
        self.free_at
    }
}

fn copy(mut from: TcpStream, mut to: TcpStream, pace: Option<&Mutex<Pace>>) {
    let _ = to.set_nodelay(true);
    let mut chunk = vec![0; CHUNK];
    while let Ok(read @ 1..) = from.read(&mut chunk) {
        if let Some(pace) = pace {
            let at = pace.lock().unwrap_or_else(PoisonError::into_inner).reserve(read);
            thread::sleep(at.saturating_duration_since(Instant::now()));
        }
        if to.write_all(chunk.get(..read).unwrap_or_default()).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
