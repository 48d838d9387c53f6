//! The services of the path table: their addresses and their objects. Sends no traffic.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use dataplane_oracle::Protocol;
use dataplane_testkit::{
    lab::{Family, Node, service_addresses},
    traffic::{ECHO, HTTP, SCTP},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Value, json};

use super::{
    cells::{Backing, Cell, EntryNode, Frontend, Policy},
    host_ports,
    testbed::Server,
};

/// The port of all services, for every protocol.
const PORT: u16 = 80;
/// The node port of the first service; the others follow.
const NODE_PORT: u16 = 30_100;
/// The number of the first service's cluster IPs; the others follow.
const CLUSTER_IP: u16 = 100;

/// The port at which servers reply with their name.
pub(crate) const fn target(protocol: Protocol) -> u16 {
    match protocol {
        Protocol::Tcp => HTTP,
        Protocol::Udp => ECHO,
        Protocol::Sctp => SCTP,
    }
}

const fn port_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "http",
        Protocol::Udp => "echo",
        Protocol::Sctp => "init",
    }
}

/// The objects of a service.
pub(crate) struct TableService {
    pub(crate) backing: Backing,
    pub(crate) policy: Policy,
    pub(crate) service: Value,
    pub(crate) slices: Vec<Value>,
}

/// Frontend addresses that are routed through an entry node of their own.
#[derive(Clone, Copy)]
enum Range {
    LoadBalancer,
    External,
}

impl Range {
    const fn v4(self, entry_node: EntryNode, number: u16) -> Ipv4Addr {
        let index = entry_node.index() as u8;
        match self {
            Self::LoadBalancer => Ipv4Addr::new(198, 51, 100 + index, 10 + number as u8),
            Self::External => Ipv4Addr::new(203, 0, 113 + index, 10 + number as u8),
        }
    }

    const fn v6(self, entry_node: EntryNode, number: u16) -> Ipv6Addr {
        let kind = match self {
            Self::LoadBalancer => 0x100,
            Self::External => 0x200,
        };
        Ipv6Addr::new(0x2001, 0xdb8, kind + entry_node.index() as u16, 0, 0, 0, 0, 10 + number)
    }

    const fn address(self, family: Family, entry_node: EntryNode, number: u16) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4(entry_node, number)),
            Family::V6 => IpAddr::V6(self.v6(entry_node, number)),
        }
    }

    /// All addresses of a service.
    fn addresses(self, number: u16) -> Vec<IpAddr> {
        EntryNode::BOTH
            .iter()
            .flat_map(|entry_node| Family::BOTH.map(|family| self.address(family, *entry_node, number)))
            .collect()
    }
}

/// The prefixes that are routed to an entry node.
pub(crate) fn prefixes(entry_node: EntryNode, frontends: &[Frontend]) -> Vec<IpNet> {
    let of_range = |range: Range| {
        [
            IpNet::from(Ipv4Net::new_assert(range.v4(entry_node, 0), 24).trunc()),
            Ipv6Net::new_assert(range.v6(entry_node, 0), 64).trunc().into(),
        ]
    };
    let mut prefixes = [Range::LoadBalancer, Range::External].map(of_range).concat();
    // one route is enough: cluster IPs mean the same on every node
    if entry_node == EntryNode::First && frontends.contains(&Frontend::ExternalClusterIp) {
        let own = service_addresses(CLUSTER_IP).map(|address| match address {
            IpAddr::V4(v4) => IpNet::from(Ipv4Net::new_assert(v4, 16).trunc()),
            IpAddr::V6(v6) => Ipv6Net::new_assert(v6, 64).trunc().into(),
        });
        prefixes.extend(own);
    }
    prefixes
}

/// The frontend of the service with this number; `node` is the address of the entry node.
pub(crate) fn frontend(cell: Cell, number: u16, node: IpAddr) -> SocketAddr {
    let Cell { family, entry_node, .. } = cell;
    match cell.frontend {
        Frontend::ClusterIp | Frontend::ExternalClusterIp | Frontend::UnknownPort => {
            let address =
                service_addresses(CLUSTER_IP + number).into_iter().find(|address| family.is_of(address));
            let port = if cell.frontend == Frontend::UnknownPort { PORT + 1 } else { PORT };
            SocketAddr::new(address.expect("a service of both families"), port)
        }
        Frontend::NodePort => SocketAddr::new(node, NODE_PORT + number),
        Frontend::LoadBalancer => {
            SocketAddr::new(Range::LoadBalancer.address(family, entry_node, number), PORT)
        }
        Frontend::ExternalIp => SocketAddr::new(Range::External.address(family, entry_node, number), PORT),
        Frontend::HostPort(mapping) | Frontend::HostPortAtLoopback(mapping) => {
            host_ports::frontend(cell, mapping, node)
        }
    }
}

impl TableService {
    /// `pods`: the client, then one on each node; `host`: the first node.
    pub(crate) fn new(
        number: u16,
        backing: Backing,
        policy: Policy,
        frontends: &[Frontend],
        pods: &[Server],
        host: &Node,
    ) -> Self {
        let name = format!("{backing:?}-{}", policy.name()).to_lowercase();
        let mut service = service(&name, number, policy, frontends);
        if backing == Backing::SourceRanges {
            // the API accepts blanks
            service["spec"]["loadBalancerSourceRanges"] = json!([" 192.0.2.0/24", "2001:db8:ffff::/64 "]);
        }
        let slices =
            Family::BOTH.map(|family| slice(&name, family, &endpoints(backing, family, pods, host))).into();
        Self { backing, policy, service, slices }
    }
}

fn service(name: &str, number: u16, policy: Policy, frontends: &[Frontend]) -> Value {
    let has = |frontend| frontends.contains(&frontend);
    let kind = match (has(Frontend::LoadBalancer), has(Frontend::NodePort)) {
        (true, _) => "LoadBalancer",
        (_, true) => "NodePort",
        _ => "ClusterIP",
    };
    let port = |protocol: Protocol| {
        let (name, target) = (port_name(protocol), target(protocol));
        let mut port = json!({"name": name, "port": PORT, "protocol": protocol.name(), "targetPort": target});
        if has(Frontend::NodePort) {
            port["nodePort"] = json!(NODE_PORT + number);
        }
        port
    };
    let addresses = service_addresses(CLUSTER_IP + number);
    let mut service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"namespace": "default", "name": name, "uid": format!("uid-{name}"), "resourceVersion": "1"},
        "spec": {
            "type": kind,
            "clusterIP": addresses[0], "clusterIPs": addresses,
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "internalTrafficPolicy": policy.name(),
            "sessionAffinity": "None",
            "ports": Protocol::ALL.map(port),
        },
        "status": {"loadBalancer": {}},
    });
    if has(Frontend::ExternalIp) {
        service["spec"]["externalIPs"] = json!(Range::External.addresses(number));
    }
    if kind != "ClusterIP" || has(Frontend::ExternalIp) {
        service["spec"]["externalTrafficPolicy"] = json!(policy.name());
    }
    if has(Frontend::LoadBalancer) {
        let ingress = |address: &IpAddr| json!({"ip": address, "ipMode": "VIP"});
        service["status"]["loadBalancer"]["ingress"] =
            Range::LoadBalancer.addresses(number).iter().map(ingress).collect();
    }
    service
}

fn slice(service: &str, family: Family, endpoints: &[Value]) -> Value {
    let name = format!("{service}-{family}").to_lowercase();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default", "name": name, "uid": format!("uid-{name}"), "resourceVersion": "1",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": family.to_string(),
        "ports": Protocol::ALL.map(
            |protocol| json!({"name": port_name(protocol), "port": target(protocol), "protocol": protocol.name()}),
        ),
        "endpoints": endpoints,
    })
}

fn endpoints(backing: Backing, family: Family, pods: &[Server], host: &Node) -> Vec<Value> {
    let conditions = |endpoint: &mut Value, [ready, serving, terminating]: [bool; 3]| {
        endpoint["conditions"] = json!({"ready": ready, "serving": serving, "terminating": terminating});
    };
    let endpoint = |node: &str, address: IpAddr| {
        let mut endpoint = json!({"addresses": [address], "nodeName": node});
        conditions(&mut endpoint, [true, true, false]);
        endpoint
    };
    let pod = |pod: &Server| endpoint(&pod.node, pod.address(family));
    let [client, near, far, third] = pods else { panic!("a client, and one pod on each node") };
    match backing {
        Backing::SameNode => vec![pod(near)],
        Backing::OtherNode => vec![pod(far)],
        Backing::Client => vec![pod(client)],
        Backing::Host => vec![endpoint(host.name(), host.address(family))],
        Backing::Spread | Backing::SourceRanges => [near, far, third].map(pod).into(),
        Backing::TopologyHints => [near, far, third]
            .map(|of| {
                let mut endpoint = pod(of);
                endpoint["hints"] = json!({"forNodes": [{"name": of.node}]});
                endpoint
            })
            .into(),
        Backing::Terminating => {
            let mut terminating = pod(near);
            conditions(&mut terminating, [false, true, true]);
            vec![terminating, pod(far)]
        }
        Backing::NotReady => {
            let mut unready = pod(near);
            conditions(&mut unready, [false, false, false]);
            vec![unready]
        }
    }
}
