//! One pipelined conversation: commands are gathered and sent together, replies are read in order
//! and borrowed until the next one.

use std::io;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::{Extent, Frame, FrameError, Progress};
use crate::connection::{Address, Stream};
use crate::resp;

const READ_SIZE: usize = 64 * 1024;
/// Longest reply kept in memory. Values are asked for whole only up to a fraction of it.
const MAX_REPLY: usize = 64 << 20;
/// A server that answers nothing for so long is treated as gone.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

pub struct Wire<S = Stream> {
    stream: S,
    address: Address,
    received: BytesMut,
    /// Bytes of `received` that the current reply takes.
    current: usize,
    /// Length of a reply that was too long to keep.
    skipped: Option<u64>,
    outgoing: Vec<u8>,
    /// Replies that are still to be read.
    unanswered: usize,
    /// Those of them whose command is still in `outgoing`.
    unsent: usize,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub fn new(stream: S, received: BytesMut, address: Address) -> Self {
        Self {
            stream,
            address,
            received,
            current: 0,
            skipped: None,
            outgoing: Vec::with_capacity(READ_SIZE),
            unanswered: 0,
            unsent: 0,
        }
    }

    pub fn address(&self) -> &Address {
        &self.address
    }

    /// False after an abandoned batch: what comes next would answer something else.
    pub fn is_idle(&self) -> bool {
        self.unanswered == 0 && self.outgoing.is_empty()
    }

    /// True while every reply still to come is that of a command not sent yet.
    pub fn is_gathering(&self) -> bool {
        self.unsent == self.unanswered && self.unsent > 0
    }

    /// Gathers one command; nothing is sent before [`Wire::send`].
    pub fn queue<A: AsRef<[u8]>>(&mut self, args: &[A]) {
        resp::encode_command(args, &mut self.outgoing);
        self.unanswered += 1;
        self.unsent += 1;
    }

    /// As `queue`, for a command with a fixed head and many keys.
    pub fn queue_many<'k>(&mut self, head: &[&[u8]], keys: impl ExactSizeIterator<Item = &'k [u8]>) {
        resp::array_header(head.len() + keys.len(), &mut self.outgoing);
        for arg in head {
            resp::bulk(arg, &mut self.outgoing);
        }
        for key in keys {
            resp::bulk(key, &mut self.outgoing);
        }
        self.unanswered += 1;
        self.unsent += 1;
    }

    pub async fn send(&mut self) -> Result<(), WireError> {
        if self.outgoing.is_empty() {
            return Ok(());
        }
        let written = tokio::time::timeout(REPLY_TIMEOUT, async {
            self.stream.write_all(&self.outgoing).await?;
            self.stream.flush().await
        })
        .await;
        self.outgoing.clear();
        self.unsent = 0;
        match written {
            Ok(Ok(())) => Ok(()),
            Ok(Err(source)) => Err(self.lost(source)),
            Err(_) => Err(WireError::Silent(self.address.clone())),
        }
    }

    /// The next reply, in the order of the commands.
    pub async fn reply(&mut self) -> Result<Frame<'_>, WireError> {
        self.arrive().await?;
        self.parse()
    }

    /// One command, one reply; only on an idle wire.
    pub async fn call<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Result<Frame<'_>, WireError> {
        self.queue(args);
        self.send().await?;
        self.reply().await
    }

    fn parse(&self) -> Result<Frame<'_>, WireError> {
        if let Some(length) = self.skipped {
            return Ok(Frame::TooLong(length));
        }
        let bytes = self.received.get(..self.current).unwrap_or_default();
        match Frame::parse(bytes) {
            Ok((frame, _)) => Ok(frame),
            Err(fault) => Err(self.garbled(fault)),
        }
    }

    /// Drops the reply before, and reads until the next one is complete.
    async fn arrive(&mut self) -> Result<(), WireError> {
        self.received.advance(self.current);
        self.current = 0;
        self.skipped = None;
        self.unanswered = self.unanswered.saturating_sub(1);
        let mut extent = Extent::default();
        loop {
            match extent.advance(&self.received, MAX_REPLY) {
                Ok(Progress::Complete(length)) => {
                    self.current = length;
                    return Ok(());
                }
                Ok(Progress::NeedMore(total)) => {
                    let missing = total.saturating_sub(self.received.len());
                    self.received.reserve(missing.max(READ_SIZE));
                    self.read().await?;
                }
                Ok(Progress::TooLong(head, length)) => {
                    self.received.advance(head);
                    self.discard(length + 2).await?;
                    self.skipped = Some(length);
                    return Ok(());
                }
                Err(fault) => return Err(self.garbled(fault)),
            }
        }
    }

    async fn discard(&mut self, mut length: u64) -> Result<(), WireError> {
        loop {
            let here = length.min(self.received.len() as u64);
            self.received.advance(here as usize);
            length -= here;
            if length == 0 {
                return Ok(());
            }
            self.received.reserve(READ_SIZE);
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), WireError> {
        let read = self.stream.read_buf(&mut self.received);
        match tokio::time::timeout(REPLY_TIMEOUT, read).await {
            Ok(Ok(0)) => Err(self.lost(io::ErrorKind::UnexpectedEof.into())),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(source)) => Err(self.lost(source)),
            Err(_) => Err(WireError::Silent(self.address.clone())),
        }
    }

    fn lost(&self, source: io::Error) -> WireError {
        WireError::Lost { address: self.address.clone(), source }
    }

    pub(super) fn garbled(&self, fault: FrameError) -> WireError {
        WireError::Garbled { address: self.address.clone(), fault }
    }
}

/// Why a conversation broke off. All but `Garbled` are worth a new connection.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("connection to {address} lost")]
    Lost {
        address: Address,
        #[source]
        source: io::Error,
    },
    #[error("{0} answered nothing for {REPLY_TIMEOUT:?}")]
    Silent(Address),
    #[error("{address} does not speak the Redis protocol: {fault}")]
    Garbled { address: Address, fault: FrameError },
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    #[tokio::test]
    async fn replies_come_in_order_and_too_long_ones_are_skipped() {
        let (near, mut far) = duplex(1 << 16);
        let address = Address { host: "test".into(), port: 1 };
        let mut wire = Wire::new(near, BytesMut::new(), address);
        wire.queue(&[b"A"]);
        wire.queue(&[b"B"]);
        wire.queue(&[b"C"]);
        wire.send().await.unwrap();
        let writer = tokio::spawn(async move {
            far.write_all(b":1\r\n").await.unwrap();
            let length = MAX_REPLY + 1;
            far.write_all(format!("${length}\r\n").as_bytes()).await.unwrap();
            let block = vec![b'x'; 1 << 20];
            let mut left = length;
            while left > 0 {
                let now = left.min(block.len());
                far.write_all(&block[..now]).await.unwrap();
                left -= now;
            }
            far.write_all(b"\r\n$2\r\nok\r\n").await.unwrap();
        });
        assert_eq!(wire.reply().await.unwrap(), Frame::Integer(1));
        assert_eq!(wire.reply().await.unwrap(), Frame::TooLong(MAX_REPLY as u64 + 1));
        assert!(!wire.is_idle());
        assert_eq!(wire.reply().await.unwrap(), Frame::Bulk(Some(b"ok")));
        assert!(wire.is_idle());
        assert!(wire.received.capacity() < 1 << 20);
        writer.await.unwrap();
        assert!(matches!(wire.reply().await, Err(WireError::Lost { .. })));
    }
}
