//! The benchmark: creates all topologies, measures them interleaved, prints tables, writes JSON and
//! the document.

use std::{fs, io::Write as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum as _};
use dataplane_bench::{
    machine::{Machine, stolen},
    markdown,
    measure::{Pace, measure},
    network::InstanceLock,
    plan::{SERVICE_COUNTS, Selection, Variant},
    plots,
    program::peers::Peers,
    report::{self, Report},
    scale,
    testbed::Testbed,
};
use indicatif::{ProgressBar, ProgressStyle};

/// Compares the datapath with kube-proxy's rules, plain routing and the limit, in one interleaved
/// run.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Few short rounds: a test of the benchmark, not a result
    #[arg(long)]
    quick: bool,
    /// Writes the result as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only these variants
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Variant>,
    /// Only rows whose name contains this
    #[arg(long, default_value = "")]
    rows: String,
    /// Only these numbers of Services in `clusterip_crr` (10, 1000, 30000)
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',')]
    services: Vec<u16>,
    #[arg(long)]
    rounds: Option<usize>,
    /// Time of a block after its warm-up
    #[arg(long, value_name = "MILLISECONDS")]
    time_ms: Option<u64>,
    /// Measures only an agent in large clusters; without a value, in those of a complete run
    #[arg(long, value_name = "SERVICESxENDPOINTS", value_delimiter = ',', num_args = 0..=1)]
    scale: Option<Vec<scale::Size>>,
    /// Updates docs/benchmarks.md and docs/figures, as a complete run always does
    #[arg(long)]
    write_docs: bool,
    /// Draws the figures of the run in docs/figures, or only those of the run in this JSON file
    #[arg(long, value_name = "FILE", num_args = 0..=1)]
    plots: Option<Vec<PathBuf>>,
    #[command(flatten)]
    peers: Peers,
}

impl Arguments {
    fn pace(&self) -> Pace {
        let (rounds, warm_up, time) = if self.quick { (5, 50, 200) } else { (75, 50, 200) };
        Pace {
            rounds: self.rounds.unwrap_or(rounds),
            warm_up: Duration::from_millis(warm_up),
            time: Duration::from_millis(self.time_ms.unwrap_or(time)),
        }
    }

    fn selection(&self) -> Result<Selection> {
        let all = if self.only.is_empty() { Variant::value_variants() } else { &self.only };
        let services = if self.services.is_empty() { SERVICE_COUNTS.to_vec() } else { self.services.clone() };
        for count in &services {
            ensure!(SERVICE_COUNTS.contains(count), "--services {count}: must be one of {SERVICE_COUNTS:?}");
        }
        Ok(Selection { variants: all.iter().copied().collect(), rows: self.rows.clone(), services })
    }

    fn is_complete(&self) -> bool {
        !self.quick && self.only.is_empty() && self.rows.is_empty() && self.services.is_empty()
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some([file]) = arguments.plots.as_deref() {
        let text = fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
        let report =
            serde_json::from_slice(&text).with_context(|| format!("cannot read {}", file.display()))?;
        return draw(&report);
    }
    ensure!(nix::unistd::geteuid().is_root(), "the benchmark needs root for network namespaces and eBPF");
    if let Some(sizes) = &arguments.scale {
        let results = measure_scale(if sizes.is_empty() { &scale::SIZES } else { sizes })?;
        print(&serde_json::to_string_pretty(&results)?)?;
        return print(&markdown::scale(&results));
    }
    let report = run(&arguments)?;
    print(&markdown::ratios(&report))?;
    print(&markdown::rates(&report))?;
    print(&markdown::program_runs(&report))?;
    print(&markdown::scale(&report.scale))?;
    print(&markdown::conditions(&report))?;
    if let Some(path) = &arguments.json {
        let text = serde_json::to_string_pretty(&report)?;
        fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    }
    if arguments.write_docs || arguments.is_complete() {
        let path = docs().join("benchmarks.md");
        fs::write(&path, markdown::document(&report))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if arguments.plots.is_some() || arguments.write_docs || arguments.is_complete() {
        draw(&serde_json::to_value(&report)?)?;
    }
    Ok(())
}

fn docs() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs")
}

/// Draws the figures of a report.
fn draw(report: &serde_json::Value) -> Result<()> {
    for file in plots::write(report, &docs().join("figures"))? {
        print(&format!("drawn: {}", file.display()))?;
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "ticks of minutes, small enough to be exact in a float")]
fn run(arguments: &Arguments) -> Result<Report> {
    let machine = Machine::inspect()?;
    let _lock = InstanceLock::acquire()?;
    let selection = arguments.selection()?;
    let testbed = Testbed::create(&selection, &arguments.peers)?;
    let cases = testbed.cases();
    ensure!(!cases.is_empty(), "no row matches {:?} and the other options", arguments.rows);
    let pace = arguments.pace();
    let blocks: usize = cases.iter().map(|case| case.workloads.len()).sum();
    let bar = ProgressBar::new((blocks * pace.rounds) as u64);
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {eta} {msg}")?);
    let (stolen_before, all_before) = stolen()?;
    let measured = measure(&cases, pace, |_, block| {
        bar.set_message(block.to_owned());
        bar.inc(1);
    })?;
    bar.finish_and_clear();
    let (stolen_after, all_after) = stolen()?;
    testbed.check(&cases)?;
    drop(testbed);
    Ok(Report {
        machine,
        rounds: pace.rounds,
        seconds_per_block: pace.time.as_secs_f64(),
        stolen: (stolen_after - stolen_before) as f64 / (all_after - all_before).max(1) as f64,
        noise: report::noise(&cases, &measured),
        rows: report::rows(&cases, &measured),
        scale: if arguments.is_complete() { measure_scale(&scale::SIZES)? } else { Vec::new() },
    })
}

/// Measures the clusters one after the other.
fn measure_scale(sizes: &[scale::Size]) -> Result<Vec<scale::Scale>> {
    sizes.iter().map(|size| scale::measure(*size)).collect()
}

fn print(text: &str) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{text}").context("cannot write to stdout")
}
