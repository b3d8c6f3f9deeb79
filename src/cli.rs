//! The command line: what is asked for, and how it is carried out.

mod execute;
mod files;

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use redis_migration::api::quantity::Quantity;
use redis_migration::migration::{DataDir, Until};
use redis_migration::report::OutputFormat;
use redis_migration::telemetry::logging::LogFormat;

pub use execute::execute;

/// Moves a live Redis or Valkey to another server or cluster, and proves that both sides are equal.
#[derive(Parser, Debug)]
#[command(
    version,
    arg_required_else_help = true,
    after_help = "Exit status: 0 done, 1 failed, 2 bad arguments or manifest, 3 verification found differences, \
4 stopped by a signal with the checkpoint kept.\n\
RUST_LOG decides what is logged, such as RUST_LOG=debug."
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// How log lines on standard error look
    #[arg(long, global = true, value_enum, default_value = "text", value_name = "FORMAT")]
    log_format: LogFormatArg,
}

impl Cli {
    pub fn log_format(&self) -> LogFormat {
        match self.log_format {
            LogFormatArg::Text => LogFormat::Text,
            LogFormatArg::Json => LogFormat::Json,
        }
    }
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Perform the migration of a manifest
    Run(RunArgs),
    /// Validate a manifest and look at both sides, changing nothing
    Check(CheckArgs),
    /// Compare both sides now, changing nothing
    Verify(VerifyArgs),
    /// Print the CustomResourceDefinition as YAML
    Crd,
    /// Perform the RedisMigrations of a Kubernetes cluster
    Operator(OperatorArgs),
    /// Print an RDB file as JSON lines, one a key
    Decode(DecodeArgs),
    /// Say what an RDB file holds: keys and bytes by type and prefix, and the largest keys
    Stat(StatArgs),
}

#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    pub manifest: ManifestArgs,
    /// When a run that goes well ends: InSync stops, checkpoint kept, when every shard has caught up
    /// and verification has passed; Finished follows the manifest's cutover
    #[arg(long, value_enum, ignore_case = true, default_value = "Finished")]
    until: UntilArg,
    #[command(flatten)]
    pub watched: WatchArgs,
    /// Where bytes go that do not fit in memory; give the same one to resume
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
}

impl RunArgs {
    pub fn until(&self) -> Until {
        match self.until {
            UntilArg::InSync => Until::InSync,
            UntilArg::Finished => Until::Finished,
        }
    }
}

#[derive(Args, Debug)]
pub struct CheckArgs {
    #[command(flatten)]
    pub manifest: ManifestArgs,
    /// auto and plain print a table
    #[arg(long, value_enum, default_value = "auto", value_name = "FORMAT")]
    output: OutputArg,
}

impl CheckArgs {
    pub fn output(&self) -> OutputFormat {
        self.output.format()
    }
}

#[derive(Args, Debug)]
pub struct VerifyArgs {
    #[command(flatten)]
    pub manifest: ManifestArgs,
    #[command(flatten)]
    pub watched: WatchArgs,
}

#[derive(Args, Debug)]
pub struct DecodeArgs {
    /// The RDB file; - reads standard input
    pub file: PathBuf,
    /// Where the lines go instead of standard output
    #[arg(short, long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct StatArgs {
    /// The RDB file; - reads standard input
    pub file: PathBuf,
    /// Also write a page with plots, which stands alone
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// The character that ends a part of a key
    #[arg(long, default_value = ":", value_name = "CHARACTER", value_parser = one_byte)]
    pub separator: u8,
    /// How many parts make a prefix; 0: no prefixes
    #[arg(long, default_value_t = 1, value_name = "PARTS")]
    pub depth: usize,
    /// How many of the largest keys are named
    #[arg(long, default_value_t = 20, value_name = "KEYS", value_parser = clap::value_parser!(u16).range(..=10_000))]
    pub top: u16,
}

fn one_byte(text: &str) -> Result<u8, String> {
    match text.as_bytes() {
        [byte] => Ok(*byte),
        _ => Err("one ASCII character is expected".to_owned()),
    }
}

#[derive(Args, Debug)]
pub struct ManifestArgs {
    /// The manifest; - reads standard input. May hold Secret documents beside the RedisMigration
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
    /// Directory that holds secrets as NAME/KEY files
    #[arg(long, value_name = "DIR")]
    pub secrets: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub struct WatchArgs {
    /// auto is a live view on a terminal and plain lines otherwise; json is one object a line
    #[arg(long, value_enum, default_value = "auto", value_name = "FORMAT")]
    output: OutputArg,
    /// Where /metrics, /metric, /healthz and /readyz are served; port 0 picks a free one and says
    /// which [default: 127.0.0.1:9320]
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
}

impl WatchArgs {
    pub fn output(&self) -> OutputFormat {
        self.output.format()
    }
}

#[derive(Args, Debug)]
pub struct OperatorArgs {
    /// Namespaces to look after, separated by commas [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    namespaces: Vec<String>,
    /// Where /metrics, /metric, /healthz and /readyz are served; port 0 picks a free one and says which
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9320")]
    listen: SocketAddr,
    /// Where bytes go that do not fit in memory [default: the temporary directory]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Size of the volume of --data-dir, such as 20Gi: all shards together leave a tenth of it free, and a source is
    /// made to wait instead [default: what the disk takes]
    #[arg(long, value_name = "SIZE", requires = "data_dir")]
    spool_size: Option<Quantity>,
    /// Folder in which RedisMigrations may name files by their path, as source or target [default: none may]
    #[arg(long, value_name = "DIR")]
    allow_files: Option<PathBuf>,
    /// Tells this replica from the others [default: the host's name]
    #[arg(long, env = "POD_NAME", value_name = "NAME")]
    identity: Option<String>,
    /// Where the replicas' own Leases are [default: the namespace of the service account or of the kubeconfig]
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAME")]
    namespace: Option<String>,
}

impl OperatorArgs {
    pub fn options(&self) -> redis_migration::operator::Options {
        let given = |text: &&String| !text.is_empty();
        let size = self.spool_size.as_ref().map(Quantity::bytes);
        redis_migration::operator::Options {
            namespaces: self.namespaces.iter().filter(given).cloned().collect(),
            listen: self.listen,
            data_dir: self.data_dir.clone().map(|path| DataDir::new(path, size)),
            files: self.allow_files.clone(),
            identity: self.identity.clone().filter(|text| !text.is_empty()),
            namespace: self.namespace.clone().filter(|text| !text.is_empty()),
        }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum LogFormatArg {
    Text,
    Json,
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum OutputArg {
    Auto,
    Plain,
    Json,
}

impl OutputArg {
    fn format(self) -> OutputFormat {
        match self {
            OutputArg::Auto => OutputFormat::Auto,
            OutputArg::Plain => OutputFormat::Plain,
            OutputArg::Json => OutputFormat::Json,
        }
    }
}

#[derive(ValueEnum, Clone, Copy, Debug)]
enum UntilArg {
    #[value(name = "InSync")]
    InSync,
    #[value(name = "Finished")]
    Finished,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_documented_commands_parse() {
        for line in [
            "run -f m.yaml",
            "run -f - --until InSync --output json --data-dir /d --secrets /s --listen 127.0.0.1:0",
            "run -f m.yaml --log-format json",
            "--log-format text verify -f m.yaml --output plain",
            "check -f m.yaml --output json",
            "crd",
            "operator --namespaces a,b --listen 0.0.0.0:9320 --data-dir /d --identity operator-0 --log-format json",
            "decode file.rdb",
            "decode - --out lines.jsonl",
            "stat file.rdb --html page.html --separator . --depth 2 --top 5",
        ] {
            let words = std::iter::once("redis-migration").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        for line in [
            "run",
            "run -f m --until never",
            "run -f m --listen nowhere",
            "dance",
            "crd -f m",
            "stat f --separator ab",
            "decode",
        ] {
            let words = std::iter::once("redis-migration").chain(line.split(' '));
            assert_eq!(Cli::try_parse_from(words).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn help_shows_only_what_works() {
        let help = Cli::command().render_long_help().to_string();
        assert!(help.contains("verify") && help.contains("operator"), "{help}");
    }
}
