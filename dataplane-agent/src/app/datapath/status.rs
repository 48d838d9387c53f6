//! The API's views of the node's datapath, and its part of the published status.

use super::NodeDatapath;
use crate::{
    api::views::{EndpointView, NotReady, Origin, ProblemView, RouteView, ServiceView, Status, UplinkView},
    datapath::XdpState,
    netlink::Uplink,
    state::Store,
};

impl NodeDatapath {
    pub(in crate::app) fn services(&self, store: &Store) -> Vec<ServiceView> {
        self.reconciler.services(store)
    }

    pub(in crate::app) fn endpoints(&self) -> Vec<EndpointView> {
        self.reconciler.endpoints().unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot list the ENDPOINTS table; the API returns no endpoints");
            Vec::new()
        })
    }

    pub(in crate::app) fn routes(&self) -> Vec<RouteView> {
        self.reconciler.routes()
    }

    /// The conditions that keep the node from being ready.
    pub(in crate::app) fn not_ready(&self) -> Vec<NotReady> {
        let mut reasons = Vec::new();
        let pods = match &self.recovery {
            Some(Ok(())) => None,
            Some(Err(error)) => Some(format!("cannot recover existing pods; no pod can be added: {error}")),
            None => Some("existing pods are being attached".to_owned()),
        };
        reasons.extend(pods.map(|reason| NotReady { check: "pods".to_owned(), reason }));
        if !self.initial_sync_done {
            let reason = "initial synchronisation of the tables has not finished".to_owned();
            reasons.push(NotReady { check: "reconcile".to_owned(), reason });
        }
        reasons
    }

    /// Fills in the fields of `status` that this module knows.
    pub(in crate::app) fn fill_status(&self, status: &mut Status, store: &Store) {
        status.uplinks = self.plan.uplinks.iter().map(|uplink| self.uplink_view(uplink)).collect();
        status.pins_adopted = self.pins_adopted;
        status.objects.pods = self.pods.len() as u64;
        status.applied_revision = self.reconciler.applied_revision();
        status.nodes = self.reconciler.nodes(store);
        status.tables = self.reconciler.tables();
        status.reconcile = self.reconciler.statistics();
        status.problems.extend(self.reconciler.problems());
        status.problems.extend(self.reserved_ports.problem());
        status.problems.extend(self.kernel_problems.borrow().iter().cloned());
        status.problems.extend(self.socket_problems.borrow().iter().cloned());
        let capacity = self.datapath.problems().iter().map(|message| ("capacity", message));
        let attach = self.attach_errors.iter().map(|(device, message)| (device.as_str(), message));
        let xdp = self.xdp.iter().filter_map(|(device, state)| match state {
            XdpState::Refused(reason) => Some((device.as_str(), reason)),
            XdpState::Off | XdpState::Native => None,
        });
        status.problems.extend(capacity.chain(attach).chain(xdp).map(|(subject, message)| ProblemView {
            origin: Origin::Datapath,
            subject: subject.to_owned(),
            message: message.clone(),
        }));
    }

    fn uplink_view(&self, uplink: &Uplink) -> UplinkView {
        UplinkView {
            device: uplink.name.clone(),
            ifindex: uplink.ifindex,
            mtu: uplink.mtu,
            addresses: uplink.addresses.clone(),
            service_hook: self.xdp.get(&uplink.name).map_or("tc", XdpState::name).to_owned(),
        }
    }
}
