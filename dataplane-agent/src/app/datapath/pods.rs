//! Pods of the node: their devices under programs, their addresses in the tables, and in which order.

use std::time::Instant;

use super::NodeDatapath;
use crate::{
    app::pods::PodRequest,
    cni::{CniError, PodDatapathError, PodDevice},
    compile::endpoints,
    datapath::AttachError,
    reconcile::{LocalPod, SocketUpdate},
};

impl NodeDatapath {
    /// Answers the CNI server.
    pub(in crate::app) fn pod(&mut self, request: PodRequest) {
        self.news = true;
        // whoever asked may have given up: what was done stays done, and the next request finds it so
        match request {
            PodRequest::Attach(device, asker) => drop(asker.send(self.add_pod(device))),
            PodRequest::Detach(device, asker) => drop(asker.send(self.remove_pod(&device))),
            PodRequest::Check(device, asker) => drop(asker.send(self.check_pod(&device))),
            PodRequest::LoadedPrograms(result) => self.pods_loaded(result),
            // the node's task answers it, who knows the objects
            PodRequest::PodAnnotations(..) => {}
        }
    }

    fn pods_loaded(&mut self, result: Result<(), CniError>) {
        if let Err(error) = &result {
            tracing::error!(%error, "pods cannot be added");
        } else {
            self.reconciler.pods_loaded();
            match self.datapath.remove_stale_links() {
                Ok(gone) if gone.is_empty() => {}
                Ok(gone) => tracing::info!(devices = ?gone, "pins of devices that are gone removed"),
                Err(error) => tracing::warn!(%error, "remove pins of devices that are gone"),
            }
            // our programs are on every device: those of an agent with other tables have had their last packet
            match self.datapath.remove_other_versions() {
                Ok(gone) if gone.is_empty() => {}
                Ok(gone) => tracing::info!(?gone, "pins of another version removed"),
                Err(error) => tracing::warn!(%error, "remove pins of another version"),
            }
        }
        self.pods_loaded = Some(result);
    }

    fn add_pod(&mut self, device: PodDevice) -> Result<(), PodDatapathError> {
        let name = device.name.clone();
        if let Some(netns) = device.netns.clone() {
            self.tell_sockets(SocketUpdate::Pod(name.clone(), netns));
        }
        // programs first: a packet that finds the address finds its device hooked
        self.pods.insert(name.clone(), device.clone());
        self.attach_pod(&name).map_err(|error| PodDatapathError(error.to_string()))?;
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
            },
            port_mappings: device.port_mappings,
        };
        self.reconciler
            .upsert_pod(&name, &entry, Instant::now())
            .map_err(|error| PodDatapathError(error.to_string()))
    }

    fn attach_pod(&mut self, device: &str) -> Result<(), AttachError> {
        let done = self.datapath.attach_pod(device);
        match &done {
            Ok(how) => {
                tracing::debug!(device, ?how, "pod device");
                self.unattached.remove(device);
            }
            Err(error) => {
                self.unattached.insert(device.to_owned(), error.to_string());
            }
        }
        done.map(drop)
    }

    /// Addresses first: no packet is to find a device without programs.
    fn remove_pod(&mut self, device: &PodDevice) -> Result<(), PodDatapathError> {
        let withdrawn = self.reconciler.remove_pod(&device.name, Instant::now());
        self.pods.remove(&device.name);
        self.tell_sockets(SocketUpdate::PodGone(device.name.clone()));
        self.unattached.remove(&device.name);
        self.datapath.detach_pod(&device.name).map_err(|error| PodDatapathError(error.to_string()))?;
        withdrawn.map_err(|error| PodDatapathError(error.to_string()))
    }

    fn check_pod(&self, device: &PodDevice) -> Result<(), PodDatapathError> {
        let Some(known) = self.pods.get(&device.name) else {
            return Err(PodDatapathError(format!("device {} is not attached", device.name)));
        };
        if known.ifindex != device.ifindex {
            return Err(PodDatapathError(format!(
                "device {} has number {}, attached is number {}",
                device.name, device.ifindex, known.ifindex
            )));
        }
        if let Some(reason) = self.unattached.get(&device.name) {
            return Err(PodDatapathError(reason.clone()));
        }
        self.reconciler.check_pod(&device.name).map_err(PodDatapathError)
    }
}
