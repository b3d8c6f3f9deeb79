//! Keys of every type and encoding that a version knows, the same ones for the same seed.

mod types;

use anyhow::{Result, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redis::Value;

use crate::{Batch, Client, Version};

/// What `fill` writes.
#[derive(Clone, Debug)]
pub struct Dataset {
    pub seed: u64,
    /// Times that each small form is written; the large ones are there once.
    pub rounds: usize,
    /// Elements of the largest collections.
    pub large: usize,
    /// Bytes of the largest string.
    pub long: usize,
    /// Further small keys of the old types, to have many.
    pub many: usize,
    /// Databases other than 0 to write to too (never in a cluster).
    pub databases: Vec<u32>,
}

impl Default for Dataset {
    fn default() -> Self {
        Self { seed: 1, rounds: 20, large: 2_000, long: 1 << 20, many: 0, databases: vec![1, 9] }
    }
}

impl Dataset {
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    pub fn rounds(mut self, rounds: usize) -> Self {
        self.rounds = rounds;
        self
    }

    pub fn databases(mut self, databases: &[u32]) -> Self {
        self.databases = databases.to_vec();
        self
    }

    /// Writes it and leaves the client in database 0.
    pub fn fill(&self, client: &mut Client) -> Result<()> {
        let databases = if client.is_cluster() { &[] } else { self.databases.as_slice() };
        for (i, &database) in [0].iter().chain(databases).enumerate() {
            client.select(database)?;
            let mut sink = Sink::new(client, StdRng::seed_from_u64(self.seed * 1000 + u64::from(database)));
            let rounds = if i == 0 { self.rounds } else { self.rounds.div_ceil(4) };
            for round in 0..rounds {
                types::small(&mut sink, round)?;
            }
            if i == 0 {
                types::large(&mut sink, self.large, self.long)?;
                types::many(&mut sink, self.many)?;
            }
            sink.flush()?;
        }
        client.select(0)?;
        types::functions(client)
    }
}

/// Gathers commands per node, and sends them in pipelines; any error reply is an error.
pub(crate) struct Sink<'a> {
    client: &'a mut Client,
    batches: Vec<Batch>,
    pub random: StdRng,
    pub version: Version,
}

impl<'a> Sink<'a> {
    fn new(client: &'a mut Client, random: StdRng) -> Self {
        let batches = client.nodes.iter().map(|_| Batch::default()).collect();
        let version = client.version;
        Self { client, batches, random, version }
    }

    /// A command for the node that serves `key`.
    pub fn add(&mut self, key: impl AsRef<[u8]>, words: &[&[u8]]) -> Result<()> {
        let node = self.client.node_of(key.as_ref())?;
        let Some(batch) = self.batches.get_mut(node) else { bail!("no such node") };
        batch.add(words);
        if batch.bytes.len() > 256 * 1024 || batch.count >= 1000 {
            self.flush()?;
        }
        Ok(())
    }

    pub fn flush(&mut self) -> Result<()> {
        for (node, batch) in self.client.nodes.iter_mut().zip(&mut self.batches) {
            for reply in node.pipeline(batch)? {
                if let Value::ServerError(error) = reply {
                    bail!("filling {}: {error:?}", node.address);
                }
            }
            batch.clear();
        }
        Ok(())
    }

    /// Letters that LZF compresses somewhat, as real text does.
    pub fn prose(&mut self, length: usize) -> Vec<u8> {
        const WORDS: [&str; 8] =
            ["order", "customer", "paid", "shipped", "warehouse", "2024-05-", "€", "null"];
        let mut text = Vec::with_capacity(length + 16);
        while text.len() < length {
            let word = WORDS.get(self.random.random_range(0..WORDS.len())).copied().unwrap_or_default();
            text.extend_from_slice(format!("{word}{} ", self.random.random_range(0..50)).as_bytes());
        }
        text.truncate(length);
        text
    }

    /// Bytes that do not compress.
    pub fn noise(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.random.random()).collect()
    }
}
