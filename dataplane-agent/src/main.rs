//! Command line of the agent.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dataplane_agent::{
    allocate::{self, AllocateArgs},
    app, cli,
    config::RunArgs,
    panics,
};

/// Kubernetes pod network and Service load balancing in eBPF.
#[derive(Debug, Parser)]
#[command(name = "dataplane-agent", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent on this node
    Run(Box<RunArgs>),
    /// Assign pod CIDRs to nodes, for clusters whose controller manager does not
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
