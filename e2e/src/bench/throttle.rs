//! A slow network to a target: a proxy that lets only so many bytes a second through towards it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use e2e::Endpoint;

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

    /// The proxy as the target that it stands for.
    pub fn endpoint(&self) -> Endpoint {
        Endpoint { address: format!("127.0.0.1:{}", self.port), cluster: false, auth: None }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_shared_and_unused_time_is_not_saved_up() {
        let start = Instant::now();
        let mut pace = Pace { free_at: start, bytes_per_second: 1000.0 };
        let first = pace.reserve(10_000);
        let second = pace.reserve(5_000);
        assert!(first >= start + Duration::from_secs(10));
        assert_eq!(second.duration_since(first), Duration::from_secs(5));
        // A line that was free for an hour starts from now, not with an hour's bytes in hand.
        if let Some(earlier) = start.checked_sub(Duration::from_secs(3600)) {
            let mut idle = Pace { free_at: earlier, bytes_per_second: 1000.0 };
            assert!(idle.reserve(1000) >= start + Duration::from_secs(1));
        }
    }

    #[test]
    fn bytes_arrive_whole_and_not_before_their_time() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let slow = Throttle::start(listener.local_addr().unwrap().port(), 1_000_000.0).unwrap();
        let started = Instant::now();
        let mut near = TcpStream::connect((Ipv4Addr::LOCALHOST, slow.port)).unwrap();
        let sent: Vec<u8> = (0..200_000u32).map(|n| n as u8).collect();
        let sender = thread::spawn({
            let sent = sent.clone();
            move || {
                near.write_all(&sent).unwrap();
                near.shutdown(Shutdown::Write).unwrap();
            }
        });
        let (mut far, _) = listener.accept().unwrap();
        let mut received = Vec::new();
        far.read_to_end(&mut received).unwrap();
        sender.join().unwrap();
        assert!(received == sent);
        assert!(started.elapsed() >= Duration::from_millis(200));
    }
}
