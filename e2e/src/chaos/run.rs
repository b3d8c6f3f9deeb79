//! One run: data, load, tool, faults, and the comparison at the end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::deployment::{Deployment, How, Side};
use super::faults::Active;
use super::keeper::Keeper;
use super::plan::{Plan, Step};
use super::probe::Probe;
use super::report::Outcome;
use super::ways::Ways;
use super::{MOST_PATIENCE, PATIENCE, Void};
use crate::Manifest;
use crate::compare::{Report, Rules, compare_with};
use crate::dataset::Dataset;
use crate::load::Writer;

/// Keys of a snapshot that is to take its time.
const MANY: usize = 15_000;
/// Faults during it.
const SLOW_STEPS: usize = 3;

pub(super) struct Run<'a> {
    pub plan: &'a Plan,
    pub source: &'a mut Deployment,
    pub target: &'a mut Deployment,
    pub to_source: Ways,
    pub to_target: Ways,
    pub keeper: Keeper,
    pub writer: Option<Writer>,
    pub probe: Probe,
    /// Faults that hold on.
    pub active: Vec<Active>,
    pub outcome: Outcome,
    /// The target is slow yet.
    slow: bool,
    started: Instant,
}

/// Both deployments are fresh. Whatever goes wrong is in the outcome.
pub(super) fn run(
    plan: &Plan,
    unguarded: bool,
    source: &mut Deployment,
    target: &mut Deployment,
) -> Result<Outcome> {
    let started = Instant::now();
    fill(plan, source)?;
    let to_source = Ways::open(Side::Source, source)?;
    let to_target = Ways::open(Side::Target, target)?;
    let manifest = manifest(plan, unguarded, source, target)?;
    let manifest = to_source.describe(manifest, source);
    let manifest = to_target.describe(manifest, target);
    let mut run = Run {
        plan,
        probe: Probe::new(source.finder(), target.finder()),
        source,
        target,
        to_source,
        to_target,
        keeper: Keeper::new(manifest, unguarded)?,
        writer: None,
        active: Vec::new(),
        outcome: Outcome::new(plan),
        slow: false,
        started,
    };
    match run.live() {
        Ok(report) => run.outcome.compared(&report),
        Err(error) => {
            run.outcome.void = error.chain().any(|cause| cause.is::<Void>());
            run.outcome.error = Some(format!("{error:#}"));
        }
    }
    run.end();
    Ok(run.outcome)
}

fn fill(plan: &Plan, source: &Deployment) -> Result<()> {
    let Plan { seed, rounds, load, slow_start, .. } = plan;
    let many = if slow_start.is_some() { MANY } else { 0 };
    let databases: Vec<u32> = load.databases.iter().copied().filter(|&database| database != 0).collect();
    let dataset = Dataset { seed: *seed, rounds: *rounds, large: 600, long: 200_000, many, databases };
    dataset.fill(&mut source.finder().client()?).context("filling the source")?;
    source.configure("rdb-key-save-delay", &plan.key_delay.to_string())?;
    source.configure("repl-diskless-sync", if plan.diskless { "yes" } else { "no" })
}

fn manifest(plan: &Plan, unguarded: bool, source: &Deployment, target: &Deployment) -> Result<Manifest> {
    let manifest = Manifest::between(&source.finder().endpoint()?, &target.finder().endpoint()?)
        .set("/metadata/name", format!("chaos-{}", plan.seed))
        .set("/spec/delivery", "ExactlyOnce")
        .set("/spec/verification/mode", "Off");
    // What unguarded replays are refused must not end the run before its data can be compared.
    let manifest =
        if unguarded { manifest.set("/spec/failurePolicy/maxQuarantined", 1_000_000) } else { manifest };
    Ok(plan.fields.iter().fold(manifest, |manifest, (path, value)| manifest.set(path, value.clone())))
}

impl Run<'_> {
    fn live(&mut self) -> Result<Report> {
        let finder = self.source.finder();
        let writer = Writer::follow(move || finder.client(), self.plan.load.clone());
        self.writer = Some(writer.context("the writer")?);
        self.written(300)?;
        if self.plan.slow_start.is_some() {
            self.slow = true;
            self.to_target.each(|proxy| proxy.limit(self.plan.slow_start));
        }
        self.keeper.start()?;
        if self.plan.in_sync {
            self.caught_up().context("before the first fault")?;
        }
        let plan = self.plan;
        for (number, step) in plan.steps.iter().enumerate() {
            if number == SLOW_STEPS {
                self.speed_up();
            }
            self.step(step).with_context(|| step.fault.name())?;
        }
        self.finish()
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        self.written(step.before)?;
        if step.fault.stands_alone() {
            self.quiet()?;
        }
        if step.fault.needs_slots_at_rest() {
            let (slots, others) = std::mem::take(&mut self.active)
                .into_iter()
                .partition(|active| matches!(active, Active::Slots(..)));
            self.active = others;
            let slots: Vec<Active> = slots;
            slots.into_iter().try_for_each(|active| self.over(active))?;
        }
        self.note(step.fault.name());
        let mut earlier = std::mem::take(&mut self.active);
        self.begin(step)?;
        *self.outcome.faults.entry(step.fault).or_default() += 1;
        earlier.drain(..).try_for_each(|active| self.over(active))?;
        if !self.active.is_empty() {
            self.written(step.hold)?;
        }
        if !step.overlaps || step.settles {
            self.quiet()?;
        }
        if step.settles {
            self.caught_up()?;
        }
        Ok(())
    }

    /// Nothing holds on any more.
    fn quiet(&mut self) -> Result<()> {
        std::mem::take(&mut self.active).into_iter().try_for_each(|active| self.over(active))
    }

    /// So many more commands of the writer, the tool being started again where it has to be.
    pub fn written(&mut self, count: u64) -> Result<()> {
        let writer = self.writer.as_ref().context("the writer has been stopped")?;
        let wanted = writer.commands() + count;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let writer = self.writer.as_ref().context("the writer has been stopped")?;
            if writer.commands() >= wanted {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the writer could not write {count} commands in {PATIENCE:?}");
            // A command is about a third of a millisecond.
            let _ = writer.wait_more(1, Duration::from_millis(50));
            if self.keeper.counts.starts > 0 {
                self.keeper.watch()?;
            }
        }
    }

    /// The slow start is over.
    fn speed_up(&mut self) {
        if std::mem::take(&mut self.slow) {
            self.note("the target is slow no more");
            self.to_target.each(|proxy| proxy.limit(None));
        }
    }

    /// All that was written until now has arrived.
    pub fn caught_up(&mut self) -> Result<()> {
        self.speed_up();
        wait_probe(&mut self.probe, &mut self.keeper)
    }

    /// Ends the faults, brings source and target to rest, and compares them.
    fn finish(&mut self) -> Result<Report> {
        self.quiet()?;
        self.note("end");
        self.to_source.heal();
        self.to_target.heal();
        self.source.ready().context("the source, at the end")?;
        self.target.ready().context("the target, at the end")?;
        if let Some(writer) = self.writer.take() {
            writer.stop()?;
        }
        self.caught_up().context("at the end, nothing being written any more")?;
        self.note("caught up");
        ensure!(self.keeper.stop()?, "the tool was not there to be stopped");
        let report = self.compare()?;
        let quarantined = self.keeper.counts.quarantined;
        // What must not be refused is not made up for by equal data: another run may be less lucky.
        if report.differences.is_empty() && quarantined > 0 {
            bail!("{quarantined} commands quarantined, though no key differs");
        }
        Ok(report)
    }

    fn compare(&self) -> Result<Report> {
        let (source, target) = (self.source.finder().endpoint()?, self.target.finder().endpoint()?);
        let report = compare_with(&source, &target, &Rules::default())?;
        if report.differences.is_empty() {
            return Ok(report);
        }
        // What expires now is there on one side only for a moment.
        std::thread::sleep(Rules::default().expiry_tolerance);
        compare_with(&source, &target, &Rules::default())
    }

    fn end(&mut self) {
        let _ = self.keeper.kill(false);
        self.outcome.counts = self.keeper.counts;
        self.outcome.took = self.started.elapsed();
        if self.outcome.is_exact() {
            return;
        }
        self.outcome.processes = std::mem::take(&mut self.keeper.ended);
        for (side, deployment) in [(Side::Source, &*self.source), (Side::Target, &*self.target)] {
            for server in deployment.servers() {
                self.outcome.servers.push((format!("{}-{}", side.name(), server.port), server.log()));
            }
        }
    }

    pub fn note(&mut self, what: &str) {
        let at = self.started.elapsed().as_secs_f64();
        let written = self.writer.as_ref().map_or(0, Writer::commands);
        self.outcome.events.push(format!("{at:7.3} s, {written:6} written: {what}"));
    }

    /// Promotes a replica of this side; `step.hold` commands are written while it is cut off or away.
    pub fn fail_over(&mut self, side: Side, how: How, step: &Step) -> Result<()> {
        let Self { source, target, writer, keeper, .. } = self;
        let deployment = if side == Side::Source { source } else { target };
        // While a source master is away nobody writes to it, and nothing may be waited for.
        let wait = side == Side::Target || how == How::Behind;
        let count = if how == How::Behind { step.hold.max(200) } else { step.hold };
        deployment.fail_over(how, step.pick, &mut || {
            let writer = writer.as_ref().context("the writer has been stopped")?;
            keeper.watch()?;
            if wait { writer.wait_more(count, PATIENCE) } else { Ok(()) }
        })
    }
}

/// The tool is started again where it has to be. As long as it gets on it is given time.
pub(super) fn wait_probe(probe: &mut Probe, keeper: &mut Keeper) -> Result<()> {
    probe.renew();
    let end = Instant::now() + MOST_PATIENCE;
    let (mut deadline, mut furthest) = (Instant::now() + PATIENCE, 0);
    loop {
        keeper.watch()?;
        let last = match probe.arrived() {
            Ok(true) if keeper.is_past_snapshots() => return Ok(()),
            // A snapshot that was taken since brings it before other keys.
            Ok(true) => String::from("it has arrived with a snapshot that is not whole yet"),
            Ok(false) => String::from("not all of it has arrived"),
            Err(error) => format!("{error:#}"),
        };
        let applied = keeper.applied();
        if applied > furthest {
            furthest = applied;
            deadline = (Instant::now() + PATIENCE).min(end);
        }
        ensure!(
            Instant::now() < deadline,
            "the tool has not caught up, nor got on within {PATIENCE:?}: {last}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
