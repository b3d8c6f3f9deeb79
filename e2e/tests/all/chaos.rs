//! A short form of `make chaos`: a few seeds of each kind. A failure names its seed; `make chaos
//! CHAOS='--runs 1 --seed N --source .. --target ..'` repeats it.

use std::path::Path;

use anyhow::{Result, ensure};
use e2e::chaos::{Arena, Choice, Fault, Outcome, Plan, Shape};

fn between(source: Shape, target: Shape) -> Choice {
    Choice { sources: vec![source], targets: vec![target], ..Choice::default() }
}

fn exact(arena: &mut Arena, plan: &Plan) -> Result<()> {
    let outcome = arena.run(plan)?;
    println!("{outcome}");
    ensure!(outcome.is_exact() || outcome.void, "{outcome}\n{}{}", outcome.details(), kept(&outcome));
    Ok(())
}

/// Logs stay beside the other output of the tests.
fn kept(outcome: &Outcome) -> String {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("chaos");
    match outcome.keep(&folder) {
        Ok(()) => format!("logs: {}", folder.join(format!("seed-{}", outcome.plan.seed)).display()),
        Err(error) => format!("no logs: {error:#}"),
    }
}

/// A load of nothing but commands that must not run twice, and a tool that is killed all the time.
fn kills(seed: u64, target: Shape) -> Result<Plan> {
    let choice = Choice {
        faults: vec![Fault::Kill, Fault::ResetTarget],
        steps: (8, 8),
        additive: Some(100),
        slow_start: Some(false),
        ..between(Shape::Standalone, target)
    };
    Plan::new(seed, &choice)
}

#[test]
fn exact_after_kills() -> Result<()> {
    let mut arena = Arena::new(false);
    exact(&mut arena, &kills(1, Shape::Standalone)?)?;
    exact(&mut arena, &kills(1, Shape::Cluster)?)
}

/// What a promoted replica lacks the spool does not hold any more: the worker begins again, on other nodes than at first.
#[test]
fn exact_after_failovers_of_the_target_that_the_spool_does_not_bridge() -> Result<()> {
    let choice = Choice {
        faults: vec![Fault::TargetFailover, Fault::TargetRollback],
        steps: (4, 4),
        slow_start: Some(false),
        fields: vec![("/spec/limits/spoolRetain".to_owned(), "0".into())],
        ..between(Shape::Standalone, Shape::Cluster)
    };
    exact(&mut Arena::new(false), &Plan::new(501, &choice)?)
}

/// Without its guards the same runs must differ: otherwise exact ones would show nothing. What a kill
/// catches in the middle is a matter of timing, so one of a few has to.
#[test]
fn without_guards_kills_differ() -> Result<()> {
    let mut arena = Arena::new(true);
    for seed in 1..=4 {
        let outcome = arena.run(&kills(seed, Shape::Cluster)?)?;
        println!("{outcome}");
        if !outcome.differences.is_empty() {
            return Ok(());
        }
    }
    anyhow::bail!("four runs without guards, and no difference: chaos would see none")
}

/// Killed in the full sync, time and again, it goes on with what it had on disk. What a kill catches is a matter
/// of timing, so one of a few runs has to.
#[test]
fn exact_after_kills_in_the_full_sync() -> Result<()> {
    let mut arena = Arena::new(false);
    let mut taken_up = 0;
    for seed in 1..=8 {
        if seed > 2 && taken_up > 0 {
            break;
        }
        let target = if seed % 2 == 1 { Shape::Standalone } else { Shape::Cluster };
        let choice = Choice {
            faults: vec![Fault::Kill, Fault::Stop],
            steps: (5, 5),
            slow_start: Some(true),
            ..between(Shape::Standalone, target)
        };
        let plan = Plan::new(seed, &choice)?;
        let outcome = arena.run(&plan)?;
        println!("{outcome}");
        ensure!(outcome.is_exact(), "{outcome}\n{}{}", outcome.details(), kept(&outcome));
        taken_up += outcome.counts.taken_up;
    }
    ensure!(taken_up > 0, "no run was caught with its spool on disk");
    Ok(())
}

#[test]
fn exact_whatever_fails() -> Result<()> {
    let mut arena = Arena::new(false);
    let shapes = [
        (Shape::Standalone, Shape::Standalone),
        (Shape::Sentinel, Shape::Sentinel),
        (Shape::Standalone, Shape::Cluster),
        (Shape::Cluster, Shape::Cluster),
    ];
    for (seed, (source, target)) in (1..).zip(shapes) {
        exact(&mut arena, &Plan::new(seed, &between(source, target))?)?;
    }
    Ok(())
}
