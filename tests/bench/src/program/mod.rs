//! Program runs: nanoseconds per packet of one program, without devices (`BPF_PROG_TEST_RUN`).
//!
//! [`scenarios`] are packets with what must come of them, [`wrapper`] the program that is repeated:
//! it writes a packet and calls the measured one. [`runner`] measures, [`peers`] are programs of
//! other projects, from files.

pub mod peers;
mod runner;
mod scenarios;
mod wrapper;

use std::{fmt, rc::Rc, sync::mpsc, thread, time::Duration};

use anyhow::{Context as _, Result, anyhow};

use self::{
    peers::Peers,
    runner::Runner,
    scenarios::{Limit, Scenario},
};
use crate::{
    bpf::kernel::Kind,
    load::{Outcome, pin},
    plan::{Case, Selection, Variant, row},
    workload::Workload,
};

/// The processor of all runs.
const CORE: usize = 0;

type Job = Box<dyn FnOnce(&mut Runner) + Send>;

/// The thread that owns the programs: it is in the network namespace of their devices.
struct Worker(mpsc::Sender<Job>);

impl Worker {
    fn start(peers: Peers) -> Result<Self> {
        let (sender, jobs) = mpsc::channel::<Job>();
        let (ready, is_ready) = mpsc::channel();
        thread::spawn(move || {
            let runner = pin(CORE).and_then(|()| Runner::create(&peers));
            let (result, runner) = match runner {
                Ok(runner) => (Ok(()), Some(runner)),
                Err(error) => (Err(error), None),
            };
            // without a receiver nobody waits for the thread
            let _received = ready.send(result);
            let Some(mut runner) = runner else { return };
            for job in jobs {
                job(&mut runner);
            }
        });
        is_ready.recv().context("the thread of the program runs ended")??;
        Ok(Self(sender))
    }

    fn call<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Runner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (sender, result) = mpsc::channel();
        let job: Job = Box::new(move |runner| {
            let _received = sender.send(work(runner));
        });
        self.0.send(job).map_err(|_job| anyhow!("the thread of the program runs ended"))?;
        result.recv().context("the thread of the program runs ended")?
    }
}

/// One program with the packets of one scenario.
#[derive(Clone)]
pub struct ProgramRun {
    worker: Rc<Worker>,
    /// Index into [`scenarios::all`].
    scenario: usize,
    variant: Variant,
}

impl fmt::Debug for ProgramRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ProgramRun({}, {})", self.scenario, self.variant)
    }
}

impl ProgramRun {
    /// Verifies what the program makes of a packet.
    pub fn verify(&self) -> Result<()> {
        self.measure(Duration::ZERO, Duration::from_millis(1)).map(drop)
    }

    /// Measures one block. Its time is processor time, without the wrapper.
    ///
    /// # Errors
    /// A packet had another result than the scenario says.
    pub fn measure(&self, warm_up: Duration, time: Duration) -> Result<Outcome> {
        let (scenario, variant) = (self.scenario, self.variant);
        self.worker.call(move |runner| runner.measure(scenario, variant, warm_up, time))
    }
}

/// The program runs of all rows.
#[derive(Debug)]
pub struct Programs {
    cases: Vec<Case>,
}

impl Programs {
    /// Loads what the selected rows need.
    pub fn create(selection: &Selection, peers: &Peers) -> Result<Self> {
        let worker = Rc::new(Worker::start(peers.clone())?);
        let scenarios = scenarios::all();
        let selected =
            scenarios.iter().enumerate().filter(|(_, scenario)| selection.has_any(&[scenario.row]));
        let cases = selected.map(|(index, scenario)| {
            let limit = limit(scenario);
            let peer = peer(scenario);
            let mut variants = vec![Variant::Ours, limit];
            variants.extend(peer.iter().copied().filter(|peer| peers.has(*peer)));
            let workload = |variant| {
                Workload::Program(ProgramRun { worker: Rc::clone(&worker), scenario: index, variant })
            };
            Case {
                row: scenario.row,
                params: scenario
                    .params
                    .iter()
                    .map(|(key, value)| ((*key).to_owned(), value.clone()))
                    .collect(),
                limit,
                peers: peer,
                workloads: variants.into_iter().map(|variant| (variant, workload(variant))).collect(),
            }
        });
        Ok(Self { cases: cases.collect() })
    }

    pub fn cases(&self) -> Vec<Case> {
        self.cases.clone()
    }
}

/// Whether the row is measured by program runs.
pub fn is_program_row(name: &str) -> bool {
    row::PROGRAM_RUNS.contains(&name)
}

/// The variant that is the limit.
const fn limit(scenario: &Scenario) -> Variant {
    match scenario.limit {
        Limit::Rewrite => Variant::Raw,
        Limit::Redirect | Limit::Empty => Variant::Empty,
    }
}

/// The other project's program that does the same.
const fn peer(scenario: &Scenario) -> &'static [Variant] {
    match scenario.kind() {
        Kind::Xdp => &[Variant::Katran],
        Kind::Tc => &[Variant::Calico],
    }
}
