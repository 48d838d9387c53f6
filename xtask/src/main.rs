//! `cargo xtask`: the list of subcommands. Each has a file of its own. None depends on another
//! crate of the workspace: they build and run programs as a user does.
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

/// Sets up, builds, demonstrates, tests and measures this project
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install the tools that build, demo, tests and benchmark need
    Setup(setup::Args),
    /// Build the programs and print their paths
    Build,
    /// Write the container image to a file; needs neither the network nor a container tool
    Image(image::Args),
    /// Run a cluster of network namespaces and check it with real traffic (root)
    #[command(disable_help_flag = true)]
    Demo(lab::Args),
    /// Enter a pod of a demo that was started with --keep, or run a command in it (root)
    #[command(disable_help_flag = true)]
    Shell(lab::Args),
    /// Build and run all tests
    Test(test::Args),
    /// Compare performance with kube-proxy's rules, plain routing and the raw device (root)
    #[command(disable_help_flag = true)]
    Bench(lab::Args),
    /// Check format, text, lints, licenses, documentation and module boundaries
    Lint(lint::Args),
    /// Run what CI runs: lint, then the test command of the README
    Ci,
    /// Load and test the datapath on other kernels, in QEMU
    Kernels(kernels::Args),
}

fn main() -> ExitCode {
    if image::rustc::is_requested() {
        return image::rustc::run();
    }
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
    fn arguments_of_demo_and_shell_are_passed_unchanged() {
        let words = ["web-1", "--", "ip", "-br", "address"];
        let arguments =
            Arguments::try_parse_from(["cargo xtask", "shell"].iter().chain(&words)).expect("a pod");
        let Command::Shell(shell) = arguments.command else { panic!("shell is a command") };
        assert_eq!(shell.arguments, words);
        let arguments = Arguments::try_parse_from(["cargo xtask", "demo", "--nodes", "5", "--help"]);
        assert!(matches!(arguments.expect("a demo").command, Command::Demo(_)));
    }
}
