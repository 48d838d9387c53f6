//! kube-proxy's nftables mode: one map lookup finds the Service.

use std::{fmt::Write as _, net::Ipv4Addr};

use anyhow::Result;

use dataplane_testkit::lab::Namespace;

use super::{MASQUERADE_MARK, load_rules};
use crate::services::{POD_CIDR, PORT_NAME, SERVICE_CIDR, SERVICE_PORT, Service, ServiceSet};

/// Loads the rules in one transaction.
pub fn apply(namespace: &Namespace, services: &ServiceSet, node: Ipv4Addr) -> Result<()> {
    load_rules(namespace, "nft", &["-f", "-"], &render(services, node))
}

/// Adds a table that masquerades packets of pods that leave the cluster, as the pod network does.
pub fn apply_masquerade(namespace: &Namespace) -> Result<()> {
    load_rules(namespace, "nft", &["-f", "-"], &masquerade())
}

fn masquerade() -> String {
    format!(
        "add table ip pods\n\
         add chain ip pods postrouting {{ type nat hook postrouting priority 100 ; }}\n\
         add rule ip pods postrouting ip saddr {POD_CIDR} ip daddr != {POD_CIDR} masquerade\n"
    )
}

/// Returns the complete table.
fn render(services: &ServiceSet, node: Ipv4Addr) -> String {
    let mut rules = base(node);
    for service in services.iter() {
        write_service(&mut rules, service);
    }
    rules
}

fn base(node: Ipv4Addr) -> String {
    format!(
        r#"add table ip kube-proxy
add set ip kube-proxy cluster-ips {{ type ipv4_addr ; }}
add set ip kube-proxy nodeport-ips {{ type ipv4_addr ; }}
add map ip kube-proxy firewall-ips {{ type ipv4_addr . inet_proto . inet_service : verdict ; }}
add map ip kube-proxy no-endpoint-nodeports {{ type inet_proto . inet_service : verdict ; }}
add map ip kube-proxy no-endpoint-services {{ type ipv4_addr . inet_proto . inet_service : verdict ; }}
add map ip kube-proxy service-ips {{ type ipv4_addr . inet_proto . inet_service : verdict ; }}
add map ip kube-proxy service-nodeports {{ type inet_proto . inet_service : verdict ; }}
add chain ip kube-proxy cluster-ips-check
add chain ip kube-proxy filter-prerouting-pre-dnat {{ type filter hook prerouting priority -110 ; }}
add chain ip kube-proxy filter-output-pre-dnat {{ type filter hook output priority -110 ; }}
add chain ip kube-proxy filter-forward {{ type filter hook forward priority 0 ; }}
add chain ip kube-proxy filter-input {{ type filter hook input priority 0 ; }}
add chain ip kube-proxy filter-output {{ type filter hook output priority 0 ; }}
add chain ip kube-proxy firewall-check
add chain ip kube-proxy mark-for-masquerade
add chain ip kube-proxy masquerading
add chain ip kube-proxy nat-output {{ type nat hook output priority -100 ; }}
add chain ip kube-proxy nat-postrouting {{ type nat hook postrouting priority 100 ; }}
add chain ip kube-proxy nat-prerouting {{ type nat hook prerouting priority -100 ; }}
add chain ip kube-proxy nodeport-endpoints-check
add chain ip kube-proxy reject-chain
add chain ip kube-proxy services
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject comment "Reject traffic to invalid ports of ClusterIPs"
add rule ip kube-proxy cluster-ips-check ip daddr {{ {SERVICE_CIDR} }} drop comment "Drop traffic to unallocated ClusterIPs"
add rule ip kube-proxy filter-prerouting-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
add rule ip kube-proxy filter-input ct state new jump nodeport-endpoints-check
add rule ip kube-proxy filter-input ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add rule ip kube-proxy filter-output-pre-dnat ct state new jump firewall-check
add rule ip kube-proxy filter-output ct state new jump cluster-ips-check
add rule ip kube-proxy firewall-check ip daddr . meta l4proto . th dport vmap @firewall-ips
add rule ip kube-proxy mark-for-masquerade mark set mark or {MASQUERADE_MARK}
add rule ip kube-proxy masquerading mark and {MASQUERADE_MARK} == 0 return
add rule ip kube-proxy masquerading mark set mark xor {MASQUERADE_MARK}
add rule ip kube-proxy masquerading masquerade fully-random
add rule ip kube-proxy nat-output jump services
add rule ip kube-proxy nat-postrouting jump masquerading
add rule ip kube-proxy nat-prerouting jump services
add rule ip kube-proxy nodeport-endpoints-check ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports
add rule ip kube-proxy reject-chain reject
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add rule ip kube-proxy services ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
add element ip kube-proxy nodeport-ips {{ {node} }}
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
"#
    )
}

fn write_service(rules: &mut String, service: &Service) {
    let address = service.cluster_ip;
    let protocol = service.protocol_in_rules();
    let name = format!("bench/{}/{protocol}/{PORT_NAME}", service.name);
    let mut choices = String::new();
    for (number, backend) in service.backends.iter().enumerate() {
        let chain = format!("endpoint-{name}__{}/{}", backend.ip(), backend.port());
        if number > 0 {
            choices.push_str(" , ");
        }
        push(&mut choices, format_args!("{number} : goto {chain}"));
        push(
            rules,
            format_args!(
                "add chain ip kube-proxy {chain}\n\
                 add rule ip kube-proxy {chain} ip saddr {} jump mark-for-masquerade\n\
                 add rule ip kube-proxy {chain} meta l4proto {protocol} dnat to {backend}\n",
                backend.ip()
            ),
        );
    }
    push(
        rules,
        format_args!(
            "add chain ip kube-proxy service-{name}\n\
             add rule ip kube-proxy service-{name} ip daddr {address} ip saddr != {POD_CIDR} jump mark-for-masquerade\n\
             add rule ip kube-proxy service-{name} numgen random mod {} vmap {{ {choices} }}\n\
             add element ip kube-proxy cluster-ips {{ {address} }}\n\
             add element ip kube-proxy service-ips {{ {address} . {protocol} . {SERVICE_PORT} : goto service-{name} }}\n",
            service.backends.len()
        ),
    );
    // node port: as for the cluster IP, and the client is masqueraded
    if let Some(port) = service.node_port {
        push(
            rules,
            format_args!(
                "add chain ip kube-proxy external-{name}\n\
                 add rule ip kube-proxy external-{name} jump mark-for-masquerade\n\
                 add rule ip kube-proxy external-{name} goto service-{name}\n\
                 add element ip kube-proxy service-nodeports {{ {protocol} . {port} : goto external-{name} }}\n"
            ),
        );
    }
}

fn push(text: &mut String, line: std::fmt::Arguments<'_>) {
    // writing to a string cannot fail
    let _written = text.write_fmt(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The chains that kube-proxy's `TestOverallNFTablesRules` expects for a Service with one
    /// endpoint.
    #[test]
    fn service_rules_equal_those_of_kube_proxy() {
        let services = ServiceSet::new(1, "10.180.0.1:80".parse().expect("an address"));
        let rules = render(&services, Ipv4Addr::new(192, 168, 0, 2));
        for line in [
            "add rule ip kube-proxy service-bench/service-0/tcp/load ip daddr 10.96.1.0 ip saddr != 10.240.0.0/12 jump mark-for-masquerade",
            "add rule ip kube-proxy service-bench/service-0/tcp/load numgen random mod 1 vmap { 0 : goto endpoint-bench/service-0/tcp/load__10.180.0.1/80 }",
            "add rule ip kube-proxy endpoint-bench/service-0/tcp/load__10.180.0.1/80 ip saddr 10.180.0.1 jump mark-for-masquerade",
            "add rule ip kube-proxy endpoint-bench/service-0/tcp/load__10.180.0.1/80 meta l4proto tcp dnat to 10.180.0.1:80",
            "add element ip kube-proxy cluster-ips { 10.96.1.0 }",
            "add element ip kube-proxy service-ips { 10.96.1.0 . tcp . 80 : goto service-bench/service-0/tcp/load }",
            "add element ip kube-proxy nodeport-ips { 192.168.0.2 }",
        ] {
            assert!(rules.lines().any(|written| written == line), "no line {line:?} in\n{rules}");
        }
    }

    /// The chains that kube-proxy's `TestNodePorts` expects.
    #[test]
    fn node_port_rules_equal_those_of_kube_proxy() {
        let services = ServiceSet::with_node_port(1, "10.180.0.1:80".parse().expect("an address"));
        let rules = render(&services, Ipv4Addr::new(192, 168, 0, 2));
        for line in [
            "add rule ip kube-proxy external-bench/service-0/udp/load jump mark-for-masquerade",
            "add rule ip kube-proxy external-bench/service-0/udp/load goto service-bench/service-0/udp/load",
            "add element ip kube-proxy service-nodeports { udp . 30080 : goto external-bench/service-0/udp/load }",
            "add rule ip kube-proxy endpoint-bench/service-0/udp/load__10.180.0.1/80 meta l4proto udp dnat to 10.180.0.1:80",
        ] {
            assert!(rules.lines().any(|written| written == line), "no line {line:?} in\n{rules}");
        }
    }
}
