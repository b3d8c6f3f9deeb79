//! A client that keeps writing commands of every family until it is stopped.

mod additive;
mod families;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use redis::Value;

use crate::client::text;
use crate::{Batch, Client, Endpoint, Version};

/// What the writer does.
#[derive(Clone, Debug)]
pub struct Load {
    pub seed: u64,
    /// Commands a second, about.
    pub rate: u32,
    /// Databases written to in turn; a cluster has only 0.
    pub databases: Vec<u32>,
    /// All keys of one command, transaction or script under one hash tag, as a cluster needs.
    pub one_slot: bool,
    /// MOVE and SWAPDB between the databases, and now and then FLUSHDB of the last of them.
    pub across_databases: bool,
    /// Hash tags in use: fewer means that more commands meet on a key.
    pub tags: u32,
    /// Share of commands, in percent, that show at once when one is lost or runs twice.
    pub additive: u32,
    /// Keys that are about to expire get a later time, or lose it: a target that lags must not expire them.
    pub renewals: bool,
    /// Keys start with this.
    pub prefix: String,
    /// Names of commands that are left out; one that ends with `*` stands for all that begin so.
    pub without: &'static [&'static str],
}

impl Default for Load {
    fn default() -> Self {
        Self {
            seed: 1,
            rate: 4_000,
            databases: vec![0],
            one_slot: true,
            across_databases: false,
            tags: 40,
            additive: 0,
            renewals: false,
            prefix: "load".into(),
            without: &[],
        }
    }
}

/// What was written until the stop.
#[derive(Debug, Default)]
pub struct Written {
    pub commands: u64,
    /// Error replies that no command of the load should cause, by text.
    pub errors: BTreeMap<String, u64>,
}

pub struct Writer {
    stop: Arc<AtomicBool>,
    commands: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<Written>>>,
}

impl Writer {
    pub fn start(endpoint: &Endpoint, load: Load) -> Result<Self> {
        let client = Client::open(endpoint)?;
        Self::spawn(move |stop, counted| write(client, &load, stop, counted))
    }

    /// Writes to whatever `locate` finds, looked for again whenever a connection is lost or a server
    /// answers that it is not the one to write to. What is lost that way is not repeated, and no error
    /// reply is an error.
    pub fn follow(locate: impl Fn() -> Result<Client> + Send + 'static, load: Load) -> Result<Self> {
        let client = locate()?;
        Self::spawn(move |stop, counted| follow(client, &locate, &load, stop, counted))
    }

    fn spawn(work: impl FnOnce(&AtomicBool, &AtomicU64) -> Result<Written> + Send + 'static) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let commands = Arc::new(AtomicU64::new(0));
        let (stopping, counted) = (Arc::clone(&stop), Arc::clone(&commands));
        let thread = std::thread::spawn(move || work(&stopping, &counted));
        Ok(Self { stop, commands, thread: Some(thread) })
    }

    /// Commands so far.
    pub fn commands(&self) -> u64 {
        self.commands.load(Relaxed)
    }

    /// At least this many more commands were written, or the writer failed.
    pub fn wait_more(&self, count: u64, timeout: Duration) -> Result<()> {
        let wanted = self.commands() + count;
        crate::wait_until("commands of the writer", timeout, || {
            let ended = self.thread.as_ref().is_none_or(JoinHandle::is_finished);
            anyhow::ensure!(!ended, "the writer ended");
            Ok((self.commands() >= wanted).then_some(()))
        })
    }

    /// Stops it; all that was written has been answered. Unexpected error replies are an error.
    pub fn stop(mut self) -> Result<Written> {
        self.stop.store(true, Relaxed);
        let thread = self.thread.take().context("stopped twice")?;
        let written = thread.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        anyhow::ensure!(written.errors.is_empty(), "the writer met errors: {:?}", written.errors);
        Ok(written)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Replies that commands on random keys get now and then, and that change nothing.
const EXPECTED: [&str; 6] = [
    "no such key",
    "index out of range",
    "BUSYGROUP",
    "NOGROUP",
    "destination objects are the same",
    "existing key",
];

fn write(mut client: Client, load: &Load, stop: &AtomicBool, counter: &AtomicU64) -> Result<Written> {
    let mut written = Written::default();
    families::prepare(&mut client)?;
    let mut rounds = Rounds::new(load, &client);
    let start = Instant::now();
    while !stop.load(Relaxed) {
        rounds.fill(&client)?;
        for (node, batch) in client.nodes.iter_mut().zip(&mut rounds.batches) {
            for reply in node.pipeline(batch)? {
                note(&reply, &mut written.errors);
            }
            written.commands += batch.count as u64;
            batch.clear();
        }
        counter.store(written.commands, Relaxed);
        // A pace, so that the machine stays usable for what is under test.
        let due = Duration::from_secs_f64(written.commands as f64 / f64::from(load.rate.max(1)));
        if let Some(early) = due.checked_sub(start.elapsed()) {
            std::thread::sleep(early.min(Duration::from_millis(200)));
        }
    }
    Ok(written)
}

fn follow(
    mut client: Client,
    locate: &dyn Fn() -> Result<Client>,
    load: &Load,
    stop: &AtomicBool,
    counter: &AtomicU64,
) -> Result<Written> {
    let mut written = Written::default();
    families::prepare(&mut client)?;
    let mut rounds = Rounds::new(load, &client);
    while !stop.load(Relaxed) {
        let started = Instant::now();
        let before = written.commands;
        let mut here = rounds.fill(&client).is_ok();
        for (node, batch) in client.nodes.iter_mut().zip(&mut rounds.batches) {
            match node.pipeline(batch) {
                Ok(replies) => {
                    let away = replies.iter().filter(|reply| is_elsewhere(reply)).count();
                    here &= away == 0;
                    written.commands += (replies.len() - away) as u64;
                }
                Err(_) => here = false,
            }
        }
        counter.store(written.commands, Relaxed);
        // What an outage kept from being written is not made up for.
        let pace = Duration::from_secs_f64((written.commands - before) as f64 / f64::from(load.rate.max(1)));
        std::thread::sleep(pace.saturating_sub(started.elapsed()));
        while !here && !stop.load(Relaxed) {
            match locate() {
                Ok(found) => (client, here) = (found, true),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
    Ok(written)
}

/// The answer of a server that is not the one to write to, or not now. What a transaction queues
/// before its EXEC is refused one by one.
fn is_elsewhere(reply: &Value) -> bool {
    const CODES: [&str; 10] = [
        "MOVED",
        "ASK",
        "TRYAGAIN",
        "CLUSTERDOWN",
        "READONLY",
        "LOADING",
        "MASTERDOWN",
        "EXECABORT",
        "UNBLOCKED",
        "NOREPLICAS",
    ];
    matches!(reply, Value::ServerError(error) if CODES.contains(&error.code()))
}

/// What goes out at once: a few steps, gathered by the node that takes them.
struct Rounds<'a> {
    load: &'a Load,
    step: Step,
    batches: Vec<Batch>,
    turn: usize,
}

impl<'a> Rounds<'a> {
    fn new(load: &'a Load, client: &Client) -> Self {
        let step = Step {
            random: StdRng::seed_from_u64(load.seed),
            version: client.version,
            one_slot: load.one_slot,
            tags: load.tags.max(2),
            prefix: load.prefix.clone(),
            without: load.without,
            tag: 0,
            batch: Batch::default(),
            serial: 0,
        };
        Self { load, step, batches: Vec::new(), turn: 0 }
    }

    /// The next steps, into one batch for each node of the client.
    fn fill(&mut self, client: &Client) -> Result<()> {
        let Self { load, step, batches, turn } = self;
        batches.clear();
        batches.resize_with(client.nodes.len(), Batch::default);
        let databases = load.databases.as_slice();
        let database = databases.get(*turn % databases.len().max(1)).copied().unwrap_or(0);
        // A connection may be a new one at any turn; a cluster knows only database 0.
        if !client.is_cluster() {
            batches.iter_mut().for_each(|batch| batch.add(args!["SELECT", database.to_string()]));
        }
        for _ in 0..25 {
            step.tag = step.random.random_range(0..step.tags);
            let node = client.node_of(step.key("n").as_bytes())?;
            if load.additive > 0 && step.random.random_range(0..100) < load.additive {
                additive::any(step, load.renewals);
            } else {
                families::any(step);
            }
            step.move_into(batches.get_mut(node));
        }
        if load.across_databases && *turn % 8 == 7 {
            families::across(step, databases, *turn);
            step.move_into(batches.first_mut());
        }
        *turn += 1;
        Ok(())
    }
}

/// Errors may also stand inside the answer to EXEC.
fn note(reply: &Value, errors: &mut BTreeMap<String, u64>) {
    match reply {
        Value::ServerError(error) => {
            let message = format!("{} {}", error.code(), error.details().unwrap_or_default());
            if !EXPECTED.iter().any(|expected| message.contains(expected)) {
                *errors.entry(message).or_default() += 1;
            }
        }
        Value::Array(items) => items.iter().for_each(|item| note(item, errors)),
        _ => drop(text(reply)),
    }
}

/// One or a few commands that belong together.
pub(crate) struct Step {
    random: StdRng,
    version: Version,
    one_slot: bool,
    tags: u32,
    prefix: String,
    without: &'static [&'static str],
    tag: u32,
    batch: Batch,
    serial: u64,
}

impl Step {
    /// A key that holds values of this kind, from the pool of the step's tag.
    fn key(&mut self, kind: &str) -> String {
        self.key_of(kind, self.tag)
    }

    /// A second key for the same command.
    fn other(&mut self, kind: &str) -> String {
        let tag = if self.one_slot { self.tag } else { self.random.random_range(0..self.tags) };
        self.key_of(kind, tag)
    }

    fn key_of(&mut self, kind: &str, tag: u32) -> String {
        format!("{}:{{{tag}}}:{kind}:{}", self.prefix, self.random.random_range(0..4))
    }

    /// A key that is written once only.
    fn once(&mut self, kind: &str) -> String {
        self.serial += 1;
        format!("{}:{{{}}}:{kind}:once:{}", self.prefix, self.tag, self.serial)
    }

    fn below(&mut self, end: u32) -> String {
        self.random.random_range(0..end).to_string()
    }

    fn value(&mut self) -> Vec<u8> {
        let length = match self.random.random_range(0..20) {
            0 => 0,
            1 => 3_000,
            2..6 => 90,
            _ => 12,
        };
        (0..length).map(|_| self.random.random_range(b' '..=b'~')).collect()
    }

    fn add(&mut self, words: &[&[u8]]) {
        let name = words.first().copied().unwrap_or_default();
        let is = |left_out: &&str| match left_out.strip_suffix('*') {
            Some(start) => name.starts_with(start.as_bytes()),
            None => name == left_out.as_bytes(),
        };
        if !self.without.iter().any(is) {
            self.batch.add(words);
        }
    }

    fn move_into(&mut self, batch: Option<&mut Batch>) {
        let mut own = std::mem::take(&mut self.batch);
        if let Some(batch) = batch {
            batch.bytes.append(&mut own.bytes);
            batch.count += own.count;
        }
    }
}
