//! Three nodes with a client and a server each, shared by the tests of this target. The first test
//! creates them, one test uses them at a time, and the end of the process or a failed test removes
//! them, so that no test sees what a failed one left.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::{Mutex, Once, PoisonError, TryLockError},
};

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::{
    lab::{Cluster, Family, Place, Pod, Process, Spec, at_exit},
    traffic::report::{Probe, ProbeResult, Transport},
};
use serde_json::Value;

use super::service_fixture::ServiceFixture;

/// How connections are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// At `connect()` and `sendmsg()`, over TCP and UDP.
    AtConnect,
    PerPacket,
}

impl Mode {
    pub(crate) const BOTH: [Self; 2] = [Self::AtConnect, Self::PerPacket];
}

/// Number of nodes of a testbed.
pub(crate) const NODES: usize = 3;
/// Timeout where no reply is expected. A refusal would arrive immediately.
const NO_REPLY_TIMEOUT_MS: u64 = 1_000;
/// Kubernetes' own limit for a refusal.
const REPLY_TIMEOUT_MS: u64 = 3_000;

/// A cluster with clients and servers.
pub(crate) struct Testbed {
    // dropped before the namespaces in which they run
    _servers: Vec<Process>,
    /// One on each node.
    pub(crate) clients: Vec<Pod>,
    /// One on each node; each replies with its name.
    pub(crate) webs: Vec<Pod>,
    pub(crate) external: Place,
    pub(crate) cluster: Cluster,
    /// The applied objects that agents use, by the name of their service.
    applied: BTreeMap<String, Vec<Value>>,
}

static TESTBEDS: [Mutex<Option<Testbed>>; 2] = [const { Mutex::new(None) }; 2];

/// Runs a test on the testbed of each mode, one after the other.
pub(crate) fn on_both(test: impl Fn(&mut Testbed) -> Result<()>) -> Result<()> {
    Mode::BOTH.into_iter().try_for_each(|mode| on(mode, &test))
}

/// Runs a test on the testbed of this mode. The error has the state of the nodes.
pub(crate) fn on(mode: Mode, test: impl FnOnce(&mut Testbed) -> Result<()>) -> Result<()> {
    static AT_EXIT: Once = Once::new();
    AT_EXIT.call_once(|| at_exit(take_down));
    let mut shared = TESTBEDS[mode as usize].lock().unwrap_or_else(PoisonError::into_inner);
    // a test that fails drops its testbed
    let mut testbed = match shared.take() {
        Some(testbed) => testbed,
        None => Testbed::create(mode)?,
    };
    let done = test(&mut testbed);
    let done = testbed.cluster.explain(done).with_context(|| format!("{mode:?}"));
    if done.is_ok() {
        *shared = Some(testbed);
    }
    done
}

/// Drops the testbeds at the end of the process. One in use belongs to an interrupted test and is
/// removed with the rest of the lab.
fn take_down() {
    for testbed in &TESTBEDS {
        match testbed.try_lock() {
            Ok(mut testbed) => drop(testbed.take()),
            Err(TryLockError::Poisoned(testbed)) => drop(testbed.into_inner().take()),
            Err(TryLockError::WouldBlock) => {}
        }
    }
}

impl Testbed {
    fn create(mode: Mode) -> Result<Self> {
        let at_connect = mode == Mode::AtConnect;
        let cluster =
            Cluster::create(&Spec { connect_tcp: at_connect, connect_udp: at_connect, ..Spec::new(NODES) })?;
        let made = (0..NODES).map(|node| {
            Ok((cluster.pod(node, &format!("client-{node}"))?, cluster.pod(node, &format!("web-{node}"))?))
        });
        let (clients, webs): (Vec<Pod>, Vec<Pod>) =
            cluster.explain(made.collect::<Result<Vec<_>>>())?.into_iter().unzip();
        let mut servers = webs.iter().map(Pod::serve).collect::<Result<Vec<_>>>()?;
        for node in cluster.nodes() {
            servers.push(node.serve()?);
            disable_icmp_rate_limits(node.place())?;
        }
        let external = cluster.outside()?;
        Ok(Self { _servers: servers, clients, webs, external, cluster, applied: BTreeMap::new() })
    }

    /// Applies a service and its slices; returns when every agent has them.
    pub(crate) fn apply_service(&mut self, fixture: &ServiceFixture) -> Result<()> {
        let name = fixture.name();
        let objects = fixture.objects();
        let mut used: Vec<Value> = objects.iter().filter(|object| is_used(object)).cloned().collect();
        used.iter_mut().for_each(remove_unused_fields);
        let before = self.applied.insert(name.to_owned(), used.clone()).unwrap_or_default();
        // agents do not count an unchanged object as a change
        let is_in = |all: &[Value], one: &Value| {
            all.iter().any(|other| {
                other["kind"] == one["kind"] && other["metadata"]["name"] == one["metadata"]["name"]
            })
        };
        let changed = used.iter().filter(|object| !before.contains(object)).count();
        let gone = before.iter().filter(|object| !is_in(&used, object)).count();
        self.cluster.change(changed + gone, |cluster| cluster.apply_objects(name, &objects))
    }

    /// Deletes the service and its slices.
    pub(crate) fn withdraw(&mut self, fixture: &ServiceFixture) -> Result<()> {
        let before = self.applied.remove(fixture.name()).unwrap_or_default().len();
        self.cluster.change(before, |cluster| cluster.withdraw(fixture.name()))
    }

    /// Applies other objects, all of which every agent uses.
    pub(crate) fn apply(&mut self, name: &str, objects: &[Value]) -> Result<()> {
        self.cluster.change(objects.len(), |cluster| cluster.apply_objects(name, objects))
    }

    pub(crate) fn host(&self, node: usize) -> &Place {
        self.cluster.nodes()[node].place()
    }

    /// A port of a node.
    pub(crate) fn at_node(&self, node: usize, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.cluster.nodes()[node].address(family), port)
    }

    /// Adds a route for this address through a node to the gateway.
    pub(crate) fn route(&self, address: IpAddr, node: usize) -> Result<()> {
        let node = &self.cluster.nodes()[node];
        let via = node.addresses().into_iter().find(|via| via.is_ipv4() == address.is_ipv4());
        let via = via.context("a node of both families")?;
        self.cluster.fabric().gateway().ip(&format!("route replace {address} via {via}")).map(drop)
    }

    /// The names of the servers on these nodes.
    pub(crate) fn names(&self, nodes: &[usize]) -> Vec<String> {
        nodes.iter().map(|node| self.webs[*node].name().to_owned()).collect()
    }
}

/// Whether agents use the object.
fn is_used(object: &Value) -> bool {
    let labels = &object["metadata"]["labels"];
    let is_of_other_proxy = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"]
        .iter()
        .any(|label| labels[*label].is_string());
    let spec = &object["spec"];
    !is_of_other_proxy && spec["type"] != "ExternalName" && spec["clusterIP"] != "None"
}

/// Removes what agents do not read: the resource version, and `targetPort`, which slices resolve.
fn remove_unused_fields(object: &mut Value) {
    object["metadata"].as_object_mut().map(|metadata| metadata.remove("resourceVersion"));
    for port in object["spec"]["ports"].as_array_mut().into_iter().flatten() {
        port.as_object_mut().map(|port| port.remove("targetPort"));
    }
}

/// Turns off the kernel's rate limits of ICMP errors: every client needs its own error.
fn disable_icmp_rate_limits(node: &Place) -> Result<()> {
    let namespace = node.namespace();
    namespace.sysctls(&[("net/ipv4/icmp_ratelimit", "0"), ("net/ipv6/icmp/ratelimit", "0")])?;
    // before Linux 6.11 these are global, and absent in a network namespace
    let _absent = namespace
        .sysctls(&[("net/ipv4/icmp_msgs_per_sec", "100000"), ("net/ipv4/icmp_msgs_burst", "100000")]);
    Ok(())
}

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];

/// Exactly these servers answer, over TCP.
pub(crate) fn expect_answers(place: &Place, server: SocketAddr, names: &[String]) -> Result<()> {
    expect_answers_over(Transport::Tcp, place, server, names).map(drop)
}

/// Exactly these servers answer; returns the report of the probe.
pub(crate) fn expect_answers_over(
    transport: Transport,
    place: &Place,
    server: SocketAddr,
    names: &[String],
) -> Result<ProbeResult> {
    let report = probe(transport, place, server, names.len(), REPLY_TIMEOUT_MS)?;
    let answered: Vec<&String> = report.answers.keys().collect();
    let mut expected: Vec<&String> = names.iter().collect();
    expected.sort();
    let is_right = answered == expected && report.refused + report.silent == 0 && report.failed.is_empty();
    ensure!(is_right, "{transport:?} {server}: expected {expected:?}: {report:?}");
    Ok(report)
}

/// Requests over TCP and UDP are refused within the time that Kubernetes' own tests allow.
pub(crate) fn expect_refused(place: &Place, servers: [SocketAddr; 2]) -> Result<()> {
    for (transport, server) in TRANSPORTS.into_iter().zip(servers) {
        let report = probe(transport, place, server, 1, REPLY_TIMEOUT_MS)?;
        let is_right =
            report.answers.is_empty() && report.refused > 0 && report.silent == 0 && report.failed.is_empty();
        ensure!(is_right, "{transport:?} {server}: expected a refusal: {report:?}");
    }
    Ok(())
}

/// Requests over TCP and UDP time out.
pub(crate) fn expect_timeout(place: &Place, servers: [SocketAddr; 2]) -> Result<()> {
    for (transport, server) in TRANSPORTS.into_iter().zip(servers) {
        let report = probe(transport, place, server, 1, NO_REPLY_TIMEOUT_MS)?;
        let is_right =
            report.answers.is_empty() && report.refused == 0 && report.silent > 0 && report.failed.is_empty();
        ensure!(is_right, "{transport:?} {server}: expected a timeout: {report:?}");
    }
    Ok(())
}

/// No server answers over TCP: the request is refused or times out.
pub(crate) fn expect_no_answer(place: &Place, server: SocketAddr) -> Result<()> {
    let report = probe(Transport::Tcp, place, server, 1, NO_REPLY_TIMEOUT_MS)?;
    ensure!(report.answers.is_empty(), "{server}: expected no answer: {report:?}");
    Ok(())
}

fn probe(
    transport: Transport,
    place: &Place,
    server: SocketAddr,
    servers: usize,
    timeout_ms: u64,
) -> Result<ProbeResult> {
    let probe = Probe { number: 0, server, transport, servers, timeout_ms, ports: None };
    place.probe(&[probe])?.pop().context("the probe has no report")
}
