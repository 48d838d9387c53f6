//! Converts v1 Node: pod CIDRs and addresses.

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;

use super::{Converted, FieldError, field};
use crate::state::{Node, Object};

pub(super) fn convert(node: &core::Node) -> Result<Converted, FieldError> {
    let mut problems = Vec::new();
    let internal_ips = internal_ips(node)?;
    if internal_ips.is_empty() {
        problems.push(FieldError::new(
            "status.addresses",
            "no InternalIP: other nodes cannot reach the pods of this node",
        ));
    }
    let taints = node.spec.iter().flat_map(|spec| spec.taints.iter().flatten());
    let node = Node {
        name: super::name(&node.metadata)?,
        owner: super::owner(&node.metadata),
        pod_cidrs: pod_cidrs(node)?,
        internal_ips,
        labels: node.metadata.labels.clone().unwrap_or_default(),
        taints: taints.map(|taint| taint.key.clone()).collect(),
        deleting: node.metadata.deletion_timestamp.is_some(),
    };
    Ok(Converted { object: Some(Object::Node(node)), problems })
}

/// Empty until the node is assigned a range.
fn pod_cidrs(node: &core::Node) -> Result<Vec<IpNet>, FieldError> {
    let Some(spec) = &node.spec else { return Ok(Vec::new()) };
    let list = spec.pod_cidrs.as_deref().unwrap_or_default();
    let cidrs = list
        .iter()
        .enumerate()
        .map(|(index, text)| field::cidr(format_args!("spec.podCIDRs[{index}]"), text))
        .collect::<Result<Vec<_>, _>>()?;
    field::one_per_family("spec.podCIDRs", &cidrs, |cidr| cidr.addr().is_ipv4())?;
    let Some(single) = spec.pod_cidr.as_deref().filter(|text| !text.is_empty()) else { return Ok(cidrs) };
    let single = field::cidr("spec.podCIDR", single)?;
    match cidrs.first() {
        None => Ok(vec![single]),
        Some(first) if *first == single => Ok(cidrs),
        Some(first) => Err(FieldError::new(
            "spec.podCIDR",
            format!("{single} is not spec.podCIDRs[0], which is {first}"),
        )),
    }
}

/// The first of each family, which is the one kubelet uses.
fn internal_ips(node: &core::Node) -> Result<Vec<IpAddr>, FieldError> {
    let addresses = node.status.as_ref().and_then(|status| status.addresses.as_deref()).unwrap_or_default();
    let mut ips: Vec<IpAddr> = Vec::new();
    for (index, address) in addresses.iter().enumerate() {
        if address.type_ != "InternalIP" {
            continue;
        }
        let ip = field::address(format_args!("status.addresses[{index}].address"), &address.address)?;
        if !ips.iter().any(|earlier| earlier.is_ipv4() == ip.is_ipv4()) {
            ips.push(ip);
        }
    }
    Ok(ips)
}
