//! The demo: creates a cluster of network namespaces, sends traffic of every kind, and reports each
//! failure with evidence.
//!
//! [`testbed`] is the cluster, [`steps`] are the checks, [`show`] is the output.

mod show;
mod steps;
mod testbed;

use std::process::ExitCode;

use anyhow::Result;
use dataplane_testkit::lab::{self, Routing};

use self::{show::Show, testbed::Testbed};

/// Name of the demo's cluster.
pub const CLUSTER: &str = "demo";

/// Options of the demo.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Number of nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=50), value_name = "N")]
    nodes: u8,
    /// Routing between pods of different nodes
    #[arg(long, default_value = "native", value_name = "MODE")]
    routing: RoutingArgument,
    /// Number of Services; the demo uses two of them
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=30_000), value_name = "N")]
    services: u16,
    /// Keep the cluster running; `cargo xtask shell POD` enters a pod, `--down` removes the cluster
    #[arg(long)]
    keep: bool,
    /// Print the result as JSON on stdout, and everything else on stderr
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum RoutingArgument {
    Auto,
    Native,
    Vxlan,
}

impl From<RoutingArgument> for Routing {
    fn from(argument: RoutingArgument) -> Self {
        match argument {
            RoutingArgument::Auto => Self::Auto,
            RoutingArgument::Native => Self::Native,
            RoutingArgument::Vxlan => Self::Vxlan,
        }
    }
}

/// Runs the demo. Success only if every check passed.
pub fn run(options: &Options) -> Result<ExitCode> {
    let mut show = Show::new(options.json);
    if lab::take_down(CLUSTER)? {
        show.note("removed the cluster of an earlier demo");
    }
    let built = Testbed::build(options, &mut show);
    let testbed = match built {
        Ok(mut testbed) => {
            steps::all(&mut testbed, &mut show);
            Some(testbed)
        }
        Err(error) => {
            show.failed("create the cluster", &error);
            None
        }
    };
    if let Some(testbed) = testbed {
        if options.keep {
            testbed.keep()?;
            show.note(
                "the cluster keeps running: `cargo xtask shell client-1` enters a pod, `cargo xtask demo --down` removes \
                 the cluster",
            );
        } else {
            show.during("remove the cluster", || drop(testbed));
        }
    }
    show.finish()
}
