//! Attaches and detaches pods: programs on their devices, and their addresses in `ENDPOINTS`.

use std::time::Instant;

use super::NodeDatapath;
use crate::{
    app::pods::PodRequest,
    cni::{CniError, PodDatapathError, PodDevice, annotations::ALLOWED_SOURCES},
    compile::endpoints,
    datapath::{AttachError, table::TableError},
    reconcile::{LocalPod, SocketUpdate},
};

impl NodeDatapath {
    /// Handles a request of the CNI server.
    pub(in crate::app) fn on_pod_request(&mut self, request: PodRequest) {
        self.dirty = true;
        // a caller that timed out is ignored: requests are idempotent, and it will retry
        match request {
            PodRequest::Attach(device, reply) => drop(reply.send(self.add_pod(device))),
            PodRequest::Detach(device, reply) => drop(reply.send(self.remove_pod(&device))),
            PodRequest::Check(device, reply) => drop(reply.send(self.check_pod(&device))),
            PodRequest::Recovered(result) => self.on_recovered(result),
            // answered by the node task, which has the store
            PodRequest::Annotations(..) => {}
        }
    }

    fn on_recovered(&mut self, result: Result<(), CniError>) {
        if let Err(error) = &result {
            tracing::error!(%error, "cannot recover existing pods, retrying; no pod can be added");
        } else {
            self.reconciler.set_down_pods(&self.plan.down_pods, Instant::now());
            self.reconciler.pods_loaded();
            if let Err(error) = self.allowed_sources.pods_loaded() {
                tracing::warn!(%error, "cannot remove the allowed sources of deleted pods; retrying at the next audit");
            }
            match self.datapath.remove_stale_links() {
                Ok(gone) if gone.is_empty() => {}
                Ok(gone) => tracing::info!(devices = ?gone, "removed pins of deleted devices"),
                Err(error) => tracing::warn!(%error, "cannot remove pins of deleted devices"),
            }
            // this version's programs are on every device now, so those of another version see no
            // more packets
            match self.datapath.remove_other_versions() {
                Ok(gone) if gone.is_empty() => {}
                Ok(gone) => tracing::info!(pins = ?gone, "removed pins of another table version"),
                Err(error) => tracing::warn!(%error, "cannot remove pins of another table version"),
            }
        }
        self.recovery = Some(result);
    }

    fn add_pod(&mut self, device: PodDevice) -> Result<(), PodDatapathError> {
        let name = device.name.clone();
        if let Some(netns) = device.netns.clone() {
            self.send_socket_update(SocketUpdate::PodAdded(name.clone(), netns));
        }
        // programs first: once the address is in the table, packets are redirected to the device
        self.pods.insert(name.clone(), device.clone());
        self.attach_pod(&name).map_err(|error| PodDatapathError(error.to_string()))?;
        let allowed_sources = self.set_allowed_sources(&device);
        let (namespace, pod) =
            device.pod.map_or_else(Default::default, |pod| (pod.namespace.clone(), pod.name));
        let entry = LocalPod {
            namespace,
            name: pod,
            device_name: name.clone(),
            device: endpoints::PodDevice {
                addresses: device.addresses,
                ifindex: device.ifindex,
                mac: device.mac,
                shaped: device.shaped,
                // the next change of its state is reported
                down: false,
            },
            port_mappings: device.port_mappings,
        };
        self.reconciler
            .upsert_pod(&name, &entry, Instant::now())
            .map_err(|error| PodDatapathError(error.to_string()))?;
        allowed_sources.map_err(|error| PodDatapathError(error.to_string()))
    }

    /// Allows the sources of the pod's annotation, unless the configuration has changed since the
    /// pod was added.
    fn set_allowed_sources(&mut self, device: &PodDevice) -> Result<(), TableError> {
        let namespace = device.pod.as_ref().map_or("", |pod| pod.namespace.as_str());
        let is_listed = self.allowed_sources_namespaces.iter().any(|listed| listed == namespace);
        let sources = if is_listed { device.allowed_sources.as_slice() } else { &[] };
        if sources.len() != device.allowed_sources.len() {
            tracing::warn!(
                pod = ?device.pod,
                "annotation {ALLOWED_SOURCES} is ignored: allowed_sources_namespaces no longer lists namespace \
                 {namespace}"
            );
        }
        self.allowed_sources.set(&device.name, device.ifindex, sources)
    }

    fn attach_pod(&mut self, device: &str) -> Result<(), AttachError> {
        let done = self.datapath.attach_pod(device);
        match &done {
            Ok(tc) => {
                tracing::debug!(device, ?tc, "attached to pod device {device}");
                self.attach_errors.remove(device);
            }
            Err(error) => {
                self.attach_errors.insert(device.to_owned(), error.to_string());
            }
        }
        done.map(drop)
    }

    /// Removes the addresses first: no packet may be redirected to a device without programs.
    fn remove_pod(&mut self, device: &PodDevice) -> Result<(), PodDatapathError> {
        let withdrawn = self.reconciler.remove_pod(&device.name, Instant::now());
        let sources_removed = self.allowed_sources.remove(&device.name);
        self.pods.remove(&device.name);
        self.send_socket_update(SocketUpdate::PodRemoved(device.name.clone()));
        self.attach_errors.remove(&device.name);
        self.datapath.detach_pod(&device.name).map_err(|error| PodDatapathError(error.to_string()))?;
        withdrawn.map_err(|error| PodDatapathError(error.to_string()))?;
        sources_removed.map_err(|error| PodDatapathError(error.to_string()))
    }

    fn check_pod(&self, device: &PodDevice) -> Result<(), PodDatapathError> {
        let Some(known) = self.pods.get(&device.name) else {
            return Err(PodDatapathError(format!("no programs are attached to device {}", device.name)));
        };
        if known.ifindex != device.ifindex {
            return Err(PodDatapathError(format!(
                "device {} has ifindex {}, but the programs are attached to ifindex {}",
                device.name, device.ifindex, known.ifindex
            )));
        }
        if let Some(reason) = self.attach_errors.get(&device.name) {
            return Err(PodDatapathError(reason.clone()));
        }
        self.reconciler.check_pod(&device.name).map_err(PodDatapathError)
    }
}
