//! The workload of a variant in a block, and its verification before the measurement.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::lab::Namespace;

use super::{
    forward::Forwarder,
    load::{Load, Outcome},
    path::{Location, Servers, TrafficPath},
    program::ProgramRun,
};

/// Time of the verification, enough for one operation.
const VERIFICATION_TIME: Duration = Duration::from_millis(50);

/// A workload.
#[derive(Clone, Debug)]
pub enum Workload {
    /// A client and a server.
    ClientServer(TrafficPath, Load),
    /// The same with bulk data, without segmentation offload.
    Segmented(TrafficPath),
    /// A node that forwards packets.
    Forward(Forwarder),
    /// A program on packets, without devices.
    Program(ProgramRun),
}

impl Workload {
    /// Starts the server, which runs until the end of the benchmark.
    pub fn start(&self, servers: &mut Servers) -> Result<()> {
        match self {
            Self::ClientServer(path, _) | Self::Segmented(path) => servers.start(path),
            Self::Forward(_) | Self::Program(_) => Ok(()),
        }
    }

    /// Verifies that the workload runs without errors.
    pub fn verify(&self) -> Result<()> {
        let (path, load) = match self {
            Self::Forward(forwarder) => return forwarder.verify(),
            Self::Program(run) => return run.verify(),
            Self::Segmented(_) => return Ok(()),
            Self::ClientServer(path, load) => (path, *load),
        };
        if load == Load::Bulk {
            // its result is an error if the rate was not held
            return Ok(());
        }
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
            Self::Segmented(path) => {
                let _offload = NoOffload::set(&path.client)?;
                path.measure(Load::Bulk, warm_up, time)
            }
            Self::Forward(forwarder) => forwarder.measure(warm_up, time),
            Self::Program(run) => run.measure(warm_up, time),
        }
    }
}

/// A pod whose device has no segmentation offload until this is dropped: its stack makes packets of
/// the size of the MTU.
struct NoOffload(Namespace);

impl NoOffload {
    fn set(pod: &Location) -> Result<Self> {
        let name =
            pod.namespace.file_name().and_then(|name| name.to_str()).context("an unnamed namespace")?;
        let offload = Self(Namespace::open(name)?);
        offload.switch("off")?;
        Ok(offload)
    }

    fn switch(&self, value: &str) -> Result<()> {
        ["gso", "tso"].iter().try_for_each(|feature| self.0.offload("eth0", feature, value))
    }
}

impl Drop for NoOffload {
    fn drop(&mut self) {
        if let Err(error) = self.switch("on") {
            eprintln!("{error:#}");
        }
    }
}
