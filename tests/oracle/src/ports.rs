//! The ports of a Service in one address family (`serviceport.go`), without endpoints.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, Service, ServiceSpec};

use super::Protocol;

/// Label: another proxy than kube-proxy serves the Service.
const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// Label: no proxy serves the Service.
pub(super) const HEADLESS: &str = "service.kubernetes.io/headless";

/// All frontends of one port of a Service in one address family.
#[derive(Clone, Debug)]
pub(super) struct ServicePort {
    pub(super) name: String,
    pub(super) protocol: Protocol,
    pub(super) number: u16,
    pub(super) cluster: IpAddr,
    /// The node port; 0: none.
    pub(super) node_port: u16,
    /// `spec.externalIPs`.
    pub(super) external: Vec<IpAddr>,
    /// `status.loadBalancer.ingress`, except those with `ipMode: Proxy`.
    pub(super) load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges` of this family; empty: all clients.
    pub(super) source_ranges: Vec<IpNet>,
    pub(super) is_internal_local: bool,
    pub(super) is_external_local: bool,
}

impl ServicePort {
    /// Whether the port has frontends for outside clients.
    pub(super) fn is_external(&self) -> bool {
        self.node_port != 0 || !self.load_balancer_ips.is_empty() || !self.external.is_empty()
    }

    /// Whether endpoints of all nodes matter: for pods, external addresses ignore policy Local.
    pub(super) fn uses_cluster(&self) -> bool {
        !self.is_internal_local || self.is_external()
    }

    /// Whether endpoints of the node alone matter.
    pub(super) fn uses_local(&self) -> bool {
        self.is_internal_local || (self.is_external_local && self.is_external())
    }
}

/// Returns the ports in the family of `like`; empty if kube-proxy does not serve the Service.
pub(super) fn of(service: &Service, like: IpAddr) -> Vec<ServicePort> {
    let labels = service.metadata.labels.iter().flatten();
    let is_not_proxied = labels.into_iter().any(|(label, _)| label == OTHER_PROXY || label == HEADLESS);
    let Some(spec) = service.spec.as_ref().filter(|_| !is_not_proxied) else { return Vec::new() };
    let is_skipped = spec.type_.as_deref() == Some("ExternalName")
        || spec.cluster_ip.as_deref().is_none_or(|address| address.is_empty() || address == "None");
    let Some(cluster) = cluster_address(spec, like).filter(|_| !is_skipped) else { return Vec::new() };
    let ingress = service.status.as_ref().and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref());
    let load_balancer_ips: Vec<IpAddr> = of_family(
        ingress.into_iter().flatten().filter(|ingress| is_vip(ingress)).filter_map(|i| i.ip.as_ref()),
        like,
    );
    let port = |port: &k8s_openapi::api::core::v1::ServicePort| {
        Some(ServicePort {
            name: port.name.clone().unwrap_or_default(),
            protocol: Protocol::ALL.into_iter().find(|protocol| protocol.is_named(port.protocol.as_ref()))?,
            number: port.port.try_into().ok()?,
            cluster,
            node_port: port.node_port.unwrap_or_default().try_into().ok()?,
            external: of_family(spec.external_ips.iter().flatten(), like),
            load_balancer_ips: load_balancer_ips.clone(),
            source_ranges: ranges(spec, like),
            is_internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            is_external_local: is_external_local(spec),
        })
    };
    spec.ports.iter().flatten().filter_map(port).collect()
}

fn cluster_address(spec: &ServiceSpec, like: IpAddr) -> Option<IpAddr> {
    let family = if like.is_ipv4() { "IPv4" } else { "IPv6" };
    let Some(families) = spec.ip_families.as_ref().filter(|families| !families.is_empty()) else {
        let only = spec.cluster_ip.as_ref()?.parse().ok()?;
        return same_family(&only, like).then_some(only);
    };
    let place = families.iter().position(|entry| entry == family)?;
    spec.cluster_ips.as_ref()?.get(place)?.parse().ok()
}

/// Whether the external policy is Local; ignored if the Service type has no external frontends.
fn is_external_local(spec: &ServiceSpec) -> bool {
    let is_external = match spec.type_.as_deref().unwrap_or("ClusterIP") {
        "LoadBalancer" | "NodePort" => true,
        "ClusterIP" => spec.external_ips.as_ref().is_some_and(|addresses| !addresses.is_empty()),
        _ => false,
    };
    is_external && spec.external_traffic_policy.as_deref() == Some("Local")
}

/// Returns the source ranges of a family. API validation allows blanks around a range.
fn ranges(spec: &ServiceSpec, like: IpAddr) -> Vec<IpNet> {
    let ranges = spec.load_balancer_source_ranges.iter().flatten();
    ranges
        .filter_map(|range| range.trim().parse().ok())
        .filter(|range: &IpNet| same_family(&range.addr(), like))
        .collect()
}

/// Whether the proxy serves this address; with `ipMode: Proxy`, the load balancer handles all
/// traffic.
fn is_vip(ingress: &LoadBalancerIngress) -> bool {
    ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP")
}

fn of_family<'a>(addresses: impl Iterator<Item = &'a String>, like: IpAddr) -> Vec<IpAddr> {
    addresses.filter_map(|text| text.parse().ok()).filter(|address| same_family(address, like)).collect()
}

fn same_family(address: &IpAddr, like: IpAddr) -> bool {
    address.is_ipv4() == like.is_ipv4()
}
