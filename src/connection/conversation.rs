use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::{Address, ConnectionError, Stream};
use crate::resp::{self, Reply, ReplyDecoder};

/// Longest silence while a reply is due. Far above what a healthy server needs, as a big DUMP or a
/// fork may hold it up.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Read at a time: a page of SCAN and a few hundred small DUMPs.
const READ_SIZE: usize = 64 << 10;
/// Buffers that one large pipeline grew are given back above this size.
const KEPT_CAPACITY: usize = 1 << 20;

/// A conversation with one server: commands out, replies in the same order. After an error other
/// than [`ConnectionError::Server`] (and its kin that quote an error reply), open a new one: replies no longer match.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    address: Address,
    outbound: Vec<u8>,
    inbound: BytesMut,
    decoder: ReplyDecoder,
    response_timeout: Duration,
}

impl Connection {
    pub fn new(stream: Stream, address: Address) -> Connection {
        Connection {
            stream,
            address,
            outbound: Vec::new(),
            inbound: BytesMut::new(),
            decoder: ReplyDecoder::default(),
            response_timeout: RESPONSE_TIMEOUT,
        }
    }

    /// The address that was dialled.
    pub fn address(&self) -> &Address {
        &self.address
    }

    pub fn set_response_timeout(&mut self, timeout: Duration) {
        self.response_timeout = timeout;
    }

    /// One command, one reply; an error reply is a [`Reply::Error`]. Nothing may be queued or due.
    pub async fn call(&mut self, args: &[&[u8]]) -> Result<Reply, ConnectionError> {
        self.queue(args);
        self.send_queued().await?;
        self.receive().await
    }

    /// [`Connection::call`], with error replies as errors that name the command but no argument.
    pub async fn query(&mut self, args: &[&[u8]]) -> Result<Reply, ConnectionError> {
        match self.call(args).await? {
            Reply::Error(text) => {
                let command = args.first().copied().unwrap_or_default();
                Err(ConnectionError::from_reply(&self.address, command, &text))
            }
            reply => Ok(reply),
        }
    }

    /// A text reply: INFO, CLUSTER NODES.
    pub async fn query_text(&mut self, args: &[&[u8]]) -> Result<String, ConnectionError> {
        let reply = self.query(args).await?;
        match reply.bytes() {
            Some(bytes) => Ok(String::from_utf8_lossy(bytes).into_owned()),
            None => Err(self.unexpected(args.first().copied().unwrap_or_default())),
        }
    }

    /// Appends a command to what [`Connection::send_queued`] will send; does no I/O.
    pub fn queue<A: AsRef<[u8]>>(&mut self, args: &[A]) {
        resp::encode_command(args, &mut self.outbound);
    }

    /// Appends frames that are encoded already.
    pub fn queue_frames(&mut self, frames: &[u8]) {
        self.outbound.extend_from_slice(frames);
    }

    /// Bytes queued and not sent.
    pub fn queued_bytes(&self) -> usize {
        self.outbound.len()
    }

    /// Sends what is queued. Replies come by [`Connection::receive`], one for each command. Not to be
    /// cancelled: half a command may be on the wire.
    pub async fn send_queued(&mut self) -> Result<(), ConnectionError> {
        let mut unsent = self.outbound.as_slice();
        while !unsent.is_empty() {
            let written = timeout(self.response_timeout, self.stream.write(unsent)).await;
            let written = written.map_err(|_| Self::silent(&self.address, self.response_timeout))?;
            match written {
                Ok(0) => return Err(ConnectionError::Closed { address: self.address.clone() }),
                Ok(count) => unsent.advance(count),
                Err(source) => return Err(Self::broken(&self.address, source)),
            }
        }
        self.outbound.clear();
        self.outbound.shrink_to(KEPT_CAPACITY);
        self.stream.flush().await.map_err(|source| Self::broken(&self.address, source))
    }

    /// The next reply. May be cancelled and called again.
    pub async fn receive(&mut self) -> Result<Reply, ConnectionError> {
        loop {
            match self.decoder.next(&mut self.inbound) {
                Ok(Some(reply)) => return Ok(reply),
                Ok(None) => {}
                Err(source) => return Err(self.not_resp(source)),
            }
            self.read_more().await?;
        }
    }

    /// Reads once and appends to [`Connection::inbound`]; at least one byte. For readers that look at
    /// replies in place: do not mix with a half-received [`Connection::receive`].
    pub async fn read_more(&mut self) -> Result<usize, ConnectionError> {
        self.inbound.reserve(READ_SIZE);
        match timeout(self.response_timeout, self.stream.read_buf(&mut self.inbound)).await {
            Ok(Ok(0)) => Err(ConnectionError::Closed { address: self.address.clone() }),
            Ok(Ok(count)) => Ok(count),
            Ok(Err(source)) => Err(Self::broken(&self.address, source)),
            Err(_) => Err(Self::silent(&self.address, self.response_timeout)),
        }
    }

    /// Bytes received and not yet taken.
    pub fn inbound(&mut self) -> &mut BytesMut {
        &mut self.inbound
    }

    /// The bare stream, what was received and not taken, and the address that was dialled.
    pub fn into_parts(self) -> (Stream, BytesMut, Address) {
        (self.stream, self.inbound, self.address)
    }

    /// For a reply whose shape does not fit `command`.
    pub fn unexpected(&self, command: &[u8]) -> ConnectionError {
        let command = String::from_utf8_lossy(command).into_owned();
        ConnectionError::UnexpectedReply { address: self.address.clone(), command }
    }

    fn not_resp(&self, source: resp::RespError) -> ConnectionError {
        let address = self.address.clone();
        // A TLS alert record: the answer to our plain text.
        if !self.stream.is_tls() && self.inbound.starts_with(&[0x15, 0x03]) {
            return ConnectionError::TlsServer { address };
        }
        ConnectionError::Protocol { address, source }
    }

    fn silent(address: &Address, after: Duration) -> ConnectionError {
        ConnectionError::ResponseTimeout { address: address.clone(), after }
    }

    fn broken(address: &Address, source: std::io::Error) -> ConnectionError {
        use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
        let address = address.clone();
        match source.kind() {
            BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof => {
                ConnectionError::Closed { address }
            }
            _ => ConnectionError::Io { address, source },
        }
    }
}
