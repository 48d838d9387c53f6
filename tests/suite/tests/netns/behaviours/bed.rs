//! Three nodes with a client and a server each, shared by the tests of this target: who comes first makes them, one has them
//! at a time, and they go with the process, or with a test that fails: what it leaves behind is nobody's business.

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

use super::told::Told;

/// How sockets come to their backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// When they connect, over TCP and UDP.
    AtConnect,
    ByPackets,
}

impl Mode {
    pub(crate) const BOTH: [Self; 2] = [Self::AtConnect, Self::ByPackets];
}

/// Nodes of a bed.
pub(crate) const NODES: usize = 3;
/// What silence is worth. Who is refused hears of it at once.
const SILENCE_MS: u64 = 1_000;
/// Kubernetes' own limit for a refusal.
const REFUSAL_MS: u64 = 3_000;

/// A cluster with what the tests want of it.
pub(crate) struct Bed {
    // end before what they run on
    _servers: Vec<Process>,
    /// One on each node.
    pub(crate) clients: Vec<Pod>,
    /// One on each node, which answer under their names.
    pub(crate) webs: Vec<Pod>,
    pub(crate) outside: Place,
    pub(crate) cluster: Cluster,
    /// How many objects there are of each name, that agents make something of.
    told: BTreeMap<String, Vec<Value>>,
}

static BEDS: [Mutex<Option<Bed>>; 2] = [const { Mutex::new(None) }; 2];

/// Runs a test on a bed of each mode, one after the other.
pub(crate) fn on_both(test: impl Fn(&mut Bed) -> Result<()>) -> Result<()> {
    Mode::BOTH.into_iter().try_for_each(|mode| on(mode, &test))
}

/// Runs a test on a bed of this mode, alone; its error with what the nodes know.
pub(crate) fn on(mode: Mode, test: impl FnOnce(&mut Bed) -> Result<()>) -> Result<()> {
    static AT_EXIT: Once = Once::new();
    AT_EXIT.call_once(|| at_exit(take_down));
    let mut shared = BEDS[mode as usize].lock().unwrap_or_else(PoisonError::into_inner);
    // whoever fails here has no bed to give back
    let mut bed = match shared.take() {
        Some(bed) => bed,
        None => Bed::create(mode)?,
    };
    let done = test(&mut bed);
    let done = bed.cluster.explain(done).with_context(|| format!("{mode:?}"));
    if done.is_ok() {
        *shared = Some(bed);
    }
    done
}

/// A bed that is in use is one of a process that is interrupted: it is removed with whatever else there is.
fn take_down() {
    for bed in &BEDS {
        match bed.try_lock() {
            Ok(mut bed) => drop(bed.take()),
            Err(TryLockError::Poisoned(bed)) => drop(bed.into_inner().take()),
            Err(TryLockError::WouldBlock) => {}
        }
    }
}

impl Bed {
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
            answer_everybody(node.place())?;
        }
        let outside = cluster.outside()?;
        Ok(Self { _servers: servers, clients, webs, outside, cluster, told: BTreeMap::new() })
    }

    /// Tells every agent of a service and its slices as they are now; returns when all go by it.
    pub(crate) fn tell(&mut self, told: &Told) -> Result<()> {
        let name = told.name();
        let objects = told.objects();
        let mut used: Vec<Value> = objects.iter().filter(|object| is_used(object)).cloned().collect();
        used.iter_mut().for_each(leave_out_unused);
        let before = self.told.insert(name.to_owned(), used.clone()).unwrap_or_default();
        // what is told again as it was is no change
        let is_in = |all: &[Value], one: &Value| {
            all.iter().any(|other| {
                other["kind"] == one["kind"] && other["metadata"]["name"] == one["metadata"]["name"]
            })
        };
        let changed = used.iter().filter(|object| !before.contains(object)).count();
        let gone = before.iter().filter(|object| !is_in(&used, object)).count();
        self.cluster.change(changed + gone, |cluster| cluster.apply_objects(name, &objects))
    }

    /// The service and its slices are gone.
    pub(crate) fn withdraw(&mut self, told: &Told) -> Result<()> {
        let before = self.told.remove(told.name()).unwrap_or_default().len();
        self.cluster.change(before, |cluster| cluster.withdraw(told.name()))
    }

    /// Tells of other objects, all of which every agent makes something of.
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

    /// Makes the gateway send what is for this address through a node.
    pub(crate) fn route(&self, address: IpAddr, node: usize) -> Result<()> {
        let node = &self.cluster.nodes()[node];
        let via = node.addresses().into_iter().find(|via| via.is_ipv4() == address.is_ipv4());
        let via = via.context("a node of both families")?;
        self.cluster.fabric().gateway().ip(&format!("route replace {address} via {via}")).map(drop)
    }

    /// Names of these servers.
    pub(crate) fn names(&self, nodes: &[usize]) -> Vec<String> {
        nodes.iter().map(|node| self.webs[*node].name().to_owned()).collect()
    }
}

/// Agents make something of it.
fn is_used(object: &Value) -> bool {
    let labels = &object["metadata"]["labels"];
    let is_others = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"]
        .iter()
        .any(|label| labels[*label].is_string());
    let spec = &object["spec"];
    !is_others && spec["type"] != "ExternalName" && spec["clusterIP"] != "None"
}

/// Takes away what agents do not look at: the version, and a port's target, which is the slices' to say.
fn leave_out_unused(object: &mut Value) {
    object["metadata"].as_object_mut().map(|metadata| metadata.remove("resourceVersion"));
    for port in object["spec"]["ports"].as_array_mut().into_iter().flatten() {
        port.as_object_mut().map(|port| port.remove("targetPort"));
    }
}

/// A node's kernel is sparing with refusals. Here everyone wants his own.
fn answer_everybody(node: &Place) -> Result<()> {
    let namespace = node.namespace();
    namespace.sysctls(&[("net/ipv4/icmp_ratelimit", "0"), ("net/ipv6/icmp/ratelimit", "0")])?;
    // the machine's before 6.11, and then not shown to a namespace
    let _is_the_machines = namespace
        .sysctls(&[("net/ipv4/icmp_msgs_per_sec", "100000"), ("net/ipv4/icmp_msgs_burst", "100000")]);
    Ok(())
}

const TRANSPORTS: [Transport; 2] = [Transport::Tcp, Transport::Udp];

/// Exactly these servers answer, over TCP.
pub(crate) fn answers(place: &Place, server: SocketAddr, names: &[String]) -> Result<()> {
    answers_over(Transport::Tcp, place, server, names).map(drop)
}

/// Exactly these servers answer; what was heard of them.
pub(crate) fn answers_over(
    transport: Transport,
    place: &Place,
    server: SocketAddr,
    names: &[String],
) -> Result<ProbeResult> {
    let heard = ask(transport, place, server, names.len(), REFUSAL_MS)?;
    let answered: Vec<&String> = heard.answers.keys().collect();
    let mut wanted: Vec<&String> = names.iter().collect();
    wanted.sort();
    let is_right = answered == wanted && heard.refused + heard.silent == 0 && heard.failed.is_empty();
    ensure!(is_right, "{transport:?} {server}: {wanted:?} are wanted: {heard:?}");
    Ok(heard)
}

/// Whoever asks is refused, over TCP and UDP: before the time is over that Kubernetes' own tests give it.
pub(crate) fn refuses(place: &Place, servers: [SocketAddr; 2]) -> Result<()> {
    for (transport, server) in TRANSPORTS.into_iter().zip(servers) {
        let heard = ask(transport, place, server, 1, REFUSAL_MS)?;
        let is_right =
            heard.answers.is_empty() && heard.refused > 0 && heard.silent == 0 && heard.failed.is_empty();
        ensure!(is_right, "{transport:?} {server} is to refuse: {heard:?}");
    }
    Ok(())
}

/// Whoever asks hears nothing, over TCP and UDP.
pub(crate) fn is_silent(place: &Place, servers: [SocketAddr; 2]) -> Result<()> {
    for (transport, server) in TRANSPORTS.into_iter().zip(servers) {
        let heard = ask(transport, place, server, 1, SILENCE_MS)?;
        let is_right =
            heard.answers.is_empty() && heard.refused == 0 && heard.silent > 0 && heard.failed.is_empty();
        ensure!(is_right, "{transport:?} {server} is to be silent: {heard:?}");
    }
    Ok(())
}

/// Nobody answers over TCP, however it ends.
pub(crate) fn nobody(place: &Place, server: SocketAddr) -> Result<()> {
    let heard = ask(Transport::Tcp, place, server, 1, SILENCE_MS)?;
    ensure!(heard.answers.is_empty(), "{server}: nobody is wanted: {heard:?}");
    Ok(())
}

fn ask(
    transport: Transport,
    place: &Place,
    server: SocketAddr,
    servers: usize,
    timeout_ms: u64,
) -> Result<ProbeResult> {
    let probe = Probe { number: 0, server, transport, servers, timeout_ms, ports: None };
    place.probe(&[probe])?.pop().context("no answer to a question")
}
