//! Endpoints change a hundred times per second under the load of two hundred clients.
//!
//! A backend that is removed from the slices still serves, as during graceful termination: no
//! request may fail. But once every node has applied the change, no new request may reach it. Every
//! request and datagram is checked against the tables as they were observed before it began. By
//! default a thousand changes run, with `DATAPLANE_FULL=1` (`cargo xtask test --full`) six
//! thousand: a minute, or longer on a slow machine, which is printed and is no failure.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use dataplane_agent::api::{request::View, views::ServiceView};
use dataplane_testkit::{
    lab::{
        Checks, Client, Cluster, ECHO_PORT, Family, Pod, Process, Service, Source, Spec, WEB_PORT, failures,
        wait,
    },
    run,
    traffic::{
        now_us,
        report::{Datagrams, Request},
    },
};
use serde_json::Value;

const CHANGES_A_SECOND: u32 = 100;
const CLIENTS: u32 = 200;
/// Interval between requests of a client.
const REQUESTS: Duration = Duration::from_millis(250);
/// Interval between datagrams of a socket.
const DATAGRAMS: Duration = Duration::from_millis(20);
/// Sockets of each kind, on each node.
const SOCKETS: u32 = 5;
/// Connections held open during the test, on each node.
const CONNECTIONS: u32 = 20;
const BACKENDS_A_NODE: u32 = 6;
/// Number of changes between two observations of the tables.
const OBSERVE_EVERY: u32 = 3;
/// Number of changes between two waits until the tables have all changes.
const SETTLE_EVERY: u32 = 10 * OBSERVE_EVERY;
const TIMEOUT: Duration = Duration::from_secs(60);
/// The first backend changes only once in so many changes, the others in turn.
const FIRST_EVERY: u32 = 250;
/// Time to find and abort a connected socket after its backend left the tables.
const ABORT_US: u64 = 1_000_000;

#[test]
fn no_request_fails_while_endpoints_change_per_packet() -> Result<()> {
    no_request_fails_while_endpoints_change(&Spec { connect_tcp: false, connect_udp: false, ..spec() })
}

#[test]
fn no_request_fails_while_endpoints_change_with_connect_time() -> Result<()> {
    no_request_fails_while_endpoints_change(&Spec { connect_tcp: true, connect_udp: true, ..spec() })
}

fn spec() -> Spec {
    Spec { source: Source::kubernetes(), ..Spec::new(2) }
}

/// When each backend was in the slices and in the tables.
#[derive(Default)]
struct History {
    /// For each backend: when it was about to be published again.
    published: BTreeMap<String, Vec<u64>>,
    /// For each node and backend: when the tables were observed without it (the end of the
    /// observation).
    absent: Vec<BTreeMap<String, Vec<u64>>>,
    changes: u32,
}

impl History {
    /// Whether the backend was absent from the node's tables from before `began` until after
    /// `ended`.
    fn was_absent(&self, node: usize, name: &str, began: u64, ended: u64) -> bool {
        let before = |moments: &[u64], limit: u64| moments.iter().copied().filter(|at| *at < limit).max();
        let Some(seen) = self.absent[node].get(name).and_then(|seen| before(seen, began)) else {
            return false;
        };
        // it may be back in the tables at any time after it was published again
        self.published.get(name).and_then(|times| before(times, ended)).is_none_or(|time| time < seen)
    }

    /// Observes the tables of every node; returns whether all have the published endpoints. Absence
    /// counts only then: other tables may still receive earlier changes, in which an absent backend
    /// returns.
    fn observe(&mut self, cluster: &Cluster, rolling: &Rolling<'_>) -> Result<bool> {
        let published: BTreeSet<IpAddr> = rolling.pods(true).flat_map(Pod::addresses).collect();
        let mut all_match = true;
        for (index, node) in cluster.nodes().iter().enumerate() {
            let views: Vec<ServiceView> = node.agent().ask(&View::Services)?;
            let seen = now_us()?;
            let mut ports = views.iter().filter(|view| view.name == "web");
            let matches = ports.all(|port| {
                let found: BTreeSet<_> = port.backends.iter().map(|backend| backend.address).collect();
                found == published
            });
            if matches {
                for pod in rolling.pods(false) {
                    self.absent[index].entry(pod.name().to_owned()).or_default().push(seen);
                }
            }
            all_match &= matches;
        }
        Ok(all_match)
    }
}

/// All backends, and which of them are in the slices.
struct Rolling<'a> {
    pods: &'a [Pod],
    is_in: Vec<bool>,
    /// The next one to change, except the first.
    next: usize,
}

impl<'a> Rolling<'a> {
    /// Every other backend is absent at first, so that about half of them are at any time.
    fn new(pods: &'a [Pod]) -> Self {
        Self { pods, is_in: (0..pods.len()).map(|number| number % 2 == 0).collect(), next: 0 }
    }

    /// The backends in the slices, or the others.
    fn pods(&self, is_in: bool) -> impl Iterator<Item = &'a Pod> {
        self.pods.iter().zip(&self.is_in).filter(move |(_, has)| **has == is_in).map(|(pod, _)| pod)
    }

    /// The current slices.
    fn slices(&self) -> Vec<Value> {
        let service = Service::of(&self.pods(true).collect::<Vec<_>>());
        service.objects().into_iter().filter(|object| object["kind"] == "EndpointSlice").collect()
    }

    /// Adds or removes the next backend; returns its index. The first one changes rarely.
    fn change_next(&mut self, change: u32) -> usize {
        if change % FIRST_EVERY == FIRST_EVERY - 1 {
            self.is_in[0] = !self.is_in[0];
            return 0;
        }
        let which = 1 + self.next % (self.pods.len() - 1);
        self.next += 1;
        self.is_in[which] = !self.is_in[which];
        which
    }
}

/// What was checked.
#[derive(Default)]
struct Count {
    requests: usize,
    datagrams: usize,
    aborted: u64,
}

/// The clients of a node.
struct Load {
    requests: Client<Vec<Request>>,
    connections: Client<dataplane_testkit::traffic::report::HeldConnections>,
    senders: Vec<Sender>,
}

struct Sender {
    /// Whether the socket is connected to a backend.
    is_connected: bool,
    client: Client<Datagrams>,
}

/// One test at a time: each uses a small machine completely.
static EXCLUSIVE: Mutex<()> = Mutex::new(());

fn no_request_fails_while_endpoints_change(spec: &Spec) -> Result<()> {
    let _guard = EXCLUSIVE.lock().unwrap_or_else(PoisonError::into_inner);
    let changes = CHANGES_A_SECOND * if run::is_full() { 60 } else { 10 };
    let mut cluster = Cluster::create(spec)?;
    let nodes = cluster.nodes().len();
    let (pods, clients, _servers) = populate(&cluster, nodes)?;
    cluster.apply(&Service::of(&pods.iter().collect::<Vec<_>>()))?;
    let mut loads = Vec::new();
    for (index, client) in clients.iter().enumerate() {
        loads.push(start(client, index, spec.connect_udp)?);
    }

    let mut history = History { absent: vec![BTreeMap::new(); nodes], ..History::default() };
    let began = Instant::now();
    let changed = change_endpoints(&cluster, &pods, changes, &mut history);
    cluster.explain(changed)?;
    let rate = f64::from(history.changes) / began.elapsed().as_secs_f64();

    let mut checks = Checks::of(format!("{}, {rate:.0} changes/s", spec.describe()));
    let mut count = Count::default();
    for (node, load) in loads.into_iter().enumerate() {
        check_load(&mut checks, &history, node, load, &mut count);
    }
    if run::is_full() {
        let Count { requests, datagrams, aborted } = count;
        run::summarize(&format!(
            "churn, {}, {rate:.0} changes/s: {requests} requests, {datagrams} datagrams echoed, {aborted} \
             sockets aborted",
            spec.describe()
        ));
    }
    checks.finish(&cluster)
}

/// Creates backends with servers and a client on every node.
fn populate(cluster: &Cluster, nodes: usize) -> Result<(Vec<Pod>, Vec<Pod>, Vec<Process>)> {
    let made = (|| {
        let (mut pods, mut clients, mut servers) = (Vec::new(), Vec::new(), Vec::new());
        for node in 0..nodes {
            for number in 0..BACKENDS_A_NODE {
                let pod = cluster.pod(node, &format!("backend-{node}-{number}"))?;
                servers.push(pod.serve()?);
                pods.push(pod);
            }
            clients.push(cluster.pod(node, &format!("client-{node}"))?);
        }
        Ok((pods, clients, servers))
    })();
    cluster.explain(made)
}

/// Starts the clients of a node, all of one family; nodes differ in family.
fn start(client: &Pod, index: usize, at_connect: bool) -> Result<Load> {
    let web = Service::of(&[]);
    let family = Family::BOTH[index % 2];
    let mut senders = Vec::new();
    for more in [&["--each"][..], &["--each", "--connected"]] {
        for _ in 0..SOCKETS {
            senders.push(Sender {
                is_connected: at_connect && more.len() > 1,
                client: client.place().keep_sending(web.at(family, ECHO_PORT), DATAGRAMS, more)?,
            });
        }
    }
    let connections =
        client.place().hold(web.at(family, ECHO_PORT), CONNECTIONS, Duration::from_millis(200))?;
    let requests =
        client.place().keep_getting_concurrently(web.at(family, WEB_PORT), CLIENTS / 2, REQUESTS)?;
    Ok(Load { requests, connections, senders })
}

/// Applies `changes` changes of the slices, at the given rate if the machine can, and observes the
/// tables.
fn change_endpoints(cluster: &Cluster, pods: &[Pod], changes: u32, history: &mut History) -> Result<()> {
    let mut rolling = Rolling::new(pods);
    let objects = cluster.control()?.objects();
    let began = Instant::now();
    while history.changes < changes {
        let change = history.changes;
        let due = Duration::from_secs(1) * change / CHANGES_A_SECOND;
        thread::sleep(due.saturating_sub(began.elapsed()));
        // observe as late as possible after the last change
        if change > 0 && change.is_multiple_of(SETTLE_EVERY) {
            wait::until("tables with the published endpoints", TIMEOUT, || {
                Ok(history.observe(cluster, &rolling)?.then_some(()))
            })?;
        } else if change > 0 && change.is_multiple_of(OBSERVE_EVERY) {
            history.observe(cluster, &rolling)?;
        }
        let which = rolling.change_next(change);
        if rolling.is_in[which] {
            history.published.entry(pods[which].name().to_owned()).or_default().push(now_us()?);
        }
        objects.apply_many(&rolling.slices())?;
        history.changes += 1;
    }
    Ok(())
}

fn check_load(checks: &mut Checks, history: &History, node: usize, load: Load, count: &mut Count) {
    let Load { requests, connections, senders } = load;
    checks.that(format!("requests on node {node}"), || {
        let requests = requests.stop()?;
        count.requests += requests.len();
        ensure!(requests.len() > 1_000, "{} requests", requests.len());
        ensure!(failures(&requests).is_empty(), "{:?} of {} failed", failures(&requests), requests.len());
        let stray = requests.iter().find(|request| {
            let name = request.answer().map(|answer| answer.name.as_str()).unwrap_or_default();
            history.was_absent(node, name, request.began_us, request.ended_us)
        });
        ensure!(stray.is_none(), "a request reached a removed backend: {stray:?}");
        Ok(())
    });
    checks.that(format!("open connections on node {node}"), || {
        let report = connections.finish()?;
        ensure!(report.broken.is_empty() && report.received == report.sent && report.sent > 0, "{report:?}");
        Ok(())
    });
    for Sender { is_connected, client } in senders {
        let what = if is_connected { "a connected socket" } else { "a socket" };
        checks.that(format!("{what} on node {node}"), || {
            let (echoes, report) = client.finish_each().context("a client's report")?;
            count.datagrams += echoes.len();
            count.aborted += report.ended;
            let late = if is_connected { ABORT_US } else { 0 };
            let stray = echoes.iter().find(|echo| {
                let began = echo.sent_us.saturating_sub(late);
                history.was_absent(node, &echo.server, began, echo.received_us)
            });
            ensure!(stray.is_none(), "a datagram reached a removed backend: {stray:?} of {report:?}");
            ensure!(report.errors.is_empty() && report.misdirected == 0, "{report:?}");
            // datagrams in flight to a socket are lost when it is aborted
            let may_be_lost = if is_connected { 2 * report.ended } else { 0 };
            ensure!(report.lost <= may_be_lost && report.received > 0, "{report:?}");
            ensure!(is_connected || report.ended == 0, "{report:?}");
            Ok(())
        });
    }
}
