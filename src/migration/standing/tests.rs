use super::*;
use crate::spool::Origin;

fn origin(id: &str) -> Option<Origin> {
    Some(Origin { replication_id: id.to_owned(), offset: 1 })
}

/// In step, after so many full resyncs.
fn shard(resyncs: u64) -> (Numbers, LinkState, Seat) {
    let numbers = Numbers {
        phase: ShardPhase::IncrementalSync,
        replication_id: format!("history {resyncs}"),
        ..Numbers::default()
    };
    let link = LinkState {
        phase: LinkPhase::Streaming,
        origin: origin(&format!("history {resyncs}")),
        full_resyncs: resyncs,
        full_resync_reason: "it asked for it".to_owned(),
        ..LinkState::default()
    };
    (numbers, link, Seat::default())
}

struct Watched {
    standing: Standing,
    began: Instant,
}

impl Watched {
    fn new() -> Self {
        Self { standing: Standing::default(), began: Instant::now() }
    }

    fn at(&mut self, seconds: u64, shards: &[(Numbers, LinkState, Seat)]) -> Option<Stands> {
        let names = ["a", "b", "c"];
        let seen = shards.iter().zip(names);
        let seen = seen.map(|((numbers, link, seat), id)| Seen {
            id: id.to_owned(),
            numbers: numbers.clone(),
            link: link.clone(),
            seat: seat.clone(),
        });
        self.standing.judge(seen, self.began + Duration::from_secs(seconds))
    }
}

fn lost(link: &mut LinkState) {
    link.phase = LinkPhase::Connecting;
    link.last_error = "refused".to_owned();
}

#[test]
fn a_link_that_is_lost_is_told_once_it_lasts_and_told_of_when_it_is_back() {
    let mut watched = Watched::new();
    let well = [shard(0), shard(2)];
    let mut broken = well.clone();
    lost(&mut broken[1].1);
    assert_eq!(watched.at(0, &well), Some(Stands::InStep));
    assert_eq!(watched.at(1, &well), None);
    // It comes and goes.
    assert_eq!(watched.at(2, &broken), None);
    assert_eq!(watched.at(16, &broken), None);
    assert_eq!(watched.at(16, &well), None);
    assert_eq!(watched.at(17, &broken), None);
    assert_eq!(watched.at(31, &broken), None);
    let message = "shard b is not in sync: refused".to_owned();
    let told = Stands::Lost { reason: reason::SOURCE_UNREACHABLE, message };
    assert_eq!(watched.at(32, &broken), Some(told));
    assert_eq!(watched.at(33, &broken), None);
    assert_eq!(watched.at(34, &well), Some(Stands::InStep));
    assert_eq!(watched.at(35, &well), None);
}

#[test]
fn a_copy_is_told_at_once_and_until_the_stream_after_it_is_followed() {
    let mut watched = Watched::new();
    assert_eq!(watched.at(0, &[shard(0)]), Some(Stands::InStep));
    // Announced: what stands is still of the history before.
    let mut again = shard(0);
    again.1.full_resyncs = 1;
    again.1.full_resync_reason = "it asked for it".to_owned();
    again.1.phase = LinkPhase::Connecting;
    let copying = Stands::Copying { message: "copying shard a again: it asked for it".to_owned() };
    assert_eq!(watched.at(1, &[again.clone()]), Some(copying));
    again.1.phase = LinkPhase::Streaming;
    again.1.origin = origin("history 1");
    assert_eq!(watched.at(2, &[again.clone()]), None);
    again.0.phase = ShardPhase::FullSync;
    assert_eq!(watched.at(3, &[again.clone()]), None);
    assert_eq!(watched.at(60, &[shard(1)]), Some(Stands::InStep));
    // From there it is lost as any other.
    let mut gone = shard(1);
    lost(&mut gone.1);
    assert_eq!(watched.at(61, &[gone.clone()]), None);
    assert!(matches!(watched.at(80, &[gone]), Some(Stands::Lost { .. })));
}

#[test]
fn what_is_wrong_is_named() {
    type Change = fn(&mut (Numbers, LinkState, Seat));
    let cases: [(Change, &str, &str); 5] = [
        (|(_, link, _)| lost(link), reason::SOURCE_UNREACHABLE, "refused"),
        (
            |(_, link, _)| link.phase = LinkPhase::Connecting,
            reason::SOURCE_UNREACHABLE,
            "its source is not followed",
        ),
        (|(numbers, ..)| numbers.waiting = "OOM".to_owned(), reason::TARGET_UNREACHABLE, "OOM"),
        (|(.., seat)| seat.silent = true, reason::INCREMENTAL_SYNC, "nothing is heard of its worker"),
        (|(numbers, ..)| numbers.stopped = true, reason::INCREMENTAL_SYNC, "nothing is heard of its worker"),
    ];
    for (change, reason, why) in cases {
        let mut watched = Watched::new();
        let mut broken = shard(0);
        change(&mut broken);
        assert_eq!(watched.at(0, &[shard(0)]), Some(Stands::InStep));
        assert_eq!(watched.at(1, &[broken.clone()]), None);
        let message = format!("shard a is not in sync: {why}");
        assert_eq!(watched.at(20, &[broken]), Some(Stands::Lost { reason, message }));
    }
}
