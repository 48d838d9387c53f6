//! One agent in a large cluster with an API server: its time to become ready, its memory, and the
//! time from a change to the tables.

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;
use serde_json::{Value, json};

use dataplane_testkit::lab::{Backend, Cluster, Place, Protocol, Service, ServicePort, Source, Spec, wait};

/// Timeout of the initial sync.
const SYNC_TIMEOUT: Duration = Duration::from_secs(300);
/// Number of EndpointSlices changed one after the other after the initial sync.
const CHANGES: u32 = 1_000;
/// Timeout of a change.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between two changes, so that each is processed alone.
const PAUSE: Duration = Duration::from_millis(5);
const METRICS: &str = "127.0.0.1:9964";
/// Environment as in `deploy/`: malloc returns unused memory to the node.
const WRAPPER: [&str; 3] = ["env", "MALLOC_ARENA_MAX=1", "MALLOC_TRIM_THRESHOLD_=131072"];
/// The agent's histogram of the time from the arrival of an event to the last write.
const HISTOGRAM: &str = "dataplane_event_apply_duration_seconds";

/// The clusters of a complete run: Services with many endpoints, and many Services with few.
pub const SIZES: [Size; 2] =
    [Size { services: 10_000, endpoints: 10 }, Size { services: 30_000, endpoints: 4 }];

/// The size of a cluster. Text form: `10000x10`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub services: u32,
    /// Endpoints per Service.
    pub endpoints: u32,
}

impl FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (services, endpoints) = text.split_once('x').context("expected SERVICESxENDPOINTS")?;
        let size = Self { services: services.parse()?, endpoints: endpoints.parse()? };
        // limited by the range of cluster IPs
        ensure!(
            (1..65_000).contains(&size.services),
            "invalid number of Services {services}: must be 1 to 64999"
        );
        Ok(size)
    }
}

/// The result.
#[derive(Clone, Debug, Serialize)]
pub struct Scale {
    pub services: u32,
    pub endpoints: u32,
    pub api_server: String,
    /// Time from the start of the agent's process until it is ready.
    pub ready_seconds: f64,
    pub rss_mib: f64,
    /// File-backed pages of the program, part of `rss_mib`; the kernel can reclaim them.
    pub program_mib: f64,
    /// Peak RSS, the initial sync included.
    pub peak_rss_mib: f64,
    /// Kernel memory of all BPF maps, flow tables included.
    pub tables_mib: f64,
    pub changes: u32,
    /// Upper bound of the histogram bucket.
    pub change_p50_ms: f64,
    pub change_p99_ms: f64,
    /// Share of changes within 5 ms.
    pub change_within_5_ms: f64,
}

/// Measures a cluster of this size.
pub fn measure(size: Size) -> Result<Scale> {
    let spec = Spec {
        source: Source::kubernetes(),
        config: json!({"http_bind_address": METRICS, "log": "warn"}),
        ..Spec::new(1)
    };
    let mut cluster = Cluster::create_stopped(&spec).context("cannot create a node and an API server")?;
    let api_server = cluster.control()?.server().describe()?;
    let objects: Vec<Value> =
        (0..size.services).flat_map(|number| service(number, size.endpoints, 0).objects()).collect();
    cluster.apply_objects("scale", &objects)?;
    drop(objects);

    let start = Instant::now();
    let node = cluster.nodes_mut().first_mut().context("a node")?;
    node.agent_mut().set_wrapper(WRAPPER.map(str::to_owned).to_vec());
    node.agent_mut().start()?;
    let ready = wait::until("the agent is ready", SYNC_TIMEOUT, || {
        let status = node.agent_mut().status();
        Ok(status.is_ok_and(|status| status.status.is_ready()).then(|| start.elapsed()))
    })?;
    let place = node.place().clone();
    let pid = node.agent_mut().pid().context("the agent has exited")?;

    let before = histogram(&place)?;
    for number in 0..CHANGES {
        // spread over the Services
        let which = number * 7_919 % size.services;
        let changed = service(which, size.endpoints, 1 + number / size.services).objects();
        let slices: Vec<Value> =
            changed.into_iter().filter(|object| object["kind"] == "EndpointSlice").collect();
        cluster.control()?.objects().apply(&slices)?;
        std::thread::sleep(PAUSE);
    }
    let wanted = count(&before) + u64::from(CHANGES);
    let after = wait::until("every change is in the tables", CHANGE_TIMEOUT, || {
        let now = histogram(&place)?;
        Ok((count(&now) >= wanted).then_some(now))
    })?;
    let buckets = difference(&after, &before);
    let tables = cluster.nodes().first().context("a node")?.map_bytes()?;
    Ok(Scale {
        services: size.services,
        endpoints: size.endpoints,
        api_server,
        ready_seconds: ready.as_secs_f64(),
        rss_mib: memory(pid, "VmRSS")?,
        program_mib: memory(pid, "RssFile")?,
        peak_rss_mib: memory(pid, "VmHWM")?,
        tables_mib: tables as f64 / f64::from(1 << 20),
        changes: CHANGES,
        change_p50_ms: percentile(&buckets, 0.5) * 1e3,
        change_p99_ms: percentile(&buckets, 0.99) * 1e3,
        change_within_5_ms: share(&buckets, 0.005),
    })
}

/// Returns a Service; its endpoint addresses depend on `generation`.
fn service(number: u32, endpoints: u32, generation: u32) -> Service {
    let address = |network: [u8; 2], host: u32| -> IpAddr {
        let base = u32::from(Ipv4Addr::new(network[0], network[1], 0, 0));
        Ipv4Addr::from(base + host).into()
    };
    Service {
        name: format!("scale-{number}"),
        addresses: vec![address([10, 96], number + 1)],
        ports: vec![ServicePort { name: "http", port: 80, protocol: Protocol::Tcp, target: 8080 }],
        backends: (0..endpoints)
            .map(|index| Backend {
                pod: format!("pod-{number}-{index}"),
                node: format!("far-{}", index % 100),
                addresses: vec![address([11, 0], (number * endpoints + index) * 2 + generation % 2)],
            })
            .collect(),
    }
}

/// Cumulative counts by upper bound (bits of an `f64`).
type Buckets = BTreeMap<u64, u64>;

fn histogram(place: &Place) -> Result<Buckets> {
    let (host, port) = METRICS.split_once(':').context("host:port")?;
    let script = format!(
        "exec 3<>/dev/tcp/{host}/{port}; printf 'GET /metrics HTTP/1.0\\r\\nHost: agent\\r\\n\\r\\n' >&3; cat <&3"
    );
    let text = place.run("bash", &["-c", &script])?;
    let prefix = format!("{HISTOGRAM}_bucket{{le=\"");
    let mut buckets = Buckets::new();
    for line in text.lines() {
        let Some((bound, count)) = line.strip_prefix(&prefix).and_then(|rest| rest.split_once("\"} ")) else {
            continue;
        };
        let seconds: f64 = if bound == "+Inf" { f64::INFINITY } else { bound.parse()? };
        // positive floats sort like their bits
        buckets.insert(seconds.to_bits(), count.trim().parse()?);
    }
    ensure!(!buckets.is_empty(), "the agent's metrics have no histogram {HISTOGRAM}");
    Ok(buckets)
}

fn count(buckets: &Buckets) -> u64 {
    buckets.values().copied().max().unwrap_or(0)
}

fn difference(after: &Buckets, before: &Buckets) -> Buckets {
    after.iter().map(|(bound, count)| (*bound, count - before.get(bound).copied().unwrap_or(0))).collect()
}

/// Returns the smallest bound that includes this share of the values.
fn percentile(buckets: &Buckets, share: f64) -> f64 {
    let wanted = count(buckets) as f64 * share;
    let found = buckets.iter().find(|(_, count)| **count as f64 >= wanted);
    found.map_or(f64::INFINITY, |(bound, _)| f64::from_bits(*bound))
}

fn share(buckets: &Buckets, seconds: f64) -> f64 {
    let within = buckets.get(&seconds.to_bits()).copied().unwrap_or(0);
    within as f64 / count(buckets).max(1) as f64
}

/// Returns a memory field of `/proc/PID/status` in MiB.
fn memory(pid: u32, field: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib: u64 = line
        .and_then(|rest| rest.split_whitespace().next())
        .with_context(|| format!("cannot read {field} of process {pid}"))?
        .parse()?;
    Ok(kib as f64 / 1_024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_is_two_numbers_within_the_address_range() {
        assert_eq!("10000x10".parse::<Size>().unwrap(), SIZES[0]);
        for bad in ["10000", "x10", "0x1", "65000x1", "ten x1"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }

    #[test]
    fn percentile_is_the_smallest_bound_that_includes_it() {
        let buckets = Buckets::from(
            [(0.001_f64, 90), (0.005, 99), (0.01, 100), (f64::INFINITY, 100)].map(|(b, c)| (b.to_bits(), c)),
        );
        let at = |share| percentile(&buckets, share);
        assert!(
            (at(0.5) - 0.001).abs() < 1e-12
                && (at(0.99) - 0.005).abs() < 1e-12
                && (at(1.0) - 0.01).abs() < 1e-12
        );
        assert!((share(&buckets, 0.005) - 0.99).abs() < 1e-12);
    }

    #[test]
    fn change_replaces_only_the_endpoints() {
        let (before, after) = (service(3, 10, 0), service(3, 10, 1));
        assert_eq!((&before.addresses, before.backends.len()), (&after.addresses, 10));
        assert_ne!(before.backends[0].addresses, after.backends[0].addresses);
    }
}
