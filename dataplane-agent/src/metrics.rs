//! Metrics, as Prometheus reads them.
//!
//! Two kinds: what requests count as they are served (families kept here), and what is read at scrape time from the
//! published status, the datapath and the IPAM ([`AtScrape`]): nothing keeps a second copy of a number in step.

use std::{
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::ConstGauge,
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};
use tokio::sync::watch;

use crate::{
    api::{
        cni::CniServer,
        datapath::DatapathReader,
        views::{Origin, Status},
    },
    source::{Problems, Progress},
};

/// Before every name.
const PREFIX: &str = "dataplane";
/// Upper bounds of the duration histograms in seconds: a view takes microseconds, a CNI ADD tens of milliseconds.
const SECONDS: [f64; 12] = [0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
/// Those of the way into the tables: milliseconds.
const EVENT_SECONDS: [f64; 12] =
    [0.000_25, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];
/// Those of the way from a pod's change to the tables of a node, most of it the control plane's.
const TRIGGER_SECONDS: [f64; 15] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0];
/// Listing the flows reads the whole index: at most this often for the sake of a number.
const FLOWS_EVERY: Duration = Duration::from_secs(10);

type Durations = Family<[(&'static str, String); 1], Histogram, fn() -> Histogram>;
type Results = Family<[(&'static str, String); 2], Counter>;

/// The registry and what is counted while serving.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    scrape: Arc<AtScrape>,
    cni_requests: Results,
    cni_seconds: Durations,
    api_requests: Results,
    api_seconds: Durations,
    programming: ProgrammingLatency,
}

/// How long changes take into the tables, in seconds. Clones count into the same.
#[derive(Clone, Debug)]
pub struct ProgrammingLatency {
    /// From the event's arrival.
    pub from_event: Histogram,
    /// From the change in the cluster that led to it.
    pub from_trigger: Histogram,
}

/// How a request ended, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestResult {
    Ok,
    Error,
}

/// Read at scrape time.
struct AtScrape {
    status: watch::Receiver<Status>,
    live: OnceLock<Arc<dyn DatapathReader>>,
    cni: OnceLock<Arc<dyn CniServer>>,
    source: OnceLock<Problems>,
    progress: OnceLock<Progress>,
    flows: Mutex<Option<(Instant, u64)>>,
}

impl Metrics {
    /// Metrics of an agent that publishes `status`. They are whole once [`Self::set_datapath_reader`] and [`Self::set_cni`]
    /// were called, which is after HTTP must answer.
    pub fn new(status: watch::Receiver<Status>) -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let scrape = Arc::new(AtScrape {
            status,
            live: OnceLock::new(),
            cni: OnceLock::new(),
            source: OnceLock::new(),
            progress: OnceLock::new(),
            flows: Mutex::default(),
        });
        registry.register_collector(Box::new(Arc::clone(&scrape)));
        let cni_requests = Results::default();
        registry.register(
            "cni_requests",
            "Requests of the CNI plugin by verb and result",
            cni_requests.clone(),
        );
        let cni_seconds = Durations::new_with_constructor(histogram);
        registry.register_with_unit(
            "cni_request_duration",
            "Time to answer the CNI plugin",
            Unit::Seconds,
            cni_seconds.clone(),
        );
        let api_requests = Results::default();
        registry.register(
            "api_requests",
            "Requests of the local API by kind and result",
            api_requests.clone(),
        );
        let api_seconds = Durations::new_with_constructor(histogram);
        registry.register_with_unit(
            "api_request_duration",
            "Time to answer the local API",
            Unit::Seconds,
            api_seconds.clone(),
        );
        let programming = ProgrammingLatency {
            from_event: Histogram::new(EVENT_SECONDS),
            from_trigger: Histogram::new(TRIGGER_SECONDS),
        };
        registry.register_with_unit(
            "event_to_table",
            "Time from the arrival of an object to its being in the tables",
            Unit::Seconds,
            programming.from_event.clone(),
        );
        registry.register_with_unit(
            "network_programming",
            "Time from a change in the cluster (last-change-trigger-time of an EndpointSlice) to its being in the tables",
            Unit::Seconds,
            programming.from_trigger.clone(),
        );
        Self { registry, scrape, cni_requests, cni_seconds, api_requests, api_seconds, programming }
    }

    /// What counts how long changes take into the tables.
    pub fn programming(&self) -> ProgrammingLatency {
        self.programming.clone()
    }

    /// From now on the datapath can be read. The first call counts.
    pub fn set_datapath_reader(&self, live: Arc<dyn DatapathReader>) {
        let _first = self.scrape.live.set(live);
    }

    /// From now on the address ranges can be read. The first call counts.
    pub fn set_cni(&self, cni: Arc<dyn CniServer>) {
        let _first = self.scrape.cni.set(cni);
    }

    /// From now on what the source could not use is counted. The first call counts.
    pub fn set_source(&self, problems: Problems) {
        let _first = self.scrape.source.set(problems);
    }

    /// From now on how far the source is behind the cluster is measured. The first call counts.
    pub fn set_progress(&self, progress: Progress) {
        let _first = self.scrape.progress.set(progress);
    }

    /// A request of the CNI plugin was answered.
    pub fn cni_request(&self, verb: &str, result: RequestResult, took: Duration) {
        self.cni_requests.get_or_create(&[("verb", verb.to_owned()), ("result", result.name())]).inc();
        self.cni_seconds.get_or_create(&[("verb", verb.to_owned())]).observe(took.as_secs_f64());
    }

    /// A request of the CLI was answered.
    pub fn api_request(&self, request: &str, result: RequestResult, took: Duration) {
        self.api_requests.get_or_create(&[("request", request.to_owned()), ("result", result.name())]).inc();
        self.api_seconds.get_or_create(&[("request", request.to_owned())]).observe(took.as_secs_f64());
    }

    /// Everything, in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        if let Err(error) = text::encode(&mut out, &self.registry) {
            tracing::error!(%error, "encode metrics");
        }
        out
    }
}

impl RequestResult {
    fn name(self) -> String {
        match self {
            Self::Ok => "ok",
            Self::Error => "error",
        }
        .to_owned()
    }
}

impl<T, E> From<&Result<T, E>> for RequestResult {
    fn from(result: &Result<T, E>) -> Self {
        if result.is_ok() { Self::Ok } else { Self::Error }
    }
}

fn histogram() -> Histogram {
    Histogram::new(SECONDS)
}

impl fmt::Debug for AtScrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtScrape").field("status", &self.status).finish_non_exhaustive()
    }
}

impl Collector for AtScrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let status = self.status.borrow().clone();
        let mut out = Encoder(encoder);
        encode_agent(&mut out, &status)?;
        encode_tables(&mut out, &status)?;
        encode_reconcile(&mut out, &status)?;
        if let Some(source) = self.source.get() {
            out.counter("source_problems", "Problems the source came upon, gone or not", source.ever())?;
        }
        if let Some(progress) = self.progress.get() {
            encode_progress(&mut out, progress)?;
        }
        self.encode_datapath(&mut out)?;
        self.encode_ipam(&mut out)
    }
}

fn encode_agent(out: &mut Encoder<'_>, status: &Status) -> fmt::Result {
    let build =
        [("version", status.version.clone()), ("abi", status.abi.to_string()), ("node", status.node.clone())];
    out.gauges("build_info", "The agent that runs", [(build, 1)])?;
    out.gauge("ready", "Whether the agent is ready", u64::from(status.is_ready()))?;
    out.gauge("synced", "Whether the source has delivered everything once", u64::from(status.synced))?;
    out.gauge("state_revision", "Revision of the state", status.revision)?;
    out.gauge("applied_revision", "Revision that is in the tables completely", status.applied_revision)?;
    out.gauge("pins_adopted", "Pins taken over from an earlier agent", u64::from(status.pins_adopted))?;
    let objects = [
        ("node", status.objects.nodes),
        ("service", status.objects.services),
        ("endpoint_slice", status.objects.endpoint_slices),
        ("pod", status.objects.pods),
    ];
    out.gauges("objects", "Objects known", objects.map(|(kind, count)| ([("kind", kind)], count)))?;
    let problems = [Origin::Source, Origin::Reconcile, Origin::Datapath, Origin::Node].map(|origin| {
        let count = status.problems.iter().filter(|problem| problem.origin == origin).count();
        ([("origin", origin.name())], count as u64)
    });
    out.gauges("problems", "What is wrong now, by the part of the agent that found it", problems)
}

fn encode_progress(out: &mut Encoder<'_>, progress: &Progress) -> fmt::Result {
    let age = progress.behind_since().and_then(|since| since.elapsed().ok()).unwrap_or_default();
    out.gauge("source_age_seconds", "Age of the state: 0 while the cluster is watched", age.as_secs())?;
    out.counter("source_relists", "How often everything of a kind was asked for again", progress.relists())?;
    let errors = progress.watch_errors();
    out.counter(
        "source_watch_errors",
        "Requests to the API server that failed, watches that broke off",
        errors,
    )?;
    out.counter("source_failovers", "How often another API server was taken", progress.failovers())
}

fn encode_tables(out: &mut Encoder<'_>, status: &Status) -> fmt::Result {
    let rows = |value: fn(&crate::api::views::TableView) -> u64| {
        status.tables.iter().map(move |table| ([("table", table.name.clone())], value(table)))
    };
    out.gauges("table_entries", "Entries in use", rows(|table| table.used))?;
    out.gauges("table_capacity", "Entries there is room for", rows(|table| table.capacity))?;
    out.counters("table_writes", "Entries written", rows(|table| table.writes))?;
    out.counters("table_removals", "Entries removed", rows(|table| table.removals))
}

fn encode_reconcile(out: &mut Encoder<'_>, status: &Status) -> fmt::Result {
    let reconcile = &status.reconcile;
    out.counter("reconcile_errors", "Writes that failed", reconcile.errors)?;
    out.counter("reconcile_retries", "Writes repeated after a failure", reconcile.retries)?;
    out.counter("reconcile_drift", "Entries an audit found changed", reconcile.drift)?;
    out.gauge("reconcile_pending", "Keys that wait for a retry", reconcile.pending)
}

impl AtScrape {
    fn encode_datapath(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let Some(live) = self.live.get() else { return Ok(()) };
        match live.counts() {
            Ok(counts) => {
                let rows = counts.into_iter().map(|count| {
                    let end = if count.dropped { "dropped" } else { "passed" };
                    (
                        [("hook", count.hook), ("outcome", count.outcome), ("end", end.to_owned())],
                        count.packets,
                    )
                });
                out.counters("packets", "Packets by hook and outcome", rows)?;
            }
            Err(error) => tracing::warn!(%error, "metrics: read the counters"),
        }
        match self.flows(live.as_ref()) {
            Ok(flows) => out.gauge("flows", "Connections translated per packet", flows),
            Err(error) => {
                tracing::warn!(%error, "metrics: read the flows");
                Ok(())
            }
        }
    }

    fn flows(&self, live: &dyn DatapathReader) -> Result<u64, String> {
        let mut cached = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((read, count)) = *cached
            && read.elapsed() < FLOWS_EVERY
        {
            return Ok(count);
        }
        let count = live.flows()?.len() as u64;
        *cached = Some((Instant::now(), count));
        Ok(count)
    }

    fn encode_ipam(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let Some(cni) = self.cni.get() else { return Ok(()) };
        let ranges = cni.ranges();
        let label = |cidr: &ipnet::IpNet| [("cidr", cidr.to_string())];
        out.gauges("ipam_used", "Pod addresses handed out", ranges.iter().map(|r| (label(&r.cidr), r.used)))?;
        out.gauges("ipam_free", "Pod addresses left", ranges.iter().map(|r| (label(&r.cidr), r.free)))
    }
}

/// Writes metrics that live no longer than a scrape.
struct Encoder<'a>(DescriptorEncoder<'a>);

impl Encoder<'_> {
    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        ConstGauge::new(value).encode(self.0.encode_descriptor(name, help, None, MetricType::Gauge)?)
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        ConstCounter::new(value).encode(self.0.encode_descriptor(name, help, None, MetricType::Counter)?)
    }

    fn gauges<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (labels, value) in rows {
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn counters<L: EncodeLabelSet>(
        &mut self,
        name: &str,
        help: &str,
        rows: impl IntoIterator<Item = (L, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (labels, value) in rows {
            ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
