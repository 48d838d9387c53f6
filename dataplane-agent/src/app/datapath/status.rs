//! The API's views of the node's datapath, and its part of the published status.

use super::NodeDatapath;
use crate::{
    api::views::{
        EndpointView, NotReady, Origin, OtherDeviceView, ProblemView, RouteView, ServiceView, Status,
        UplinkView,
    },
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
        // one of several without programs is a problem; all of them, or one with the address that
        // the other nodes know, is a node that nobody reaches
        let has_internal_ip = |name: &String| {
            let uplink = self.plan.uplinks.iter().find(|uplink| uplink.name == *name);
            uplink.is_some_and(|uplink| {
                uplink.addresses.iter().any(|network| self.plan.node.internal_ips.contains(&network.addr()))
            })
        };
        let failed =
            self.uplink_errors.iter().find(|(name, _)| self.attached.is_empty() || has_internal_ip(name));
        reasons.extend(failed.map(|(name, reason)| NotReady {
            check: "network".to_owned(),
            reason: format!("the programs are not attached to {name}: {reason}"),
        }));
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
        status.other_devices = self
            .plan
            .choices
            .iter()
            .filter(|choice| !choice.is_uplink)
            .map(|choice| OtherDeviceView {
                device: choice.name.clone(),
                ifindex: choice.ifindex,
                reason: choice.reason.clone(),
            })
            .collect();
        status.egress = self.plan.egress.view();
        status.pins_adopted = self.pins_adopted;
        status.objects.pods = self.pods.len() as u64;
        status.applied_revision = self.reconciler.applied_revision();
        status.nodes = self.reconciler.nodes(store);
        status.tables = self.reconciler.tables();
        status.tables.push(self.devices.view());
        status.tables.push(self.allowed_sources.view());
        status.reconcile = self.reconciler.statistics();
        status.problems.extend(self.reconciler.problems());
        status.problems.extend(self.reserved_ports.problem());
        status.problems.extend(self.kernel_problems.borrow().iter().cloned());
        status.problems.extend(self.socket_problems.borrow().iter().cloned());
        let capacity = self.datapath.problems().iter().map(|message| ("capacity", message));
        let errors = self.attach_errors.iter().chain(&self.uplink_errors);
        let attach = errors.map(|(device, message)| (device.as_str(), message));
        let xdp = self.attached.values().filter_map(|uplink| match &uplink.xdp {
            XdpState::Refused(reason) => Some((uplink.name.as_str(), reason)),
            XdpState::Off | XdpState::Native => None,
        });
        let warnings = self.plan.warnings.iter().map(|message| ("uplinks", message));
        let sysctls = self.plan.sysctl_problems.iter().map(|message| ("sysctl", message));
        let ipsec = self.plan.egress.problems.iter().map(|message| ("IPsec", message));
        status.problems.extend(
            capacity.chain(attach).chain(xdp).chain(warnings).chain(sysctls).chain(ipsec).map(
                |(subject, message)| ProblemView {
                    origin: Origin::Datapath,
                    subject: subject.to_owned(),
                    message: message.clone(),
                },
            ),
        );
    }

    fn uplink_view(&self, uplink: &Uplink) -> UplinkView {
        let attached = self.attached.get(&uplink.ifindex);
        let choice = self.plan.choices.iter().find(|choice| choice.ifindex == uplink.ifindex);
        UplinkView {
            device: uplink.name.clone(),
            ifindex: uplink.ifindex,
            mtu: uplink.mtu,
            addresses: uplink.addresses.clone(),
            service_hook: attached.map_or("none", |attached| attached.xdp.name()).to_owned(),
            reason: choice.map(|choice| choice.reason.clone()).unwrap_or_default(),
        }
    }
}
