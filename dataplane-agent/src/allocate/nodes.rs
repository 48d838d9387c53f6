//! Reads Node objects into [`NodeFacts`].

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client, api::ListParams};

use super::ledger::NodeFacts;

/// Nodes per page.
const PAGE: u32 = 500;

/// Lists all nodes.
pub(super) async fn list(client: &Client) -> Result<Vec<NodeFacts>, kube::Error> {
    let api: Api<Node> = Api::all(client.clone());
    let mut nodes = Vec::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let list = api.list(&page).await?;
        nodes.extend(list.items.iter().map(facts));
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = ListParams::default().limit(PAGE).continue_token(&token),
            None => return Ok(nodes),
        }
    }
}

/// Drops large fields that are not used.
pub(super) fn trim(node: &mut Node) {
    node.metadata.managed_fields = None;
    node.metadata.annotations = None;
    node.metadata.labels = None;
    if let Some(status) = &mut node.status {
        status.images = None;
        status.conditions = None;
        status.volumes_attached = None;
        status.volumes_in_use = None;
    }
}

/// Extracts the fields of a node. Unparsable addresses and ranges are ignored: they cannot
/// conflict.
pub(super) fn facts(node: &Node) -> NodeFacts {
    let spec = node.spec.clone().unwrap_or_default();
    let mut ranges: Vec<String> = spec.pod_cidrs.unwrap_or_default();
    if ranges.is_empty() {
        ranges.extend(spec.pod_cidr.filter(|range| !range.is_empty()));
    }
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    let internal = addresses.filter(|address| address.type_ == "InternalIP");
    NodeFacts {
        name: node.metadata.name.clone().unwrap_or_default(),
        uid: node.metadata.uid.clone().unwrap_or_default(),
        resource_version: node.metadata.resource_version.clone().unwrap_or_default(),
        pod_cidrs: ranges
            .iter()
            .filter_map(|range| range.parse::<IpNet>().ok())
            .map(|range| range.trunc())
            .collect(),
        internal_ips: internal.filter_map(|address| address.address.parse::<IpAddr>().ok()).collect(),
    }
}
