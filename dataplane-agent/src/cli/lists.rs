//! `services`, `endpoints`, `routes`, `flows` as tables.

use std::{net::SocketAddr, time::Duration};

use super::{
    table::{list, or_dash, table, text},
    text::{duration, peer},
};
use crate::api::{
    request::FlowList,
    views::{ClientsView, EndpointView, FrontendKind, FrontendView, RouteKindView, RouteView, ServiceView},
};

/// Backends shown of one service; `-o json` has them all.
const BACKENDS_SHOWN: usize = 8;

pub(super) fn services(services: &[ServiceView]) -> String {
    let mut rows =
        table(["SERVICE", "PORT", "PROTOCOL", "FRONTENDS", "ID", "GENERATION", "LOAD-BALANCING", "BACKENDS"]);
    for service in services {
        let port = if service.port_name.is_empty() {
            service.port.to_string()
        } else {
            format!("{} ({})", service.port, service.port_name)
        };
        rows.add_row([
            format!("{}/{}", service.namespace, service.name),
            port,
            service.protocol.clone(),
            list(frontends(&service.frontends)),
            service.id.to_string(),
            service.generation.to_string(),
            load_balancing(service),
            backends(service),
        ]);
    }
    text(&rows)
}

/// Each frontend once (a node port once for both families), with its restrictions.
fn frontends(frontends: &[FrontendView]) -> Vec<String> {
    let mut texts: Vec<String> = Vec::with_capacity(frontends.len());
    for frontend in frontends.iter().filter(|frontend| frontend.clients != ClientsView::External) {
        let external = frontends.iter().find(|other| {
            other.clients == ClientsView::External
                && (other.kind, other.address, other.port) == (frontend.kind, frontend.address, frontend.port)
        });
        let address = match frontend.kind {
            FrontendKind::NodePort => format!("node:{}", frontend.port),
            _ => SocketAddr::new(frontend.address, frontend.port).to_string(),
        };
        let mut notes = Vec::new();
        if frontend.has_source_ranges {
            notes.push("source ranges".to_owned());
        }
        if frontend.local_only {
            notes.push(format!("local{}", no_local_backend(frontend)));
        }
        if let Some(external) = external {
            let scope = if external.local_only { "local" } else { "all" };
            notes.push(format!("external: {scope}{}", no_local_backend(external)));
        }
        let text = if notes.is_empty() { address } else { format!("{address} ({})", notes.join(", ")) };
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    texts
}

/// Note on a frontend of traffic policy Local without a backend on this node.
fn no_local_backend(frontend: &FrontendView) -> &'static str {
    if frontend.local_only && frontend.backends == 0 { ": no backend on this node, dropped" } else { "" }
}

fn load_balancing(service: &ServiceView) -> String {
    let mut words = vec![service.load_balancing.clone()];
    if service.forwarding == "dsr" {
        words.push(service.forwarding.clone());
    }
    words.extend(service.affinity_timeout.map(|seconds| format!("affinity {seconds}s")));
    words.join(", ")
}

fn backends(service: &ServiceView) -> String {
    if service.backends.is_empty() {
        return "none: new connections are rejected (no_backend)".to_owned();
    }
    let shown = service.backends.iter().take(BACKENDS_SHOWN);
    let mut cell = list(shown.map(|backend| SocketAddr::new(backend.address, backend.port)));
    if service.backends.len() > BACKENDS_SHOWN {
        cell.push_str(&format!(", and {} more", service.backends.len() - BACKENDS_SHOWN));
    }
    cell
}

fn device_state(device: &str, is_down: bool) -> String {
    if is_down { format!("{device} (down)") } else { device.to_owned() }
}

pub(super) fn endpoints(endpoints: &[EndpointView]) -> String {
    let mut rows = table(["ADDRESS", "POD", "DEVICE", "MAC", "FLOW-HINTS"]);
    for endpoint in endpoints {
        let pod = match &endpoint.pod {
            Some(pod) => format!("{}/{}", pod.namespace, pod.name),
            None if endpoint.accepts_node_ports => "(this node, accepts node ports)".to_owned(),
            None => "(this node)".to_owned(),
        };
        rows.add_row([
            endpoint.address.to_string(),
            pod,
            or_dash(endpoint.device.as_ref().map(|device| device_state(device, endpoint.device_down))),
            or_dash(endpoint.mac.as_ref()),
            list(&endpoint.flow_hints),
        ]);
    }
    text(&rows)
}

pub(super) fn routes(routes: &[RouteView]) -> String {
    let mut rows = table(["PREFIX", "KIND", "NEXT-HOP", "DEVICE", "MTU", "NODE"]);
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
        RouteKindView::Services => "services",
    }
}

pub(super) fn flows(list: &FlowList) -> String {
    let mut rows =
        table(["PROTOCOL", "SOURCE", "DESTINATION", "TRANSLATED-TO", "SERVICE", "STATE", "AGE", "IDLE"]);
    for flow in &list.flows {
        // the source only if it was translated
        let source = (flow.translated_source != flow.source)
            .then(|| format!("{} → ", peer(flow.translated_source, &flow.protocol)));
        let destination = peer(flow.translated_destination, &flow.protocol);
        rows.add_row([
            flow.protocol.clone(),
            peer(flow.source, &flow.protocol),
            peer(flow.destination, &flow.protocol),
            format!("{}{destination}", source.unwrap_or_default()),
            or_dash(flow.service.clone().or_else(|| flow.service_id.map(|id| format!("ID {id}")))),
            flow.state.clone(),
            duration(Duration::from_secs(flow.age_seconds.into())),
            duration(Duration::from_secs(flow.idle_seconds.into())),
        ]);
    }
    let mut out = text(&rows);
    if list.matching > list.flows.len() {
        out.push_str(&format!(
            "... showing {} of {} matching flows; --limit shows more\n",
            list.flows.len(),
            list.matching
        ));
    } else if list.matching < list.total {
        out.push_str(&format!("{} of {} flows match\n", list.matching, list.total));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::views::{BackendView, FlowView, PeerView};

    fn frontend(kind: FrontendKind, end: &str, clients: ClientsView, backends: u32) -> FrontendView {
        let end: SocketAddr = end.parse().unwrap();
        FrontendView {
            kind,
            address: end.ip(),
            port: end.port(),
            clients,
            local_only: clients == ClientsView::External,
            has_source_ranges: kind == FrontendKind::LoadBalancer,
            backends,
        }
    }

    fn end(text: &str) -> PeerView {
        let end: SocketAddr = text.parse().unwrap();
        PeerView { address: end.ip(), port: end.port() }
    }

    fn service(backends: usize) -> ServiceView {
        let backend = |n| BackendView { address: [10, 1, 0, n as u8].into(), port: 8_080 };
        ServiceView {
            namespace: "default".to_owned(),
            name: "web".to_owned(),
            port_name: "http".to_owned(),
            cluster_ips: vec!["10.96.0.10".parse().unwrap(), "fd00:96::a".parse().unwrap()],
            frontends: ["10.96.0.10:80", "[fd00:96::a]:80"]
                .map(|end| frontend(FrontendKind::ClusterIp, end, ClientsView::All, backends as u32))
                .into(),
            port: 80,
            protocol: "TCP".to_owned(),
            id: 7,
            generation: 3,
            load_balancing: "maglev".to_owned(),
            forwarding: "dsr".to_owned(),
            affinity_timeout: Some(60),
            backends: (1..=backends).map(backend).collect(),
        }
    }

    fn columns(line: &str) -> Vec<&str> {
        line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect()
    }

    #[test]
    fn a_service_is_one_line() {
        let out = services(&[service(2)]);
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines.len(), 2, "{out}");
        assert_eq!(
            columns(lines[1]),
            [
                "default/web",
                "80 (http)",
                "TCP",
                "10.96.0.10:80, [fd00:96::a]:80",
                "7",
                "3",
                "maglev, dsr, affinity 60s",
                "10.1.0.1:8080, 10.1.0.2:8080"
            ]
        );
    }

    #[test]
    fn more_than_eight_backends_are_abbreviated_and_none_is_explained() {
        assert!(services(&[service(20)]).contains("10.1.0.8:8080, and 12 more"));
        assert!(services(&[service(0)]).contains("none: new connections are rejected (no_backend)"));
    }

    #[test]
    fn frontend_shows_source_ranges_and_traffic_policy() {
        use ClientsView::{All, External, Internal};
        use FrontendKind::{ClusterIp, ExternalIp, LoadBalancer, NodePort};
        let local = FrontendView { local_only: true, ..frontend(ClusterIp, "10.96.0.10:80", All, 1) };
        let shown = frontends(&[
            local,
            frontend(ExternalIp, "203.0.113.1:80", All, 3),
            frontend(LoadBalancer, "192.0.2.9:80", Internal, 3),
            frontend(LoadBalancer, "192.0.2.9:80", External, 0),
            frontend(NodePort, "0.0.0.0:30080", Internal, 3),
            frontend(NodePort, "0.0.0.0:30080", External, 1),
            frontend(NodePort, "[::]:30080", Internal, 3),
            frontend(NodePort, "[::]:30080", External, 1),
        ]);
        assert_eq!(
            shown,
            [
                "10.96.0.10:80 (local)",
                "203.0.113.1:80",
                "192.0.2.9:80 (source ranges, external: local: no backend on this node, dropped)",
                "node:30080 (external: local)",
            ]
        );
    }

    #[test]
    fn flow_shows_the_translated_source_only_if_it_differs() {
        let plain = FlowView {
            protocol: "TCP".to_owned(),
            source: end("10.1.0.5:4000"),
            destination: end("10.96.0.10:80"),
            translated_source: end("10.1.0.5:4000"),
            translated_destination: end("10.1.1.2:8080"),
            state: "established".to_owned(),
            age_seconds: 30,
            idle_seconds: 2,
            service_id: Some(7),
            service: Some("default/web".to_owned()),
        };
        let masqueraded =
            FlowView { translated_source: end("192.0.2.1:61000"), service: None, ..plain.clone() };
        let out = flows(&FlowList { matching: 5, total: 9, flows: vec![plain, masqueraded] });
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(columns(lines[1])[3..6], ["10.1.1.2:8080", "default/web", "established"]);
        assert_eq!(columns(lines[2])[3..5], ["192.0.2.1:61000 → 10.1.1.2:8080", "ID 7"]);
        assert_eq!(lines[3], "... showing 2 of 5 matching flows; --limit shows more");
    }

    #[test]
    fn host_address_has_no_device() {
        let host = EndpointView {
            address: "192.0.2.1".parse().unwrap(),
            pod: None,
            device: None,
            ifindex: 0,
            mac: None,
            flow_hints: vec!["tcp".to_owned()],
            accepts_node_ports: true,
            device_down: false,
        };
        let out = endpoints(&[host]);
        let row = ["192.0.2.1", "(this node, accepts node ports)", "-", "-", "tcp"];
        assert_eq!(columns(out.lines().nth(1).unwrap()), row);
    }

    #[test]
    fn route_without_a_next_hop_has_a_dash() {
        let local = RouteView {
            prefix: "10.1.0.0/24".parse().unwrap(),
            kind: RouteKindView::Local,
            next_hop: None,
            device: None,
            node: Some("node-1".to_owned()),
            mtu: 0,
        };
        let out = routes(&[local]);
        assert_eq!(columns(out.lines().nth(1).unwrap()), ["10.1.0.0/24", "local", "-", "-", "-", "node-1"]);
    }
}
