//! Converts v1 Service: addresses, ports and policies.

use std::{collections::BTreeSet, net::IpAddr};

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;

use super::{Converted, FieldError, field};
use crate::state::{Forwarding, LoadBalancing, Object, Service, ServicePort, TrafficPolicy};

const CLUSTER_IP: &str = "ClusterIP";
const NODE_PORT: &str = "NodePort";
const LOAD_BALANCER: &str = "LoadBalancer";

/// Annotation that selects the load balancing algorithm.
const LOAD_BALANCING: &str = "dataplane.local/load-balancing";
const FORWARDING: &str = "dataplane.local/forwarding-mode";
/// Labels of Services of another service proxy and of headless ones: kube-proxy ignores both.
pub(super) const UNMANAGED_LABELS: [&str; 2] =
    ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];
/// Seconds (default and maximum of the API).
const AFFINITY_DEFAULT: i32 = 10_800;
const AFFINITY_MAX: i32 = 86_400;

pub(super) fn convert(service: &core::Service) -> Result<Converted, FieldError> {
    let name = super::namespaced_name(&service.metadata)?;
    if super::has_label(&service.metadata, &UNMANAGED_LABELS) {
        return Ok(Converted::default());
    }
    let spec = service.spec.as_ref().ok_or_else(|| FieldError::missing("spec"))?;
    match spec.type_.as_deref() {
        None | Some(CLUSTER_IP | NODE_PORT | LOAD_BALANCER) => {}
        Some("ExternalName") => return Ok(Converted::default()),
        Some(other) => {
            return Err(FieldError::new(
                "spec.type",
                format!("{other:?} is not one of ClusterIP, NodePort, LoadBalancer, ExternalName"),
            ));
        }
    }
    let (load_balancing, forwarding) = annotated_options(service)?;
    let Some(cluster_ips) = cluster_ips(spec)? else { return Ok(Converted::default()) };
    let service = Service {
        name,
        owner: super::owner(&service.metadata),
        external_ips: external_ips(spec, &cluster_ips)?,
        load_balancer_ips: load_balancer_ips(service, spec, &cluster_ips)?,
        source_ranges: source_ranges(spec)?,
        internal_policy: policy("spec.internalTrafficPolicy", spec.internal_traffic_policy.as_deref())?,
        external_policy: policy("spec.externalTrafficPolicy", spec.external_traffic_policy.as_deref())?,
        health_check_port: health_check_port(spec)?,
        cluster_ips,
        ports: ports(spec)?,
        affinity_timeout: affinity_timeout(spec)?,
        load_balancing,
        forwarding,
    };
    Ok(Converted { object: Some(Object::Service(service)), problems: Vec::new() })
}

/// Drops addresses in families without a cluster IP, as kube-proxy does.
fn in_service_families(ips: impl Iterator<Item = IpAddr>, cluster_ips: &[IpAddr]) -> Vec<IpAddr> {
    ips.filter(|ip| cluster_ips.iter().any(|own| own.is_ipv4() == ip.is_ipv4())).collect()
}

fn external_ips(spec: &core::ServiceSpec, cluster_ips: &[IpAddr]) -> Result<Vec<IpAddr>, FieldError> {
    let list = spec.external_ips.iter().flatten().enumerate();
    let ips: Vec<IpAddr> = list
        .map(|(index, text)| field::address(format_args!("spec.externalIPs[{index}]"), text))
        .collect::<Result<_, _>>()?;
    Ok(in_service_families(ips.into_iter(), cluster_ips))
}

/// Load balancer addresses. Empty unless the type is `LoadBalancer`, whatever the status says.
fn load_balancer_ips(
    service: &core::Service,
    spec: &core::ServiceSpec,
    cluster_ips: &[IpAddr],
) -> Result<Vec<IpAddr>, FieldError> {
    if spec.type_.as_deref() != Some(LOAD_BALANCER) {
        return Ok(Vec::new());
    }
    let status = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
    let mut ips = Vec::new();
    for (index, ingress) in status.iter().flat_map(|status| status.ingress.iter().flatten()).enumerate() {
        // traffic must pass the load balancer itself (KEP-1860)
        if ingress.ip_mode.as_deref() == Some("Proxy") {
            continue;
        }
        if let Some(text) = ingress.ip.as_deref().filter(|text| !text.is_empty()) {
            ips.push(field::address(format_args!("status.loadBalancer.ingress[{index}].ip"), text)?);
        }
    }
    Ok(in_service_families(ips.into_iter(), cluster_ips))
}

fn source_ranges(spec: &core::ServiceSpec) -> Result<Vec<IpNet>, FieldError> {
    if spec.type_.as_deref() != Some(LOAD_BALANCER) {
        return Ok(Vec::new());
    }
    let list = spec.load_balancer_source_ranges.iter().flatten().enumerate();
    list.map(|(index, text)| {
        // the API server accepts white space
        let text = text.trim();
        let Ok(range) = text.parse::<IpNet>() else {
            let field = format!("spec.loadBalancerSourceRanges[{index}]");
            return Err(FieldError::new(field, format!("{text:?} is not a CIDR")));
        };
        Ok(range.trunc())
    })
    .collect()
}

fn policy(field: &str, text: Option<&str>) -> Result<TrafficPolicy, FieldError> {
    match text {
        None | Some("" | "Cluster") => Ok(TrafficPolicy::Cluster),
        Some("Local") => Ok(TrafficPolicy::Local),
        Some(other) => Err(FieldError::new(field, format!("{other:?} is not one of Cluster, Local"))),
    }
}

/// Only for type `LoadBalancer` with policy Local, as in kube-proxy.
fn health_check_port(spec: &core::ServiceSpec) -> Result<Option<u16>, FieldError> {
    let local = spec.external_traffic_policy.as_deref() == Some("Local");
    let number = spec
        .health_check_node_port
        .filter(|number| *number != 0 && local && spec.type_.as_deref() == Some(LOAD_BALANCER));
    number.map(|number| field::port("spec.healthCheckNodePort", number)).transpose()
}

/// `None` for a headless Service.
fn cluster_ips(spec: &core::ServiceSpec) -> Result<Option<Vec<IpAddr>>, FieldError> {
    let single = spec.cluster_ip.as_deref().filter(|text| !text.is_empty());
    let list = spec.cluster_ips.as_deref().unwrap_or_default();
    if let (Some(single), Some(first)) = (single, list.first())
        && single != first
    {
        return Err(FieldError::new(
            "spec.clusterIP",
            format!("{single:?} is not spec.clusterIPs[0], which is {first:?}"),
        ));
    }
    if single == Some("None") || list == ["None"] {
        return Ok(None);
    }
    let mut ips = Vec::with_capacity(list.len());
    for (index, text) in list.iter().enumerate() {
        ips.push(field::address(format_args!("spec.clusterIPs[{index}]"), text)?);
    }
    field::one_per_family("spec.clusterIPs", &ips, IpAddr::is_ipv4)?;
    match (single, ips.is_empty()) {
        (_, false) => Ok(Some(ips)),
        (Some(single), true) => Ok(Some(vec![field::address("spec.clusterIP", single)?])),
        // an API server would allocate one
        (None, true) => Err(FieldError::missing("spec.clusterIP")),
    }
}

fn ports(spec: &core::ServiceSpec) -> Result<Vec<ServicePort>, FieldError> {
    let list = spec.ports.as_deref().unwrap_or_default();
    if list.is_empty() {
        return Err(FieldError::missing("spec.ports"));
    }
    let mut ports = Vec::with_capacity(list.len());
    let has_node_ports = matches!(spec.type_.as_deref(), Some(NODE_PORT | LOAD_BALANCER));
    let (mut names, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, port) in list.iter().enumerate() {
        let at = format!("spec.ports[{index}]");
        let number = field::port(format_args!("{at}.port"), port.port)?;
        let protocol = field::protocol(format_args!("{at}.protocol"), port.protocol.as_deref())?;
        let node_port = port.node_port.filter(|number| *number != 0 && has_node_ports);
        let node_port =
            node_port.map(|number| field::port(format_args!("{at}.nodePort"), number)).transpose()?;
        let name = port.name.as_deref().unwrap_or_default();
        if name.is_empty() && list.len() > 1 {
            return Err(FieldError::new(
                format!("{at}.name"),
                "missing; required if there are several ports",
            ));
        }
        if !names.insert(name) {
            return Err(FieldError::new(
                format!("{at}.name"),
                format!("{name:?} is the name of an earlier port"),
            ));
        }
        if !numbers.insert((number, protocol)) {
            return Err(FieldError::new(
                format!("{at}.port"),
                format!("{number} is also an earlier port with the same protocol"),
            ));
        }
        ports.push(ServicePort { name: name.into(), port: number, protocol, node_port });
    }
    Ok(ports)
}

fn affinity_timeout(spec: &core::ServiceSpec) -> Result<Option<u32>, FieldError> {
    match spec.session_affinity.as_deref() {
        None | Some("None" | "") => return Ok(None),
        Some("ClientIP") => {}
        Some(other) => {
            return Err(FieldError::new(
                "spec.sessionAffinity",
                format!("{other:?} is not one of None, ClientIP"),
            ));
        }
    }
    let seconds = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref()?.timeout_seconds)
        .unwrap_or(AFFINITY_DEFAULT);
    if !(1..=AFFINITY_MAX).contains(&seconds) {
        return Err(FieldError::new(
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            format!("{seconds} is not within 1 to {AFFINITY_MAX}"),
        ));
    }
    Ok(Some(seconds.unsigned_abs()))
}

/// Load balancing and forwarding as selected by annotations.
fn annotated_options(
    service: &core::Service,
) -> Result<(Option<LoadBalancing>, Option<Forwarding>), FieldError> {
    let annotation = |name: &str| service.metadata.annotations.as_ref()?.get(name).map(String::as_str);
    let invalid =
        |name: &str, problem: String| FieldError::new(format!("metadata.annotations[{name}]"), problem);
    let load_balancing = match annotation(LOAD_BALANCING) {
        None => None,
        Some("random") => Some(LoadBalancing::Random),
        Some("maglev") => Some(LoadBalancing::Maglev),
        Some(other) => {
            return Err(invalid(LOAD_BALANCING, format!("{other:?} is not one of random, maglev")));
        }
    };
    let forwarding = match annotation(FORWARDING) {
        None => None,
        Some("snat") => Some(Forwarding::Snat),
        Some("dsr") if load_balancing == Some(LoadBalancing::Random) => {
            return Err(invalid(
                FORWARDING,
                format!("\"dsr\" cannot be combined with {LOAD_BALANCING}: random"),
            ));
        }
        Some("dsr") => Some(Forwarding::Dsr),
        Some(other) => return Err(invalid(FORWARDING, format!("{other:?} is not one of snat, dsr"))),
    };
    Ok((load_balancing, forwarding))
}
