use super::*;

/// An object that nobody has looked at yet.
const NEW: Situation = Situation {
    deleting: false,
    finalizer: false,
    suspend: false,
    recorded: Recorded::Nothing,
    kept: false,
    observed: false,
    parked: false,
    claim: Claim::Free,
    run: Run::Idle,
};
const MINE: Situation = Situation { claim: Claim::Mine, ..NEW };
const THEIRS: Situation = Situation { claim: Claim::Theirs, ..NEW };
const RUNNING: Situation =
    Situation { run: Run::Running { current: true }, finalizer: true, observed: true, ..MINE };

fn ended(end: End) -> Situation {
    Situation { run: Run::Ended(end), ..RUNNING }
}

#[test]
fn each_situation_has_its_step() {
    let table = [
        ("new", NEW, Step::Claim),
        ("claimed", MINE, Step::Start),
        ("another's", THEIRS, Step::Wait),
        ("running", RUNNING, Step::Wait),
        ("its spec changed", Situation { run: Run::Running { current: false }, ..RUNNING }, Step::Update),
        ("its Lease was deleted", Situation { claim: Claim::Free, ..RUNNING }, Step::Claim),
        ("its Lease was taken", Situation { claim: Claim::Theirs, ..RUNNING }, Step::Stop(Why::Lost)),
        ("suspended while running", Situation { suspend: true, ..RUNNING }, Step::Stop(Why::Suspended)),
        ("deleted while running", Situation { deleting: true, ..RUNNING }, Step::Stop(Why::Deleted)),
        ("stopping", Situation { run: Run::Stopping, deleting: true, ..RUNNING }, Step::Wait),
        ("stopped", ended(End::Stopped), Step::Forget),
        ("done", ended(End::Completed), Step::Conclude),
        (
            "done, though the Lease is lost",
            Situation { claim: Claim::Theirs, ..ended(End::Completed) },
            Step::Conclude,
        ),
        ("failed", ended(End::Failed), Step::Conclude),
        ("failed, nobody's Lease", Situation { claim: Claim::Free, ..ended(End::Failed) }, Step::Conclude),
        ("failed, Lease lost", Situation { claim: Claim::Theirs, ..ended(End::Failed) }, Step::Forget),
        ("source away", ended(End::Transient), Step::PutOff),
        ("source away, suspended", Situation { suspend: true, ..ended(End::Transient) }, Step::Forget),
        ("shut out, Lease lost", Situation { claim: Claim::Theirs, ..ended(End::Superseded) }, Step::Forget),
        ("shut out, Lease held", ended(End::Superseded), Step::PutOff),
        ("waiting", Situation { run: Run::Waiting { current: true }, ..MINE }, Step::Wait),
        ("waiting, changed", Situation { run: Run::Waiting { current: false }, ..MINE }, Step::Start),
        ("waiting, Lease gone", Situation { run: Run::Waiting { current: true }, ..NEW }, Step::Claim),
        ("suspended from the start", Situation { suspend: true, ..MINE }, Step::ShowSuspended),
        ("suspended, told", Situation { suspend: true, parked: true, ..MINE }, Step::Release),
        ("suspended, told, free", Situation { suspend: true, parked: true, ..NEW }, Step::Wait),
        ("wrong spec, told", Situation { parked: true, ..MINE }, Step::Release),
        ("wrong spec, told, free", Situation { parked: true, ..NEW }, Step::Wait),
    ];
    for (what, situation, step) in table {
        assert_eq!(decide(&situation), step, "{what}: {situation:?}");
    }
}

#[test]
fn an_outcome_is_recorded_then_everything_is_given_back() {
    let recorded = Situation { recorded: Recorded::Completed, observed: true, finalizer: true, ..MINE };
    assert_eq!(decide(&recorded), Step::DropFinalizer);
    assert_eq!(decide(&Situation { finalizer: false, ..recorded }), Step::Release);
    assert_eq!(decide(&Situation { finalizer: false, claim: Claim::Free, ..recorded }), Step::Wait);
    assert_eq!(decide(&Situation { claim: Claim::Free, ..recorded }), Step::Claim);
    let changed = Situation { finalizer: false, observed: false, claim: Claim::Free, ..recorded };
    assert_eq!(decide(&changed), Step::Acknowledge);
    assert_eq!(decide(&Situation { suspend: true, ..changed }), Step::Acknowledge);
    let failed = Situation { recorded: Recorded::Failed, ..recorded };
    assert_eq!(decide(&failed), Step::DropFinalizer);
    assert_eq!(decide(&Situation { observed: false, ..failed }), Step::Start);
    // As long as it may be tried again, and the target holds something of it.
    assert_eq!(decide(&Situation { kept: true, ..failed }), Step::Release);
    assert_eq!(decide(&Situation { kept: true, ..recorded }), Step::DropFinalizer);
}

#[test]
fn what_is_deleted_is_cleaned_up_by_whoever_may() {
    let deleted = Situation { deleting: true, finalizer: true, ..NEW };
    assert_eq!(decide(&deleted), Step::Claim);
    assert_eq!(decide(&Situation { claim: Claim::Mine, ..deleted }), Step::CleanUp);
    assert_eq!(decide(&Situation { claim: Claim::Theirs, ..deleted }), Step::Wait);
    assert_eq!(decide(&Situation { claim: Claim::Mine, finalizer: false, ..deleted }), Step::Release);
    assert_eq!(decide(&Situation { finalizer: false, ..deleted }), Step::Wait);
    for recorded in [Recorded::Completed, Recorded::Failed] {
        let deleted = Situation { recorded, claim: Claim::Mine, suspend: true, parked: true, ..deleted };
        assert_eq!(decide(&deleted), Step::CleanUp);
    }
}

/// Whatever happens, there is no writing to a target without the Lease.
#[test]
fn nothing_starts_without_the_lease() {
    for bits in 0..2u32.pow(5) {
        let bit = |n: u32| bits >> n & 1 == 1;
        for claim in [Claim::Free, Claim::Theirs] {
            for recorded in [Recorded::Nothing, Recorded::Completed, Recorded::Failed] {
                for run in [Run::Idle, Run::Waiting { current: true }, Run::Running { current: false }] {
                    let situation = Situation {
                        deleting: bit(0),
                        finalizer: bit(1),
                        suspend: bit(2),
                        observed: bit(3),
                        parked: bit(4),
                        recorded,
                        kept: bit(1),
                        claim,
                        run,
                    };
                    let step = decide(&situation);
                    let needs =
                        [Step::Start, Step::Update, Step::CleanUp, Step::DropFinalizer, Step::ShowSuspended];
                    assert!(!needs.contains(&step), "{situation:?} {step:?}");
                }
            }
        }
    }
}
