//! Computes the rows of the report from samples.

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

/// Largest difference of two measurements of the same thing in a valid run.
const NOISE_ALLOWED: f64 = 0.02;

/// A row of the result.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: &'static str,
    pub params: Map<String, Value>,
    /// The datapath's variant.
    #[serde(skip)]
    pub variant: Option<Variant>,
    /// Median operations per second of the datapath.
    #[serde(rename = "ours")]
    pub dataplane: Option<f64>,
    /// Compared with the best of the row's peers.
    pub vs_peer: Option<Against>,
    /// Peers that were not measured in this row.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers_absent: Vec<Variant>,
    pub vs_limit: Option<Against>,
    /// Compared with all baselines of the row.
    pub vs: Vec<Against>,
    /// Compared with the same row with the fewest Services.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vs_fewest_services: Option<Ratio>,
    /// Failed operations and lost datagrams by variant, where there were any.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub failures: BTreeMap<String, String>,
    /// Median measurement overhead per operation in microseconds, not included in other numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overhead_us: Option<f64>,
    /// Median rate and latency by variant.
    pub rates: BTreeMap<String, Rate>,
}

/// The datapath's rate divided by a baseline's.
#[derive(Clone, Debug, Serialize)]
pub struct Against {
    #[serde(rename = "peer")]
    pub baseline: Variant,
    #[serde(flatten)]
    pub ratio: Ratio,
}

/// A ratio of rates and of median latencies.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Ratio of operations per second: the result.
    #[serde(flatten)]
    pub rate: Estimate,
    /// Ratio of the rates computed from median latencies, as on an otherwise idle machine.
    pub p50: Estimate,
}

impl Ratio {
    fn of(dataplane: &Samples, baseline: &Samples) -> Option<Self> {
        Some(Self {
            rate: Estimate::of_ratio(&dataplane.rates(), &baseline.rates())?,
            p50: Estimate::of_ratio(&dataplane.undisturbed_rates(), &baseline.undisturbed_rates())?,
        })
    }
}

/// Medians of all rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rate {
    pub per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// The result of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub machine: Machine,
    pub rounds: usize,
    pub seconds_per_block: f64,
    /// Share of steal time during the run.
    pub stolen: f64,
    /// The ratio of two measurements of the same thing: smaller differences are noise.
    pub noise: Option<Ratio>,
    pub rows: Vec<Row>,
    /// The agent in large clusters.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub scale: Vec<Scale>,
}

impl Report {
    /// Whether the noise is small enough for a valid result.
    pub fn is_quiet(&self) -> bool {
        self.noise.is_none_or(|noise| is_small(&noise.rate))
    }

    /// Whether at least the p50 ratios are valid.
    pub fn is_quiet_at_median(&self) -> bool {
        self.noise.is_none_or(|noise| is_small(&noise.p50))
    }
}

fn is_small(noise: &Estimate) -> bool {
    (noise.median - 1.0).abs() <= NOISE_ALLOWED
}

/// Returns a row per datapath variant of each case, or one with the baselines' rates if there is
/// none.
pub fn rows(cases: &[Case], measured: &Measured) -> Vec<Row> {
    let mut rows = Vec::new();
    for (case, samples) in cases.iter().zip(measured) {
        let dataplane: Vec<Variant> =
            samples.keys().copied().filter(|variant| variant.is_dataplane()).collect();
        if dataplane.is_empty() {
            rows.push(row_of(case, samples, None));
        }
        for variant in dataplane {
            let mut row = row_of(case, samples, Some(variant));
            row.vs_fewest_services = against_fewest(cases, measured, case, variant, &samples[&variant]);
            rows.push(row);
        }
    }
    rows
}

fn row_of(case: &Case, samples: &BTreeMap<Variant, Samples>, dataplane: Option<Variant>) -> Row {
    let mut params = case.params.clone();
    if let Some((key, value)) = dataplane.and_then(Variant::row_parameter) {
        params.insert(key.into(), json!(value));
    }
    if case.row == row::CLUSTERIP_CRR
        && let Some(dataplane) = dataplane
    {
        params.insert(
            "translation".into(),
            json!(if dataplane == Variant::Packet { "packet" } else { "connect" }),
        );
    }
    let rates: BTreeMap<Variant, Rate> =
        samples.iter().filter_map(|(variant, samples)| Some((*variant, rate(samples)?))).collect();
    let vs: Vec<Against> = samples
        .iter()
        .filter(|(variant, _)| !variant.is_dataplane())
        .filter_map(|(variant, baseline)| {
            let ratio = Ratio::of(samples.get(&dataplane?)?, baseline)?;
            Some(Against { baseline: *variant, ratio })
        })
        .collect();
    let best = case
        .peers
        .iter()
        .filter_map(|peer| Some((*peer, rates.get(peer)?.per_second)))
        .max_by(|a, b| a.1.total_cmp(&b.1));
    let against = |wanted: Variant| vs.iter().find(|against| against.baseline == wanted).cloned();
    Row {
        name: case.row,
        params,
        variant: dataplane,
        dataplane: dataplane.and_then(|dataplane| rates.get(&dataplane)).map(|rate| rate.per_second),
        vs_peer: best.and_then(|(peer, _)| against(peer)),
        peers_absent: case.peers.iter().copied().filter(|peer| !samples.contains_key(peer)).collect(),
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
        if let Some(problem) = &samples.last_error {
            failures.insert(variant.to_string(), format!("{blocks} blocks failed, the last one: {problem}"));
        } else if operations > 0 {
            failures.insert(variant.to_string(), format!("{operations} operations"));
        }
    }
    failures
}

/// Compares with the same variant in the row's first case.
fn against_fewest(
    cases: &[Case],
    measured: &Measured,
    case: &Case,
    dataplane: Variant,
    samples: &Samples,
) -> Option<Ratio> {
    let first = cases.iter().position(|other| other.row == case.row)?;
    if case.params.get("services")? == cases[first].params.get("services")? {
        return None;
    }
    Ratio::of(samples, measured[first].get(&dataplane)?)
}

/// Returns the noise: the limit of the `clusterip_crr` rows does not depend on the number of
/// Services, so two rows measure the same thing.
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
        Samples { outcomes: rates.iter().map(|rate| Some(outcome(*rate))).collect(), last_error: None }
    }

    fn case(services: u16) -> Case {
        let params = Map::from_iter([("services".to_owned(), json!(services))]);
        Case {
            row: row::CLUSTERIP_CRR,
            params,
            limit: Variant::Plain,
            peers: &Variant::KUBE_PROXY,
            workloads: Vec::new(),
        }
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
    fn row_compares_with_the_better_kube_proxy_mode_and_the_limit() {
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
    fn peer_that_was_not_measured_is_absent() {
        let mut measured = measured();
        measured[0].remove(&Variant::Iptables);
        let json = serde_json::to_value(rows(&[case(10)], &measured)).expect("rows serialize");
        assert_eq!(json[0]["peers_absent"], json!(["iptables"]));
        assert_eq!(json[0]["vs_peer"]["peer"], "nftables");
    }

    #[test]
    fn row_compares_with_the_fewest_services_of_the_same_variant() {
        let rows = rows(&[case(10), case(1_000)], &measured());
        let few = rows.iter().map(|row| row.vs_fewest_services.map(|ratio| ratio.rate.median));
        assert_eq!(few.collect::<Vec<_>>(), [None, None, Some(0.95), Some(1.0)]);
    }

    #[test]
    fn row_without_datapath_has_the_rates_of_the_baselines() {
        let mut measured = measured();
        for samples in &mut measured {
            samples.retain(|variant, _| !variant.is_dataplane());
        }
        let rows = rows(&[case(10), case(1_000)], &measured);
        assert_eq!(rows.len(), 2);
        assert!(rows[0].dataplane.is_none() && rows[0].vs_peer.is_none());
        assert_eq!(rows[0].rates.len(), 3);
    }

    #[test]
    fn block_with_errors_is_ignored_and_reported() {
        let mut measured = measured();
        let bad = measured[0].get_mut(&Variant::Nftables).expect("there");
        bad.outcomes[0].as_mut().expect("there").errors = 3;
        let rows = rows(&[case(10)], &measured);
        assert_eq!(rows[0].failures["nftables"], "3 operations");
        assert!((rows[0].rates["nftables"].per_second - 60.0).abs() < 1e-9);
    }

    #[test]
    fn block_without_operations_is_ignored() {
        let mut measured = measured();
        let empty =
            measured[0].get_mut(&Variant::Nftables).expect("there").outcomes[0].as_mut().expect("there");
        (empty.operations, empty.per_second, empty.latency.p50) = (0, 0.0, 0.0);
        let rows = rows(&[case(10)], &measured);
        let against =
            rows[0].vs.iter().find(|against| against.baseline == Variant::Nftables).expect("a peer");
        assert_eq!((against.ratio.rate.high, against.ratio.p50.high), (1.5, 1.0));
    }

    #[test]
    fn noise_is_the_ratio_of_two_limit_measurements() {
        let noise = noise(&[case(10), case(1_000)], &measured()).expect("two service rows");
        assert!((noise.rate.median - 1.0).abs() < 1e-9);
    }
}
