//! The limit: a data set as RESTORE commands made beforehand, so that piping them costs almost only the target.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::client::{Client, Pipe, Reply, encode};
use crate::server::Server;

/// Commands ready to send.
pub struct Prepared {
    bytes: Vec<u8>,
    commands: u64,
}

impl Prepared {
    /// Reads the commands from `file`, or makes them from the `source` and keeps them there.
    pub fn load(file: &Path, source: &Server) -> Result<Prepared> {
        let count = file.with_extension("count");
        if let (Ok(bytes), Ok(commands)) = (fs::read(file), fs::read_to_string(&count)) {
            return Ok(Prepared { bytes, commands: commands.trim().parse()? });
        }
        let made = dump_all(source)?;
        fs::write(file, &made.bytes)?;
        // Last, as its presence says that the other is whole.
        fs::write(&count, made.commands.to_string())?;
        Ok(made)
    }

    /// Keys, as there is one command a key.
    pub fn keys(&self) -> u64 {
        self.commands
    }

    /// Bytes on the wire.
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Pipes everything into one empty server; the time until its last answer.
    pub fn pipe_into(&self, target: &Server) -> Result<Duration> {
        let started = Instant::now();
        let mut pipe = Pipe::open(target.port())?;
        pipe.write_all(&self.bytes)?;
        pipe.finish(self.commands)?;
        Ok(started.elapsed())
    }
}

/// RESTORE without REPLACE, the expiry as time left: the cheapest form for the target.
fn dump_all(source: &Server) -> Result<Prepared> {
    let mut client = source.client()?;
    let mut made = Prepared { bytes: Vec::new(), commands: 0 };
    let mut cursor = b"0".to_vec();
    loop {
        let page = client.call(&[b"SCAN".as_slice(), &cursor, b"COUNT", b"2000"])?.into_array()?;
        let mut page = page.into_iter();
        cursor = page.next().context("SCAN without cursor")?.into_bytes()?;
        let keys = page.next().context("SCAN without keys")?.into_array()?;
        let keys: Vec<Vec<u8>> = keys.into_iter().map(Reply::into_bytes).collect::<Result<_>>()?;
        dump_page(&mut client, &keys, &mut made)?;
        if cursor == b"0" {
            return Ok(made);
        }
    }
}

fn dump_page(client: &mut Client, keys: &[Vec<u8>], made: &mut Prepared) -> Result<()> {
    for key in keys {
        client.queue(&[b"PTTL".as_slice(), key]);
        client.queue(&[b"DUMP".as_slice(), key]);
    }
    client.flush()?;
    for key in keys {
        let Reply::Integer(left) = client.reply()? else { bail!("PTTL did not answer a number") };
        let payload = client.reply()?.into_bytes()?;
        let ttl = left.max(0).to_string();
        encode(&mut made.bytes, &[b"RESTORE".as_slice(), key, ttl.as_bytes(), &payload]);
        made.commands += 1;
    }
    Ok(())
}
