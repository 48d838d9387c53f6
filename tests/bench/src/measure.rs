//! Runs the measurements in rounds. Each round runs all blocks in a new random order, so that drift
//! affects all variants alike. Blocks that are compared run within seconds of each other, because
//! the machine drifts within a minute.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    load::Outcome,
    path::Servers,
    plan::{Case, Variant},
    stats::Random,
};

/// Number of rounds and length of a block.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub rounds: usize,
    pub warm_up: Duration,
    pub time: Duration,
}

/// The outcomes of one variant of one case by round; `None`: failed.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    pub outcomes: Vec<Option<Outcome>>,
    /// The last error.
    pub last_error: Option<String>,
}

impl Samples {
    /// Returns operations per second by round; `None` for a block with errors or without
    /// operations.
    pub fn rates(&self) -> Vec<Option<f64>> {
        self.valid().map(|outcome| outcome.map(|outcome| outcome.per_second)).collect()
    }

    /// Returns the rates computed from the median latency, up to a factor common to all variants.
    /// An interruption (another guest, a build) changes the rate of a block, but hardly its median
    /// latency.
    pub fn undisturbed_rates(&self) -> Vec<Option<f64>> {
        self.valid().map(|outcome| outcome.map(|outcome| 1e6 / outcome.latency.p50)).collect()
    }

    pub fn latencies_p50(&self) -> Vec<f64> {
        self.valid().flatten().map(|outcome| outcome.latency.p50).collect()
    }

    pub fn latencies_p99(&self) -> Vec<f64> {
        self.valid().flatten().map(|outcome| outcome.latency.p99).collect()
    }

    fn valid(&self) -> impl Iterator<Item = Option<&Outcome>> {
        let is_valid = |outcome: &&Outcome| outcome.errors == 0 && outcome.operations > 0;
        self.outcomes.iter().map(move |outcome| outcome.as_ref().filter(is_valid))
    }

    /// Returns the measurement overhead per operation in microseconds.
    pub fn overheads(&self) -> Vec<f64> {
        self.valid().flatten().map(|outcome| outcome.overhead).filter(|overhead| *overhead > 0.0).collect()
    }

    /// Returns the number of failed operations and lost datagrams in all rounds.
    pub fn failures(&self) -> u64 {
        self.outcomes.iter().flatten().map(|outcome| outcome.errors + outcome.lost).sum()
    }
}

/// Samples of every case, by variant.
pub type Measured = Vec<BTreeMap<Variant, Samples>>;

/// Runs all rounds; calls `progress` before each block.
pub fn measure(cases: &[Case], pace: Pace, mut progress: impl FnMut(usize, &str)) -> Result<Measured> {
    let mut servers = Servers::default();
    for case in cases {
        for (variant, workload) in &case.workloads {
            workload.start(&mut servers).with_context(|| format!("{}: {variant}", case.title()))?;
        }
    }
    verify(cases)?;
    let mut groups = groups(cases);
    let mut random = Random::new(seed()?);
    let mut measured: Measured = vec![BTreeMap::new(); cases.len()];
    for round in 0..pace.rounds {
        random.shuffle(&mut groups);
        for blocks in &mut groups {
            random.shuffle(blocks);
        }
        for (number, index) in groups.iter().flatten() {
            let case = &cases[*number];
            let (variant, workload) = &case.workloads[*index];
            progress(round, &format!("{}: {variant}", case.title()));
            let samples = measured[*number].entry(*variant).or_default();
            match workload.run(pace.warm_up, pace.time) {
                Ok(outcome) => samples.outcomes.push(Some(outcome)),
                Err(error) => {
                    samples.outcomes.push(None);
                    samples.last_error = Some(format!("{error:#}"));
                }
            }
        }
    }
    Ok(measured)
}

/// Groups the blocks (case, variant) of cases that are compared with each other.
fn groups(cases: &[Case]) -> Vec<Vec<(usize, usize)>> {
    let mut groups: Vec<(usize, Vec<(usize, usize)>)> = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let blocks = (0..case.workloads.len()).map(|index| (number, index));
        match groups.iter_mut().find(|(first, _)| cases[*first].is_compared_with(case)) {
            Some((_, group)) => group.extend(blocks),
            None => groups.push((number, blocks.collect())),
        }
    }
    groups.into_iter().map(|(_, blocks)| blocks).collect()
}

/// Verifies every variant before the measurement.
fn verify(cases: &[Case]) -> Result<()> {
    for case in cases {
        for (variant, workload) in &case.workloads {
            workload.verify().with_context(|| format!("{}: {variant}", case.title()))?;
        }
    }
    Ok(())
}

/// Returns a random seed, so that each run has another order.
fn seed() -> Result<u64> {
    let text = fs::read_to_string("/proc/sys/kernel/random/uuid").context("cannot read a random number")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    Ok(u64::from_str_radix(&digits, 16)?)
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;
    use crate::{load::Load, path::TrafficPath, plan::row, workload::Workload};

    fn case(row: &'static str, variants: &[Variant]) -> Case {
        let workload = Workload::ClientServer(TrafficPath::empty(), Load::UdpRr);
        let workloads = variants.iter().map(|variant| (*variant, workload.clone())).collect();
        Case { row, params: Map::new(), limit: Variant::Raw, peers: &[], workloads }
    }

    #[test]
    fn compared_cases_are_in_one_group() {
        let cases = [
            case(row::CLUSTERIP_CRR, &[Variant::Plain, Variant::Ours]),
            case(row::SAME_NODE_RR, &[Variant::Raw, Variant::Ours]),
            case(row::CLUSTERIP_CRR, &[Variant::Plain]),
            case(row::SAME_NODE_RR, &[Variant::Raw]),
        ];
        let expected = [vec![(0, 0), (0, 1), (2, 0)], vec![(1, 0), (1, 1)], vec![(3, 0)]];
        assert_eq!(groups(&cases), expected);
    }
}
