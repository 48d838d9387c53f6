//! Generated Services and EndpointSlices of every kind that the API allows, as JSON. Two services
//! never have the same address and port; other tests cover such conflicts.

use std::net::IpAddr;

use proptest::{collection::vec, option, prelude::*, sample::select, sample::subsequence};
use serde_json::{Value, json};

use super::cluster::{self, NODES, PODS};

/// Maximum number of services.
pub(crate) const SERVICES: usize = 6;
/// Maximum number of slices of a service.
pub(crate) const SLICES: usize = 3;
const NAMES: [&str; 3] = ["a", "b", "c"];
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];
const POLICIES: [Option<&str>; 3] = [None, Some("Cluster"), Some("Local")];
/// The first node port.
const NODE_PORTS: u16 = 30_000;

/// A Service without its number.
#[derive(Clone, Debug)]
pub(crate) struct ServiceSpec {
    kind: &'static str,
    label: Option<&'static str>,
    /// Indexes into `cluster_ips`, in this order.
    families: Vec<usize>,
    ports: Vec<PortSpec>,
    external: Vec<usize>,
    /// Index into `pool`, and `ipMode`.
    load_balancers: Vec<(usize, Option<&'static str>)>,
    ranges: Vec<&'static str>,
    internal_policy: Option<&'static str>,
    external_policy: Option<&'static str>,
    pub(crate) affinity: Option<u32>,
    is_maglev: bool,
    publishes_unready: bool,
}

#[derive(Clone, Debug)]
struct PortSpec {
    name: usize,
    /// Ports of different protocols may share a number.
    number: u16,
    protocol: usize,
    has_node_port: bool,
}

/// An EndpointSlice without its number and service.
#[derive(Clone, Debug)]
pub(crate) struct SliceSpec {
    family: usize,
    /// Name, target port, protocol.
    ports: Vec<(usize, u16, usize)>,
    endpoints: Vec<EndpointSpec>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct EndpointSpec {
    address: EndpointLocation,
    names_node: bool,
    has_more_addresses: bool,
    conditions: [Option<bool>; 3],
    zones: Vec<&'static str>,
    nodes: Vec<&'static str>,
}

/// The location of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EndpointLocation {
    Pod(usize, usize),
    /// A node address: a pod with `hostNetwork`.
    Node(usize),
    /// Outside the cluster, as in custom slices.
    Outside(u8),
}

/// External IPs and load balancer IPs, IPv4 and IPv6, which all services share.
pub(crate) fn pool() -> Vec<IpAddr> {
    let v4 = (10..12_u8).map(|last| IpAddr::from([203, 0, 113, last]));
    let v6 = (10..12_u16).map(|last| IpAddr::from([0x2001, 0xdb8, 0x200, 0, 0, 0, 0, last]));
    v4.chain(v6).collect()
}

/// The cluster IPs of a service, IPv4 and IPv6.
pub(crate) fn cluster_ips(service: usize) -> [IpAddr; 2] {
    let last = service as u8 + 10;
    [IpAddr::from([10, 96, 0, last]), IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, last.into()])]
}

/// The service that has this port or node port.
pub(crate) const fn owner_of(port: u16) -> usize {
    let port = if port >= NODE_PORTS { port - NODE_PORTS } else { port };
    port as usize / 100
}

/// The node port of a service's port.
pub(crate) const fn node_port(port: u16) -> u16 {
    NODE_PORTS + port
}

/// The ports of a service are above this one.
pub(crate) const fn first_port(service: usize) -> u16 {
    service as u16 * 100
}

pub(crate) fn name(service: usize) -> String {
    format!("service-{service}")
}

pub(crate) fn slice_name(service: usize, slice: usize) -> String {
    format!("service-{service}-{slice}")
}

pub(crate) fn service() -> impl Strategy<Value = ServiceSpec> {
    let kinds = prop_oneof![
        6 => select(vec!["ClusterIP", "NodePort", "LoadBalancer", "LoadBalancer"]),
        1 => select(vec!["ExternalName", "None"]),
    ];
    let label = prop_oneof![
        12 => Just(None),
        1 => select(vec!["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"])
            .prop_map(Some),
    ];
    let families = select(vec![vec![0], vec![1], vec![0, 1], vec![1, 0], vec![0, 1]]);
    let ranges = vec![
        "10.1.0.0/16",
        " 192.0.2.0/24",
        "0.0.0.0/0",
        "172.18.0.2/32",
        "fd00:10::/32 ",
        "2001:db8:ffff::/48",
        "::/0",
    ];
    let ranges = prop_oneof![2 => Just(Vec::new()), 2 => subsequence(ranges, 0..4)];
    let load_balancers =
        vec((0..pool().len(), select(vec![None, Some("VIP"), Some("VIP"), Some("Proxy")])), 0..3);
    let policies = (select(POLICIES.to_vec()), select(POLICIES.to_vec()));
    let ports = vec((1..4_u16, 0..PROTOCOLS.len(), any::<bool>()), 1..4);
    let external = subsequence((0..pool().len()).collect::<Vec<_>>(), 0..3);
    let rest = (option::of(1..86_400_u32), prop::bool::weighted(0.15), any::<bool>());
    (kinds, label, families, (ports, external, load_balancers), ranges, policies, rest).prop_map(
        |(kind, label, families, (ports, external, load_balancers), ranges, policies, rest)| ServiceSpec {
            kind,
            label,
            families,
            ports: distinct(ports),
            external,
            load_balancers,
            ranges,
            internal_policy: policies.0,
            external_policy: policies.1,
            affinity: rest.0,
            is_maglev: rest.1,
            publishes_unready: rest.2,
        },
    )
}

/// Gives each port a unique name and drops duplicates of number and protocol.
fn distinct(ports: Vec<(u16, usize, bool)>) -> Vec<PortSpec> {
    let mut found: Vec<PortSpec> = Vec::new();
    for (name, (number, protocol, has_node_port)) in ports.into_iter().enumerate() {
        if found.iter().all(|port| (port.number, port.protocol) != (number, protocol)) {
            found.push(PortSpec { name, number, protocol, has_node_port });
        }
    }
    found
}

/// A service with one frontend, and a slice with its only backend.
pub(crate) fn smallest() -> (ServiceSpec, SliceSpec) {
    let service = ServiceSpec {
        kind: "ClusterIP",
        label: None,
        families: vec![0],
        ports: vec![PortSpec { name: 0, number: 1, protocol: 0, has_node_port: false }],
        external: Vec::new(),
        load_balancers: Vec::new(),
        ranges: Vec::new(),
        internal_policy: None,
        external_policy: None,
        affinity: None,
        is_maglev: false,
        publishes_unready: false,
    };
    let endpoint = EndpointSpec {
        address: EndpointLocation::Pod(0, 0),
        names_node: true,
        has_more_addresses: false,
        conditions: [Some(true); 3],
        zones: Vec::new(),
        nodes: Vec::new(),
    };
    (service, SliceSpec { family: 0, ports: vec![(0, 8_080, 0)], endpoints: vec![endpoint] })
}

pub(crate) fn slice() -> impl Strategy<Value = SliceSpec> {
    let ports = vec((select(vec![8_080_u16, 8_081, 5_300]), 0..PROTOCOLS.len()), NAMES.len());
    let named = subsequence((0..NAMES.len()).collect::<Vec<_>>(), 1..=NAMES.len());
    (0..2_usize, named, ports, vec(endpoint(), 0..5)).prop_map(|(family, named, ports, endpoints)| {
        let ports = named.into_iter().map(|name| (name, ports[name].0, ports[name].1)).collect();
        SliceSpec { family, ports, endpoints }
    })
}

fn endpoint() -> impl Strategy<Value = EndpointSpec> {
    let address = prop_oneof![
        8 => (0..NODES.len(), 0..PODS).prop_map(|(node, pod)| EndpointLocation::Pod(node, pod)),
        2 => (0..NODES.len()).prop_map(EndpointLocation::Node),
        1 => (1..3_u8).prop_map(EndpointLocation::Outside),
    ];
    let usual = vec![
        [Some(true), Some(true), Some(false)],
        [Some(false), Some(true), Some(true)],
        [Some(false), Some(false), Some(false)],
    ];
    let any_conditions = prop::array::uniform3(option::of(any::<bool>()));
    let conditions = prop_oneof![3 => select(usual), 1 => any_conditions];
    let zones = prop_oneof![1 => Just(Vec::new()), 1 => subsequence(vec!["west", "east", "south"], 1..3)];
    let nodes = NODES.map(|(name, _)| name).to_vec();
    let nodes = prop_oneof![2 => Just(Vec::new()), 1 => subsequence(nodes, 1..3)];
    let rest = (prop::bool::weighted(0.85), prop::bool::weighted(0.1));
    (address, rest, conditions, zones, nodes).prop_map(|(address, rest, conditions, zones, nodes)| {
        EndpointSpec { address, names_node: rest.0, has_more_addresses: rest.1, conditions, zones, nodes }
    })
}

impl ServiceSpec {
    pub(crate) fn object(&self, number: usize) -> Value {
        let port = |port: &PortSpec| {
            let own = first_port(number) + port.number;
            let mut object =
                json!({"name": NAMES[port.name], "port": own, "protocol": PROTOCOLS[port.protocol]});
            if port.has_node_port && ["NodePort", "LoadBalancer"].contains(&self.kind) {
                object["nodePort"] = json!(node_port(own));
            }
            object
        };
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"namespace": "default", "name": name(number), "labels": {}, "annotations": {}},
            "spec": {
                "type": if self.kind == "None" { "ClusterIP" } else { self.kind },
                "ports": self.ports.iter().map(port).collect::<Vec<_>>(),
                "publishNotReadyAddresses": self.publishes_unready,
            },
        });
        let spec = &mut service["spec"];
        match self.kind {
            "ExternalName" => spec["externalName"] = json!("example.com"),
            "None" => (spec["clusterIP"], spec["clusterIPs"]) = (json!("None"), json!(["None"])),
            _ => {
                let ips: Vec<IpAddr> =
                    self.families.iter().map(|family| cluster_ips(number)[*family]).collect();
                let names: Vec<_> = self.families.iter().map(|family| ["IPv4", "IPv6"][*family]).collect();
                spec["clusterIP"] = json!(ips[0]);
                spec["clusterIPs"] = json!(ips);
                spec["ipFamilies"] = json!(names);
            }
        }
        for (field, policy) in
            [("internalTrafficPolicy", self.internal_policy), ("externalTrafficPolicy", self.external_policy)]
        {
            if let Some(policy) = policy {
                spec[field] = json!(policy);
            }
        }
        if let Some(seconds) = self.affinity {
            spec["sessionAffinity"] = json!("ClientIP");
            spec["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
        }
        spec["externalIPs"] = json!(self.external.iter().map(|index| pool()[*index]).collect::<Vec<_>>());
        // an API server keeps these fields only for this type
        if self.kind == "LoadBalancer" {
            let ingress = |(index, mode): &(usize, Option<&str>)| match mode {
                Some(mode) => json!({"ip": pool()[*index], "ipMode": mode}),
                None => json!({"ip": pool()[*index]}),
            };
            spec["loadBalancerSourceRanges"] = json!(self.ranges);
            service["status"] = json!({"loadBalancer": {
                "ingress": self.load_balancers.iter().map(ingress).collect::<Vec<_>>(),
            }});
        }
        if let Some(label) = self.label {
            service["metadata"]["labels"][label] = json!("other");
        }
        if self.is_maglev {
            service["metadata"]["annotations"]["dataplane.local/load-balancing"] = json!("maglev");
        }
        service
    }
}

impl SliceSpec {
    /// Removes endpoints whose address other slices of the service have with different data,
    /// because the result would be undefined. A terminating one may appear together with another.
    pub(crate) fn without_conflicts<'a>(&self, others: &(impl Iterator<Item = &'a Self> + Clone)) -> Self {
        let mut result = Self { endpoints: Vec::new(), ..self.clone() };
        for endpoint in &self.endpoints {
            let known = others.clone().filter(|other| other.family == self.family);
            let mut known = known.flat_map(|other| &other.endpoints).chain(&result.endpoints);
            if known.all(|other| other.is_compatible(endpoint)) {
                result.endpoints.push(endpoint.clone());
            }
        }
        result
    }

    pub(crate) fn object(&self, service: usize, number: usize) -> Value {
        let ports = self.ports.iter().map(|(name, target, protocol)| {
            json!({"name": NAMES[*name], "port": target, "protocol": PROTOCOLS[*protocol]})
        });
        let family = ["IPv4", "IPv6"][self.family];
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "namespace": "default", "name": slice_name(service, number),
                "labels": {"kubernetes.io/service-name": name(service)},
            },
            "addressType": family,
            "ports": ports.collect::<Vec<_>>(),
            "endpoints": self.endpoints.iter().map(|it| it.object(self.family)).collect::<Vec<_>>(),
        })
    }
}

impl EndpointSpec {
    fn is_compatible(&self, other: &Self) -> bool {
        self.address != other.address || self == other || self.is_terminating() != other.is_terminating()
    }

    fn is_terminating(&self) -> bool {
        self.conditions[2] == Some(true)
    }

    fn object(&self, family: usize) -> Value {
        let (address, node) = match self.address {
            EndpointLocation::Pod(node, pod) => {
                (cluster::pod_addresses(node, pod)[family], Some(NODES[node].0))
            }
            EndpointLocation::Node(node) => (cluster::node_addresses(node)[family], Some(NODES[node].0)),
            EndpointLocation::Outside(last) if family == 0 => (IpAddr::from([198, 51, 100, last]), None),
            EndpointLocation::Outside(last) => {
                (IpAddr::from([0x2001, 0xdb8, 0x300, 0, 0, 0, 0, last.into()]), None)
            }
        };
        let mut object = json!({"addresses": [address], "conditions": {}});
        if self.has_more_addresses {
            // further addresses have no meaning in the API
            object["addresses"] = json!([address, cluster::external_addresses()[family]]);
        }
        if let Some(node) = node.filter(|_| self.names_node) {
            object["nodeName"] = json!(node);
        }
        for (field, value) in ["ready", "serving", "terminating"].iter().zip(self.conditions) {
            if let Some(value) = value {
                object["conditions"][field] = json!(value);
            }
        }
        let names = |names: &[&str]| names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>();
        if !self.zones.is_empty() || !self.nodes.is_empty() {
            object["hints"] = json!({"forZones": names(&self.zones), "forNodes": names(&self.nodes)});
        }
        object
    }
}
