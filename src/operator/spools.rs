//! Spools of shards that nobody in this process goes on with: they take room that others need.

use super::context::Context;
use super::decide::Claim;
use super::seats::Seat;
use crate::migration::{DataDir, SpoolLeft};

/// Removes the spools of migrations that are no more, and of shards that another replica works on by now.
pub fn tidy(context: &Context, data_dir: &DataDir) {
    let left = data_dir.spools_left();
    if left.is_empty() || context.health.ready().is_err() {
        return;
    }
    let running = context.runs.targets();
    let mut doomed = Vec::new();
    // No worker begins meanwhile.
    context.agents.beside(|works_on| {
        for spool in left.into_iter().filter(|spool| !works_on(spool)) {
            let seat = context.seats.of_spool(&spool.name);
            let runs = running.iter().any(|target| target.uid == spool.uid);
            let claim = context.claims.of(&spool.uid, |identity| context.members.is_gone(identity));
            let elsewhere = claim == Claim::Theirs || !context.objects.has(&spool.uid);
            if is_of_no_use(&context.members.identity, seat.as_ref(), runs, elsewhere) {
                tracing::info!(path = %spool.path.display(), "removing a spool that is of no use any more");
                spool.doom();
                doomed.push(spool);
            }
        }
    });
    // Gigabytes, maybe; workers begin and end meanwhile.
    tokio::task::spawn_blocking(move || doomed.iter().for_each(SpoolLeft::remove));
}

/// `runs`: its migration does, in this process, which may work on the shard whatever the seat says: of a holder that
/// is gone, or of a coordinator that shares no more. `elsewhere`: another replica has it, or it is no more. While nobody
/// has it, this process may be the one that goes on.
fn is_of_no_use(identity: &str, seat: Option<&Seat>, runs: bool, elsewhere: bool) -> bool {
    match seat {
        _ if runs => false,
        Some(seat) => !seat.holder.is_empty() && seat.holder != identity,
        None => elsewhere,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_here_goes_on_with_is_of_no_use() {
        let of = |holder: &str| Seat { holder: holder.to_owned(), ..Seat::default() };
        let judged = |seat: Option<&Seat>, runs, elsewhere| is_of_no_use("a", seat, runs, elsewhere);
        assert!(judged(Some(&of("b")), false, false));
        // The holder died, and this replica works on the shard itself.
        assert!(!judged(Some(&of("b")), true, false));
        assert!(judged(None, false, true));
        for kept in [Some(&of("a")), Some(&of(""))] {
            assert!(!judged(kept, false, true));
        }
        assert!(!judged(None, true, true) && !judged(None, false, false));
    }
}
