//! The project's one command. Owns the list of its subcommands; each has a file of its own, and none knows a crate of
//! ours: they build and run them as a user would.
#![forbid(unsafe_code)]

mod build;
mod ci;
mod image;
mod kernels;
mod lab;
mod lint;
mod process;
mod setup;
mod test;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Sets up, builds, demonstrates, tests and measures this project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building, running and measuring need; quick when nothing is missing
    Setup(setup::Args),
    /// Build everything in release and say where it is
    Build,
    /// Write the container image as one file, offline; no other tool needed
    Image(image::Args),
    /// Show the whole thing at work: a cluster of network namespaces, with real traffic (root)
    #[command(disable_help_flag = true)]
    Demo(lab::Args),
    /// Enter a pod of a demo started with --keep, or run a command in it (root)
    #[command(disable_help_flag = true)]
    Shell(lab::Args),
    /// Run every test
    Test(test::Args),
    /// Measure against kube-proxy's rules, plain routing and the raw device (root)
    #[command(disable_help_flag = true)]
    Bench(lab::Args),
    /// Check format, text, lints, licenses, documentation and the boundaries between modules
    Lint(lint::Args),
    /// What CI runs: lint, then the README's test command
    Ci,
    /// Load and run the datapath on other kernels, in QEMU
    Kernels(kernels::Args),
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    match Arguments::parse().command {
        Command::Setup(arguments) => setup::run(&arguments),
        Command::Build => build::run(),
        Command::Image(arguments) => image::run(&arguments),
        Command::Demo(arguments) => lab::demo(&arguments),
        Command::Shell(arguments) => lab::shell(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Bench(arguments) => lab::bench(&arguments),
        Command::Lint(arguments) => lint::run(&arguments),
        Command::Ci => ci::run(),
        Command::Kernels(arguments) => kernels::run(arguments),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demos_arguments_are_handed_on_as_they_are() {
        let words = ["web-1", "--", "ip", "-br", "address"];
        let arguments =
            Arguments::try_parse_from(["cargo xtask", "shell"].iter().chain(&words)).expect("a pod");
        let Command::Shell(shell) = arguments.command else { panic!("shell is a command") };
        assert_eq!(shell.arguments, words);
        let arguments = Arguments::try_parse_from(["cargo xtask", "demo", "--nodes", "5", "--help"]);
        assert!(matches!(arguments.expect("a demo").command, Command::Demo(_)));
    }
}
