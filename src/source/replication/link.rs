//! One open replication connection: lines, the RDB, the command stream, acknowledgements.

use std::convert::Infallible;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::watch;

use super::answer::printable;
use super::{Acknowledged, ReplicationError};
use crate::clock::unix_millis;
use crate::connection::{Address, Connection, Stream};
use crate::resp::encode_command;
use crate::source::framing::Splitter;
use crate::spool::SpoolWriter;

const READ_BUFFER: usize = 256 << 10;
/// Longest line before the RDB.
const MAX_LINE: usize = 512;
const ACK_PERIOD: Duration = Duration::from_secs(1);
/// Acknowledgements that follow the target's are at least this far apart.
const ACK_SPACING: Duration = Duration::from_millis(10);

pub struct Link {
    read: ReadHalf<Stream>,
    write: WriteHalf<Stream>,
    buffer: BytesMut,
    /// What is not written yet of an acknowledgement.
    unsent: BytesMut,
    address: Address,
    /// After this long without a byte it is half-open.
    silence: Duration,
}

impl Link {
    pub fn new(connection: Connection, address: &Address, silence: Duration) -> Self {
        let (stream, buffer, _) = connection.into_parts();
        let (read, write) = tokio::io::split(stream);
        Self { read, write, buffer, unsent: BytesMut::new(), address: address.clone(), silence }
    }

    pub async fn send(&mut self, command: &[u8]) -> Result<(), ReplicationError> {
        self.write.write_all(command).await.map_err(|source| io(&self.address, source))
    }

    /// The next line that is not a bare newline, without its line end.
    pub async fn line(&mut self) -> Result<Vec<u8>, ReplicationError> {
        loop {
            while self.buffer.first() == Some(&b'\n') {
                self.buffer.advance(1);
            }
            if let Some(end) = memchr::memchr(b'\n', &self.buffer) {
                let mut line = self.buffer.split_to(end + 1).to_vec();
                while matches!(line.last(), Some(b'\n' | b'\r')) {
                    line.pop();
                }
                return Ok(line);
            }
            if self.buffer.len() > MAX_LINE {
                let line = self.buffer.to_vec();
                return Err(self.bad("no line end", &line));
            }
            let Self { read, buffer, address, silence, .. } = self;
            read_more(read, buffer, address, *silence, "before it sent data").await?;
        }
    }

    /// Passes the RDB into the spool; what follows it stays in the buffer.
    pub async fn snapshot(
        &mut self,
        spool: &mut SpoolWriter,
        mut splitter: Splitter,
    ) -> Result<(), ReplicationError> {
        let Self { read, write, buffer, unsent, address, silence } = self;
        let reading = async {
            loop {
                while !buffer.is_empty() {
                    let split = splitter.split(buffer);
                    let now = unix_millis();
                    spool.append(&split.held, now).await?;
                    spool.append(buffer.get(..split.direct).unwrap_or_default(), now).await?;
                    buffer.advance(split.used);
                    if split.ended {
                        return Ok(());
                    }
                }
                buffer.clear();
                // Only the wait for the network counts as silence, not that for room in the spool.
                read_more(read, buffer, address, *silence, "in the middle of the RDB").await?;
            }
        };
        tokio::select! {
            read = reading => read,
            source = keep_alive(write, unsent) => Err(io(address, source)),
        }
    }

    /// Passes the command stream into the spool and acknowledges what the target has.
    pub async fn stream(
        self,
        spool: &mut SpoolWriter,
        acknowledged: watch::Receiver<Acknowledged>,
    ) -> Result<Infallible, ReplicationError> {
        let history = spool.history();
        let Self { mut read, mut write, buffer, mut unsent, address, silence } = self;
        let reading = async {
            spool.append(&buffer, unix_millis()).await?;
            drop(buffer);
            let mut buffer = vec![0u8; READ_BUFFER];
            loop {
                let count = match tokio::time::timeout(silence, read.read(&mut buffer)).await {
                    Err(_) => {
                        return Err(ReplicationError::Silent { address: address.clone(), after: silence });
                    }
                    Ok(Err(source)) => return Err(io(&address, source)),
                    Ok(Ok(0)) => {
                        let part = "while it sent the command stream";
                        return Err(ReplicationError::Closed { address: address.clone(), part });
                    }
                    Ok(Ok(count)) => count,
                };
                spool.append(buffer.get(..count).unwrap_or_default(), unix_millis()).await?;
            }
        };
        tokio::select! {
            ended = reading => ended,
            source = acknowledge(&mut write, &mut unsent, acknowledged, history) => Err(io(&address, source)),
        }
    }

    pub fn bad(&self, what: &'static str, line: &[u8]) -> ReplicationError {
        ReplicationError::Handshake { address: self.address.clone(), what, line: printable(line) }
    }
}

fn io(address: &Address, source: std::io::Error) -> ReplicationError {
    ReplicationError::Io { address: address.clone(), source }
}

async fn read_more(
    read: &mut ReadHalf<Stream>,
    buffer: &mut BytesMut,
    address: &Address,
    silence: Duration,
    part: &'static str,
) -> Result<(), ReplicationError> {
    buffer.reserve(READ_BUFFER);
    match tokio::time::timeout(silence, read.read_buf(buffer)).await {
        Err(_) => Err(ReplicationError::Silent { address: address.clone(), after: silence }),
        Ok(Err(source)) => Err(io(address, source)),
        Ok(Ok(0)) => Err(ReplicationError::Closed { address: address.clone(), part }),
        Ok(Ok(_)) => Ok(()),
    }
}

/// While the RDB arrives nothing stands on the target, but a replica that says nothing would be dropped,
/// also one whose spool is full. May be cancelled: what is not written yet stays in `unsent`.
async fn keep_alive(write: &mut WriteHalf<Stream>, unsent: &mut BytesMut) -> std::io::Error {
    loop {
        if unsent.is_empty() {
            unsent.extend_from_slice(&ack_frame(0));
        }
        while !unsent.is_empty() {
            if let Err(error) = write.write_buf(unsent).await {
                return error;
            }
        }
        tokio::time::sleep(ACK_PERIOD).await;
    }
}

/// Sends `REPLCONF ACK` every second and soon after the target acknowledged more. A master that sent
/// its RDB without a file starts the stream only on such an acknowledgement, so the first go at once.
async fn acknowledge(
    write: &mut WriteHalf<Stream>,
    unsent: &mut BytesMut,
    mut acknowledged: watch::Receiver<Acknowledged>,
    history: u64,
) -> std::io::Error {
    if let Err(error) = write.write_all(unsent).await {
        return error;
    }
    let mut early = 10u32;
    loop {
        let last = *acknowledged.borrow_and_update();
        let offset = if last.history == history { last.offset } else { 0 };
        if let Err(error) = write.write_all(&ack_frame(offset)).await {
            return error;
        }
        let period = if early > 0 { ACK_PERIOD / 10 } else { ACK_PERIOD };
        early = early.saturating_sub(1);
        tokio::time::sleep(ACK_SPACING).await;
        // An error means that nobody acknowledges any more: the period alone goes on.
        if let Ok(Err(_)) = tokio::time::timeout(period, acknowledged.changed()).await {
            tokio::time::sleep(period).await;
        }
    }
}

fn ack_frame(offset: i64) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    encode_command(&[b"REPLCONF".as_slice(), b"ACK", offset.to_string().as_bytes()], &mut out);
    out
}
