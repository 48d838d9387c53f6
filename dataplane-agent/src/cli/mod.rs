//! The commands that query a running agent, and `cleanup`.
//!
//! Output is a table, or with `-o json` the agent's answer unchanged. Knows the agent only by the
//! views of its API.

mod cleanup;
mod client;
mod kube_proxy;
mod lists;
mod status;
mod table;
mod text;

use std::{
    io::{self, Write as _},
    net::IpAddr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::{Args, Subcommand, ValueEnum};
use nix::time::{ClockId, clock_gettime};
use serde::de::DeserializeOwned;

pub use cleanup::{CleanupArgs, CleanupError, cleanup};
pub use client::ClientError;
pub use kube_proxy::KubeProxyError;

use crate::{
    api::{
        request::{EventFilter, EventLine, FlowFilter, View},
        views::EventView,
    },
    datapath::{Pins, pins::PinsError},
};
use client::Client;
use kube_proxy::Flags;

/// Commands other than `run` and `allocate`.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Show the state of the agent: readiness, problems, routing, tables, dropped packets
    Status(ClientArgs),
    /// List Services with their frontends and backends
    Services(ClientArgs),
    /// List addresses of this node and the pods they belong to
    Endpoints(ClientArgs),
    /// List routes to other nodes
    Routes(ClientArgs),
    /// List flows: connections that are translated per packet
    Flows(FlowsArgs),
    /// Print packet events: verdicts and drop reasons
    Events(EventsArgs),
    /// Remove everything that the agent created on this node: programs, tables, devices, routes,
    /// files
    Cleanup(CleanupArgs),
    /// Mount a BPF file system unless one is mounted; for nodes without systemd
    MountBpffs(MountArgs),
    /// Print the version of the agent and of its table layout
    Version,
}

/// Arguments of commands that query the agent.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct ClientArgs {
    /// API socket of the agent
    #[arg(long, env = "DATAPLANE_SOCKET", default_value = "/run/dataplane/agent.sock")]
    pub socket: PathBuf,
    /// Output format
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// Output format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// A table
    #[default]
    Table,
    /// JSON, as the agent sends it
    Json,
}

/// Arguments of `flows`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct FlowsArgs {
    #[command(flatten)]
    client: ClientArgs,
    /// Only flows from or to this address, before or after translation
    #[arg(long)]
    address: Option<IpAddr>,
    /// Only flows from or to this port
    #[arg(long)]
    port: Option<u16>,
    /// Only flows of this protocol (tcp, udp, sctp, icmp, icmpv6)
    #[arg(long)]
    protocol: Option<String>,
    /// Only flows to this Service (namespace/name)
    #[arg(long)]
    service: Option<String>,
    /// Largest number of flows to show
    #[arg(long, default_value_t = 1_000)]
    limit: usize,
}

/// Arguments of `events`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct EventsArgs {
    #[command(flatten)]
    client: ClientArgs,
    /// Continue with new events
    #[arg(short, long)]
    follow: bool,
    /// Only dropped packets
    #[arg(long)]
    dropped: bool,
    /// Only packets from or to this address
    #[arg(long)]
    address: Option<IpAddr>,
    /// Only packets with this verdict or drop reason by name
    #[arg(long)]
    outcome: Option<String>,
}

/// Arguments of `mount-bpffs`.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct MountArgs {
    /// Mount point of the BPF file system
    #[arg(long, env = "DATAPLANE_BPFFS", default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
}

/// Error of a command.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("cleanup failed: {0}")]
    Cleanup(#[from] CleanupError),
    #[error("cleanup of kube-proxy's rules failed: {0}")]
    KubeProxy(#[from] KubeProxyError),
    #[error(transparent)]
    Pins(#[from] PinsError),
    #[error("cannot read the agent's answer; it may have another version than this command: {0}")]
    Answer(#[from] serde_json::Error),
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

/// Runs a command. Output goes to stdout, errors to stderr. Must not be called inside an async
/// runtime.
pub fn run(command: Command) -> ExitCode {
    let done = match command {
        Command::Status(args) => show(&args, &View::Status, status::status),
        Command::Services(args) => show(&args, &View::Services, |rows: &Vec<_>| lists::services(rows)),
        Command::Endpoints(args) => show(&args, &View::Endpoints, |rows: &Vec<_>| lists::endpoints(rows)),
        Command::Routes(args) => show(&args, &View::Routes, |rows: &Vec<_>| lists::routes(rows)),
        Command::Flows(args) => show(&args.client, &View::Flows(args.filter()), lists::flows),
        Command::Events(args) => print_events(&args),
        Command::Cleanup(args) => run_cleanup(&args),
        Command::MountBpffs(args) => Pins::new(&args.bpffs).prepare().map_err(CliError::Pins),
        Command::Version => print(&version()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => report_error(&error),
    }
}

/// The reader of stdout has closed it (`... | head`): not a failure.
fn is_broken_pipe(error: &CliError) -> bool {
    let (CliError::Output(source) | CliError::Client(ClientError::Io { source, .. })) = error else {
        return false;
    };
    source.kind() == io::ErrorKind::BrokenPipe
}

fn report_error(error: &CliError) -> ExitCode {
    // stderr may be closed, too
    let _closed = writeln!(io::stderr(), "dataplane-agent: {error}");
    ExitCode::FAILURE
}

fn version() -> String {
    format!("dataplane-agent {} (tables v{})\n", env!("CARGO_PKG_VERSION"), dataplane_common::ABI_VERSION)
}

fn show<T: DeserializeOwned>(
    args: &ClientArgs,
    view: &View,
    table: impl FnOnce(&T) -> String,
) -> Result<(), CliError> {
    let answer = Client::connect(&args.socket)?.request(view)?;
    match args.output {
        Output::Table => print(&table(&serde_json::from_value(answer)?)),
        Output::Json => print(&format!("{}\n", serde_json::to_string_pretty(&answer)?)),
    }
}

fn print_events(args: &EventsArgs) -> Result<(), CliError> {
    let view = View::Events(args.filter());
    let clock = Clock::read()?;
    Client::connect(&args.client.socket)?.stream(&view, |line| {
        let text = match (args.client.output, &line) {
            (Output::Json, line) => serde_json::to_string(line)?,
            (_, EventLine::Event(event)) => format!("{} {}", clock.time(event), text::sentence(event)),
            (_, EventLine::Lost(lost)) => {
                format!("({lost} events lost: they arrived faster than they were read)")
            }
            (_, EventLine::End) => return Ok(()),
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{text}")?;
        out.flush()
    })?;
    Ok(())
}

fn run_cleanup(args: &CleanupArgs) -> Result<(), CliError> {
    // the cleanup continues if stdout is closed
    let mut print = |line: &str| {
        let _closed = writeln!(io::stdout(), "{line}");
    };
    if args.kube_proxy {
        let yes = args.yes && !args.dry_run;
        return Ok(kube_proxy::clean(Flags { yes, force: args.force }, &mut print)?);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(cleanup(args, &mut print))?;
    Ok(())
}

fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Converts the monotonic clock of events to wall-clock time. Read once: the wall clock may be set
/// while events are printed.
struct Clock {
    /// Wall-clock time at the monotonic clock's zero.
    boot: Duration,
}

impl Clock {
    fn read() -> io::Result<Self> {
        let monotonic = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self { boot: now.saturating_sub(monotonic) })
    }

    fn time(&self, event: &EventView) -> String {
        text::time_of_day(self.boot + Duration::from_nanos(event.timestamp_ns))
    }
}

impl FlowsArgs {
    fn filter(&self) -> FlowFilter {
        FlowFilter {
            address: self.address,
            port: self.port,
            protocol: self.protocol.clone(),
            service: self.service.clone(),
            limit: Some(self.limit),
        }
    }
}

impl EventsArgs {
    fn filter(&self) -> EventFilter {
        EventFilter {
            follow: self.follow,
            dropped: self.dropped,
            address: self.address,
            outcome: self.outcome.clone(),
        }
    }
}
