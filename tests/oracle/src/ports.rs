//! What a Service offers in one family: an item for each of its ports (`serviceport.go`). Knows no endpoint.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, Service, ServiceSpec};

use super::Protocol;

/// Whoever sets it proxies the service instead of kube-proxy.
const OTHER_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// Not to be proxied at all.
pub(super) const HEADLESS: &str = "service.kubernetes.io/headless";

/// All frontends of one port of a Service, in one family.
#[derive(Clone, Debug)]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) protocol: Protocol,
    pub(super) number: u16,
    pub(super) cluster: IpAddr,
    /// 0: none.
    pub(super) on_nodes: u16,
    /// `spec.externalIPs`.
    pub(super) external: Vec<IpAddr>,
    /// `status.loadBalancer.ingress`, but for those that are proxies of their own.
    pub(super) balancers: Vec<IpAddr>,
    /// `spec.loadBalancerSourceRanges` of this family; none: everybody.
    pub(super) allowed: Vec<IpNet>,
    pub(super) is_internal_local: bool,
    pub(super) is_external_local: bool,
}

impl Port {
    /// It has addresses meant for the outside.
    pub(super) fn is_external(&self) -> bool {
        self.on_nodes != 0 || !self.balancers.is_empty() || !self.external.is_empty()
    }

    /// Endpoints anywhere are of use to somebody: to pods at external addresses even where policy is Local.
    pub(super) fn uses_cluster(&self) -> bool {
        !self.is_internal_local || self.is_external()
    }

    /// Endpoints of the node alone are of use to somebody.
    pub(super) fn uses_local(&self) -> bool {
        self.is_internal_local || (self.is_external_local && self.is_external())
    }
}

/// Its ports in the family of `like`; none, if it is not kube-proxy's to serve or not of this family.
pub(super) fn of(service: &Service, like: IpAddr) -> Vec<Port> {
    let labels = service.metadata.labels.iter().flatten();
    let is_others = labels.into_iter().any(|(label, _)| label == OTHER_PROXY || label == HEADLESS);
    let Some(spec) = service.spec.as_ref().filter(|_| !is_others) else { return Vec::new() };
    let is_skipped = spec.type_.as_deref() == Some("ExternalName")
        || spec.cluster_ip.as_deref().is_none_or(|address| address.is_empty() || address == "None");
    let Some(cluster) = cluster_address(spec, like).filter(|_| !is_skipped) else { return Vec::new() };
    let ingress = service.status.as_ref().and_then(|status| status.load_balancer.as_ref()?.ingress.as_ref());
    let balancers: Vec<IpAddr> = of_family(
        ingress.into_iter().flatten().filter(|ingress| is_vip(ingress)).filter_map(|i| i.ip.as_ref()),
        like,
    );
    let port = |port: &k8s_openapi::api::core::v1::ServicePort| {
        Some(Port {
            name: port.name.clone().unwrap_or_default(),
            protocol: Protocol::ALL.into_iter().find(|protocol| protocol.is_named(port.protocol.as_ref()))?,
            number: port.port.try_into().ok()?,
            cluster,
            on_nodes: port.node_port.unwrap_or_default().try_into().ok()?,
            external: of_family(spec.external_ips.iter().flatten(), like),
            balancers: balancers.clone(),
            allowed: ranges(spec, like),
            is_internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            is_external_local: is_external_local(spec),
        })
    };
    spec.ports.iter().flatten().filter_map(port).collect()
}

fn cluster_address(spec: &ServiceSpec, like: IpAddr) -> Option<IpAddr> {
    let wanted = if like.is_ipv4() { "IPv4" } else { "IPv6" };
    let Some(families) = spec.ip_families.as_ref().filter(|families| !families.is_empty()) else {
        let only = spec.cluster_ip.as_ref()?.parse().ok()?;
        return same_family(&only, like).then_some(only);
    };
    let place = families.iter().position(|family| family == wanted)?;
    spec.cluster_ips.as_ref()?.get(place)?.parse().ok()
}

/// The policy is that of services that want the outside; on others it is what an earlier type has left.
fn is_external_local(spec: &ServiceSpec) -> bool {
    let is_external = match spec.type_.as_deref().unwrap_or("ClusterIP") {
        "LoadBalancer" | "NodePort" => true,
        "ClusterIP" => spec.external_ips.as_ref().is_some_and(|addresses| !addresses.is_empty()),
        _ => false,
    };
    is_external && spec.external_traffic_policy.as_deref() == Some("Local")
}

/// Blanks around a range pass validation, and mean nothing.
fn ranges(spec: &ServiceSpec, like: IpAddr) -> Vec<IpNet> {
    let ranges = spec.load_balancer_source_ranges.iter().flatten();
    ranges
        .filter_map(|range| range.trim().parse().ok())
        .filter(|range: &IpNet| same_family(&range.addr(), like))
        .collect()
}

/// A balancer of mode Proxy wants its traffic itself, also that of pods.
fn is_vip(ingress: &LoadBalancerIngress) -> bool {
    ingress.ip_mode.as_deref().is_none_or(|mode| mode == "VIP")
}

fn of_family<'a>(addresses: impl Iterator<Item = &'a String>, like: IpAddr) -> Vec<IpAddr> {
    addresses.filter_map(|text| text.parse().ok()).filter(|address| same_family(address, like)).collect()
}

fn same_family(address: &IpAddr, like: IpAddr) -> bool {
    address.is_ipv4() == like.is_ipv4()
}
