//! `services`, `endpoints`, `routes`, `flows` as tables.

use std::{net::SocketAddr, time::Duration};

use super::{
    table::{list, or_dash, table, text},
    text::{duration, peer},
};
use crate::api::{
    request::FlowList,
    views::{EndpointView, RouteKindView, RouteView, ServiceView},
};

/// Backends shown of one service; `-o json` has them all.
const BACKENDS_SHOWN: usize = 8;

pub(super) fn services(services: &[ServiceView]) -> String {
    let mut rows =
        table(["SERVICE", "CLUSTER IPS", "PORT", "PROTOCOL", "ID", "GENERATION", "SELECTION", "BACKENDS"]);
    for service in services {
        let port = if service.port_name.is_empty() {
            service.port.to_string()
        } else {
            format!("{} ({})", service.port, service.port_name)
        };
        rows.add_row([
            format!("{}/{}", service.namespace, service.name),
            list(&service.cluster_ips),
            port,
            service.protocol.clone(),
            service.id.to_string(),
            service.generation.to_string(),
            selection(service),
            backends(service),
        ]);
    }
    text(&rows)
}

fn selection(service: &ServiceView) -> String {
    match service.affinity_timeout {
        Some(seconds) => format!("{}, sticky {seconds}s", service.load_balancing),
        None => service.load_balancing.clone(),
    }
}

fn backends(service: &ServiceView) -> String {
    if service.backends.is_empty() {
        return "none: new connections are dropped (no_backend)".to_owned();
    }
    let shown = service.backends.iter().take(BACKENDS_SHOWN);
    let mut cell = list(shown.map(|backend| SocketAddr::new(backend.address, backend.port)));
    if service.backends.len() > BACKENDS_SHOWN {
        cell.push_str(&format!(", and {} more", service.backends.len() - BACKENDS_SHOWN));
    }
    cell
}

pub(super) fn endpoints(endpoints: &[EndpointView]) -> String {
    let mut rows = table(["ADDRESS", "POD", "DEVICE", "MAC", "GATES OPEN"]);
    for endpoint in endpoints {
        let pod = match &endpoint.pod {
            Some(pod) => format!("{}/{}", pod.namespace, pod.name),
            None => "(this node)".to_owned(),
        };
        rows.add_row([
            endpoint.address.to_string(),
            pod,
            or_dash(endpoint.device.as_ref()),
            or_dash(endpoint.mac.as_ref()),
            list(&endpoint.gates),
        ]);
    }
    text(&rows)
}

pub(super) fn routes(routes: &[RouteView]) -> String {
    let mut rows = table(["PREFIX", "KIND", "NEXT HOP", "DEVICE", "MTU", "NODE"]);
    for route in routes {
        rows.add_row([
            route.prefix.to_string(),
            kind(route.kind).to_owned(),
            or_dash(route.next_hop),
            or_dash(route.device.as_ref()),
            or_dash(Some(route.mtu).filter(|mtu| *mtu != 0)),
            or_dash(route.node.as_ref()),
        ]);
    }
    text(&rows)
}

const fn kind(kind: RouteKindView) -> &'static str {
    match kind {
        RouteKindView::Native => "native",
        RouteKindView::Overlay => "overlay",
        RouteKindView::NoMasquerade => "no masquerade",
        RouteKindView::Local => "local",
    }
}

pub(super) fn flows(list: &FlowList) -> String {
    let mut rows = table(["PROTOCOL", "FROM", "TO", "LEAVES AS", "SERVICE", "STATE", "AGE", "IDLE"]);
    for flow in &list.flows {
        // only what the translation changed
        let source = (flow.translated_source != flow.source)
            .then(|| format!("{} → ", peer(flow.translated_source, &flow.protocol)));
        let target = peer(flow.translated_destination, &flow.protocol);
        rows.add_row([
            flow.protocol.clone(),
            peer(flow.source, &flow.protocol),
            peer(flow.destination, &flow.protocol),
            format!("{}{target}", source.unwrap_or_default()),
            or_dash(flow.service.clone().or_else(|| flow.service_id.map(|id| format!("number {id}")))),
            flow.state.clone(),
            duration(Duration::from_secs(flow.age_seconds.into())),
            duration(Duration::from_secs(flow.idle_seconds.into())),
        ]);
    }
    let mut out = text(&rows);
    if list.matching > list.flows.len() {
        out.push_str(&format!("... {} of {} shown (see --limit)\n", list.flows.len(), list.matching));
    } else if list.matching < list.total {
        out.push_str(&format!("{} of {} flows match\n", list.matching, list.total));
    }
    out
}
