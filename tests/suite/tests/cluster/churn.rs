//! Endpoints that roll, a hundred changes a second, under two hundred clients.
//!
//! A backend that is taken out of the slices goes on serving, as one does that ends with grace: nothing may fail. And once
//! every node has the change, nothing new may reach it, or it would have failed with a backend that is really gone. Every
//! request and every datagram is judged by what the tables were seen to hold before it began. A thousand changes run by
//! default, with `DATAPLANE_FULL=1` (`cargo xtask test --full`) six thousand: a minute, or longer on a machine that cannot keep
//! that pace, which is told and is no failure.

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
/// Between two requests of a client.
const REQUESTS: Duration = Duration::from_millis(250);
/// Between two datagrams of a socket.
const DATAGRAMS: Duration = Duration::from_millis(20);
/// Sockets of each kind, on each node.
const SOCKETS: u32 = 5;
/// Connections that are held all the while, on each node.
const HELD: u32 = 20;
const BACKENDS_A_NODE: u32 = 6;
/// The tables are looked at after so many changes, as they happen to be.
const LOOK: u32 = 3;
/// After so many, until they hold what was told.
const SETTLE: u32 = 10 * LOOK;
const PATIENCE: Duration = Duration::from_secs(60);
/// One of the backends is in and out for so many changes at a time; the others take turns.
const RARE: u32 = 250;
/// A connected socket is found and ended after the tables say that its backend is gone.
const FOUND_US: u64 = 1_000_000;

#[test]
fn endpoints_roll_by_packets_alone() -> Result<()> {
    endpoints_roll(&Spec { connect_tcp: false, connect_udp: false, ..spec() })
}

#[test]
fn endpoints_roll_with_connect_time() -> Result<()> {
    endpoints_roll(&Spec { connect_tcp: true, connect_udp: true, ..spec() })
}

fn spec() -> Spec {
    Spec { source: Source::kubernetes(), ..Spec::new(2) }
}

/// Who was in the slices, and in the tables, when.
#[derive(Default)]
struct History {
    /// When each backend began to be told of again, by name.
    back: BTreeMap<String, Vec<u64>>,
    /// When the tables of each node were seen without it: the end of the look.
    absent: Vec<BTreeMap<String, Vec<u64>>>,
    changes: u32,
}

impl History {
    /// Whether the backend was out of the tables of the node from before `began` until after `ended`.
    fn was_out(&self, node: usize, name: &str, began: u64, ended: u64) -> bool {
        let before = |moments: &[u64], limit: u64| moments.iter().copied().filter(|at| *at < limit).max();
        let Some(seen) = self.absent[node].get(name).and_then(|seen| before(seen, began)) else {
            return false;
        };
        // it may have come back at any time after it began to be told of
        self.back.get(name).and_then(|back| before(back, ended)).is_none_or(|back| back < seen)
    }

    /// Looks at the tables of every node: whether they all are what was told. Where they are not yet, they may be on their
    /// way through what was told before: only if they are, whoever is out stays out until he is told of again.
    fn look(&mut self, cluster: &Cluster, rolling: &Rolling<'_>) -> Result<bool> {
        let told: BTreeSet<IpAddr> = rolling.pods(true).flat_map(Pod::addresses).collect();
        let mut are_told = true;
        for (index, node) in cluster.nodes().iter().enumerate() {
            let views: Vec<ServiceView> = node.agent().ask(&View::Services)?;
            let seen = now_us()?;
            let mut ports = views.iter().filter(|view| view.name == "web");
            let is_told = ports.all(|port| {
                let held: BTreeSet<_> = port.backends.iter().map(|backend| backend.address).collect();
                held == told
            });
            if is_told {
                for pod in rolling.pods(false) {
                    self.absent[index].entry(pod.name().to_owned()).or_default().push(seen);
                }
            }
            are_told &= is_told;
        }
        Ok(are_told)
    }
}

/// All backends, and who of them is in the slices.
struct Rolling<'a> {
    pods: &'a [Pod],
    is_in: Vec<bool>,
    /// The next to take its turn.
    next: usize,
}

impl<'a> Rolling<'a> {
    /// Every other one is out at first: as they take turns, about half of them are out at any time.
    fn new(pods: &'a [Pod]) -> Self {
        Self { pods, is_in: (0..pods.len()).map(|number| number % 2 == 0).collect(), next: 0 }
    }

    /// Those in the slices, or the others.
    fn pods(&self, is_in: bool) -> impl Iterator<Item = &'a Pod> {
        self.pods.iter().zip(&self.is_in).filter(move |(_, has)| **has == is_in).map(|(pod, _)| pod)
    }

    /// The slices as they are now.
    fn slices(&self) -> Vec<Value> {
        let service = Service::of(&self.pods(true).collect::<Vec<_>>());
        service.objects().into_iter().filter(|object| object["kind"] == "EndpointSlice").collect()
    }

    /// Whose turn it is: he is out if he was in. The first comes and goes rarely.
    fn turn(&mut self, change: u32) -> usize {
        if change % RARE == RARE - 1 {
            self.is_in[0] = !self.is_in[0];
            return 0;
        }
        let turning = self.pods.len() - 1;
        let which = 1 + self.next % turning;
        self.next += 1;
        self.is_in[which] = !self.is_in[which];
        which
    }
}

/// What was judged.
#[derive(Default)]
struct Count {
    requests: usize,
    datagrams: usize,
    ended: u64,
}

/// Clients of a node.
struct Load {
    requests: Client<Vec<Request>>,
    held: Client<dataplane_testkit::traffic::report::HeldConnections>,
    talks: Vec<Talk>,
}

struct Talk {
    /// Its socket has one peer, which is a backend.
    is_bound: bool,
    client: Client<Datagrams>,
}

/// One at a time: at its rate, one takes all of a small machine.
static TURN: Mutex<()> = Mutex::new(());

fn endpoints_roll(spec: &Spec) -> Result<()> {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
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
    let rolled = roll(&cluster, &pods, changes, &mut history);
    cluster.explain(rolled)?;
    let rate = f64::from(history.changes) / began.elapsed().as_secs_f64();

    let mut checks = Checks::of(format!("{}, {rate:.0} changes/s", spec.describe()));
    let mut count = Count::default();
    for (node, load) in loads.into_iter().enumerate() {
        judge(&mut checks, &history, node, load, &mut count);
    }
    if run::is_full() {
        let Count { requests, datagrams, ended } = count;
        run::summarize(&format!(
            "churn, {}, {rate:.0} changes/s: {requests} requests, {datagrams} datagrams came back, {ended} \
             sockets ended",
            spec.describe()
        ));
    }
    checks.finish(&cluster)
}

/// Backends on every node, each with a server, and a client.
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

/// All that runs on a node: of one family each, so that both are asked.
fn start(client: &Pod, index: usize, at_connect: bool) -> Result<Load> {
    let web = Service::of(&[]);
    let family = Family::BOTH[index % 2];
    let mut talks = Vec::new();
    for more in [&["--each"][..], &["--each", "--connected"]] {
        for _ in 0..SOCKETS {
            talks.push(Talk {
                is_bound: at_connect && more.len() > 1,
                client: client.place().keep_sending(web.at(family, ECHO_PORT), DATAGRAMS, more)?,
            });
        }
    }
    let held = client.place().hold(web.at(family, ECHO_PORT), HELD, Duration::from_millis(200))?;
    let requests =
        client.place().keep_getting_concurrently(web.at(family, WEB_PORT), CLIENTS / 2, REQUESTS)?;
    Ok(Load { requests, held, talks })
}

/// Makes so many changes of the slices, at the rate if the machine keeps up, and looks at the tables meanwhile.
fn roll(cluster: &Cluster, pods: &[Pod], changes: u32, history: &mut History) -> Result<()> {
    let mut rolling = Rolling::new(pods);
    let objects = cluster.control()?.objects();
    let began = Instant::now();
    while history.changes < changes {
        let change = history.changes;
        let due = Duration::from_secs(1) * change / CHANGES_A_SECOND;
        thread::sleep(due.saturating_sub(began.elapsed()));
        // as long after the last change as can be
        if change > 0 && change.is_multiple_of(SETTLE) {
            wait::until("tables that hold what was told", PATIENCE, || {
                Ok(history.look(cluster, &rolling)?.then_some(()))
            })?;
        } else if change > 0 && change.is_multiple_of(LOOK) {
            history.look(cluster, &rolling)?;
        }
        let which = rolling.turn(change);
        if rolling.is_in[which] {
            history.back.entry(pods[which].name().to_owned()).or_default().push(now_us()?);
        }
        objects.apply_many(&rolling.slices())?;
        history.changes += 1;
    }
    Ok(())
}

fn judge(checks: &mut Checks, history: &History, node: usize, load: Load, count: &mut Count) {
    let Load { requests, held, talks } = load;
    checks.that(format!("requests on node {node}"), || {
        let requests = requests.stop()?;
        count.requests += requests.len();
        ensure!(requests.len() > 1_000, "{} requests", requests.len());
        ensure!(failures(&requests).is_empty(), "{:?} of {}", failures(&requests), requests.len());
        let stray = requests.iter().find(|request| {
            let name = request.answer().map(|answer| answer.name.as_str()).unwrap_or_default();
            history.was_out(node, name, request.began_us, request.ended_us)
        });
        ensure!(stray.is_none(), "one reached a backend that was gone: {stray:?}");
        Ok(())
    });
    checks.that(format!("connections that were open before, on node {node}"), || {
        let held = held.finish()?;
        ensure!(held.broken.is_empty() && held.received == held.sent && held.sent > 0, "{held:?}");
        Ok(())
    });
    for Talk { is_bound, client } in talks {
        let what = if is_bound { "a connected socket" } else { "a socket" };
        checks.that(format!("{what} on node {node}"), || {
            let (echoes, report) = client.finish_each().context("its report")?;
            count.datagrams += echoes.len();
            count.ended += report.ended;
            let late = if is_bound { FOUND_US } else { 0 };
            let stray = echoes.iter().find(|echo| {
                let began = echo.sent_us.saturating_sub(late);
                history.was_out(node, &echo.server, began, echo.received_us)
            });
            ensure!(stray.is_none(), "one reached a backend that was gone: {stray:?} of {report:?}");
            ensure!(report.errors.is_empty() && report.misdirected == 0, "{report:?}");
            // what is on its way to a socket as it ends is lost
            let may_be_lost = if is_bound { 2 * report.ended } else { 0 };
            ensure!(report.lost <= may_be_lost && report.received > 0, "{report:?}");
            ensure!(is_bound || report.ended == 0, "{report:?}");
            Ok(())
        });
    }
}
