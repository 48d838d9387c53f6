//! `ENDPOINTS`: the pods of this node and the addresses of the host.
//!
//! The datapath writes the gates of an entry, we write the rest: entries are compared without gates, and an entry that
//! is written over another one opens them all, because the datapath may open one at the same moment.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    time::Instant,
};

use dataplane_cni::protocol::PortMapping;
use dataplane_common::abi::{Addr, Endpoint};

use super::{backoff::WorkQueue, instrumented::InstrumentedTable};
use crate::{
    compile::{self, endpoints::PodDevice},
    datapath::table::{Table, TableError},
};

/// A pod of this node, as the CNI knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPod {
    pub namespace: String,
    pub name: String,
    /// Name of the host-side device.
    pub device_name: String,
    pub device: PodDevice,
    /// Ports of the host that lead to it.
    pub port_mappings: Vec<PortMapping>,
}

/// What may be asked of addresses of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    /// Addresses with frontends of their own, the host's or not.
    pub(super) frontends: BTreeSet<Addr>,
    /// There are node ports.
    pub(super) node_ports: bool,
    /// This is all. Until then, what an earlier agent marked counts too.
    pub(super) complete: bool,
}

/// Why a pod has no entries.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error("address {0} of the pod is an address of this host")]
    HostAddress(IpAddr),
    #[error("endpoint {address}: {source}")]
    Table { address: IpAddr, source: TableError },
}

/// What an address should be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    endpoint: Endpoint,
    /// Attachment of the pod; `None`: the host.
    pod: Option<String>,
    /// A new entry starts with open flow_hints: flows to the address may exist.
    open: bool,
}

/// Wanted and actual entries.
#[derive(Debug)]
pub(super) struct Endpoints {
    pub(super) table: InstrumentedTable<Addr, Endpoint>,
    /// Without gates.
    actual: HashMap<Addr, Endpoint>,
    wanted: HashMap<Addr, Wanted>,
    pub(super) pods: BTreeMap<String, LocalPod>,
    /// `None`: not known yet.
    host: Option<BTreeSet<Addr>>,
    asked: Asked,
    /// Addresses of the host that take node ports; `None`: all.
    node_port_addresses: Option<BTreeSet<Addr>>,
    /// Nothing was adopted: no flow is older than this agent.
    fresh: bool,
    pub(super) queue: WorkQueue<Addr>,
}

impl Endpoints {
    pub(super) fn new(table: Box<dyn Table<Addr, Endpoint>>) -> Self {
        Self {
            table: InstrumentedTable::new(table),
            actual: HashMap::new(),
            wanted: HashMap::new(),
            pods: BTreeMap::new(),
            host: None,
            asked: Asked::default(),
            node_port_addresses: None,
            fresh: true,
            queue: WorkQueue::default(),
        }
    }

    pub(super) fn adopt(&mut self) -> Result<usize, TableError> {
        let entries = self.table.entries()?;
        self.actual =
            entries.into_iter().map(|(addr, endpoint)| (addr, endpoint.without_flow_hints())).collect();
        self.fresh = self.actual.is_empty();
        Ok(self.actual.len())
    }

    pub(super) fn set_host(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let entries: BTreeMap<_, _> = compile::endpoints::host(addresses)
            .into_iter()
            .map(|(addr, endpoint)| (addr, self.marked(addr, endpoint)))
            .collect();
        let before = self.host.take();
        // an address that comes back has flows from before: masquerade uses the node's
        let open = before.is_some() || !self.fresh;
        for addr in before.unwrap_or_default() {
            if !entries.contains_key(&addr) {
                self.wanted.remove(&addr);
                self.want_pod_at(addr);
                self.queue.push(addr);
            }
        }
        for (addr, endpoint) in &entries {
            let known = self.wanted.get(addr).filter(|wanted| wanted.pod.is_none());
            if known.is_none_or(|wanted| wanted.endpoint != *endpoint) {
                self.wanted.insert(*addr, Wanted { endpoint: *endpoint, pod: None, open });
                self.queue.push(*addr);
            }
        }
        self.host = Some(entries.into_keys().collect());
    }

    /// From now on this is asked of the addresses of the host. Told again with every change.
    pub(super) fn set_asked(&mut self, asked: Asked) {
        if self.asked == asked {
            return;
        }
        self.asked = asked;
        self.mark_host();
    }

    /// Addresses of the host that take node ports; `None`: all.
    pub(super) fn set_node_port_addresses(&mut self, addresses: Option<BTreeSet<Addr>>) {
        if self.node_port_addresses != addresses {
            self.node_port_addresses = addresses;
            self.mark_host();
        }
    }

    /// The addresses of the host are the same, what marks them is not.
    fn mark_host(&mut self) {
        let host: Vec<IpAddr> = self.host_addresses().collect();
        if self.host.is_some() {
            self.set_host(host);
        }
    }

    /// An address of the host, as what is asked of it marks it.
    fn marked(&self, addr: Addr, mut endpoint: Endpoint) -> Endpoint {
        let before = self.actual.get(&addr).filter(|_| !self.asked.complete);
        if self.asked.frontends.contains(&addr) || before.is_some_and(Endpoint::has_frontends) {
            endpoint = endpoint.with_frontends();
        }
        let takes = self.node_port_addresses.as_ref().is_none_or(|addresses| addresses.contains(&addr));
        if takes && (self.asked.node_ports || before.is_some_and(Endpoint::has_node_ports)) {
            endpoint = endpoint.with_node_ports();
        }
        endpoint
    }

    /// What marks the addresses of the host is in the table. What fails is tried again by later work.
    pub(super) fn apply_host(&mut self, now: Instant) {
        for addr in self.host.clone().unwrap_or_default() {
            let done = self.apply(addr);
            self.settle(addr, &done, now);
        }
    }

    /// Every address of the host.
    pub(super) fn host_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.host.iter().flatten().map(Addr::to_ip)
    }

    /// The host gave the address up: a pod that has it gets it.
    fn want_pod_at(&mut self, addr: Addr) {
        let has = |pod: &LocalPod| pod.device.addresses.iter().any(|ip| Addr::from(*ip) == addr);
        if let Some((id, pod)) = self.pods.iter().find(|(_, pod)| has(pod)) {
            let endpoint = compile::endpoints::endpoint(&pod.device);
            self.wanted.insert(addr, Wanted { endpoint, pod: Some(id.clone()), open: false });
        }
    }

    pub(super) fn upsert_pod(&mut self, id: &str, pod: &LocalPod, now: Instant) -> Result<(), EndpointError> {
        let entries = compile::endpoints::pod(&pod.device);
        let host = self.host.iter().flatten();
        if let Some(addr) = host.into_iter().find(|addr| entries.iter().any(|(own, _)| own == *addr)) {
            return Err(EndpointError::HostAddress(addr.to_ip()));
        }
        let before = self.pods.insert(id.to_owned(), pod.clone());
        let mut result = Ok(());
        for (addr, endpoint) in &entries {
            let wanted = Wanted { endpoint: *endpoint, pod: Some(id.to_owned()), open: false };
            self.wanted.insert(*addr, wanted);
            result = result.and(self.apply_now(*addr, now));
        }
        for ip in before.map(|pod| pod.device.addresses).unwrap_or_default() {
            let addr = Addr::from(ip);
            if entries.iter().all(|(own, _)| *own != addr) {
                result = result.and(self.drop_pod_at(addr, id, now));
            }
        }
        result
    }

    pub(super) fn remove_pod(&mut self, id: &str, now: Instant) -> Result<(), EndpointError> {
        let Some(pod) = self.pods.remove(id) else { return Ok(()) };
        let addresses = pod.device.addresses.into_iter().map(Addr::from);
        let mut result = Ok(());
        for addr in addresses {
            result = result.and(self.drop_pod_at(addr, id, now));
        }
        result
    }

    /// Another pod may have got the address since: then it is none of ours.
    fn drop_pod_at(&mut self, addr: Addr, id: &str, now: Instant) -> Result<(), EndpointError> {
        if self.wanted.get(&addr).is_none_or(|wanted| wanted.pod.as_deref() != Some(id)) {
            return Ok(());
        }
        self.wanted.remove(&addr);
        self.apply_now(addr, now)
    }

    pub(super) fn check_pod(&self, id: &str) -> Result<(), String> {
        let Some(pod) = self.pods.get(id) else { return Err(format!("pod device {id} is not known")) };
        for (addr, endpoint) in compile::endpoints::pod(&pod.device) {
            if self.actual.get(&addr) != Some(&endpoint) {
                return Err(format!("the entry of {} is not as it should be", addr.to_ip()));
            }
        }
        Ok(())
    }

    fn apply_now(&mut self, addr: Addr, now: Instant) -> Result<(), EndpointError> {
        let done = self.apply(addr);
        self.settle(addr, &done, now);
        done.map_err(|source| EndpointError::Table { address: addr.to_ip(), source })
    }

    fn settle(&mut self, addr: Addr, done: &Result<(), TableError>, now: Instant) {
        match done {
            Ok(()) => self.queue.settle(&addr),
            Err(error) => self.queue.fail(addr, error.to_string(), now),
        }
    }

    /// Makes the entry what it should be.
    fn apply(&mut self, addr: Addr) -> Result<(), TableError> {
        let actual = self.actual.get(&addr);
        let Some(wanted) = self.wanted.get(&addr) else {
            if actual.is_some() {
                self.table.remove(&addr)?;
                self.actual.remove(&addr);
            }
            return Ok(());
        };
        if actual == Some(&wanted.endpoint) {
            return Ok(());
        }
        let open = wanted.open
            || actual.is_some()
            || wanted.endpoint.has_frontends()
            || wanted.endpoint.has_node_ports();
        let entry = if open { wanted.endpoint.with_all_flow_hints() } else { wanted.endpoint };
        self.table.insert(&addr, &entry)?;
        self.actual.insert(addr, wanted.endpoint);
        Ok(())
    }

    /// Pods nobody told us of do not exist.
    pub(super) fn sweep_pods(&mut self) {
        self.sweep(|endpoint| !endpoint.is_host());
    }

    /// Addresses the host does not have are not its own.
    pub(super) fn sweep_host(&mut self) {
        if self.host.is_some() {
            self.sweep(Endpoint::is_host);
        }
    }

    fn sweep(&mut self, which: impl Fn(&Endpoint) -> bool) {
        for (addr, endpoint) in &self.actual {
            if which(endpoint) && !self.wanted.contains_key(addr) {
                self.queue.push(*addr);
            }
        }
    }

    /// Works on one key that is due. `false`: there is none.
    pub(super) fn work_one(&mut self, now: Instant) -> bool {
        let Some(addr) = self.queue.pop(now) else { return false };
        let done = self.apply(addr);
        self.settle(addr, &done, now);
        true
    }

    /// The pod an address belongs to.
    pub(super) fn pod_of(&self, addr: &Addr) -> Option<&LocalPod> {
        self.pods.get(self.wanted.get(addr)?.pod.as_ref()?)
    }

    /// Compares with what is in the table; differences are repaired by later work. Returns how many there are.
    pub(super) fn audit(&mut self) -> Result<u64, TableError> {
        let entries = self.table.entries()?.into_iter();
        let found: HashMap<_, _> =
            entries.map(|(addr, endpoint)| (addr, endpoint.without_flow_hints())).collect();
        let mut different: BTreeSet<Addr> = BTreeSet::new();
        different.extend(found.iter().filter(|(a, e)| self.actual.get(a) != Some(e)).map(|(a, _)| *a));
        different.extend(self.actual.keys().filter(|addr| !found.contains_key(addr)));
        self.actual = found;
        for addr in &different {
            self.queue.push(*addr);
        }
        Ok(different.len() as u64)
    }

    pub(super) fn used(&self) -> usize {
        self.actual.len()
    }

    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        self.queue.next_due(now)
    }

    pub(super) fn is_settled(&self) -> bool {
        self.queue.is_settled()
    }

    pub(super) const fn changes(&self) -> u64 {
        self.table.changes()
    }
}
