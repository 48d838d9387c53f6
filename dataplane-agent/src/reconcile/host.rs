//! Inputs about this host: its addresses, its pods, and their host ports.

use std::{collections::BTreeSet, net::IpAddr, time::Instant};

use dataplane_common::abi::Addr;

use super::{EndpointError, LocalPod, Reconciler, endpoints::HostFrontends};
use crate::{
    compile::{
        self,
        services::{NodeContext, PortEntries},
    },
    state::{NamespacedName, Store},
};

/// The name of a pod's host ports in the tables; `None`: it has none.
fn host_ports_name(pod: &LocalPod) -> Option<NamespacedName> {
    // a runtime outside of Kubernetes does not pass the pod's name
    let name = if pod.name.is_empty() { &pod.device_name } else { &pod.name };
    (!pod.port_mappings.is_empty()).then(|| compile::host_ports::name(&pod.namespace, name))
}

/// Ports of the host that belong to pods (host ports) or Services (node ports).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostPorts {
    pub ports: BTreeSet<u16>,
    /// Whether `ports` is complete. Until then, ports of an earlier agent may still be in use.
    pub complete: bool,
}

impl Reconciler {
    /// Sets the addresses of this host, on all devices, without link-local and loopback ones.
    pub fn set_host_addresses(
        &mut self,
        addresses: impl IntoIterator<Item = IpAddr>,
        store: &Store,
        now: Instant,
    ) {
        self.endpoints.set_host(addresses);
        let host = self.endpoints.host_addresses().map(Addr::from).collect();
        self.set_node_context(NodeContext { host, ..self.node_context.clone() }, store);
        let names: BTreeSet<_> = self.endpoints.pods.values().filter_map(host_ports_name).collect();
        self.host_ports_changed(names, now);
    }

    /// Ports of the host that belong to pods or Services, whether or not they are in the tables
    /// yet.
    pub fn host_ports(&self) -> HostPorts {
        HostPorts { ports: self.services.host_ports().collect(), complete: self.synced && self.pods_loaded }
    }

    /// Whether [`Self::host_ports`] may have changed since the last call.
    pub const fn take_host_ports_changed(&mut self) -> bool {
        std::mem::replace(&mut self.services.host_ports_changed, false)
    }

    /// Sets the host addresses that accept node port connections; `None`: all.
    pub fn set_node_port_addresses(&mut self, addresses: Option<BTreeSet<IpAddr>>) {
        let addresses = addresses.map(|addresses| addresses.into_iter().map(Addr::from).collect());
        self.endpoints.set_node_port_addresses(addresses);
    }

    /// Adds a pod of this node and writes its entries now. After an error they are retried until
    /// [`Self::remove_pod`].
    ///
    /// `id` names the attachment (container and interface).
    pub fn upsert_pod(&mut self, id: &str, pod: &LocalPod, now: Instant) -> Result<(), EndpointError> {
        let before = self.endpoints.pods.get(id).and_then(host_ports_name);
        let result = self.endpoints.upsert_pod(id, pod, now);
        self.routes.set_pod(id, self.endpoints.pods.get(id).map(|pod| &pod.device));
        self.host_ports_changed(before.into_iter().chain(host_ports_name(pod)), now);
        result
    }

    /// Removes a pod and its entries now. After an error they are removed later.
    pub fn remove_pod(&mut self, id: &str, now: Instant) -> Result<(), EndpointError> {
        self.routes.set_pod(id, None);
        let name = self.endpoints.pods.get(id).and_then(host_ports_name);
        let result = self.endpoints.remove_pod(id, now);
        self.host_ports_changed(name, now);
        result
    }

    /// Sets which pod devices are down, by index.
    pub fn set_down_pods(&mut self, down: &BTreeSet<u32>, now: Instant) {
        self.endpoints.set_down(down, now);
    }

    /// Updates the host ports of pods with these names now.
    fn host_ports_changed(&mut self, names: impl IntoIterator<Item = NamespacedName>, now: Instant) {
        for name in names {
            // of two pods with one name, the first is terminating
            let mut pods = self.endpoints.pods.values();
            let pod = pods.rfind(|pod| host_ports_name(pod).as_ref() == Some(&name));
            let entries = pod.and_then(|pod| {
                let addresses = &pod.device.addresses;
                let host = self.endpoints.host_addresses();
                compile::host_ports::compile(&name, &pod.port_mappings, addresses, host)
            });
            let ports = entries.iter().flat_map(|entries| &entries.ports);
            let addresses = ports.flat_map(PortEntries::frontends).map(|key| key.addr).collect();
            self.set_frontend_addresses(&name, addresses);
            self.services.set_now(&name, entries, now);
        }
        self.publish_frontends();
        self.endpoints.apply_host(now);
    }

    pub(super) fn publish_frontends(&mut self) {
        self.endpoints.set_host_frontends(HostFrontends {
            addresses: self.frontend_addresses.values().flatten().copied().collect(),
            node_ports: self.services.has_node_ports(),
            complete: self.synced && self.pods_loaded,
        });
    }

    /// Sets the frontend addresses of a Service or pod. Returns whether they changed.
    pub(super) fn set_frontend_addresses(
        &mut self,
        name: &NamespacedName,
        addresses: BTreeSet<Addr>,
    ) -> bool {
        if addresses.is_empty() {
            return self.frontend_addresses.remove(name).is_some();
        }
        let changed = self.frontend_addresses.get(name) != Some(&addresses);
        if changed {
            self.frontend_addresses.insert(name.clone(), addresses);
        }
        changed
    }
}
