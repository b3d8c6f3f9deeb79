//! Has what was written to the source by now arrived? Told by keys of our own, which pass every way
//! from a source master to a target master; nothing that the tool says is believed.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::deployment::Finder;
use crate::client::bytes;
use crate::{Batch, Client};

/// Enough for each pair of three source and three target masters to have a few.
const KEYS: usize = 64;
/// And one in each slot that the load writes to, should it have moved: of its hash tags there are not more.
const TAGS: usize = 24;
/// A write may be lost with a source master: repeated after so long.
const AGAIN: Duration = Duration::from_millis(500);

pub struct Probe {
    source: Finder,
    target: Finder,
    number: u64,
    written: Option<Instant>,
    clients: [Option<Client>; 2],
}

impl Probe {
    pub fn new(source: Finder, target: Finder) -> Self {
        Self { source, target, number: 0, written: None, clients: [None, None] }
    }

    /// From here on `arrived` asks about a new number.
    pub fn renew(&mut self) {
        self.number += 1;
        self.written = None;
        // Masters may have changed, without the old ones saying so.
        self.clients = [None, None];
    }

    /// All keys on the target have the number. An error is no reason to stop asking.
    pub fn arrived(&mut self) -> Result<bool> {
        let result = self.ask();
        if result.is_err() {
            self.clients = [None, None];
        }
        result
    }

    fn ask(&mut self) -> Result<bool> {
        let number = self.number.to_string();
        let [source, target] = &mut self.clients;
        if self.written.is_none_or(|at| at.elapsed() > AGAIN) {
            let found = self.source.client()?;
            each(source.insert(found), |batch, key| batch.add(args!["SET", key, number]))?;
            self.written = Some(Instant::now());
        }
        let target = match target {
            Some(target) => target,
            None => target.insert(self.target.client()?),
        };
        let values = each(target, |batch, key| batch.add(args!["GET", key]))?;
        Ok(values.iter().all(|value| *value == number.as_bytes()))
    }
}

fn each(client: &mut Client, add: impl Fn(&mut Batch, &str)) -> Result<Vec<Vec<u8>>> {
    let mut batches: Vec<Batch> = client.nodes.iter().map(|_| Batch::default()).collect();
    let names = (0..KEYS).map(|i| i.to_string()).chain((0..TAGS).map(|tag| format!("{{{tag}}}")));
    for name in names {
        let key = format!("chaos:probe:{name}");
        let node = client.node_of(key.as_bytes())?;
        if let Some(batch) = batches.get_mut(node) {
            add(batch, &key);
        }
    }
    let mut values = Vec::new();
    for (node, batch) in client.nodes.iter_mut().zip(&batches) {
        for reply in node.pipeline(batch)? {
            if let redis::Value::ServerError(error) = reply {
                anyhow::bail!("{}: {error:?}", node.address);
            }
            values.push(bytes(&reply));
        }
    }
    Ok(values)
}
