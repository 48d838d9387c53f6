//! Pings to cluster IPs and load balancer addresses are answered by the node while a backend is
//! ready.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::{Result, ensure};
use dataplane_testkit::lab::{Checks, Family, Place, Routing, Spec};
use serde_json::json;

use super::{Testbed, WEB};

const LOAD_BALANCER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(198, 51, 100, 20)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x100, 0, 0, 0, 0, 0x20)),
];

#[test]
fn service_addresses_answer_pings_while_a_backend_is_ready() -> Result<()> {
    ping(&Spec { routing: Routing::Native, ..Spec::new(2) }, true)
}

#[test]
fn service_addresses_answer_pings_with_an_overlay() -> Result<()> {
    ping(&Spec { routing: Routing::Vxlan, ..Spec::new(2) }, true)
}

#[test]
fn service_addresses_do_not_answer_pings_if_disabled() -> Result<()> {
    ping(&Spec { config: json!({"services": {"ping": false}}), ..Spec::new(2) }, false)
}

fn ping(spec: &Spec, is_enabled: bool) -> Result<()> {
    let mut testbed = Testbed::create(spec, &[1])?;
    let cluster_ips = Family::BOTH.map(|family| testbed.service.at(family, WEB).ip());
    let node = testbed.cluster.nodes()[0].addresses();
    for (address, via) in LOAD_BALANCER.iter().zip(node).chain(cluster_ips.iter().zip(node)) {
        testbed.cluster.fabric().gateway().ip(&format!("route add {address} via {via}"))?;
    }
    testbed.apply_service(|service| {
        service["spec"]["type"] = json!("LoadBalancer");
        service["status"]["loadBalancer"]["ingress"] =
            json!(LOAD_BALANCER.map(|address| json!({"ip": address.to_string()})));
    })?;
    let mut checks = Checks::of(spec.describe());
    for (state, is_ready) in [("at first", true), ("no backend", false), ("ready again", true)] {
        if state != "at first" {
            testbed.apply_endpoints(|endpoint| {
                endpoint["conditions"] =
                    json!({"ready": is_ready, "serving": is_ready, "terminating": false});
            })?;
        }
        for address in cluster_ips.into_iter().chain(LOAD_BALANCER) {
            let clients: [(&str, &Place); 3] =
                [("pod", testbed.client.place()), ("host", testbed.host()), ("outside", &testbed.external)];
            for (client, place) in clients {
                checks.that(format!("{state}: {client} pings {address}"), || {
                    expect(place, address, is_enabled && is_ready)
                });
            }
        }
    }
    checks.finish(&testbed.cluster)
}

/// Three echo requests of this size are answered, or none is.
fn expect(place: &Place, address: IpAddr, is_answered: bool) -> Result<()> {
    if is_answered {
        return place.ping(address, 3, 1_000)?.check();
    }
    ensure!(!place.is_answered(address, Duration::from_millis(500))?, "answered");
    Ok(())
}
