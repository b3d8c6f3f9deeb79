//! Giving held expiries back, between the blocks of the stream.

use std::collections::BTreeMap;
use std::time::Instant;

use futures::future::try_join_all;

use super::connecting::unconnected;
use super::{Applier, Interrupted, Stage, Work};
use crate::target::fence::Closing;
use crate::worker::keeper;
use crate::worker::release::{self, NodeSweep, Sweep, owners};

/// Sweeps until it is given up over these connections.
const MOST_PASSES: u32 = 5;
/// Nobody gives expiries back while the target is further behind, in ms.
const LAG: u64 = 1000;

impl Applier {
    /// What is held from now on is what the release says.
    pub(super) fn hold(&mut self) {
        let holding = self.release.holding();
        self.rules.holding = holding;
        self.stream_rules.holding = holding;
        self.numbers.holding = !self.release.is_done();
    }

    /// All over again, as something was lost or has to be run again.
    pub(super) fn hold_again(&mut self) {
        self.release.reset();
        self.hold();
    }

    /// True when a part of the held expiries is to be given back now.
    pub(super) fn releases(&self) -> bool {
        !self.release.is_done()
            && *self.progress.release.borrow()
            && matches!((&self.work, &self.stands.stage), (Work::Stream(_), Stage::Stream(_)))
            && self.release.is_due(!self.reader.is_ready())
            && self.may_send()
            && self.may_mark()
            && self.lag().1 <= LAG
    }

    /// Gives a page back, with nothing of the stream under way; more where the stream has to wait.
    pub(super) async fn release_some(&mut self) -> Result<(), Interrupted> {
        let began = Instant::now();
        loop {
            self.flush().await?;
            self.wait_idle().await?;
            self.release.begin_page();
            self.release_page().await?;
            self.numbers.released = self.release.released;
            self.publish();
            if self.release.is_done() || !self.release.is_exclusive() {
                break;
            }
        }
        self.release.rest(began.elapsed());
        Ok(())
    }

    async fn release_page(&mut self) -> Result<(), Interrupted> {
        if matches!(self.release.stage, release::Stage::Holding) {
            tracing::info!(shard = %self.setup.shard, "giving keys on the target their expiries back");
            self.release.stage = release::Stage::Keys(self.sweep().await?);
            self.hold();
        }
        let release::Stage::Keys(sweep) = &mut self.release.stage else { return Ok(()) };
        let pages = sweep.nodes.iter_mut().map(NodeSweep::page);
        for page in try_join_all(pages).await.map_err(|error| unconnected(&error))? {
            self.release.released += page.released;
            if page.missed {
                self.release.carried.again();
            }
        }
        if sweep.nodes.iter().all(NodeSweep::is_done) {
            self.end_pass().await?;
        }
        Ok(())
    }

    /// All nodes were gone through: now what the sweep may have missed, and the fields of hashes.
    async fn end_pass(&mut self) -> Result<(), Interrupted> {
        let now = owners(&self.router, &self.setup.target_dialer).await;
        let now = now.map_err(|error| Interrupted::Lost(error.to_string()))?;
        let (keys, mut again) = self.release.carried.take();
        let release::Stage::Keys(sweep) = &mut self.release.stage else { return Ok(()) };
        // Keys of a slot that changed hands may have passed the sweep.
        again |= now != sweep.owners;
        let mut places: BTreeMap<(usize, u64), Vec<Vec<u8>>> = BTreeMap::new();
        for (db, key) in keys {
            places.entry((self.router.lane(&key), db)).or_default().push(key);
        }
        for ((lane, db), keys) in places {
            let Some(node) = sweep.nodes.iter_mut().find(|node| node.lane == lane) else {
                again = true;
                continue;
            };
            let page = node.keys(db, &keys).await.map_err(|error| unconnected(&error))?;
            self.release.released += page.released;
            again |= page.missed;
        }
        if !again && self.rules.dialect.field_expiry {
            let pages = sweep.nodes.iter_mut().map(NodeSweep::fields);
            for page in try_join_all(pages).await.map_err(|error| unconnected(&error))? {
                self.release.released += page.released;
                again |= page.missed;
            }
        }
        if again && self.release.passes >= MOST_PASSES {
            // What the lanes do not show: a node that has become a replica, say.
            let why = "keys of the target cannot be asked for their expiries; connecting again";
            return Err(Interrupted::Lost(why.to_owned()));
        }
        if again {
            let sweep = self.sweep().await?;
            self.release.repeat(sweep);
            return Ok(());
        }
        self.release.stage = release::Stage::Done;
        self.hold();
        let released = self.release.released;
        tracing::info!(shard = %self.setup.shard, released, "no expiry on the target is held any more");
        Ok(())
    }

    async fn sweep(&self) -> Result<Sweep, Interrupted> {
        let owners = owners(&self.router, &self.setup.target_dialer).await;
        let owners = owners.map_err(|error| Interrupted::Lost(error.to_string()))?;
        let slots = self.setup.slots.as_ref().filter(|_| !self.setup.sole_source);
        let mut nodes = Vec::new();
        for node in keeper::nodes(&self.router, &self.lane_addresses) {
            let connection = self.dial(&node, Closing::None).await?;
            nodes.push(NodeSweep::new(node.lane, connection, self.setup.target_version, slots.cloned()));
        }
        Ok(Sweep { nodes, owners })
    }
}
