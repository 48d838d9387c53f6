//! The agent's command line.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use dataplane_agent::{app, cli, config::RunArgs};

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
    #[command(flatten)]
    Cli(cli::Command),
}

fn main() -> ExitCode {
    match Args::parse().command {
        Command::Run(args) => app::run(&args),
        Command::Cli(command) => cli::run(command),
    }
}
