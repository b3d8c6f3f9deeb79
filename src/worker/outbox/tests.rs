use super::*;
use crate::target::keys::KeyNames;
use crate::target::lane::ExceptionKind;

fn outbox(lanes: usize) -> Outbox<&'static str> {
    Outbox::with_lanes(lanes)
}

/// One command for `lane`, as a batch that ends at `end`.
fn sent(outbox: &mut Outbox<&'static str>, lane: usize, end: u64) -> Batch {
    outbox.pending(lane).unwrap().command().extend_from_slice(b"*1\r\n$4\r\nPING\r\n");
    outbox.take_batch(lane, end, b"").unwrap()
}

fn answer(lane: usize, batch: Batch) -> LaneReport {
    LaneReport::Answered { lane, batch, exceptions: Vec::new() }
}

fn moved(lane: usize, batch: Batch) -> LaneReport {
    let kind = ExceptionKind::Error(b"MOVED 1 127.0.0.1:1".to_vec());
    LaneReport::Answered { lane, batch, exceptions: vec![Exception { index: 0, element: None, kind }] }
}

#[test]
fn a_mark_waits_for_every_batch_before_it_and_for_none_behind() {
    let mut outbox = outbox(2);
    let (first, second) = (sent(&mut outbox, 0, 10), sent(&mut outbox, 0, 20));
    let other = sent(&mut outbox, 1, 20);
    outbox.mark("twenty");
    let later = sent(&mut outbox, 0, 30);
    assert!(matches!(outbox.hear(moved(0, first)), Heard::Trouble(_)));
    outbox.hear(answer(0, second));
    outbox.hear(answer(0, later));
    outbox.hear(answer(1, other));
    // The first batch is answered, but what it holds does not stand yet.
    assert_eq!(outbox.reached(), None);
    outbox.answered(0, Batch { sequence: 1, ..Batch::default() });
    assert_eq!(outbox.reached(), Some("twenty"));
}

#[test]
fn nothing_overtakes_a_guarded_unit_of_its_slot() {
    let mut outbox = outbox(1);
    outbox.kept = Some(Kept::new(KeyNames::new("u", "0"), 1, 7));
    assert!(!outbox.follows_guarded(0, 5));
    outbox.append(0, 0, (b"*1\r\n$4\r\nPING\r\n", 1), Some(5), 40);
    // Neither while it is gathered nor while it is under way.
    assert!(outbox.follows_guarded(0, 5) && !outbox.follows_guarded(0, 6));
    let batch = outbox.take_batch(0, 50, b"").unwrap();
    assert!(outbox.follows_guarded(0, 5));
    assert!(matches!(outbox.hear(moved(0, batch)), Heard::Trouble(_)));
    assert!(outbox.follows_guarded(0, 5));
    outbox.answered(0, Batch { sequence: 1, ..Batch::default() });
    assert!(!outbox.follows_guarded(0, 5));
}

#[test]
fn answers_to_an_ended_history_do_not_let_commands_of_the_next_be_skipped() {
    let mut outbox = outbox(1);
    let old = sent(&mut outbox, 0, 1_000_000);
    outbox.begin();
    outbox.hear(answer(0, old));
    let new = sent(&mut outbox, 0, 50);
    outbox.hear(answer(0, new));
    outbox.rewind(true);
    assert!(outbox.is_applied(0, None, 50));
    assert!(!outbox.is_applied(0, None, 51));
}

/// The guard's own unit stands for certain; one before it may have been refused, unless its lane told that it was
/// not.
#[test]
fn what_is_before_a_guard_may_be_in_doubt() {
    let mut outbox = outbox(1);
    outbox.kept = Some(Kept::new(KeyNames::new("u", "0"), 1, 7));
    for doubtful in [true, false] {
        outbox.kept.as_mut().unwrap().set_guards(&[(5, 7, 60)], doubtful);
        assert!(outbox.is_applied(0, Some(5), 60) && outbox.is_applied(0, Some(5), 59));
        assert_eq!((outbox.is_doubtful(0, 5, 59), outbox.is_doubtful(0, 5, 60)), (doubtful, false));
    }
    outbox.kept.as_mut().unwrap().set_guards(&[(5, 7, 60)], true);
    outbox.slots[0].skip_to = 50;
    assert!(!outbox.is_doubtful(0, 5, 50) && outbox.is_doubtful(0, 5, 51));
}

#[test]
fn commands_of_an_ended_history_are_not_sent_again_over_the_next() {
    let mut outbox = outbox(1);
    let old = sent(&mut outbox, 0, 1_000);
    outbox.begin();
    let new = sent(&mut outbox, 0, 50);
    outbox.mark("fifty");
    assert!(matches!(outbox.hear(moved(0, old)), Heard::Fine));
    assert!(matches!(outbox.hear(moved(0, new)), Heard::Trouble(_)));
    assert_eq!(outbox.reached(), None);
}

#[tokio::test]
async fn a_late_report_of_an_ended_lane_reaches_nobody() {
    let mut outbox = outbox(1);
    let old = sent(&mut outbox, 0, 10);
    let late = outbox.reporter.clone();
    outbox.rewind(true);
    let new = sent(&mut outbox, 0, 10);
    assert!(late.send(moved(0, old)).await.is_err());
    outbox.reporter.clone().send(answer(0, new)).await.unwrap();
    let LaneReport::Answered { batch, exceptions, .. } = outbox.report().await else { panic!() };
    assert_eq!((batch.sequence, exceptions.len()), (2, 0));
}
