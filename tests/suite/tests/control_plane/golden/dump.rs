//! The tables of a node as text, free of what depends on the order of writes.
//!
//! IDs of backends and first slots of ranges are replaced by numbers in the order of the dump.
//! Generations, row checksums and flow hints are checked, and shown only where they are wrong.

mod services;

use anyhow::Result;
use dataplane_agent::{
    compile::{
        routes::network,
        services::{NodeContext, count_local_ready},
    },
    datapath::table::Table,
};
use dataplane_common::abi::{Addr, ClusterRange, Endpoint, EndpointFlags, FlowHints, RouteKind};

use self::services::Services;
use super::{
    DEFAULT_CLUSTER,
    case::NODE,
    node::{Node, OVERLAY, UPLINK},
    text::TextTable,
};

/// All tables, and what else the node makes of the objects. A section with the same rows in
/// `default_cluster` is replaced by a reference to it.
pub(super) fn dump(node: &Node, default_cluster: Option<&Node>) -> Result<String> {
    let default_sections = default_cluster.map(sections).transpose()?.unwrap_or_default();
    let mut texts = Vec::new();
    for section in sections(node)? {
        let is_default = !section.is_empty() && default_sections.contains(&section);
        texts.push(if is_default {
            format!("{}: as in {DEFAULT_CLUSTER}\n", section.title())
        } else {
            section.to_text()
        });
    }
    Ok(texts.join("\n"))
}

fn sections(node: &Node) -> Result<Vec<TextTable>> {
    let services = Services::read(node)?;
    let mut sections = vec![
        services.frontends(),
        services.backends(),
        services.source_ranges(),
        endpoints(node)?,
        routes(node)?,
        kernel_routes(node),
        cluster_ranges(node),
        reserved_ports(node),
        health_checks(node),
        problems(node),
    ];
    let wrong = services.wrong();
    if !wrong.is_empty() {
        sections.push(wrong);
    }
    Ok(sections)
}

/// IPv4 first, then in the order of the addresses.
fn by_family(addr: Addr) -> (bool, std::net::IpAddr) {
    (!addr.is_v4(), addr.to_ip())
}

/// The names of the bits that are set, or their number if one has no name.
fn flag_names(flags: u32, names: &[(u32, &str)]) -> String {
    let unnamed = names.iter().fold(flags, |rest, (bit, _)| rest & !bit);
    let named = names.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| (*name).to_owned());
    let unnamed = (unnamed != 0).then(|| format!("{unnamed:#x}"));
    named.chain(unnamed).collect::<Vec<_>>().join(" ")
}

fn device(ifindex: u32) -> String {
    match ifindex {
        0 => String::new(),
        index if index == UPLINK.0 => UPLINK.1.to_owned(),
        index if index == OVERLAY.0 => OVERLAY.1.to_owned(),
        index => format!("dp{index}"),
    }
}

fn endpoints(node: &Node) -> Result<TextTable> {
    let mut table = TextTable::new("ENDPOINTS", &["address", "owner", "device", "mac", "flags"]);
    let mut entries = node.tables.endpoints.entries()?;
    entries.sort_by_key(|(addr, _)| by_family(*addr));
    let views = node.reconciler.endpoints()?;
    for (addr, endpoint) in entries {
        let view = views.iter().find(|view| view.address == addr.to_ip());
        let pod =
            view.and_then(|view| view.pod.as_ref()).map(|pod| format!("{}/{}", pod.namespace, pod.name));
        let is_host = endpoint.is_host();
        table.row([
            addr.to_string(),
            if is_host { "host".to_owned() } else { pod.unwrap_or_default() },
            device(endpoint.ifindex),
            if is_host { String::new() } else { endpoint.mac.to_string() },
            endpoint_flags(&endpoint),
        ]);
    }
    Ok(table)
}

fn endpoint_flags(endpoint: &Endpoint) -> String {
    const NAMES: [(u32, &str); 4] = [
        (EndpointFlags::HOST as u32, "host"),
        (EndpointFlags::FRONTENDS as u32, "frontends"),
        (EndpointFlags::SHAPED as u32, "shaped"),
        (EndpointFlags::NODE_PORTS as u32, "node_ports"),
    ];
    let names = flag_names(endpoint.flags.into(), &NAMES);
    let needs_hints = endpoint.has_frontends() || endpoint.has_node_ports();
    let lacks_hints = needs_hints && endpoint.flow_hints != FlowHints::ALL;
    names + if lacks_hints { " WITHOUT FLOW HINTS" } else { "" }
}

fn routes(node: &Node) -> Result<TextTable> {
    let mut table = TextTable::new("ROUTES", &["destination", "kind", "next hop", "device", "mtu"]);
    let mut entries = node.tables.routes.entries()?;
    entries.sort_by_key(|(prefix, _)| (by_family(prefix.addr), prefix.bits));
    for (prefix, route) in entries {
        let destination = network(&prefix).map(|network| network.to_string());
        let kind = match route.kind() {
            Some(RouteKind::Native) => "native",
            Some(RouteKind::Overlay) => "overlay",
            Some(RouteKind::NoMasquerade) => "no_masquerade",
            Some(RouteKind::Local) => "local",
            Some(RouteKind::Services) => "services",
            None => "UNKNOWN",
        };
        table.row([
            destination.unwrap_or_else(|| format!("{prefix:?}")),
            kind.to_owned(),
            if route.next_hop.is_zero() { String::new() } else { route.next_hop.to_string() },
            device(route.ifindex),
            if route.mtu == 0 { String::new() } else { route.mtu.to_string() },
        ]);
    }
    Ok(table)
}

fn kernel_routes(node: &Node) -> TextTable {
    let mut table = TextTable::new("KERNEL ROUTES", &["destination", "gateway", "device", "source"]);
    let text = |ip: Option<std::net::IpAddr>| ip.map(|ip| ip.to_string()).unwrap_or_default();
    for route in node.kernel_routes.values() {
        table.row([
            route.destination.to_string(),
            text(route.gateway),
            device(route.ifindex),
            text(route.source),
        ]);
    }
    table
}

/// The prefixes of `NODE_VARIABLES` that hold every cluster IP.
fn cluster_ranges(node: &Node) -> TextTable {
    let mut table = TextTable::new("CLUSTER IP RANGES", &["range"]);
    for range in node.reconciler.cluster_ranges().iter().filter(|range| **range != ClusterRange::EMPTY) {
        let ones: u32 = range.mask.words().iter().map(|word| word.count_ones()).sum();
        let bits = if range.addr.is_v4() { ones.saturating_sub(Addr::V4_PREFIX_BITS) } else { ones };
        table.row([format!("{}/{bits}", range.addr)]);
    }
    table
}

/// Ports that the kernel does not give to host sockets by chance.
fn reserved_ports(node: &Node) -> TextTable {
    let mut table = TextTable::new("RESERVED PORTS", &["port"]);
    for port in node.reconciler.host_ports().ports {
        table.row([port.to_string()]);
    }
    table
}

/// As `app` publishes them to the servers of the health check ports.
fn health_checks(node: &Node) -> TextTable {
    let mut table = TextTable::new("HEALTH CHECKS", &["port", "service", "local endpoints"]);
    let context = NodeContext { node: NODE.to_owned(), ..NodeContext::default() };
    let services = node.store.services();
    let mut checks: Vec<_> =
        services.filter_map(|service| Some((service.health_check_port?, &service.name))).collect();
    checks.sort();
    for (port, name) in checks {
        let endpoints = count_local_ready(node.store.slices_of(name), &context);
        table.row([port.to_string(), name.to_string(), endpoints.to_string()]);
    }
    table
}

fn problems(node: &Node) -> TextTable {
    let mut table = TextTable::new("PROBLEMS", &["subject", "problem"]);
    for (subject, message) in &node.problems {
        table.row([subject.clone(), message.clone()]);
    }
    table
}
