//! Sending again what the target refused for a moment, in an order that comes out right.

use std::collections::BTreeMap;
use std::time::Instant;

use super::sending::undirected;
use super::{Applier, Interrupted};
use crate::worker::mending::{Mending, Plan, keys_of_units};
use crate::worker::outbox::Trouble;
use crate::worker::repair::Findings;

impl Applier {
    /// When commands have to be sent again: waits until nothing is under way, sends them, goes on.
    pub(super) async fn mend(&mut self) -> Result<(), Interrupted> {
        self.check_lost().await?;
        if self.troubles.is_empty() {
            return Ok(());
        }
        // What is gathered for a node that lost a slot goes to it first, and comes back: behind what is sent
        // again, and before what will find the slot's new owner.
        for lane in 0..self.outbox.lanes() {
            self.send(lane).await?;
        }
        self.wait_answers().await?;
        let mut troubles = std::mem::take(&mut self.troubles);
        troubles.sort_by_key(|trouble| (trouble.lane, trouble.batch.sequence));
        let mut lanes: BTreeMap<usize, Vec<(Trouble, Findings)>> = BTreeMap::new();
        for trouble in troubles {
            let findings = self.examine(&trouble);
            self.recopy.late.extend(keys_of_units(&findings.retry));
            lanes.entry(trouble.lane).or_default().push((trouble, findings));
        }
        for (lane, troubles) in lanes {
            self.outbox.hold(lane, false);
            self.mend_lane(troubles).await?;
        }
        self.recopy.late.clear();
        self.open_new_lanes().await?;
        self.advance();
        Ok(())
    }

    /// A lane was lost before what the target had refused was sent again. A replay begins behind what stands, and
    /// guards may stand that lie behind the refused commands: their keys are copied again.
    pub(super) fn recopy_what_was_refused(&mut self) {
        self.recopy.abandon(false);
        let mut late = std::mem::take(&mut self.recopy.late);
        if !self.router.is_cluster() || self.keeper.is_none() || !self.in_stream() {
            return;
        }
        for trouble in &self.troubles {
            late.extend(keys_of_units(&self.examine(trouble).retry));
        }
        if late.is_empty() {
            return;
        }
        let barrier = self.position() as i64 + self.offset_shift;
        self.recopy.barrier = Some(self.recopy.barrier.map_or(barrier, |before| before.max(barrier)));
        self.recopy.overtaken.get_or_insert_with(Instant::now);
        late.into_iter().for_each(|(db, key)| self.recopy.gate.spoil(db, key));
    }

    async fn mend_lane(&mut self, troubles: Vec<(Trouble, Findings)>) -> Result<(), Interrupted> {
        let mut mending = Mending::default();
        for (trouble, findings) in &troubles {
            mending.note(trouble, &findings.retry);
        }
        let first = troubles.iter().find_map(|(_, findings)| findings.retry.first());
        let why = first.map(|unit| unit.error.clone()).unwrap_or_default();
        let mut planned = Vec::with_capacity(troubles.len());
        for (trouble, mut findings) in troubles {
            let plan = mending.units(&trouble, std::mem::take(&mut findings.retry));
            planned.push((trouble, findings, plan));
        }
        let spoiled = mending.close(planned.iter_mut().map(|(_, _, plan)| plan));
        if mending.out_of_order || !spoiled.is_empty() {
            if !spoiled.is_empty() {
                self.spoil(spoiled, &why)?;
            }
            // Until they stand, the guards say too much: nobody may go on from here.
            if let Some(keeper) = &mut self.keeper {
                keeper.passed_barrier((self.base + self.at as u64) as i64 + self.offset_shift);
                self.write_records(true).await?;
                self.wait_answers().await?;
            }
        }
        if planned.iter().any(|(_, _, plan)| !plan.again.is_empty()) {
            // A node may have lost what it had been given.
            self.hold_again();
        }
        for (trouble, mut findings, Plan { again: units, left }) in planned {
            // What is sent again, or copied anew, was not refused for good.
            let refused = std::mem::take(&mut findings.refused).into_iter().zip(&findings.refused_at);
            let last =
                refused.filter(|(_, at)| !units.iter().any(|unit| unit.at == **at) && !left.contains(*at));
            findings.refused = last.map(|(refusal, _)| refusal).collect();
            self.settle_findings(&trouble, findings)?;
            let mut refused = Vec::new();
            {
                let guarding = self.guarding(self.position());
                let mut direct = self.direct(guarding);
                for unit in &units {
                    tracing::debug!(error = %unit.error, what = %unit.frames.escape_ascii(), "sent again");
                    refused.extend(direct.retry(unit).await.map_err(undirected)?);
                }
            }
            self.numbers.waiting.clear();
            for refusal in refused {
                self.refuse(trouble.batch.db.unwrap_or_default(), refusal)?;
            }
            self.outbox.answered(trouble.lane, trouble.batch);
        }
        Ok(())
    }
}
