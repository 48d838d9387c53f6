//! Rows out of samples: ratios, as JSON for programs and as Markdown for people.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    machine::Machine,
    measure::{Measured, Samples},
    plan::{Case, Variant, row},
    scale::Scale,
    stats::{Estimate, median},
};

/// What two measurements of the same thing in one round may differ by.
const NOISE_ALLOWED: f64 = 0.02;

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: &'static str,
    pub params: Map<String, Value>,
    /// Who of ours it is about.
    #[serde(skip)]
    pub way: Option<Variant>,
    /// Median operations per second.
    pub ours: Option<f64>,
    /// Against the better of kube-proxy's rule sets.
    pub vs_peer: Option<Against>,
    pub vs_limit: Option<Against>,
    /// Against everybody in the row.
    pub vs: Vec<Against>,
    /// Against the same row with the fewest services.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vs_fewest_services: Option<Ratio>,
    /// Failed operations and lost datagrams by variant, where there were any.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub failures: BTreeMap<String, String>,
    /// Microseconds of each operation that are the measuring's, and counted nowhere; median over everybody's rounds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overhead_us: Option<f64>,
    /// Median rate and latency of everybody.
    pub rates: BTreeMap<String, Rate>,
}

/// Our rate divided by another's.
#[derive(Clone, Debug, Serialize)]
pub struct Against {
    pub peer: Variant,
    #[serde(flatten)]
    pub ratio: Ratio,
}

/// One speed divided by another, by two measures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Of operations per second: the result.
    #[serde(flatten)]
    pub rate: Estimate,
    /// Of the speed of the median operation: what the rate comes to on a machine that does nothing else.
    pub p50: Estimate,
}

impl Ratio {
    fn of(ours: &Samples, theirs: &Samples) -> Option<Self> {
        Some(Self {
            rate: Estimate::of_ratio(&ours.rates(), &theirs.rates())?,
            p50: Estimate::of_ratio(&ours.undisturbed_rates(), &theirs.undisturbed_rates())?,
        })
    }
}

/// Medians over rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rate {
    pub per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// All rows and what they were made on.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub rounds: usize,
    pub seconds_per_block: f64,
    /// Share of time other guests took while it ran.
    pub stolen: f64,
    /// The same thing measured twice in every round, one against the other: the smallest difference to believe.
    pub noise: Option<Ratio>,
    pub rows: Vec<Row>,
    /// One agent in large clusters.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scale: Vec<Scale>,
}

impl Report {
    /// Whether the machine was quiet enough for the rows to mean something.
    pub fn is_quiet(&self) -> bool {
        self.noise.is_none_or(|noise| is_small(&noise.rate))
    }

    /// Whether at least the median operations mean something.
    pub fn is_quiet_at_median(&self) -> bool {
        self.noise.is_none_or(|noise| is_small(&noise.p50))
    }
}

fn is_small(noise: &Estimate) -> bool {
    (noise.median - 1.0).abs() <= NOISE_ALLOWED
}

/// A row per way of ours in every case; a case without ours gives one row with the others' rates.
pub fn rows(cases: &[Case], measured: &Measured) -> Vec<Row> {
    let mut rows = Vec::new();
    for (case, samples) in cases.iter().zip(measured) {
        let ours: Vec<Variant> = samples.keys().copied().filter(|variant| variant.is_ours()).collect();
        if ours.is_empty() {
            rows.push(row_of(case, samples, None));
        }
        for variant in ours {
            let mut row = row_of(case, samples, Some(variant));
            row.vs_fewest_services = against_fewest(cases, measured, case, variant, &samples[&variant]);
            rows.push(row);
        }
    }
    rows
}

fn row_of(case: &Case, samples: &BTreeMap<Variant, Samples>, ours: Option<Variant>) -> Row {
    let mut params = case.params.clone();
    if let Some((key, value)) = ours.and_then(Variant::way) {
        params.insert(key.into(), json!(value));
    }
    if case.row == row::CLUSTERIP_CRR
        && let Some(ours) = ours
    {
        params
            .insert("translation".into(), json!(if ours == Variant::Packet { "packet" } else { "connect" }));
    }
    let rates: BTreeMap<Variant, Rate> =
        samples.iter().filter_map(|(variant, samples)| Some((*variant, rate(samples)?))).collect();
    let vs: Vec<Against> = samples
        .iter()
        .filter(|(variant, _)| !variant.is_ours())
        .filter_map(|(variant, theirs)| {
            let ratio = Ratio::of(samples.get(&ours?)?, theirs)?;
            Some(Against { peer: *variant, ratio })
        })
        .collect();
    let best = Variant::PEERS
        .into_iter()
        .filter_map(|peer| Some((peer, rates.get(&peer)?.per_second)))
        .max_by(|a, b| a.1.total_cmp(&b.1));
    let against = |wanted: Variant| vs.iter().find(|against| against.peer == wanted).cloned();
    Row {
        name: case.row,
        params,
        way: ours,
        ours: ours.and_then(|ours| rates.get(&ours)).map(|rate| rate.per_second),
        vs_peer: best.and_then(|(peer, _)| against(peer)),
        vs_limit: against(case.limit),
        vs_fewest_services: None,
        failures: failures(samples),
        overhead_us: median(&samples.values().flat_map(Samples::overheads).collect::<Vec<_>>()),
        rates: rates.into_iter().map(|(variant, rate)| (variant.to_string(), rate)).collect(),
        vs,
    }
}

fn rate(samples: &Samples) -> Option<Rate> {
    let rates: Vec<f64> = samples.rates().into_iter().flatten().collect();
    Some(Rate {
        per_second: median(&rates)?,
        p50_us: median(&samples.latencies_p50())?,
        p99_us: median(&samples.latencies_p99())?,
    })
}

fn failures(samples: &BTreeMap<Variant, Samples>) -> BTreeMap<String, String> {
    let mut failures = BTreeMap::new();
    for (variant, samples) in samples {
        let blocks = samples.outcomes.iter().filter(|outcome| outcome.is_none()).count();
        let operations = samples.failures();
        if let Some(problem) = &samples.problem {
            failures.insert(variant.to_string(), format!("{blocks} blocks, the last: {problem}"));
        } else if operations > 0 {
            failures.insert(variant.to_string(), format!("{operations} operations"));
        }
    }
    failures
}

/// The same way of ours in the first case of the same name.
fn against_fewest(
    cases: &[Case],
    measured: &Measured,
    case: &Case,
    ours: Variant,
    samples: &Samples,
) -> Option<Ratio> {
    let first = cases.iter().position(|other| other.row == case.row)?;
    if case.params.get("services")? == cases[first].params.get("services")? {
        return None;
    }
    Ratio::of(samples, measured[first].get(&ours)?)
}

/// The limit of the service rows has nothing to do with services, so its measurements in two of them are the same
/// thing measured twice.
pub fn noise(cases: &[Case], measured: &Measured) -> Option<Ratio> {
    let mut same = cases
        .iter()
        .zip(measured)
        .filter(|(case, _)| case.row == row::CLUSTERIP_CRR)
        .filter_map(|(case, samples)| samples.get(&case.limit));
    Ratio::of(same.next()?, same.next()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Latency, Outcome};

    fn samples(rates: &[f64]) -> Samples {
        let outcome = |per_second| Outcome {
            operations: 100,
            seconds: 1.0,
            per_second,
            errors: 0,
            lost: 0,
            overhead: 0.0,
            latency: Latency { p50: 10.0, p90: 11.0, p99: 12.0, max: 13.0 },
        };
        Samples { outcomes: rates.iter().map(|rate| Some(outcome(*rate))).collect(), problem: None }
    }

    fn case(services: u16) -> Case {
        let params = Map::from_iter([("services".to_owned(), json!(services))]);
        Case { row: row::CLUSTERIP_CRR, params, limit: Variant::Plain, work: Vec::new() }
    }

    fn measured() -> Measured {
        let few = BTreeMap::from([
            (Variant::Plain, samples(&[200.0, 100.0])),
            (Variant::Nftables, samples(&[120.0, 60.0])),
            (Variant::Iptables, samples(&[100.0, 50.0])),
            (Variant::Ours, samples(&[180.0, 90.0])),
            (Variant::Packet, samples(&[150.0, 75.0])),
        ]);
        let mut many = few.clone();
        many.insert(Variant::Iptables, samples(&[10.0, 5.0]));
        many.insert(Variant::Ours, samples(&[171.0, 85.5]));
        vec![few, many]
    }

    #[test]
    fn a_row_compares_with_the_better_peer_and_the_limit() {
        let rows = rows(&[case(10), case(1_000)], &measured());
        let json = serde_json::to_value(&rows[0]).expect("a row serializes");
        assert_eq!(json["name"], "clusterip_crr");
        assert_eq!(json["params"], json!({ "services": 10, "translation": "connect" }));
        assert_eq!(json["ours"], 135.0);
        let p50 = json!({ "median": 1.0, "low": 1.0, "high": 1.0 });
        let against = json!({ "peer": "nftables", "median": 1.5, "low": 1.5, "high": 1.5, "p50": p50 });
        assert_eq!(json["vs_peer"], against);
        assert_eq!(json["vs_limit"]["median"], 0.9);
        assert_eq!(rows[1].params["translation"], "packet");
    }

    #[test]
    fn many_services_compare_with_few_of_the_same_way() {
        let rows = rows(&[case(10), case(1_000)], &measured());
        let few = rows.iter().map(|row| row.vs_fewest_services.map(|ratio| ratio.rate.median));
        assert_eq!(few.collect::<Vec<_>>(), [None, None, Some(0.95), Some(1.0)]);
    }

    #[test]
    fn without_ours_a_row_still_has_the_rates_of_the_others() {
        let mut measured = measured();
        for samples in &mut measured {
            samples.retain(|variant, _| !variant.is_ours());
        }
        let rows = rows(&[case(10), case(1_000)], &measured);
        assert_eq!(rows.len(), 2);
        assert!(rows[0].ours.is_none() && rows[0].vs_peer.is_none());
        assert_eq!(rows[0].rates.len(), 3);
    }

    #[test]
    fn a_block_with_errors_counts_for_nothing_and_is_told() {
        let mut measured = measured();
        let bad = measured[0].get_mut(&Variant::Nftables).expect("there");
        bad.outcomes[0].as_mut().expect("there").errors = 3;
        let rows = rows(&[case(10)], &measured);
        assert_eq!(rows[0].failures["nftables"], "3 operations");
        assert!((rows[0].rates["nftables"].per_second - 60.0).abs() < 1e-9);
    }

    #[test]
    fn a_block_without_an_operation_counts_for_nothing() {
        let mut measured = measured();
        let empty =
            measured[0].get_mut(&Variant::Nftables).expect("there").outcomes[0].as_mut().expect("there");
        (empty.operations, empty.per_second, empty.latency.p50) = (0, 0.0, 0.0);
        let rows = rows(&[case(10)], &measured);
        let against = rows[0].vs.iter().find(|against| against.peer == Variant::Nftables).expect("a peer");
        assert_eq!((against.ratio.rate.high, against.ratio.p50.high), (1.5, 1.0));
    }

    #[test]
    fn the_limit_measured_twice_is_the_noise() {
        let noise = noise(&[case(10), case(1_000)], &measured()).expect("two service rows");
        assert!((noise.rate.median - 1.0).abs() < 1e-9);
    }
}
