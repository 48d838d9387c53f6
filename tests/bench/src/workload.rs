//! The workload of a variant in a block, and its verification before the measurement.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::{
    forward::Forwarder,
    load::{Load, Outcome},
    path::{Servers, TrafficPath},
    program::ProgramRun,
};

/// Time of the verification, enough for one operation.
const VERIFICATION_TIME: Duration = Duration::from_millis(50);

/// A workload.
#[derive(Clone, Debug)]
pub enum Workload {
    /// A client and a server.
    ClientServer(TrafficPath, Load),
    /// A node that forwards packets.
    Forward(Forwarder),
    /// A program on packets, without devices.
    Program(ProgramRun),
}

impl Workload {
    /// Starts the server, which runs until the end of the benchmark.
    pub fn start(&self, servers: &mut Servers) -> Result<()> {
        match self {
            Self::ClientServer(path, _) => servers.start(path),
            Self::Forward(_) | Self::Program(_) => Ok(()),
        }
    }

    /// Verifies that the workload runs without errors.
    pub fn verify(&self) -> Result<()> {
        let (path, load) = match self {
            Self::Forward(forwarder) => return forwarder.verify(),
            Self::Program(run) => return run.verify(),
            Self::ClientServer(path, load) => (path, *load),
        };
        let mut outcome = path.measure(load, Duration::ZERO, VERIFICATION_TIME)?;
        if outcome.operations == 0 {
            // the machine may have been busy
            outcome = path.measure(load, Duration::ZERO, VERIFICATION_TIME * 20)?;
        }
        ensure!(
            outcome.errors == 0 && outcome.operations > 0,
            "verification failed: {} operations, {} errors",
            outcome.operations,
            outcome.errors
        );
        Ok(())
    }

    /// Runs one block.
    pub fn run(&self, warm_up: Duration, time: Duration) -> Result<Outcome> {
        match self {
            Self::ClientServer(path, load) => path.measure(*load, warm_up, time),
            Self::Forward(forwarder) => forwarder.measure(warm_up, time),
            Self::Program(run) => run.measure(warm_up, time),
        }
    }
}
