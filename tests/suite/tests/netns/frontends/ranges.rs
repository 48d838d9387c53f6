//! `loadBalancerSourceRanges`: for all clients, and at the addresses of the load balancer alone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use dataplane_testkit::lab::{Checks, Family, Place, Spec};
use serde_json::{Value, json};

use super::{Bed, End, WEB, answered, fails};

const BALANCER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 10)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x10)),
];

#[test]
fn source_ranges_with_connect_time() -> Result<()> {
    source_ranges(&Spec { connect_tcp: true, ..Spec::new(2) })
}

#[test]
fn source_ranges_by_packets_alone() -> Result<()> {
    source_ranges(&Spec { connect_tcp: false, ..Spec::new(2) })
}

/// Upstream: "should only allow access from service loadbalancer source ranges".
fn source_ranges(spec: &Spec) -> Result<()> {
    let mut bed = Bed::create(spec, &[1])?;
    let node = &bed.cluster.nodes()[0];
    for (address, via) in BALANCER.iter().zip(node.addresses()) {
        bed.cluster.fabric().gateway().ip(&format!("route add {address} via {via}"))?;
    }
    let mut checks = Checks::of(spec.describe());
    let ranges: [(&str, Vec<String>); 4] = [
        ("pod", bed.client.addresses().map(|address| address.to_string()).into()),
        ("outside", vec![" 192.0.2.0/24".to_owned(), "2001:db8:ffff::/48 ".to_owned()]),
        ("host", node.addresses().map(|address| address.to_string()).into()),
        ("nobody here", vec!["100.64.0.0/10".to_owned(), "fd64::/64".to_owned()]),
    ];
    for (who, ranges) in &ranges {
        bed.tell(|service| guarded(service, ranges))?;
        for family in Family::BOTH {
            for (client, place) in clients(&bed) {
                let claim = format!("only {who} may ask: {client} ({family})");
                checks.that(claim, || {
                    if client == *who {
                        open(place, family)
                    } else {
                        fails(place, balancer(family), End::Silent)
                    }
                });
                checks
                    .that(format!("only {who} at the balancer: {client} at a node port ({family})"), || {
                        answered(place, bed.node_port(0, family), 2).map(drop)
                    });
            }
        }
    }
    bed.tell(|service| guarded(service, &[]))?;
    for family in Family::BOTH {
        for (client, place) in clients(&bed) {
            checks.that(format!("no ranges: {client} ({family})"), || open(place, family));
        }
    }
    checks.that("the outside is seen", || {
        // the backend is elsewhere: it sees the node
        bed.outside.get_as(balancer(Family::V4), 3, None, bed.cluster.nodes()[0].address(Family::V4))?;
        bed.client.place().get_as(balancer(Family::V4), 3, None, bed.client.address(Family::V4))
    });
    checks.finish(&bed.cluster)
}

fn guarded(service: &mut Value, ranges: &[String]) {
    service["spec"]["type"] = json!("LoadBalancer");
    let whole = |range: &String| match range {
        range if range.contains('/') => range.clone(),
        range if range.contains(':') => format!("{range}/128"),
        range => format!("{range}/32"),
    };
    service["spec"]["loadBalancerSourceRanges"] = ranges.iter().map(whole).collect();
    service["status"]["loadBalancer"]["ingress"] =
        BALANCER.iter().map(|address| json!({"ip": address, "ipMode": "VIP"})).collect();
}

fn clients(bed: &Bed) -> [(&'static str, &Place); 3] {
    [("pod", bed.client.place()), ("host", bed.host()), ("outside", &bed.outside)]
}

fn balancer(family: Family) -> SocketAddr {
    let address = BALANCER.into_iter().find(|address| family.is_of(address));
    SocketAddr::new(address.expect("an address of both families"), WEB)
}

fn open(place: &Place, family: Family) -> Result<()> {
    answered(place, balancer(family), 3).map(drop)
}
