//! The table's services: where they are, and how they are told. Knows no traffic.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use dataplane_oracle::Protocol;
use dataplane_testkit::{
    lab::{Family, Node, service_addresses},
    traffic::{ECHO, HTTP, SCTP},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Value, json};

use super::{
    bed::Server,
    cells::{Backing, Cell, Door, Frontend, Policy},
    host_ports,
};

/// Port of all services: the same for every protocol.
const PORT: u16 = 80;
/// `NodePort` of the first; the others follow.
const NODE_PORT: u16 = 30_100;
/// Number of the first one's cluster addresses; the others follow.
const CLUSTER_IP: u16 = 100;

/// Where a server answers who it is.
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

/// A service as it was told.
pub(crate) struct Laid {
    pub(crate) backing: Backing,
    pub(crate) policy: Policy,
    pub(crate) service: Value,
    pub(crate) slices: Vec<Value>,
}

/// Addresses of a service that a door of its own leads to.
#[derive(Clone, Copy)]
enum Range {
    Balancer,
    External,
}

impl Range {
    const fn v4(self, door: Door, number: u16) -> Ipv4Addr {
        let door = door.node() as u8;
        match self {
            Self::Balancer => Ipv4Addr::new(198, 51, 100 + door, 10 + number as u8),
            Self::External => Ipv4Addr::new(203, 0, 113 + door, 10 + number as u8),
        }
    }

    const fn v6(self, door: Door, number: u16) -> Ipv6Addr {
        let kind = match self {
            Self::Balancer => 0x100,
            Self::External => 0x200,
        };
        Ipv6Addr::new(0x2001, 0xdb8, kind + door.node() as u16, 0, 0, 0, 0, 10 + number)
    }

    const fn address(self, family: Family, door: Door, number: u16) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4(door, number)),
            Family::V6 => IpAddr::V6(self.v6(door, number)),
        }
    }

    /// All of a service.
    fn addresses(self, number: u16) -> Vec<IpAddr> {
        Door::BOTH
            .iter()
            .flat_map(|door| Family::BOTH.map(|family| self.address(family, *door, number)))
            .collect()
    }
}

/// What the outside reaches through a door.
pub(crate) fn prefixes(door: Door, frontends: &[Frontend]) -> Vec<IpNet> {
    let of_range = |range: Range| {
        [
            IpNet::from(Ipv4Net::new_assert(range.v4(door, 0), 24).trunc()),
            Ipv6Net::new_assert(range.v6(door, 0), 64).trunc().into(),
        ]
    };
    let mut prefixes = [Range::Balancer, Range::External].map(of_range).concat();
    // a cluster's own addresses mean the same on every node
    if door == Door::First && frontends.contains(&Frontend::ClusterIpFromOutside) {
        let own = service_addresses(CLUSTER_IP).map(|address| match address {
            IpAddr::V4(v4) => IpNet::from(Ipv4Net::new_assert(v4, 16).trunc()),
            IpAddr::V6(v6) => Ipv6Net::new_assert(v6, 64).trunc().into(),
        });
        prefixes.extend(own);
    }
    prefixes
}

/// Where a cell asks the service with this number; `node` is its door's address.
pub(crate) fn frontend(cell: Cell, number: u16, node: IpAddr) -> SocketAddr {
    let Cell { family, door, .. } = cell;
    match cell.frontend {
        Frontend::ClusterIp | Frontend::ClusterIpFromOutside | Frontend::UnknownPort => {
            let address =
                service_addresses(CLUSTER_IP + number).into_iter().find(|address| family.is_of(address));
            let port = if cell.frontend == Frontend::UnknownPort { PORT + 1 } else { PORT };
            SocketAddr::new(address.expect("a service of both families"), port)
        }
        Frontend::NodePort => SocketAddr::new(node, NODE_PORT + number),
        Frontend::LoadBalancer => SocketAddr::new(Range::Balancer.address(family, door, number), PORT),
        Frontend::ExternalIp => SocketAddr::new(Range::External.address(family, door, number), PORT),
        Frontend::HostPort(mapping) | Frontend::HostPortAtLoopback(mapping) => {
            host_ports::frontend(cell, mapping, node)
        }
    }
}

impl Laid {
    /// `pods`: who asks, then one on each node; `host`: the first.
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
        if backing == Backing::Guarded {
            // blanks are as the API takes them
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
            Range::Balancer.addresses(number).iter().map(ingress).collect();
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
    let [asker, near, far, third] = pods else { panic!("who asks, and one on each node") };
    match backing {
        Backing::SameNode => vec![pod(near)],
        Backing::OtherNode => vec![pod(far)],
        Backing::Asker => vec![pod(asker)],
        Backing::Host => vec![endpoint(host.name(), host.address(family))],
        Backing::Spread | Backing::Guarded => [near, far, third].map(pod).into(),
        Backing::Hinted => [near, far, third]
            .map(|of| {
                let mut endpoint = pod(of);
                endpoint["hints"] = json!({"forNodes": [{"name": of.node}]});
                endpoint
            })
            .into(),
        Backing::Leaving => {
            let mut leaving = pod(near);
            conditions(&mut leaving, [false, true, true]);
            vec![leaving, pod(far)]
        }
        Backing::Nobody => {
            let mut unready = pod(near);
            conditions(&mut unready, [false, false, false]);
            vec![unready]
        }
    }
}
