//! Converts v1 Pod: its node, addresses and network annotations.

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;

use super::{Converted, FieldError};
use crate::state::{Object, Pod};

/// Bandwidth limits, with the annotations of the CNI bandwidth plugin.
const BANDWIDTH: [&str; 2] = ["kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"];

pub(super) fn convert(mut pod: core::Pod) -> Result<Converted, FieldError> {
    let name = super::namespaced_name(&pod.metadata)?;
    let ips = ips(pod.status.as_ref())?;
    let spec = pod.spec.unwrap_or_default();
    // not scheduled yet
    let Some(node) = spec.node_name.filter(|node| !node.is_empty()) else { return Ok(Converted::default()) };
    let phase = pod.status.and_then(|status| status.phase);
    let pod = Pod {
        name,
        owner: super::owner(&pod.metadata),
        node,
        labels: pod.metadata.labels.take().unwrap_or_default(),
        annotations: super::annotations(&mut pod.metadata, &BANDWIDTH),
        host_network: spec.host_network.unwrap_or(false),
        ips,
        ended: matches!(phase.as_deref(), Some("Succeeded" | "Failed")),
        deleting: pod.metadata.deletion_timestamp.is_some(),
    };
    Ok(Converted { object: Some(Object::Pod(pod)), problems: Vec::new() })
}

/// Not validated further: no route or endpoint is made from them.
fn ips(status: Option<&core::PodStatus>) -> Result<Vec<IpAddr>, FieldError> {
    let list = status.and_then(|status| status.pod_ips.as_deref()).unwrap_or_default();
    list.iter()
        .enumerate()
        .map(|(index, one)| {
            one.ip.parse().map_err(|_address| {
                let field = format!("status.podIPs[{index}].ip");
                FieldError::new(field, format!("{:?} is not an IP address", one.ip))
            })
        })
        .collect()
}
