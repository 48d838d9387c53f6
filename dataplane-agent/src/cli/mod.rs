//! The commands that ask a running agent, or clean up after one.
//!
//! Owns arguments and presentation: tables for people, `-o json` (what the agent answered, as it is) for programs.
//! Knows the agent only through the views of its local API.

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
use kube_proxy::Resolve;

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// How the agent is: ready or why not, routing, problems, tables, drops
    Status(Ask),
    /// Services and their backends, as the datapath has them
    Services(Ask),
    /// Addresses of this node and the pods they belong to
    Endpoints(Ask),
    /// Where packets to other nodes go
    Routes(Ask),
    /// Connections that are translated packet by packet
    Flows(FlowsArgs),
    /// What happened to packets: drops with their reason
    Events(EventsArgs),
    /// Remove everything the agent ever made on this node: programs, tables, devices, routes, files; or what kube-proxy left
    Cleanup(CleanupArgs),
    /// Mount a BPF file system unless there is one; for the init container of a node without systemd
    MountBpffs(MountArgs),
    /// Version of the agent and of its tables
    Version,
}

/// Whom to ask, and how to answer.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct Ask {
    /// Socket of the agent
    #[arg(long, env = "DATAPLANE_SOCKET", default_value = "/run/dataplane/agent.sock")]
    pub socket: PathBuf,
    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// Form of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    #[default]
    Table,
    /// For programs
    Json,
}

/// Which flows.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct FlowsArgs {
    #[command(flatten)]
    ask: Ask,
    /// Only those with this address at either end, before or after the translation
    #[arg(long)]
    address: Option<IpAddr>,
    /// Only those with this port at either end
    #[arg(long)]
    port: Option<u16>,
    /// Only this protocol (tcp, udp, sctp, icmp, icmpv6)
    #[arg(long)]
    protocol: Option<String>,
    /// Only those to this service (namespace/name)
    #[arg(long)]
    service: Option<String>,
    /// Show no more than this many
    #[arg(long, default_value_t = 1_000)]
    limit: usize,
}

/// Which events.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct EventsArgs {
    #[command(flatten)]
    ask: Ask,
    /// Go on with what happens from now on
    #[arg(short, long)]
    follow: bool,
    /// Only packets that were dropped
    #[arg(long)]
    dropped: bool,
    /// Only packets from or to this address
    #[arg(long)]
    address: Option<IpAddr>,
    /// Only this verdict or drop reason (`no_backend`, ...)
    #[arg(long)]
    outcome: Option<String>,
}

/// Where.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct MountArgs {
    /// BPF file system for the agent's pins
    #[arg(long, env = "DATAPLANE_BPFFS", default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("clean up: {0}")]
    Cleanup(#[from] CleanupError),
    #[error("clean up after kube-proxy: {0}")]
    KubeProxy(#[from] KubeProxyError),
    #[error(transparent)]
    Pins(#[from] PinsError),
    #[error("the agent's answer is not understood (is it of another version?): {0}")]
    Answer(#[from] serde_json::Error),
    #[error("write the answer: {0}")]
    Output(#[from] io::Error),
}

/// Runs a command: the answer to stdout, one sentence to stderr if there is none. Not from inside a runtime.
pub fn run(command: Command) -> ExitCode {
    let done = match command {
        Command::Status(ask) => show(&ask, &View::Status, status::status),
        Command::Services(ask) => show(&ask, &View::Services, |rows: &Vec<_>| lists::services(rows)),
        Command::Endpoints(ask) => show(&ask, &View::Endpoints, |rows: &Vec<_>| lists::endpoints(rows)),
        Command::Routes(ask) => show(&ask, &View::Routes, |rows: &Vec<_>| lists::routes(rows)),
        Command::Flows(args) => show(&args.ask, &View::Flows(args.filter()), lists::flows),
        Command::Events(args) => events(&args),
        Command::Cleanup(args) => clean(&args),
        Command::MountBpffs(args) => Pins::new(&args.bpffs).prepare().map_err(CliError::Pins),
        Command::Version => print(&version()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if left(&error) => ExitCode::SUCCESS,
        Err(error) => complain(&error),
    }
}

/// `... | head` has seen enough: no failure.
fn left(error: &CliError) -> bool {
    let (CliError::Output(source) | CliError::Client(ClientError::Io { source, .. })) = error else {
        return false;
    };
    source.kind() == io::ErrorKind::BrokenPipe
}

fn complain(error: &CliError) -> ExitCode {
    // if stderr is closed too, the exit code says it
    let _closed = writeln!(io::stderr(), "dataplane-agent: {error}");
    ExitCode::FAILURE
}

fn version() -> String {
    format!("dataplane-agent {} (tables v{})\n", env!("CARGO_PKG_VERSION"), dataplane_common::ABI_VERSION)
}

fn show<T: DeserializeOwned>(
    ask: &Ask,
    view: &View,
    table: impl FnOnce(&T) -> String,
) -> Result<(), CliError> {
    let answer = Client::connect(&ask.socket)?.ask(view)?;
    match ask.output {
        Output::Table => print(&table(&serde_json::from_value(answer)?)),
        Output::Json => print(&format!("{}\n", serde_json::to_string_pretty(&answer)?)),
    }
}

fn events(args: &EventsArgs) -> Result<(), CliError> {
    let view = View::Events(args.filter());
    let clock = Clock::read()?;
    Client::connect(&args.ask.socket)?.stream(&view, |line| {
        let text = match (args.ask.output, &line) {
            (Output::Json, line) => serde_json::to_string(line)?,
            (_, EventLine::Event(event)) => format!("{} {}", clock.time(event), text::sentence(event)),
            (_, EventLine::Lost(lost)) => {
                format!("({lost} events lost: they came faster than they were read)")
            }
            (_, EventLine::End) => return Ok(()),
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{text}")?;
        out.flush()
    })?;
    Ok(())
}

fn clean(args: &CleanupArgs) -> Result<(), CliError> {
    // on with the work if nobody reads along any more
    let mut say = |line: &str| {
        let _closed = writeln!(io::stdout(), "{line}");
    };
    if args.kube_proxy {
        let yes = args.yes && !args.dry_run;
        return Ok(kube_proxy::clean(Resolve { yes, force: args.force }, &mut say)?);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(cleanup(args, &mut say))?;
    Ok(())
}

fn print(text: &str) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// KeyedMutex the datapath's clock into the time of day. Read once: the wall clock may be set while events are followed.
struct Clock {
    /// Since the epoch, of the monotonic clock's zero.
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
