//! Runs a program on two CPUs at the same time.

use std::{
    hint::spin_loop,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    TestRunOptions,
    programs::{SchedClassifier, TestRun as _},
};
use dataplane_common::reason::HookId;
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity},
    unistd::Pid,
};

use super::Rig;

impl Rig {
    /// Runs the program of `hook` on each frame on two CPUs at once, and returns both results.
    /// Fails on a machine with one CPU.
    pub fn race(&mut self, hook: HookId, frames: &[Vec<u8>]) -> Result<Vec<[Vec<u8>; 2]>> {
        let contexts = frames
            .iter()
            .map(|frame| Ok(self.metadata(hook, frame)?.context()))
            .collect::<Result<Vec<_>>>()?;
        self.load(hook)?;
        let cpus = usable_cpus()?;
        let program: &SchedClassifier = self.classifier(hook)?;
        let arrived = AtomicUsize::new(0);
        let run_all = |cpu: usize| -> Result<Vec<Vec<u8>>> {
            let mut set = CpuSet::new();
            set.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &set)?;
            let mut results = Vec::new();
            for (index, (frame, context)) in frames.iter().zip(&contexts).enumerate() {
                let mut out = vec![0; frame.len() + 2_048];
                let options = TestRunOptions {
                    data_in: Some(frame),
                    data_out: Some(&mut out),
                    ctx_in: Some(context),
                    ..TestRunOptions::new()
                };
                arrived.fetch_add(1, Ordering::AcqRel);
                while arrived.load(Ordering::Acquire) < 2 * (index + 1) {
                    spin_loop();
                }
                let length = program.test_run(options)?.data_size_out as usize;
                out.truncate(length);
                results.push(out);
            }
            Ok(results)
        };
        let [first, second] = thread::scope(|scope| {
            let threads = cpus.map(|cpu| scope.spawn(move || run_all(cpu)));
            threads.map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        Ok(first?.into_iter().zip(second?).map(|(first, second)| [first, second]).collect())
    }
}

/// Keeps the calling thread, and so the programs that it runs, on the CPU where it is.
pub fn stay_on_one_cpu() -> Result<()> {
    let mut set = CpuSet::new();
    set.set(sched_getcpu()?)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// Two CPUs that this process may use.
fn usable_cpus() -> Result<[usize; 2]> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    let usable: Vec<usize> = (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect();
    ensure!(usable.len() >= 2, "a race needs two CPUs");
    Ok([usable[0], *usable.get(1).context("a second CPU")?])
}
