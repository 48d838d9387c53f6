//! The load generator: `serve` runs a server, `measure` runs a client and prints JSON.

use std::{io::Write as _, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand, ValueEnum};
use dataplane_bench::load::{self, Load, READY, Run};

/// Request/response load over TCP and UDP, for comparing networks.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Network namespace to run in
    #[arg(long, global = true)]
    netns: Option<PathBuf>,
    /// Cgroup to run in
    #[arg(long, global = true)]
    cgroup: Option<PathBuf>,
    /// Processor to stay on
    #[arg(long, global = true)]
    core: Option<usize>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs an echo server over TCP and UDP until killed
    Serve {
        /// Address and port
        listen: SocketAddr,
    },
    /// Runs a client and prints the result as JSON
    Measure {
        /// Address and port of a server
        target: SocketAddr,
        #[arg(long, value_enum)]
        load: Kind,
        /// Connections of tcp-rr
        #[arg(long, default_value_t = 1)]
        connections: usize,
        #[arg(long, default_value_t = 200)]
        warm_up_ms: u64,
        #[arg(long, default_value_t = 1_000)]
        time_ms: u64,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    TcpRr,
    TcpCrr,
    UdpRr,
    Bulk,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    // ends with its parent, even if that crashes
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
    if let Some(cgroup) = &arguments.cgroup {
        load::enter_cgroup(cgroup)?;
    }
    if let Some(namespace) = &arguments.netns {
        load::enter_namespace(namespace)?;
    }
    if let Some(core) = arguments.core {
        load::pin(core)?;
    }
    match arguments.command {
        Command::Serve { listen } => load::serve(listen, || print(READY)),
        Command::Measure { target, load, connections, warm_up_ms, time_ms } => {
            let load = match load {
                Kind::TcpRr => Load::TcpRr { connections },
                Kind::TcpCrr => Load::TcpCrr,
                Kind::UdpRr => Load::UdpRr,
                Kind::Bulk => Load::Bulk,
            };
            let warm_up = Duration::from_millis(warm_up_ms);
            let outcome = load::run(&Run { load, target, warm_up, time: Duration::from_millis(time_ms) })?;
            print(&serde_json::to_string(&outcome)?)
        }
    }
}

fn print(line: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}").and_then(|()| stdout.flush()).context("cannot write to stdout")
}
