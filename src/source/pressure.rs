//! What a migration costs its source, and when that is too much (`limits.source`): a full sync is not begun, and
//! a scan pauses, until it has passed. A replication stream is always read: not to read it would cost the source
//! more, as it keeps what its replicas have not taken.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::connection::{Address, Connection, ConnectionError, Dialer};
use crate::resp::Reply;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// PINGs of a look: the middle one counts, so that one slow command does not pause anything.
const PINGS: usize = 5;

/// Above these a source is under pressure; 0: off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PressureLimits {
    pub latency_millis: u64,
    /// Of the host's memory that the server holds: the child of a snapshot may take as much again.
    pub fork_memory_percent: u64,
    /// Bytes that wait in the server for its clients and replicas.
    pub output_buffer: u64,
}

impl PressureLimits {
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }
}

/// Whether to pause.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pressure {
    pub pause: bool,
    /// What is passed, in a few words; empty when nothing is.
    pub why: String,
}

/// What a server shows. `None`: it does not tell, which is no pressure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    pub latency: Option<Duration>,
    pub resident: Option<u64>,
    pub host_memory: Option<u64>,
    pub output_buffers: Option<u64>,
}

impl Reading {
    /// Fields of INFO memory: `used_memory_rss`; `total_system_memory` from 3.2; `mem_clients_*` from 4.0.
    fn parse(info: &str, latency: Duration) -> Self {
        let field = |name: &str| {
            let value = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            value.and_then(|value| value.trim().parse::<u64>().ok())
        };
        let buffers = [field("mem_clients_normal"), field("mem_clients_slaves")];
        Self {
            latency: Some(latency),
            resident: field("used_memory_rss"),
            host_memory: field("total_system_memory").filter(|&bytes| bytes > 0),
            output_buffers: buffers.into_iter().flatten().reduce(u64::saturating_add),
        }
    }
}

/// What a reading means.
pub fn judge(limits: &PressureLimits, address: &Address, reading: &Reading) -> Pressure {
    let mut passed = Vec::new();
    if let Some(latency) = reading.latency
        && limits.latency_millis > 0
        && latency > Duration::from_millis(limits.latency_millis)
    {
        let most = limits.latency_millis;
        passed.push(format!("answers after {} ms (maxLatencyMillis {most})", latency.as_millis()));
    }
    if let (Some(resident), Some(host)) = (reading.resident, reading.host_memory)
        && limits.fork_memory_percent > 0
    {
        let percent = u128::from(resident) * 100 / u128::from(host);
        if percent > u128::from(limits.fork_memory_percent) {
            let most = limits.fork_memory_percent;
            passed.push(format!("holds {percent}% of its host's memory (maxForkMemoryPercent {most})"));
        }
    }
    if let Some(bytes) = reading.output_buffers
        && limits.output_buffer > 0
        && bytes > limits.output_buffer
    {
        passed.push(format!("{bytes} B wait for its clients (maxOutputBuffer {})", limits.output_buffer));
    }
    if passed.is_empty() {
        return Pressure::default();
    }
    Pressure { pause: true, why: format!("{address} {}", passed.join(", ")) }
}

/// Watches one server for as long as it lives.
pub struct Watched {
    pub pressure: watch::Receiver<Pressure>,
    task: JoinHandle<()>,
}

impl Watched {
    /// The first look decides before anything is said, so that nothing begins under pressure. Without limits no
    /// server is asked.
    pub fn start(dialer: Dialer, address: Address, limits: watch::Receiver<PressureLimits>) -> Self {
        let first = Pressure { pause: !limits.borrow().is_off(), why: format!("{address} is not known yet") };
        let (told, pressure) = watch::channel(first);
        let task = tokio::spawn(look(dialer, address, limits, Arc::new(told)));
        Self { pressure, task }
    }

    /// Until there is none; `why` is told at each change.
    pub async fn passed(&mut self, mut tell: impl FnMut(&str)) {
        loop {
            {
                let pressure = self.pressure.borrow_and_update();
                if !pressure.pause {
                    return;
                }
                tell(&pressure.why);
            }
            // An error: nobody looks any more, so nothing is known to be wrong.
            if self.pressure.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn look(
    dialer: Dialer,
    address: Address,
    mut limits: watch::Receiver<PressureLimits>,
    told: Arc<watch::Sender<Pressure>>,
) {
    let mut connection = None;
    loop {
        let now = *limits.borrow_and_update();
        let pressure = if now.is_off() {
            connection = None;
            Pressure::default()
        } else {
            match read(&dialer, &address, &mut connection).await {
                Ok(reading) => judge(&now, &address, &reading),
                Err(error) => {
                    // Whoever reads from it has more to say about that.
                    tracing::debug!(%error, "the source's load cannot be asked for");
                    connection = None;
                    Pressure::default()
                }
            }
        };
        told.send_if_modified(|known| {
            let news = *known != pressure;
            *known = pressure;
            news
        });
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            changed = limits.changed() => if changed.is_err() {
                // The limits stay as they are.
                tokio::time::sleep(LOOK).await;
            },
        }
    }
}

async fn read(
    dialer: &Dialer,
    address: &Address,
    open: &mut Option<Connection>,
) -> Result<Reading, ConnectionError> {
    if open.is_none() {
        *open = Some(dialer.connect(address).await?);
    }
    let Some(connection) = open else { return Ok(Reading::default()) };
    let mut times = Vec::with_capacity(PINGS);
    for _ in 0..PINGS {
        let asked = Instant::now();
        connection.query(&[b"PING"]).await?;
        times.push(asked.elapsed());
    }
    times.sort_unstable();
    let latency = times.get(PINGS / 2).copied().unwrap_or_default();
    // A server that forbids it tells nothing of its memory.
    let info = connection.query(&[b"INFO".as_slice(), b"memory"]).await;
    Ok(match info.as_ref().ok().and_then(Reply::text) {
        Some(text) => Reading::parse(text, latency),
        None => Reading { latency: Some(latency), ..Reading::default() },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "# Memory\r\nused_memory:1\r\nused_memory_rss:600\r\ntotal_system_memory:1000\r\n\
        mem_clients_slaves:70\r\nmem_clients_normal:30\r\n";

    #[test]
    fn each_limit_is_looked_at_and_named() {
        let reading = Reading::parse(INFO, Duration::from_millis(20));
        let address = Address::new("a", 1);
        let judged = |latency_millis, fork_memory_percent, output_buffer| {
            judge(&PressureLimits { latency_millis, fork_memory_percent, output_buffer }, &address, &reading)
        };
        for (limits, why) in [
            ((0, 0, 0), None),
            ((20, 60, 100), None),
            ((19, 0, 0), Some("a:1 answers after 20 ms (maxLatencyMillis 19)")),
            ((0, 59, 0), Some("a:1 holds 60% of its host's memory (maxForkMemoryPercent 59)")),
            ((0, 0, 99), Some("a:1 100 B wait for its clients (maxOutputBuffer 99)")),
        ] {
            let pressure = judged(limits.0, limits.1, limits.2);
            assert_eq!((pressure.pause, pressure.why.as_str()), (why.is_some(), why.unwrap_or_default()));
        }
        assert!(judged(1, 1, 1).why.matches(", ").count() == 2);
    }

    #[test]
    fn a_server_that_tells_nothing_is_under_no_pressure() {
        let limits = PressureLimits { latency_millis: 50, fork_memory_percent: 1, output_buffer: 1 };
        let reading = Reading::parse("used_memory:5\r\n", Duration::from_millis(1));
        assert_eq!(judge(&limits, &Address::new("a", 1), &reading), Pressure::default());
    }
}
