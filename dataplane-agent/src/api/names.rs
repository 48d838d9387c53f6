//! Names for numbers: which service, pod or device an address or interface number of an event or a flow is.
//!
//! Made from the same views people list, once per request; a stream of events makes them anew when it meets an
//! address that had none.

use std::{collections::HashMap, net::IpAddr};

use super::views::{EndpointView, EventView, FlowView, PeerView, ServiceView, Status};

/// What is known by name at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    frontends: HashMap<(IpAddr, u16, String), String>,
    services: HashMap<u32, String>,
    pods: HashMap<IpAddr, String>,
    devices: HashMap<u32, String>,
}

impl Names {
    pub(super) fn of(services: &[ServiceView], endpoints: &[EndpointView], status: &Status) -> Self {
        let mut names = Self::default();
        for service in services {
            let name = format!("{}/{}", service.namespace, service.name);
            for address in &service.cluster_ips {
                names.frontends.insert((*address, service.port, service.protocol.clone()), name.clone());
            }
            names.services.insert(service.id, name);
        }
        for endpoint in endpoints {
            if let Some(pod) = &endpoint.pod {
                names.pods.insert(endpoint.address, format!("{}/{}", pod.namespace, pod.name));
            }
            if let Some(device) = &endpoint.device {
                names.devices.insert(endpoint.ifindex, device.clone());
            }
        }
        for uplink in &status.uplinks {
            names.devices.insert(uplink.ifindex, uplink.device.clone());
        }
        names
    }

    /// Fills in what is known. True if the device and both ends now have all the names they can have.
    pub(super) fn name_event(&self, event: &mut EventView) -> bool {
        event.device = self.devices.get(&event.ifindex).cloned();
        event.source_name = event.source.and_then(|peer| self.end(peer, &event.protocol));
        event.destination_name = event.destination.and_then(|peer| self.end(peer, &event.protocol));
        let device_known = event.ifindex == 0 || event.device.is_some();
        device_known && event.source_name.is_some() && event.destination_name.is_some()
    }

    pub(super) fn name_flow(&self, flow: &mut FlowView) {
        flow.service = flow.service_id.and_then(|id| self.services.get(&id).cloned());
    }

    /// A service by its frontend, else a pod by its address.
    fn end(&self, peer: PeerView, protocol: &str) -> Option<String> {
        if let Some(service) = self.frontends.get(&(peer.address, peer.port, protocol.to_owned())) {
            return Some(format!("Service {service}"));
        }
        self.pods.get(&peer.address).map(|pod| format!("Pod {pod}"))
    }
}
