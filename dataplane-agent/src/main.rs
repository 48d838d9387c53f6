//! The agent's command line.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dataplane_agent::{
    allocate::{self, AllocateArgs},
    app, cli,
    config::RunArgs,
    panics,
};

/// Pod network and services of a Kubernetes node, in eBPF.
#[derive(Debug, Parser)]
#[command(name = "dataplane-agent", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent of this node
    Run(Box<RunArgs>),
    /// Give each node its ranges of pod addresses, on a cluster that does not
    Allocate(Box<AllocateArgs>),
    #[command(flatten)]
    Cli(cli::Command),
}

fn main() -> ExitCode {
    panics::abort_on_panic();
    match Args::parse().command {
        Command::Run(args) => app::run(&args),
        Command::Allocate(args) => allocate::run(&args),
        Command::Cli(command) => cli::run(command),
    }
}
