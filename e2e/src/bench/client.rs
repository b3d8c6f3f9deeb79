//! A RESP2 client that costs as little as possible, so that what is measured is the server and the tool.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// Size of one write to a server's socket, in bytes.
pub const WRITE_BYTES: usize = 128 * 1024;

/// Longest silence of a server before a measurement is given up.
const SILENCE: Duration = Duration::from_secs(120);

/// A server's answer. Bulk strings are bytes, absent ones `None`.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    Line(String),
    Integer(i64),
    Bulk(Option<Vec<u8>>),
    Array(Vec<Reply>),
    Error(String),
}

impl Reply {
    /// The bytes of a present bulk string or of a line.
    pub fn into_bytes(self) -> Result<Vec<u8>> {
        match self {
            Reply::Bulk(Some(bytes)) => Ok(bytes),
            Reply::Line(line) => Ok(line.into_bytes()),
            other => bail!("expected a string, the server answered {other:?}"),
        }
    }

    /// The elements of an array.
    pub fn into_array(self) -> Result<Vec<Reply>> {
        match self {
            Reply::Array(items) => Ok(items),
            other => bail!("expected an array, the server answered {other:?}"),
        }
    }
}

/// One connection to a server of this machine, one question at a time or pipelined by hand.
pub struct Client {
    stream: BufReader<TcpStream>,
    out: Vec<u8>,
}

impl Client {
    /// Connects to 127.0.0.1.
    pub fn connect(port: u16) -> Result<Client> {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))
            .with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        Ok(Client { stream: BufReader::with_capacity(WRITE_BYTES, stream), out: Vec::new() })
    }

    /// Sends one command and waits for its answer; an error reply is an `Err`.
    pub fn call<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Result<Reply> {
        self.queue(args);
        self.flush()?;
        match self.reply()? {
            Reply::Error(text) => {
                let name = args.first().map(|arg| String::from_utf8_lossy(arg.as_ref()).into_owned());
                Err(anyhow!("{} was refused: {text}", name.unwrap_or_default()))
            }
            reply => Ok(reply),
        }
    }

    /// Appends a command to what the next `flush` sends.
    pub fn queue<A: AsRef<[u8]>>(&mut self, args: &[A]) {
        encode(&mut self.out, args);
    }

    /// Sends what was queued.
    pub fn flush(&mut self) -> Result<()> {
        self.stream.get_mut().write_all(&self.out)?;
        self.out.clear();
        Ok(())
    }

    /// Reads one reply, error replies included.
    pub fn reply(&mut self) -> Result<Reply> {
        let line = self.line()?;
        let (kind, rest) = line.split_at_checked(1).ok_or_else(|| anyhow!("empty reply line"))?;
        Ok(match kind {
            "+" => Reply::Line(rest.to_owned()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Integer(rest.parse()?),
            "$" if rest == "-1" => Reply::Bulk(None),
            "$" => {
                let length: usize = rest.parse()?;
                let mut bytes = vec![0; length + 2];
                self.stream.read_exact(&mut bytes)?;
                bytes.truncate(length);
                Reply::Bulk(Some(bytes))
            }
            // `>` is RESP3's push, of which only its arrival and its elements matter here; `%` is a map.
            "*" | ">" => {
                let count: i64 = rest.parse()?;
                Reply::Array((0..count.max(0)).map(|_| self.reply()).collect::<Result<_>>()?)
            }
            "%" => {
                let count: i64 = rest.parse()?;
                Reply::Array((0..count.max(0) * 2).map(|_| self.reply()).collect::<Result<_>>()?)
            }
            "_" => Reply::Bulk(None),
            _ => bail!("not RESP: {line:?}"),
        })
    }

    /// One field of `INFO section`.
    pub fn info(&mut self, section: &str, field: &str) -> Result<String> {
        let text = String::from_utf8_lossy(&self.call(&["INFO", section])?.into_bytes()?).into_owned();
        info_field(&text, field).ok_or_else(|| anyhow!("INFO {section} has no field {field}"))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line)?;
        if line.is_empty() {
            bail!("the server closed the connection");
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

/// The value of `field:` in the text of INFO.
pub fn info_field(text: &str, field: &str) -> Option<String> {
    text.lines().find_map(|line| Some(line.strip_prefix(field)?.strip_prefix(':')?.to_owned()))
}

/// Appends a command as a RESP array of bulk strings.
pub fn encode<A: AsRef<[u8]>>(out: &mut Vec<u8>, args: &[A]) {
    length(out, b'*', args.len());
    for arg in args {
        let arg = arg.as_ref();
        length(out, b'$', arg.len());
        out.extend_from_slice(arg);
        out.extend_from_slice(b"\r\n");
    }
}

fn length(out: &mut Vec<u8>, kind: u8, mut value: usize) {
    let mut digits = [0u8; 20];
    let mut start = digits.len();
    for (at, digit) in digits.iter_mut().enumerate().rev() {
        *digit = b'0' + (value % 10) as u8;
        value /= 10;
        start = at;
        if value == 0 {
            break;
        }
    }
    out.push(kind);
    out.extend_from_slice(&digits[start..]);
    out.extend_from_slice(b"\r\n");
}

/// Commands streamed into a server while a second thread only counts the replies.
///
/// Holds for commands whose reply is one line (`+OK`, `:1`, `-ERR …`), which is all the workloads use.
pub struct Pipe {
    stream: TcpStream,
    buffer: Vec<u8>,
    expected: Arc<AtomicU64>,
    counter: JoinHandle<Result<u64>>,
}

impl Pipe {
    /// Connects to 127.0.0.1.
    pub fn open(port: u16) -> Result<Pipe> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        let expected = Arc::new(AtomicU64::new(u64::MAX));
        let counter = thread::spawn({
            let (stream, expected) = (stream.try_clone()?, expected.clone());
            move || count_replies(stream, &expected)
        });
        Ok(Pipe { stream, buffer: Vec::with_capacity(WRITE_BYTES * 2), expected, counter })
    }

    /// Sends whole commands, cut into writes of `WRITE_BYTES`.
    pub fn write_all(&mut self, commands: &[u8]) -> Result<()> {
        for chunk in commands.chunks(WRITE_BYTES) {
            self.stream.write_all(chunk)?;
        }
        Ok(())
    }

    /// Queues one command for a generator that makes them as it goes.
    pub fn command<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Result<()> {
        encode(&mut self.buffer, args);
        if self.buffer.len() >= WRITE_BYTES { self.flush() } else { Ok(()) }
    }

    /// Waits until all `commands` sent are answered; an error reply fails.
    pub fn finish(mut self, commands: u64) -> Result<()> {
        self.flush()?;
        // The counter may sleep in a read having seen everything: the answer to PING wakes it with the goal set.
        self.expected.store(commands + 1, Ordering::Release);
        self.stream.write_all(b"PING\r\n")?;
        let errors = self.counter.join().map_err(|_| anyhow!("the reply counter panicked"))??;
        if errors > 0 {
            bail!("{errors} of {commands} piped commands were refused");
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.stream.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

fn count_replies(mut stream: TcpStream, expected: &AtomicU64) -> Result<u64> {
    let mut block = vec![0; 64 * 1024];
    let (mut replies, mut errors, mut last) = (0u64, 0u64, b'\n');
    while replies < expected.load(Ordering::Acquire) {
        let read = stream.read(&mut block).context("reading replies of piped commands")?;
        if read == 0 {
            bail!("the server closed the connection after {replies} replies");
        }
        for &byte in block.iter().take(read) {
            errors += u64::from(last == b'\n' && byte == b'-');
            replies += u64::from(byte == b'\n');
            last = byte;
        }
    }
    Ok(errors)
}

/// Asks again and again until the answer is `Some`, or fails saying `what` did not happen.
pub fn poll<T>(
    what: &str,
    every: Duration,
    timeout: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(value) = ask()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {timeout:?}");
        }
        thread::sleep(every);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A server that answers every connection with fixed bytes, one at a time so that reads split anywhere.
    fn answering(bytes: &'static [u8]) -> u16 {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        thread::spawn(move || {
            for mut stream in listener.incoming().map_while(Result::ok) {
                stream.set_nodelay(true).unwrap();
                let (answers, pong) = match bytes.strip_suffix(b"+PONG\r\n") {
                    Some(answers) => (answers, b"+PONG\r\n".as_slice()),
                    None => (bytes, b"".as_slice()),
                };
                for byte in answers {
                    stream.write_all(&[*byte]).unwrap();
                }
                if !pong.is_empty() {
                    // As a server does: PING is answered when it has come.
                    stream.read_exact(&mut [0; b"PING\r\n".len()]).unwrap();
                    stream.write_all(pong).unwrap();
                }
                // Held open until the client goes, whatever it sends.
                let _ = std::io::copy(&mut stream, &mut std::io::sink());
            }
        });
        port
    }

    #[test]
    fn commands_are_arrays_of_bulk_strings() {
        let mut out = Vec::new();
        encode(&mut out, &[b"SET".as_slice(), b"", &[b'x'; 10]]);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$0\r\n\r\n$10\r\nxxxxxxxxxx\r\n");
    }

    #[test]
    fn replies_nest_and_keep_binary_bytes() {
        let port = answering(b"*3\r\n$4\r\na\r\nb\r\n$-1\r\n*2\r\n:-5\r\n-ERR no\r\n");
        let reply = Client::connect(port).unwrap().reply().unwrap();
        let inner = Reply::Array(vec![Reply::Integer(-5), Reply::Error("ERR no".into())]);
        assert_eq!(
            reply,
            Reply::Array(vec![Reply::Bulk(Some(b"a\r\nb".to_vec())), Reply::Bulk(None), inner])
        );
    }

    #[test]
    fn a_pipe_counts_every_answer_and_names_the_refused() {
        let pipe = Pipe::open(answering(b"+OK\r\n:1\r\n+PONG\r\n")).unwrap();
        pipe.finish(2).unwrap();
        let pipe = Pipe::open(answering(b"+OK\r\n-ERR no - never\r\n+OK\r\n+PONG\r\n")).unwrap();
        let error = pipe.finish(3).unwrap_err().to_string();
        assert_eq!(error, "1 of 3 piped commands were refused");
    }
}
