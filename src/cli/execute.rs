//! Carries out one command: manifest → plan → engine, with signals, endpoints and the view around it.

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use redis_migration::api::manifest::Manifest;
use redis_migration::api::{Plan, Status, conditions, crd};
use redis_migration::migration::{
    self, DataDir, FindingLevel, Observers, Outcome, RunOptions, StopRequest, Until,
};
use redis_migration::operator;
use redis_migration::report::{self, OutputFormat, View};
use redis_migration::telemetry::http::{DEFAULT_LISTEN, Endpoints};
use redis_migration::telemetry::logging::{self, LogFormat};
use redis_migration::telemetry::{EngineGauges, Observed};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::{CheckArgs, Cli, Command, ManifestArgs, OperatorArgs, RunArgs, VerifyArgs, WatchArgs, files};

/// How the process ends; the numbers are a promise to scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Done = 0,
    Failed = 1,
    /// Bad arguments or manifest.
    Usage = 2,
    /// Verification found differences.
    Differences = 3,
    /// Stopped by a signal, checkpoint kept.
    Stopped = 4,
}

/// A drain is over within so long, or it is cut short.
const DRAIN_MAX: Duration = Duration::from_secs(10);
/// What a stop at once may take before the process just ends.
const STOP_MAX: Duration = Duration::from_millis(500);
/// Past the last status nothing is left to show, but a reader of standard output may be stuck.
const LAST_WORDS_MAX: Duration = Duration::from_secs(5);

/// Does what the command line says. `Err` is for faults of the machine, not of the migration.
pub fn execute(cli: &Cli) -> Result<Exit> {
    match &cli.command {
        Command::Run(args) => run(args, cli.log_format()),
        Command::Check(args) => check(args, cli.log_format()),
        Command::Verify(args) => verify(args, cli.log_format()),
        Command::Crd => print(&crd::yaml().context("the CustomResourceDefinition")?),
        Command::Operator(args) => operate(args, cli.log_format()),
        Command::Decode(args) => files::decode(args),
        Command::Stat(args) => files::stat(args),
    }
}

fn run(args: &RunArgs, log_format: LogFormat) -> Result<Exit> {
    let Some(plan) = plan(&args.manifest) else { return Ok(Exit::Usage) };
    let job = Job {
        work: Work::Run,
        until: args.until(),
        data_dir: args.data_dir.clone().map(|path| DataDir::new(path, None)),
        view: View::new(args.watched.output(), &plan.name, &plan.namespace),
        plan,
    };
    job.perform(&args.watched, log_format)
}

fn verify(args: &VerifyArgs, log_format: LogFormat) -> Result<Exit> {
    let Some(plan) = plan(&args.manifest) else { return Ok(Exit::Usage) };
    let job = Job {
        work: Work::Verify,
        until: Until::default(),
        data_dir: None,
        view: View::new(args.watched.output(), &plan.name, &plan.namespace),
        plan,
    };
    job.perform(&args.watched, log_format)
}

fn check(args: &CheckArgs, log_format: LogFormat) -> Result<Exit> {
    let Some(plan) = plan(&args.manifest) else { return Ok(Exit::Usage) };
    logging::init(log_format, "warn", None);
    let name = plan.name.clone();
    let report = match runtime()?.block_on(migration::check(plan)) {
        Ok(report) => report,
        Err(error) => return Ok(complain(&format!("{}: {error}", error.reason))),
    };
    match args.output() {
        OutputFormat::Json => print(&(serde_json::to_string(&report)? + "\n"))?,
        OutputFormat::Auto | OutputFormat::Plain => print(&report::check_report(&name, &report))?,
    };
    let failed = report.findings.iter().any(|finding| finding.level == FindingLevel::Failed);
    Ok(if failed { Exit::Failed } else { Exit::Done })
}

fn operate(args: &OperatorArgs, log_format: LogFormat) -> Result<Exit> {
    // A watch that breaks off is nothing to tell: it begins again, and /healthz says when it does not.
    logging::init(log_format, "info,kube_client=error,kube_runtime=error", None);
    let runtime = runtime()?;
    let exit = runtime.block_on(async {
        let (stop, stop_seen) = watch::channel(StopRequest::Run);
        let signals = tokio::spawn(operator_signals(Signals::new()?, stop));
        let ended = operator::run(args.options(), stop_seen).await;
        signals.abort();
        Ok(match ended {
            Ok(()) => Exit::Done,
            Err(error) => complain(&error.to_string()),
        })
    });
    runtime.shutdown_background();
    exit
}

/// The first signal hands over what runs here; a second one ends the process at once.
async fn operator_signals(mut signals: Signals, stop: watch::Sender<StopRequest>) {
    signals.next().await;
    tracing::info!("stopping: handing over; a second signal ends at once");
    stop.send_replace(StopRequest::Drain);
    signals.next().await;
    std::process::exit(Exit::Stopped as i32);
}

/// `None`: the complaint is on standard error already.
fn plan(args: &ManifestArgs) -> Option<Arc<Plan>> {
    let plan = Manifest::read(&args.file).and_then(|manifest| manifest.plan(args.secrets.as_deref()));
    match plan {
        Ok(plan) => Some(Arc::new(plan)),
        Err(error) => {
            eprintln!("{error}");
            None
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Run,
    Verify,
}

/// A run or a verification with all that surrounds it.
struct Job {
    work: Work,
    plan: Arc<Plan>,
    until: Until,
    data_dir: Option<DataDir>,
    view: View,
}

impl Job {
    fn perform(self, watched: &WatchArgs, log_format: LogFormat) -> Result<Exit> {
        // Beside a view for people, logs that merely repeat it are noise.
        let level = if self.view.is_for_people() { "warn" } else { "info" };
        logging::init(log_format, level, self.view.live());
        let runtime = runtime()?;
        let exit = runtime.block_on(self.follow(watched));
        // Nothing that matters is left; a blocked write must not hold the process.
        runtime.shutdown_background();
        exit
    }

    async fn follow(self, watched: &WatchArgs) -> Result<Exit> {
        let (status, status_seen) =
            watch::channel(Status { observed_generation: self.plan.generation, ..Status::default() });
        let (gauges, gauges_seen) = watch::channel(EngineGauges::default());
        let (stop, stop_seen) = watch::channel(StopRequest::Run);
        let (close, close_seen) = watch::channel(false);
        let observed = Observed {
            name: self.plan.name.clone(),
            namespace: self.plan.namespace.clone(),
            status: status_seen.clone(),
            gauges: gauges_seen,
        };

        let served = match endpoints(watched).await {
            Ok(endpoints) => {
                endpoints.map(|endpoints| tokio::spawn(endpoints.serve(observed.into(), close_seen)))
            }
            Err(error) => return Ok(complain_usage(&error.to_string())),
        };
        let signals = tokio::spawn(watch_signals(Signals::new()?, stop));
        let for_people = self.view.is_for_people();
        let handle = tokio::runtime::Handle::current();
        let view = self.view;
        let shown = tokio::task::spawn_blocking(move || handle.block_on(view.follow(status_seen)));

        let began = Instant::now();
        let options = RunOptions {
            until: self.until,
            data_dir: self.data_dir,
            stop: stop_seen,
            plans: None,
            earlier: None,
            placement: None,
        };
        let observers = Observers { status, gauges };
        let name = self.plan.name.clone();
        let outcome = match self.work {
            Work::Run => migration::run(self.plan, options, observers).await,
            Work::Verify => migration::verify(self.plan, options, observers).await,
        };
        let took = began.elapsed();

        // The engine has dropped the status' sender: the view shows the last one and ends.
        let last = tokio::time::timeout(LAST_WORDS_MAX, shown).await;
        if let (true, Ok(Ok(status))) = (for_people, last) {
            let summary = match self.work {
                Work::Run => report::run_summary(&name, &status, &outcome, took),
                Work::Verify => report::verification_summary(&name, &status, &outcome, took),
            };
            print(&summary)?;
        }
        signals.abort();
        let _ = close.send(true);
        if let Some(served) = served {
            // Its connections end with the process if they do not end by themselves.
            let _ = tokio::time::timeout(STOP_MAX, served).await;
        }
        Ok(exit_of(&outcome))
    }
}

fn exit_of(outcome: &Outcome) -> Exit {
    match outcome {
        Outcome::Done => Exit::Done,
        Outcome::Failed { reason, message, .. } => {
            complain(&format!("{reason}: {message}"));
            // The manifest is at fault, though only a connection could tell.
            if *reason == conditions::reason::INVALID_SPEC { Exit::Usage } else { Exit::Failed }
        }
        Outcome::Superseded { message } => complain(&format!("{}: {message}", conditions::reason::ABORTED)),
        Outcome::Differences { .. } => Exit::Differences,
        Outcome::Stopped => Exit::Stopped,
    }
}

/// `None`: the usual port is taken, most likely by another run, which is no reason not to run.
async fn endpoints(watched: &WatchArgs) -> Result<Option<Endpoints>> {
    match watched.listen {
        Some(address) => {
            let endpoints = Endpoints::bind(address).await?;
            if address.port() == 0 {
                eprintln!("listening on {}", endpoints.address());
            }
            Ok(Some(endpoints))
        }
        None => match Endpoints::bind(DEFAULT_LISTEN).await {
            Ok(endpoints) => Ok(Some(endpoints)),
            Err(error) => {
                tracing::warn!("no metrics are served: {error}");
                Ok(None)
            }
        },
    }
}

struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// The first signal asks for a drain; a second one, or a drain that takes too long, for a stop at
/// once; and should even that not end the process, this does.
async fn watch_signals(mut signals: Signals, stop: watch::Sender<StopRequest>) {
    signals.next().await;
    tracing::info!("stopping: draining for at most {} s; a second signal stops at once", DRAIN_MAX.as_secs());
    stop.send_replace(StopRequest::Drain);
    let _ = tokio::time::timeout(DRAIN_MAX, signals.next()).await;
    stop.send_replace(StopRequest::Now);
    tokio::time::sleep(STOP_MAX).await;
    std::process::exit(Exit::Stopped as i32);
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")
}

/// A reader of standard output that has gone is no fault.
pub(super) fn print(text: &str) -> Result<Exit> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error).context("standard output"),
        _ => Ok(Exit::Done),
    }
}

pub(super) fn complain(message: &str) -> Exit {
    eprintln!("error: {message}");
    Exit::Failed
}

pub(super) fn complain_usage(message: &str) -> Exit {
    complain(message);
    Exit::Usage
}
