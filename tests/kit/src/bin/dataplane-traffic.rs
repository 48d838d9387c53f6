//! Test servers and clients for pods: see [`dataplane_testkit::traffic`].

use anyhow::Result;
use clap::Parser as _;
use dataplane_testkit::traffic::{self, Command};

/// Small servers and clients that record what arrives
#[derive(Debug, clap::Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    traffic::run(Arguments::parse().command).await
}
