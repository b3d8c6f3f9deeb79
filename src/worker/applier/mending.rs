//! Sending again what the target refused for a moment, in an order that comes out right.

use std::collections::BTreeMap;

use super::sending::undirected;
use super::{Applier, Interrupted};
use crate::worker::WorkerError;
use crate::worker::mending::{Mending, Overtaken};
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
            lanes.entry(trouble.lane).or_default().push((trouble, findings));
        }
        for (lane, troubles) in lanes {
            self.outbox.hold(lane, false);
            self.mend_lane(troubles).await?;
        }
        self.open_new_lanes().await?;
        self.advance();
        Ok(())
    }

    async fn mend_lane(&mut self, troubles: Vec<(Trouble, Findings)>) -> Result<(), Interrupted> {
        let mut mending = Mending::default();
        for (trouble, findings) in &troubles {
            mending.note(trouble, &findings.retry);
        }
        let mut planned = Vec::with_capacity(troubles.len());
        for (trouble, mut findings) in troubles {
            let failed = std::mem::take(&mut findings.retry);
            let units = match mending.units(&trouble, failed.clone()) {
                Ok(units) => units,
                Err(Overtaken) if self.keeper.is_none() => failed,
                Err(Overtaken) => {
                    let why = failed.first().map(|unit| unit.error.clone()).unwrap_or_default();
                    return Err(WorkerError::Overtaken { shard: self.setup.shard.clone(), why }.into());
                }
            };
            // What is sent again was not refused for good.
            let refused = std::mem::take(&mut findings.refused).into_iter().zip(&findings.refused_at);
            let last = refused.filter(|(_, at)| !units.iter().any(|unit| unit.at == **at));
            findings.refused = last.map(|(refusal, _)| refusal).collect();
            planned.push((trouble, findings, units));
        }
        if mending.out_of_order
            && let Some(keeper) = &mut self.keeper
        {
            // Until they stand, the guards say too much: nobody may go on from here.
            keeper.passed_barrier((self.base + self.at as u64) as i64 + self.offset_shift);
            self.write_records(true).await?;
            self.wait_answers().await?;
        }
        for (trouble, findings, units) in planned {
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
