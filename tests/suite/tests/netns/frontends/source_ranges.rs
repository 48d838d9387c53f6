//! `loadBalancerSourceRanges`: for all clients, but only at the load balancer's addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use dataplane_testkit::lab::{Checks, Family, Place, Spec};
use serde_json::{Value, json};

use super::{End, Testbed, WEB, expect_answers, expect_no_answer};

const LOAD_BALANCER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 10)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x10)),
];

#[test]
fn source_ranges_with_connect_time_translation() -> Result<()> {
    source_ranges(&Spec { connect_tcp: true, ..Spec::new(2) })
}

#[test]
fn source_ranges_per_packet() -> Result<()> {
    source_ranges(&Spec { connect_tcp: false, ..Spec::new(2) })
}

/// Upstream: "should only allow access from service loadbalancer source ranges".
fn source_ranges(spec: &Spec) -> Result<()> {
    let mut testbed = Testbed::create(spec, &[1])?;
    let node = &testbed.cluster.nodes()[0];
    for (address, via) in LOAD_BALANCER.iter().zip(node.addresses()) {
        testbed.cluster.fabric().gateway().ip(&format!("route add {address} via {via}"))?;
    }
    let mut checks = Checks::of(spec.describe());
    let ranges: [(&str, Vec<String>); 4] = [
        ("pod", testbed.client.addresses().map(|address| address.to_string()).into()),
        ("external", vec![" 192.0.2.0/24".to_owned(), "2001:db8:ffff::/48 ".to_owned()]),
        ("host", node.addresses().map(|address| address.to_string()).into()),
        ("no client", vec!["100.64.0.0/10".to_owned(), "fd64::/64".to_owned()]),
    ];
    for (allowed, ranges) in &ranges {
        testbed.apply_service(|service| set_source_ranges(service, ranges))?;
        for family in Family::BOTH {
            for (client, place) in clients(&testbed) {
                let claim = format!("only {allowed} is allowed: {client} ({family})");
                checks.that(claim, || {
                    if client == *allowed {
                        expect_allowed(place, family)
                    } else {
                        expect_no_answer(place, load_balancer(family), End::Timeout)
                    }
                });
                checks.that(format!("only {allowed} is allowed: {client} at a node port ({family})"), || {
                    expect_answers(place, testbed.node_port(0, family), 2).map(drop)
                });
            }
        }
    }
    testbed.apply_service(|service| set_source_ranges(service, &[]))?;
    for family in Family::BOTH {
        for (client, place) in clients(&testbed) {
            checks.that(format!("no ranges: {client} ({family})"), || expect_allowed(place, family));
        }
    }
    checks.that("the backend sees the expected source", || {
        // the backend is on another node: it sees the entry node
        testbed.external.get_as(
            load_balancer(Family::V4),
            3,
            None,
            testbed.cluster.nodes()[0].address(Family::V4),
        )?;
        testbed.client.place().get_as(load_balancer(Family::V4), 3, None, testbed.client.address(Family::V4))
    });
    checks.finish(&testbed.cluster)
}

fn set_source_ranges(service: &mut Value, ranges: &[String]) {
    service["spec"]["type"] = json!("LoadBalancer");
    let whole = |range: &String| match range {
        range if range.contains('/') => range.clone(),
        range if range.contains(':') => format!("{range}/128"),
        range => format!("{range}/32"),
    };
    service["spec"]["loadBalancerSourceRanges"] = ranges.iter().map(whole).collect();
    service["status"]["loadBalancer"]["ingress"] =
        LOAD_BALANCER.iter().map(|address| json!({"ip": address, "ipMode": "VIP"})).collect();
}

fn clients(testbed: &Testbed) -> [(&'static str, &Place); 3] {
    [("pod", testbed.client.place()), ("host", testbed.host()), ("external", &testbed.external)]
}

fn load_balancer(family: Family) -> SocketAddr {
    let address = LOAD_BALANCER.into_iter().find(|address| family.is_of(address));
    SocketAddr::new(address.expect("an address of both families"), WEB)
}

fn expect_allowed(place: &Place, family: Family) -> Result<()> {
    expect_answers(place, load_balancer(family), 3).map(drop)
}
