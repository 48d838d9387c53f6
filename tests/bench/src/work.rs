//! What a variant does in a block, and how it shows beforehand that it does it right.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{
    forward::Forwarder,
    load::{Load, Outcome},
    site::{Servers, Site},
};

/// Enough for a first operation.
const PROOF: Duration = Duration::from_millis(50);

/// One kind of measuring.
#[derive(Clone, Debug)]
pub enum Work {
    /// A client asks a server.
    Ask(Site, Load),
    /// A node sends packets round.
    Forward(Forwarder),
}

impl Work {
    /// Starts what is to run all the time.
    pub fn start(&self, servers: &mut Servers) -> Result<()> {
        match self {
            Self::Ask(site, _) => servers.start(site),
            Self::Forward(_) => Ok(()),
        }
    }

    /// It works, without an error.
    pub fn prove(&self) -> Result<()> {
        let (site, load) = match self {
            Self::Forward(forwarder) => return forwarder.prove(),
            Self::Ask(site, load) => (site, *load),
        };
        let mut outcome = site.ask(load, Duration::ZERO, PROOF)?;
        if outcome.operations == 0 {
            // the machine may have been busy with something else
            outcome = site.ask(load, Duration::ZERO, PROOF * 20)?;
        }
        ensure!(
            outcome.errors == 0 && outcome.operations > 0,
            "{} operations, {} errors before anything was measured",
            outcome.operations,
            outcome.errors
        );
        Ok(())
    }

    /// One block.
    pub fn run(&self, warm_up: Duration, time: Duration) -> Result<Outcome> {
        match self {
            Self::Ask(site, load) => site.ask(*load, warm_up, time),
            Self::Forward(forwarder) => forwarder.ask(warm_up, time),
        }
    }
}
