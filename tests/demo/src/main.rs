//! `cargo xtask demo` and `cargo xtask shell`: see [`dataplane_demo`].

use std::{
    env,
    ffi::OsString,
    io::Write as _,
    os::unix::process::CommandExt as _,
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use dataplane_demo::{self as demo, CLUSTER, Options};
use dataplane_testkit::lab;

/// Runs a cluster on this machine: nodes are network namespaces, agents and traffic are real
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(flatten)]
    options: Options,
    /// Remove the cluster that `--keep` left
    #[arg(long, exclusive = true)]
    down: bool,
    #[command(subcommand)]
    command: Option<Inside>,
}

#[derive(Debug, Subcommand)]
enum Inside {
    /// Enter a pod of the cluster that `--keep` left
    Shell {
        /// Name of the pod
        pod: String,
        /// Command to run instead of a shell
        #[arg(last = true)]
        command: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.command {
        Some(Inside::Shell { pod, command }) => shell(&pod, command),
        None if arguments.down => down(),
        None => demo::run(&arguments.options),
    };
    done.unwrap_or_else(|error| {
        let _closed = writeln!(std::io::stderr(), "dataplane-demo: {error:#}");
        ExitCode::FAILURE
    })
}

fn down() -> Result<ExitCode> {
    let was_there = lab::take_down(CLUSTER)?;
    let result = if was_there { "removed the demo's cluster" } else { "there is no cluster of the demo" };
    writeln!(std::io::stdout(), "{result}")?;
    Ok(ExitCode::SUCCESS)
}

/// Becomes the shell or the command.
fn shell(pod: &str, command: Vec<OsString>) -> Result<ExitCode> {
    let place = lab::attach_to_pod(CLUSTER, pod)?;
    let mut words = command.into_iter();
    let program = words.next().or_else(|| env::var_os("SHELL")).unwrap_or_else(|| "/bin/sh".into());
    let mut inside: Command = place.command(&program)?;
    // for prompts that show it
    let error = inside.args(words).env("DATAPLANE_POD", pod).exec();
    Err(error).with_context(|| format!("run {} in pod {pod}", program.display()))
}
