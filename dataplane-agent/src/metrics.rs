//! Prometheus metrics.
//!
//! Request metrics are counted as requests are served, all others are read at scrape time
//! ([`AtScrape`]).

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

/// Prefix of every name.
const PREFIX: &str = "dataplane";
/// Buckets of request durations: a view takes microseconds, a CNI ADD tens of milliseconds.
const REQUEST_BUCKETS: [f64; 12] =
    [0.000_1, 0.000_5, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];
/// Buckets from an event to the tables.
const EVENT_BUCKETS: [f64; 12] =
    [0.000_25, 0.000_5, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0];
/// Buckets from a change in the cluster to the tables; most of the time is the control plane's.
const TRIGGER_BUCKETS: [f64; 15] =
    [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0];
/// Shortest time between two counts of flows: counting reads the whole flow index.
const FLOWS_REFRESH: Duration = Duration::from_secs(10);

type Durations = Family<[(&'static str, String); 1], Histogram, fn() -> Histogram>;
type Results = Family<[(&'static str, String); 2], Counter>;

/// The registry, and the metrics of requests.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    scrape: Arc<AtScrape>,
    cni_requests: Results,
    cni_seconds: Durations,
    api_requests: Results,
    api_seconds: Durations,
    latency: LatencyHistograms,
}

/// Histograms of the time until the tables hold a change, in seconds. Clones share them.
#[derive(Clone, Debug)]
pub struct LatencyHistograms {
    /// From the arrival of the event.
    pub from_event: Histogram,
    /// From the change in the cluster.
    pub from_trigger: Histogram,
}

/// Value of the label `result`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestResult {
    Ok,
    Error,
}

/// Metrics that are read at scrape time.
struct AtScrape {
    status: watch::Receiver<Status>,
    datapath: OnceLock<Arc<dyn DatapathReader>>,
    cni: OnceLock<Arc<dyn CniServer>>,
    source: OnceLock<Problems>,
    progress: OnceLock<Progress>,
    flows: Mutex<Option<(Instant, u64)>>,
}

impl Metrics {
    /// Metrics of an agent that publishes `status`; the setters add parts that start after HTTP.
    pub fn new(status: watch::Receiver<Status>) -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let scrape = Arc::new(AtScrape {
            status,
            datapath: OnceLock::new(),
            cni: OnceLock::new(),
            source: OnceLock::new(),
            progress: OnceLock::new(),
            flows: Mutex::default(),
        });
        registry.register_collector(Box::new(Arc::clone(&scrape)));
        let cni_requests = Results::default();
        registry.register("cni_requests", "Requests of the CNI plugin", cni_requests.clone());
        let cni_seconds = Durations::new_with_constructor(histogram);
        registry.register_with_unit(
            "cni_request_duration",
            "Duration of requests of the CNI plugin",
            Unit::Seconds,
            cni_seconds.clone(),
        );
        let api_requests = Results::default();
        registry.register("api_requests", "Requests for views of the local API", api_requests.clone());
        let api_seconds = Durations::new_with_constructor(histogram);
        registry.register_with_unit(
            "api_request_duration",
            "Duration of requests for views of the local API",
            Unit::Seconds,
            api_seconds.clone(),
        );
        let latency = LatencyHistograms {
            from_event: Histogram::new(EVENT_BUCKETS),
            from_trigger: Histogram::new(TRIGGER_BUCKETS),
        };
        registry.register_with_unit(
            "event_apply_duration",
            "Time from the arrival of an event of the source until the tables hold the change",
            Unit::Seconds,
            latency.from_event.clone(),
        );
        registry.register_with_unit(
            "network_programming_duration",
            "Time from the last-change-trigger-time of an EndpointSlice until the tables hold the change",
            Unit::Seconds,
            latency.from_trigger.clone(),
        );
        Self { registry, scrape, cni_requests, cni_seconds, api_requests, api_seconds, latency }
    }

    /// The histograms of programming latency.
    pub fn latency(&self) -> LatencyHistograms {
        self.latency.clone()
    }

    /// Adds the metrics of the datapath. The first call counts.
    pub fn set_datapath_reader(&self, datapath: Arc<dyn DatapathReader>) {
        let _first = self.scrape.datapath.set(datapath);
    }

    /// Adds the metrics of the IPAM. The first call counts.
    pub fn set_cni(&self, cni: Arc<dyn CniServer>) {
        let _first = self.scrape.cni.set(cni);
    }

    /// Adds the count of source problems. The first call counts.
    pub fn set_source(&self, problems: Problems) {
        let _first = self.scrape.source.set(problems);
    }

    /// Adds the metrics of the API server watches. The first call counts.
    pub fn set_progress(&self, progress: Progress) {
        let _first = self.scrape.progress.set(progress);
    }

    /// Counts an answered request of the CNI plugin.
    pub fn cni_request(&self, verb: &str, result: RequestResult, duration: Duration) {
        self.cni_requests.get_or_create(&[("verb", verb.to_owned()), ("result", result.name())]).inc();
        self.cni_seconds.get_or_create(&[("verb", verb.to_owned())]).observe(duration.as_secs_f64());
    }

    /// Counts an answered request for a view.
    pub fn api_request(&self, view: &str, result: RequestResult, duration: Duration) {
        self.api_requests.get_or_create(&[("view", view.to_owned()), ("result", result.name())]).inc();
        self.api_seconds.get_or_create(&[("view", view.to_owned())]).observe(duration.as_secs_f64());
    }

    /// All metrics in the OpenMetrics text format.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        if let Err(error) = text::encode(&mut out, &self.registry) {
            tracing::error!(%error, "cannot encode metrics; the scrape is incomplete");
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
    Histogram::new(REQUEST_BUCKETS)
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
            out.counter(
                "source_problems",
                "Problems found in objects of the source since the agent started",
                source.total(),
            )?;
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
    out.gauges("build_info", "Version, table layout and node of the agent; the value is 1", [(build, 1)])?;
    out.gauge("ready", "1 if the agent is ready, else 0", u64::from(status.is_ready()))?;
    out.gauge("synced", "1 if the source has delivered every object once, else 0", u64::from(status.synced))?;
    out.gauge("state_revision", "Revision of the cluster state in the agent", status.revision)?;
    out.gauge(
        "applied_revision",
        "Revision of the cluster state that the tables hold completely",
        status.applied_revision,
    )?;
    out.gauge("pins_adopted", "Pinned tables adopted from an earlier agent", u64::from(status.pins_adopted))?;
    let objects = [
        ("node", status.objects.nodes),
        ("service", status.objects.services),
        ("endpoint_slice", status.objects.endpoint_slices),
        ("pod", status.objects.pods),
    ];
    out.gauges(
        "objects",
        "Objects in the state of the agent, by kind",
        objects.map(|(kind, count)| ([("kind", kind)], count)),
    )?;
    let problems = [Origin::Source, Origin::Reconcile, Origin::Datapath, Origin::Node].map(|origin| {
        let count = status.problems.iter().filter(|problem| problem.origin == origin).count();
        ([("origin", origin.name())], count as u64)
    });
    out.gauges("problems", "Current problems, by the part of the agent that found them", problems)
}

fn encode_progress(out: &mut Encoder<'_>, progress: &Progress) -> fmt::Result {
    let age = progress.behind_since().and_then(|since| since.elapsed().ok()).unwrap_or_default();
    out.gauge(
        "source_age_seconds",
        "Age of the cluster state in seconds; 0 while every watch is up to date",
        age.as_secs(),
    )?;
    out.counter("source_relists", "Complete lists of a kind after the first", progress.relists())?;
    let errors = progress.watch_errors();
    out.counter("source_watch_errors", "Failed requests to the API server, and broken watches", errors)?;
    out.counter("source_failovers", "Changes to another API server", progress.failovers())
}

fn encode_tables(out: &mut Encoder<'_>, status: &Status) -> fmt::Result {
    let rows = |value: fn(&crate::api::views::TableView) -> u64| {
        status.tables.iter().map(move |table| ([("table", table.name.clone())], value(table)))
    };
    out.gauges("table_entries", "Rows in the table", rows(|table| table.used))?;
    out.gauges("table_capacity", "Largest number of rows of the table", rows(|table| table.capacity))?;
    out.counters(
        "table_writes",
        "Rows written to the table since the agent started",
        rows(|table| table.writes),
    )?;
    out.counters(
        "table_removals",
        "Rows removed from the table since the agent started",
        rows(|table| table.removals),
    )
}

fn encode_reconcile(out: &mut Encoder<'_>, status: &Status) -> fmt::Result {
    let reconcile = &status.reconcile;
    out.counter("reconcile_errors", "Failed writes to tables", reconcile.errors)?;
    out.counter("reconcile_retries", "Writes to tables repeated after a failure", reconcile.retries)?;
    out.counter(
        "reconcile_drift",
        "Table rows that an audit found changed by another process",
        reconcile.drift,
    )?;
    out.gauge("reconcile_pending", "Table keys that wait for a retry", reconcile.pending)
}

impl AtScrape {
    fn encode_datapath(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let Some(datapath) = self.datapath.get() else { return Ok(()) };
        match datapath.counts() {
            Ok(counts) => {
                let rows = counts.into_iter().map(|count| {
                    let action = if count.dropped { "drop" } else { "pass" };
                    (
                        [("hook", count.hook), ("outcome", count.outcome), ("action", action.to_owned())],
                        count.packets,
                    )
                });
                out.counters("packets", "Packets by hook, verdict or drop reason, and action", rows)?;
            }
            Err(error) => tracing::warn!(%error, "cannot read packet counters for /metrics"),
        }
        match self.flows(datapath.as_ref()) {
            Ok(flows) => out.gauge("flows", "Flows (connections translated per packet)", flows),
            Err(error) => {
                tracing::warn!(%error, "cannot count flows for /metrics");
                Ok(())
            }
        }
    }

    fn flows(&self, datapath: &dyn DatapathReader) -> Result<u64, String> {
        let mut cached = self.flows.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((read, count)) = *cached
            && read.elapsed() < FLOWS_REFRESH
        {
            return Ok(count);
        }
        let count = datapath.flows()?.len() as u64;
        *cached = Some((Instant::now(), count));
        Ok(count)
    }

    fn encode_ipam(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let Some(cni) = self.cni.get() else { return Ok(()) };
        let ranges = cni.ranges();
        let label = |cidr: &ipnet::IpNet| [("cidr", cidr.to_string())];
        out.gauges(
            "ipam_addresses_used",
            "Pod addresses in use, by pod CIDR",
            ranges.iter().map(|r| (label(&r.cidr), r.used)),
        )?;
        out.gauges(
            "ipam_addresses_free",
            "Free pod addresses, by pod CIDR",
            ranges.iter().map(|r| (label(&r.cidr), r.free)),
        )
    }
}

/// Encodes metrics that exist only during a scrape.
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
