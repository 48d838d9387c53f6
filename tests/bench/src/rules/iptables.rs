//! kube-proxy's iptables mode: a linear search of the Services.

use std::{fmt::Write as _, net::Ipv4Addr, process::Command};

use anyhow::Result;

use dataplane_testkit::lab::Namespace;

use super::{MASQUERADE_MARK, load_rules};
use crate::services::{POD_CIDR, SERVICE_PORT, Service, ServiceSet};

/// kube-proxy omits comments above this number of endpoints.
const LARGE_CLUSTER: usize = 1_000;

/// The iptables implementation. kube-proxy uses the same as the node's other components.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// `ip_tables` in the kernel; the faster one.
    Legacy,
    /// nftables in the kernel.
    Nft,
}

impl Backend {
    /// Returns the fastest implementation on this machine.
    pub fn best() -> Self {
        let runs = Command::new(Self::Legacy.restore()).arg("--version").output();
        if runs.is_ok_and(|output| output.status.success()) { Self::Legacy } else { Self::Nft }
    }

    pub const fn restore(self) -> &'static str {
        match self {
            Self::Legacy => "iptables-legacy-restore",
            Self::Nft => "iptables-nft-restore",
        }
    }
}

/// Loads the rules in one transaction per table.
pub fn apply(namespace: &Namespace, services: &ServiceSet, backend: Backend) -> Result<()> {
    load_rules(namespace, backend.restore(), &[], &render(services))
}

/// Adds a rule that masquerades packets of pods that leave the cluster, as the pod network does.
pub fn apply_masquerade(namespace: &Namespace, backend: Backend) -> Result<()> {
    let rules = format!("*nat\n-A POSTROUTING -s {POD_CIDR} ! -d {POD_CIDR} -j MASQUERADE\nCOMMIT\n");
    load_rules(namespace, backend.restore(), &["--noflush"], &rules)
}

/// Returns the tables `filter` and `nat`.
fn render(services: &ServiceSet) -> String {
    let mut rules = String::from(FILTER);
    let mut chains = String::new();
    let mut dispatch = String::new();
    let mut bodies = String::new();
    let mut node_ports = String::new();
    let comments = services.backends() <= LARGE_CLUSTER;
    for service in services.iter() {
        write_service(&mut chains, &mut dispatch, &mut bodies, service, comments);
        write_node_port(&mut chains, &mut node_ports, &mut bodies, service, comments);
    }
    push(
        &mut rules,
        format_args!(
            r#"*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
{chains}-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark {MASQUERADE_MARK}/{MASQUERADE_MARK} -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark {MASQUERADE_MARK}
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-MARK-MASQ -j MARK --or-mark {MASQUERADE_MARK}
{dispatch}-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
{node_ports}{bodies}COMMIT
"#
        ),
    );
    rules
}

const FILTER: &str = r#"*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"#;

fn write_service(
    chains: &mut String,
    dispatch: &mut String,
    bodies: &mut String,
    service: &Service,
    comments: bool,
) {
    let comment = |text: &str| if comments { comment(text) } else { String::new() };
    let name = service.port_name();
    let protocol = service.protocol_in_rules();
    let address = service.cluster_ip;
    let chain = chain_name("SVC", &[address]);
    let to_service = comment(&format!("{name} cluster IP"));
    push(chains, format_args!(":{chain} - [0:0]\n"));
    push(
        dispatch,
        format_args!(
            "-A KUBE-SERVICES {to_service}-m {protocol} -p {protocol} -d {address} --dport {SERVICE_PORT} -j {chain}\n"
        ),
    );
    push(
        bodies,
        format_args!(
            "-A {chain} {to_service}-m {protocol} -p {protocol} -d {address} --dport {SERVICE_PORT} ! -s {POD_CIDR} -j KUBE-MARK-MASQ\n"
        ),
    );
    for (number, backend) in service.backends.iter().enumerate() {
        let endpoint = chain_name("SEP", &[address, *backend.ip()]);
        let arrow = comment(&format!("{name} -> {backend}"));
        let about = comment(&name);
        // the last of those left takes all that come so far
        let left = service.backends.len() - number;
        let chance = match left {
            1 => String::new(),
            _ => format!("-m statistic --mode random --probability {:0.10} ", 1.0 / left as f64),
        };
        push(chains, format_args!(":{endpoint} - [0:0]\n"));
        push(bodies, format_args!("-A {chain} {arrow}{chance}-j {endpoint}\n"));
        push(bodies, format_args!("-A {endpoint} {about}-s {} -j KUBE-MARK-MASQ\n", backend.ip()));
        push(
            bodies,
            format_args!(
                "-A {endpoint} {about}-m {protocol} -p {protocol} -j DNAT --to-destination {backend}\n"
            ),
        );
    }
}

/// Writes the rules of a node port: as of the cluster IP, and the client is masqueraded. kube-proxy
/// has one more rule for 127.0.0.0/8.
fn write_node_port(
    chains: &mut String,
    node_ports: &mut String,
    bodies: &mut String,
    service: &Service,
    comments: bool,
) {
    let Some(port) = service.node_port else { return };
    let comment = |text: &str| if comments { comment(text) } else { String::new() };
    let name = service.port_name();
    let protocol = service.protocol_in_rules();
    let [external, chain] = ["EXT", "SVC"].map(|kind| chain_name(kind, &[service.cluster_ip]));
    let why = comment(&format!("masquerade traffic for {name} external destinations"));
    push(chains, format_args!(":{external} - [0:0]\n"));
    push(
        node_ports,
        format_args!(
            "-A KUBE-NODEPORTS {}-m {protocol} -p {protocol} --dport {port} -j {external}\n",
            comment(&name)
        ),
    );
    push(bodies, format_args!("-A {external} {why}-j KUBE-MARK-MASQ\n-A {external} -j {chain}\n"));
}

fn comment(text: &str) -> String {
    format!("-m comment --comment \"{text}\" ")
}

/// Returns a unique chain name of at most 28 characters.
fn chain_name(kind: &str, addresses: &[Ipv4Addr]) -> String {
    let mut name = format!("KUBE-{kind}-");
    for address in addresses {
        push(&mut name, format_args!("{:08X}", address.to_bits()));
    }
    name
}

fn push(text: &mut String, line: std::fmt::Arguments<'_>) {
    // writing to a string cannot fail
    let _written = text.write_fmt(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(count: u16) -> String {
        render(&ServiceSet::new(count, "10.180.0.1:80".parse().expect("an address")))
    }

    /// The rules that kube-proxy's `TestOverallIPTablesRules` expects for a Service with one
    /// endpoint.
    #[test]
    fn service_rules_equal_those_of_kube_proxy() {
        let rules = rules(1);
        for line in [
            r#"-A KUBE-SERVICES -m comment --comment "bench/service-0:load cluster IP" -m tcp -p tcp -d 10.96.1.0 --dport 80 -j KUBE-SVC-0A600100"#,
            r#"-A KUBE-SVC-0A600100 -m comment --comment "bench/service-0:load cluster IP" -m tcp -p tcp -d 10.96.1.0 --dport 80 ! -s 10.240.0.0/12 -j KUBE-MARK-MASQ"#,
            r#"-A KUBE-SVC-0A600100 -m comment --comment "bench/service-0:load -> 10.180.0.1:80" -j KUBE-SEP-0A6001000AB40001"#,
            r#"-A KUBE-SEP-0A6001000AB40001 -m comment --comment "bench/service-0:load" -s 10.180.0.1 -j KUBE-MARK-MASQ"#,
            r#"-A KUBE-SEP-0A6001000AB40001 -m comment --comment "bench/service-0:load" -m tcp -p tcp -j DNAT --to-destination 10.180.0.1:80"#,
        ] {
            assert!(rules.lines().any(|written| written == line), "no line {line:?} in\n{rules}");
        }
    }

    /// The rules that kube-proxy's `TestNodePorts` expects.
    #[test]
    fn node_port_rules_equal_those_of_kube_proxy() {
        let set = ServiceSet::with_node_port(1, "10.180.0.1:80".parse().expect("an address"));
        let rules = render(&set);
        for line in [
            r#"-A KUBE-NODEPORTS -m comment --comment "bench/service-0:load" -m udp -p udp --dport 30080 -j KUBE-EXT-0A600100"#,
            r#"-A KUBE-EXT-0A600100 -m comment --comment "masquerade traffic for bench/service-0:load external destinations" -j KUBE-MARK-MASQ"#,
            "-A KUBE-EXT-0A600100 -j KUBE-SVC-0A600100",
            r#"-A KUBE-SEP-0A6001000AB40001 -m comment --comment "bench/service-0:load" -m udp -p udp -j DNAT --to-destination 10.180.0.1:80"#,
        ] {
            assert!(rules.lines().any(|written| written == line), "no line {line:?} in\n{rules}");
        }
    }

    #[test]
    fn large_cluster_has_no_comments_and_equal_probabilities() {
        let rules = rules(1_000);
        assert!(!rules.contains("service-7:load"));
        let chances: Vec<&str> = rules
            .lines()
            .filter(|line| line.starts_with("-A KUBE-SVC-0A600107 ") && line.contains("SEP"))
            .collect();
        assert_eq!(chances.len(), 4);
        assert!(chances[0].contains("--probability 0.2500000000 "));
        assert!(chances[1].contains("--probability 0.3333333333 "));
        assert!(chances[2].contains("--probability 0.5000000000 "));
        assert!(!chances[3].contains("statistic"));
    }
}
