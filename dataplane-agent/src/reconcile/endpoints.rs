//! Reconciles `ENDPOINTS`: the pods of this node and the addresses of the host.
//!
//! The datapath writes the flow hints of an entry, the agent writes the rest: entries are compared
//! without hints. Overwriting an entry sets all hints, because the datapath may set one at the same
//! time.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    time::Instant,
};

use dataplane_cni::protocol::PortMapping;
use dataplane_common::abi::{Addr, Endpoint, PodSource};

use super::{backoff::WorkQueue, instrumented::InstrumentedTable, pod_sources::PodSources};
use crate::{
    compile::{self, endpoints::PodDevice},
    datapath::table::{Table, TableError},
};

/// A pod of this node, as registered by the CNI server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPod {
    pub namespace: String,
    pub name: String,
    /// Name of the host-side device.
    pub device_name: String,
    pub device: PodDevice,
    /// Its host ports.
    pub port_mappings: Vec<PortMapping>,
}

/// The frontends at addresses of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HostFrontends {
    /// Addresses with frontends; not all of them are host addresses.
    pub(super) addresses: BTreeSet<Addr>,
    /// Whether any Service has a node port.
    pub(super) node_ports: bool,
    /// Whether all frontends are known. Until then, flags set by an earlier agent are kept.
    pub(super) complete: bool,
}

/// Why the entries of a pod could not be written.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    #[error("pod address {0} is also an address of this host")]
    HostAddress(IpAddr),
    #[error("cannot write endpoint {address}: {source}")]
    Table { address: IpAddr, source: TableError },
}

/// The desired entry of an address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct DesiredEndpoint {
    endpoint: Endpoint,
    /// Attachment ID of the pod; `None`: the host.
    pod: Option<String>,
    /// Write all flow hints into a new entry: flows to the address may exist.
    set_flow_hints: bool,
}

/// Desired and actual entries.
#[derive(Debug)]
pub(super) struct Endpoints {
    pub(super) table: InstrumentedTable<Addr, Endpoint>,
    pub(super) sources: PodSources,
    /// Without flow hints.
    actual: HashMap<Addr, Endpoint>,
    desired: HashMap<Addr, DesiredEndpoint>,
    pub(super) pods: BTreeMap<String, LocalPod>,
    /// `None`: not known yet.
    host: Option<BTreeSet<Addr>>,
    host_frontends: HostFrontends,
    /// Host addresses that accept node port connections; `None`: all.
    node_port_addresses: Option<BTreeSet<Addr>>,
    /// The table was empty at start: no flow is older than this agent.
    fresh: bool,
    pub(super) queue: WorkQueue<Addr>,
}

impl Endpoints {
    pub(super) fn new(
        table: Box<dyn Table<Addr, Endpoint>>,
        sources: Box<dyn Table<u32, PodSource>>,
    ) -> Self {
        Self {
            table: InstrumentedTable::new(table),
            sources: PodSources::new(sources),
            actual: HashMap::new(),
            desired: HashMap::new(),
            pods: BTreeMap::new(),
            host: None,
            host_frontends: HostFrontends::default(),
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
        self.sources.repair(&self.actual)?;
        Ok(self.actual.len())
    }

    pub(super) fn set_host(&mut self, addresses: impl IntoIterator<Item = IpAddr>) {
        let entries: BTreeMap<_, _> = compile::endpoints::host(addresses)
            .into_iter()
            .map(|(addr, endpoint)| (addr, self.with_frontend_flags(addr, endpoint)))
            .collect();
        let before = self.host.take();
        // a re-added address may have old flows: masquerade uses host addresses
        let set_flow_hints = before.is_some() || !self.fresh;
        for addr in before.unwrap_or_default() {
            if !entries.contains_key(&addr) {
                self.desired.remove(&addr);
                self.restore_pod_entry(addr);
                self.queue.push(addr);
            }
        }
        for (addr, endpoint) in &entries {
            let known = self.desired.get(addr).filter(|desired| desired.pod.is_none());
            if known.is_none_or(|desired| desired.endpoint != *endpoint) {
                self.desired
                    .insert(*addr, DesiredEndpoint { endpoint: *endpoint, pod: None, set_flow_hints });
                self.queue.push(*addr);
            }
        }
        self.host = Some(entries.into_keys().collect());
    }

    /// Sets the frontends at host addresses.
    pub(super) fn set_host_frontends(&mut self, host_frontends: HostFrontends) {
        if self.host_frontends == host_frontends {
            return;
        }
        self.host_frontends = host_frontends;
        self.refresh_host();
    }

    /// Host addresses that accept node port connections; `None`: all.
    pub(super) fn set_node_port_addresses(&mut self, addresses: Option<BTreeSet<Addr>>) {
        if self.node_port_addresses != addresses {
            self.node_port_addresses = addresses;
            self.refresh_host();
        }
    }

    /// Recomputes the flags of the host's entries.
    fn refresh_host(&mut self) {
        let host: Vec<IpAddr> = self.host_addresses().collect();
        if self.host.is_some() {
            self.set_host(host);
        }
    }

    /// The entry of a host address with its frontend flags.
    fn with_frontend_flags(&self, addr: Addr, mut endpoint: Endpoint) -> Endpoint {
        let before = self.actual.get(&addr).filter(|_| !self.host_frontends.complete);
        if self.host_frontends.addresses.contains(&addr) || before.is_some_and(Endpoint::has_frontends) {
            endpoint = endpoint.with_frontends();
        }
        let accepts = self.node_port_addresses.as_ref().is_none_or(|addresses| addresses.contains(&addr));
        if accepts && (self.host_frontends.node_ports || before.is_some_and(Endpoint::has_node_ports)) {
            endpoint = endpoint.with_node_ports();
        }
        endpoint
    }

    /// Writes the host's entries now. Failures are retried by later work.
    pub(super) fn apply_host(&mut self, now: Instant) {
        for addr in self.host.clone().unwrap_or_default() {
            let result = self.apply(addr);
            self.record_result(addr, &result, now);
        }
    }

    /// All addresses of the host.
    pub(super) fn host_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.host.iter().flatten().map(Addr::to_ip)
    }

    /// Gives an address the host lost to the pod that has it.
    fn restore_pod_entry(&mut self, addr: Addr) {
        let has = |pod: &LocalPod| pod.device.addresses.iter().any(|ip| Addr::from(*ip) == addr);
        if let Some((id, pod)) = self.pods.iter().find(|(_, pod)| has(pod)) {
            let endpoint = compile::endpoints::endpoint(&pod.device);
            self.desired
                .insert(addr, DesiredEndpoint { endpoint, pod: Some(id.clone()), set_flow_hints: false });
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
            let desired =
                DesiredEndpoint { endpoint: *endpoint, pod: Some(id.to_owned()), set_flow_hints: false };
            self.desired.insert(*addr, desired);
            result = result.and(self.apply_now(*addr, now));
        }
        for ip in before.map(|pod| pod.device.addresses).unwrap_or_default() {
            let addr = Addr::from(ip);
            if entries.iter().all(|(own, _)| *own != addr) {
                result = result.and(self.remove_pod_entry(addr, id, now));
            }
        }
        result
    }

    pub(super) fn remove_pod(&mut self, id: &str, now: Instant) -> Result<(), EndpointError> {
        let Some(pod) = self.pods.remove(id) else { return Ok(()) };
        let addresses = pod.device.addresses.into_iter().map(Addr::from);
        let mut result = Ok(());
        for addr in addresses {
            result = result.and(self.remove_pod_entry(addr, id, now));
        }
        result
    }

    /// Removes the entry unless another pod got the address since.
    fn remove_pod_entry(&mut self, addr: Addr, id: &str, now: Instant) -> Result<(), EndpointError> {
        if self.desired.get(&addr).is_none_or(|desired| desired.pod.as_deref() != Some(id)) {
            return Ok(());
        }
        self.desired.remove(&addr);
        self.apply_now(addr, now)
    }

    /// Sets which pod devices are down, by index, and writes the entries that change. Failures are
    /// retried by later work.
    pub(super) fn set_down(&mut self, down: &BTreeSet<u32>, now: Instant) {
        let mut changed = Vec::new();
        for (id, pod) in &mut self.pods {
            let is_down = down.contains(&pod.device.ifindex);
            if pod.device.down != is_down {
                pod.device.down = is_down;
                changed.push((id.clone(), compile::endpoints::pod(&pod.device)));
            }
        }
        for (id, entries) in changed {
            for (addr, endpoint) in entries {
                let desired = self.desired.get_mut(&addr);
                // the address may be another pod's or the host's since
                let Some(desired) = desired.filter(|desired| desired.pod.as_ref() == Some(&id)) else {
                    continue;
                };
                desired.endpoint = endpoint;
                let result = self.apply(addr);
                self.record_result(addr, &result, now);
            }
        }
    }

    pub(super) fn check_pod(&self, id: &str) -> Result<(), String> {
        let Some(pod) = self.pods.get(id) else {
            return Err(format!("pod attachment {id} is not known to the agent"));
        };
        for (addr, endpoint) in compile::endpoints::pod(&pod.device) {
            if self.actual.get(&addr) != Some(&endpoint) {
                return Err(format!("ENDPOINTS entry of {} is missing or outdated", addr.to_ip()));
            }
        }
        Ok(())
    }

    fn apply_now(&mut self, addr: Addr, now: Instant) -> Result<(), EndpointError> {
        let result = self.apply(addr);
        self.record_result(addr, &result, now);
        result.map_err(|source| EndpointError::Table { address: addr.to_ip(), source })
    }

    fn record_result(&mut self, addr: Addr, result: &Result<(), TableError>, now: Instant) {
        match result {
            Ok(()) => self.queue.done(&addr),
            Err(error) => self.queue.fail(addr, error.to_string(), now),
        }
    }

    /// Writes or removes the entry of an address.
    fn apply(&mut self, addr: Addr) -> Result<(), TableError> {
        let actual = self.actual.get(&addr);
        let Some(desired) = self.desired.get(&addr) else {
            if let Some(actual) = actual {
                let slot = self.sources.clear(addr, actual)?;
                self.table.remove(&addr)?;
                self.actual.remove(&addr);
                self.pass_on(slot);
            }
            return Ok(());
        };
        if actual == Some(&desired.endpoint) {
            return self.sources.set(addr, &desired.endpoint);
        }
        let slot = actual.map_or(Ok(None), |actual| self.sources.clear(addr, actual))?;
        let set_flow_hints = desired.set_flow_hints
            || actual.is_some()
            || desired.endpoint.has_frontends()
            || desired.endpoint.has_node_ports();
        let entry = if set_flow_hints { desired.endpoint.with_all_flow_hints() } else { desired.endpoint };
        self.table.insert(&addr, &entry)?;
        self.actual.insert(addr, desired.endpoint);
        let done = self.sources.set(addr, &desired.endpoint);
        self.pass_on(slot);
        done
    }

    /// Lets later work give a cleared slot of `POD_SOURCES` to the row that waits for it.
    fn pass_on(&mut self, slot: Option<u32>) {
        if let Some(addr) = slot.and_then(|slot| PodSources::waiting(slot, &self.actual)) {
            self.queue.push(addr);
        }
    }

    /// Removes entries of unknown pods.
    pub(super) fn sweep_pods(&mut self) {
        self.sweep(|endpoint| !endpoint.is_host());
    }

    /// Removes host entries of addresses the host does not have.
    pub(super) fn sweep_host(&mut self) {
        if self.host.is_some() {
            self.sweep(Endpoint::is_host);
        }
    }

    fn sweep(&mut self, which: impl Fn(&Endpoint) -> bool) {
        for (addr, endpoint) in &self.actual {
            if which(endpoint) && !self.desired.contains_key(addr) {
                self.queue.push(*addr);
            }
        }
    }

    /// Reconciles one due key. Returns `false` if there is none.
    pub(super) fn work_one(&mut self, now: Instant) -> bool {
        let Some(addr) = self.queue.pop(now) else { return false };
        let result = self.apply(addr);
        self.record_result(addr, &result, now);
        true
    }

    /// The pod that has an address.
    pub(super) fn pod_of(&self, addr: &Addr) -> Option<&LocalPod> {
        self.pods.get(self.desired.get(addr)?.pod.as_ref()?)
    }

    /// Compares the table with what was written; differences are repaired by later work. Returns
    /// their number.
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
        let sources = self.sources.repair(&self.actual)?;
        Ok(different.len() as u64 + sources)
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
        self.table.changes() + self.sources.table.changes()
    }
}
