//! The demo: a cluster is made, traffic of every kind is shown to flow, and what fails is named with its evidence.
//!
//! [`world`] is what is built, [`steps`] what is shown, [`show`] how it is told.

mod show;
mod steps;
mod world;

use std::process::ExitCode;

use anyhow::Result;
use dataplane_testkit::lab::{self, Routing};

use self::{show::Show, world::World};

/// Name of its cluster.
pub const CLUSTER: &str = "demo";

/// What can be chosen.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Nodes of the cluster
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=50), value_name = "N")]
    nodes: u8,
    /// How pods of other nodes are reached
    #[arg(long, default_value = "native", value_name = "MODE")]
    routing: RoutingArgument,
    /// Services in the cluster: those the demo needs, and so many more that do nothing but be there
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=30_000), value_name = "N")]
    services: u16,
    /// Leave the cluster running; `shell POD` enters it, `--down` removes it
    #[arg(long)]
    keep: bool,
    /// Print the result as JSON; the rest goes to stderr
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

/// Shows it all. Success only if everything was as it should be.
pub fn run(options: &Options) -> Result<ExitCode> {
    let mut show = Show::new(options.json);
    if lab::take_down(CLUSTER)? {
        show.note("removed the cluster an earlier demo kept");
    }
    let built = World::build(options, &mut show);
    let world = match built {
        Ok(mut world) => {
            steps::all(&mut world, &mut show);
            Some(world)
        }
        Err(error) => {
            show.failed("build the cluster", &error);
            None
        }
    };
    if let Some(world) = world {
        if options.keep {
            world.keep()?;
            show.note("the cluster stays: `cargo xtask shell client-1` enters a pod, `cargo xtask demo --down` removes it");
        } else {
            show.during("remove the cluster", || drop(world));
        }
    }
    show.finish()
}
