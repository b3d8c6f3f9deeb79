//! A shard's worker in another replica, as the coordinator follows it: its orders go out when they change, and what
//! it tells is put down as if it were here.

use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::api::Target;
use super::placing::Placing;
use super::seats::Seat;
use crate::migration::shard::{Orders, Over, Start};
use crate::worker::{Failed, ShardProgress, Stopped, WorkerError, WorkerSetup};

/// How often it is looked whether the replica is still there.
const LOOK: Duration = Duration::from_secs(1);
const ORDER_AGAIN: Duration = Duration::from_secs(1);
/// A replica that says nothing for so long after a shard was given to it does not know how to begin, as an older
/// version.
const FIRST_WORD_MAX: Duration = Duration::from_secs(30);

/// How it came that a worker is not followed any more.
pub enum Followed {
    /// For the migration's coordinator to judge.
    Over(Result<Stopped, Failed>),
    /// It stopped for another replica to go on.
    Moves(Stopped),
    /// Its replica is gone, or somebody took its Lease away.
    Lost(String),
    /// Its replica could not begin.
    Declined(String),
    /// It goes on under another coordinator.
    Left,
}

struct Follower<'a> {
    placing: &'a Placing,
    progress: &'a ShardProgress,
    setup: &'a WorkerSetup,
    holder: String,
    epoch: i32,
    start: Start,
    /// What was ordered last; `None`: by an earlier coordinator.
    ordered: Option<Orders>,
    moves: bool,
    /// It has not said anything since then.
    waits_since: Option<Instant>,
}

pub async fn follow(
    placing: &Placing,
    setup: &WorkerSetup,
    progress: &ShardProgress,
    mut drain: watch::Receiver<bool>,
    seat: Seat,
) -> Followed {
    let key = placing.key(&setup.lineage);
    let context = &placing.context;
    let target = Target::of(&placing.object);
    let mut told = context.seats.follow(&key);
    let mut follower = Follower::new(placing, setup, progress, seat);
    let (mut release, mut wanted) = (progress.release.subscribe(), progress.wanted.subscribe());
    let (mut asked, mut plans) = (progress.asked.subscribe(), placing.plans.clone());
    let mut owners = placing.owners.subscribe();
    let mut tick = tokio::time::interval(LOOK);
    let mut again_at: Option<Instant> = None;
    loop {
        let seat = told.borrow_and_update().clone();
        let drains = *drain.borrow();
        if let Some(end) = follower.hear(seat, drains) {
            return end;
        }
        if *drain.borrow() && placing.leaves() {
            return Followed::Left;
        }
        if context.members.is_gone(&follower.holder) {
            return Followed::Lost(follower.holder);
        }
        let silent = !context.members.has_contact();
        if follower.waits_since.is_some_and(|since| since.elapsed() > FIRST_WORD_MAX) && !silent {
            let why = format!("{} said nothing for {} s", follower.holder, FIRST_WORD_MAX.as_secs());
            return Followed::Declined(why);
        }
        progress.seat.send_if_modified(|seat| std::mem::replace(&mut seat.silent, silent) != silent);
        follower.moves |= placing.owner(&setup.lineage) != follower.holder;
        let stops = *drain.borrow() || follower.moves;
        let generation = plans.borrow_and_update().generation;
        let orders = Orders::of(follower.start.clone(), generation, stops, progress);
        if follower.ordered.as_ref() != Some(&orders) && again_at.is_none_or(|at| Instant::now() >= at) {
            let ordered = context.seats.edit(&target, &key, |seat| follower.order(seat, &orders)).await;
            again_at = None;
            match ordered {
                Ok(true) => follower.ordered = Some(orders),
                // What is true instead has been heard by now, or will soon be.
                Ok(false) => again_at = Some(Instant::now() + ORDER_AGAIN),
                Err(error) => {
                    tracing::debug!(shard = %setup.shard, %error, "a worker cannot be told what to do, trying again");
                    again_at = Some(Instant::now() + ORDER_AGAIN);
                }
            }
            continue;
        }
        let drained = *drain.borrow();
        tokio::select! {
            Ok(()) = told.changed() => {}
            Ok(()) = release.changed() => {}
            Ok(()) = wanted.changed() => {}
            Ok(()) = asked.changed() => {}
            Ok(()) = plans.changed() => {}
            Ok(()) = owners.changed() => {}
            Ok(_) = drain.wait_for(|drain| *drain), if !drained => {}
            _ = tick.tick() => {}
        }
    }
}

impl<'a> Follower<'a> {
    fn new(placing: &'a Placing, setup: &'a WorkerSetup, progress: &'a ShardProgress, seat: Seat) -> Self {
        let Seat { holder, epoch, coordinator, orders, report } = seat;
        let orders = orders.unwrap_or_default();
        // What an earlier coordinator ordered goes on to hold.
        progress
            .release
            .send_if_modified(|release| !std::mem::replace(release, *release || orders.release) && *release);
        progress.wanted.send_if_modified(|wanted| {
            let news = wanted.is_none() && orders.wanted.is_some();
            if news {
                wanted.clone_from(&orders.wanted);
            }
            news
        });
        progress.asked.send_modify(|asked| {
            if asked.number < orders.asked.number {
                *asked = orders.asked;
            }
        });
        let waits_since = report.is_none().then(Instant::now);
        progress.answered.send_replace(report.map_or(0, |report| report.answered));
        Self {
            placing,
            progress,
            setup,
            holder,
            epoch,
            start: orders.start.clone(),
            moves: orders.drain,
            waits_since,
            ordered: Some(orders).filter(|_| coordinator == placing.token),
        }
    }

    /// `Some`: that was the end of it.
    fn hear(&mut self, seat: Option<Seat>, drains: bool) -> Option<Followed> {
        let Some(seat) = seat else { return Some(Followed::Lost(self.holder.clone())) };
        let left = seat.holder.is_empty() && seat.epoch == self.epoch;
        if !left && (seat.epoch != self.epoch || seat.holder != self.holder)
            || self.ordered.is_some() && seat.coordinator != self.placing.token
        {
            let message = "another replica coordinates this migration now".to_owned();
            let error = WorkerError::Fenced(message);
            return Some(Followed::Over(Err(Failed { error, left: Stopped::default() })));
        }
        if let Some(report) = &seat.report {
            self.waits_since = None;
            report.put_into(self.progress);
        }
        match seat.report.and_then(|report| report.over) {
            None if left => Some(Followed::Lost(self.holder.clone())),
            None => None,
            Some(Over::Declined { why }) => Some(Followed::Declined(why)),
            Some(over) => {
                if left {
                    self.placing.context.members.leaves(&self.holder);
                }
                match over.result(&self.setup.shard) {
                    Ok(stopped) if !drains => Some(Followed::Moves(stopped)),
                    result => Some(Followed::Over(result)),
                }
            }
        }
    }

    /// False: it is not ours to order any more.
    fn order(&self, seat: &mut Seat, orders: &Orders) -> bool {
        let coordinates = self.ordered.is_none() || seat.coordinator == self.placing.token;
        if seat.holder != self.holder || seat.epoch != self.epoch || !coordinates {
            return false;
        }
        self.placing.token.clone_into(&mut seat.coordinator);
        seat.orders = Some(orders.clone());
        true
    }
}
