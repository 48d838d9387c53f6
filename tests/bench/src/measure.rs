//! Takes the measurements: rounds, each of all blocks in an order of its own, so that what drifts with time falls on
//! everybody alike. What is compared is measured within seconds of each other, because the machine drifts within a minute.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    load::Outcome,
    plan::{Case, Variant},
    site::Servers,
    stats::Random,
};

/// How long everything takes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pub rounds: usize,
    pub warm_up: Duration,
    pub time: Duration,
}

/// What one variant of one case gave, round by round; a failed round has nothing.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    pub outcomes: Vec<Option<Outcome>>,
    /// What went wrong last.
    pub problem: Option<String>,
}

impl Samples {
    /// Operations per second, round by round. A block with errors, or without an operation, is none: its rate says
    /// nothing.
    pub fn rates(&self) -> Vec<Option<f64>> {
        self.sound().map(|outcome| outcome.map(|outcome| outcome.per_second)).collect()
    }

    /// What the rates would be if every operation took as long as the median one, up to a factor common to all
    /// variants: what interrupts a block (another guest, a build) moves its rate, but hardly its median operation.
    pub fn undisturbed_rates(&self) -> Vec<Option<f64>> {
        self.sound().map(|outcome| outcome.map(|outcome| 1e6 / outcome.latency.p50)).collect()
    }

    pub fn latencies_p50(&self) -> Vec<f64> {
        self.sound().flatten().map(|outcome| outcome.latency.p50).collect()
    }

    pub fn latencies_p99(&self) -> Vec<f64> {
        self.sound().flatten().map(|outcome| outcome.latency.p99).collect()
    }

    fn sound(&self) -> impl Iterator<Item = Option<&Outcome>> {
        let is_sound = |outcome: &&Outcome| outcome.errors == 0 && outcome.operations > 0;
        self.outcomes.iter().map(move |outcome| outcome.as_ref().filter(is_sound))
    }

    /// Microseconds of each operation that are the measuring's.
    pub fn overheads(&self) -> Vec<f64> {
        self.sound().flatten().map(|outcome| outcome.overhead).filter(|overhead| *overhead > 0.0).collect()
    }

    /// Operations that failed and datagrams that were lost, over all rounds.
    pub fn failures(&self) -> u64 {
        self.outcomes.iter().flatten().map(|outcome| outcome.errors + outcome.lost).sum()
    }
}

/// Samples of every case, by variant.
pub type Measured = Vec<BTreeMap<Variant, Samples>>;

/// Runs all rounds; `progress` hears of every block before it begins.
pub fn measure(cases: &[Case], pace: Pace, mut progress: impl FnMut(usize, &str)) -> Result<Measured> {
    let mut servers = Servers::default();
    for case in cases {
        for (variant, work) in &case.work {
            work.start(&mut servers).with_context(|| format!("{}: {variant}", case.title()))?;
        }
    }
    prove(cases)?;
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
            let (variant, work) = &case.work[*index];
            progress(round, &format!("{}: {variant}", case.title()));
            let samples = measured[*number].entry(*variant).or_default();
            match work.run(pace.warm_up, pace.time) {
                Ok(outcome) => samples.outcomes.push(Some(outcome)),
                Err(error) => {
                    samples.outcomes.push(None);
                    samples.problem = Some(format!("{error:#}"));
                }
            }
        }
    }
    Ok(measured)
}

/// Blocks, as case and variant of it, with those of cases that are compared with each other side by side.
fn groups(cases: &[Case]) -> Vec<Vec<(usize, usize)>> {
    let mut groups: Vec<(usize, Vec<(usize, usize)>)> = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let blocks = (0..case.work.len()).map(|index| (number, index));
        match groups.iter_mut().find(|(first, _)| cases[*first].is_compared_with(case)) {
            Some((_, group)) => group.extend(blocks),
            None => groups.push((number, blocks.collect())),
        }
    }
    groups.into_iter().map(|(_, blocks)| blocks).collect()
}

/// Every variant answers, without an error, before anything is measured.
fn prove(cases: &[Case]) -> Result<()> {
    for case in cases {
        for (variant, work) in &case.work {
            work.prove().with_context(|| format!("{}: {variant}", case.title()))?;
        }
    }
    Ok(())
}

/// Another order in each run.
fn seed() -> Result<u64> {
    let text = fs::read_to_string("/proc/sys/kernel/random/uuid").context("read a random number")?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).take(16).collect();
    Ok(u64::from_str_radix(&digits, 16)?)
}

#[cfg(test)]
mod tests {
    use serde_json::Map;

    use super::*;
    use crate::{load::Load, plan::row, site::Site, work::Work};

    fn case(row: &'static str, variants: &[Variant]) -> Case {
        let work = Work::Ask(Site::nowhere(), Load::UdpRr);
        let work = variants.iter().map(|variant| (*variant, work.clone())).collect();
        Case { row, params: Map::new(), limit: Variant::Raw, work }
    }

    #[test]
    fn what_is_compared_is_measured_side_by_side() {
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
