//! Node addresses that are added and removed, and which serve node ports (`node_ports.addresses`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use dataplane_agent::api::{request::View, views::EndpointView};
use dataplane_testkit::lab::{Checks, Family, Spec, failures};
use serde_json::{Value, json};

use super::{End, NODE_ECHO, NODE_WEB, Testbed, expect_answers, expect_no_answer};

/// Addresses that are added to the uplink: of its subnet, and of no other node.
const ADDED: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(172, 18, 0, 77)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 0x77))];

/// Whether the node's own address and an added one serve node ports.
#[derive(Clone, Copy)]
struct Serves {
    own: bool,
    added: bool,
}

#[test]
fn added_addresses_serve_node_ports() -> Result<()> {
    add_and_remove_addresses(&json!("all"), Serves { own: true, added: true })
}

#[test]
fn only_the_primary_address_serves_node_ports() -> Result<()> {
    add_and_remove_addresses(&json!("primary"), Serves { own: true, added: false })
}

#[test]
fn only_addresses_in_the_ranges_serve_node_ports() -> Result<()> {
    add_and_remove_addresses(&json!(["172.18.0.0/28", "fd00:18::/124"]), Serves { own: true, added: false })?;
    add_and_remove_addresses(
        &json!(["172.18.0.64/26", "fd00:18::40/122"]),
        Serves { own: false, added: true },
    )
}

fn add_and_remove_addresses(addresses: &Value, serves: Serves) -> Result<()> {
    let config = json!({"node_ports": {"addresses": addresses}});
    let spec = Spec { config, ..Spec::new(1) };
    let mut testbed = Testbed::create(&spec, &[0])?;
    testbed.apply_service(|_| {})?;
    let own = testbed.cluster.nodes()[0].addresses();
    // packets must arrive at the node also when it has lost the address
    for (to, via) in ADDED.iter().zip(own) {
        testbed.cluster.fabric().gateway().ip(&format!("route add {to} via {via}"))?;
    }
    let mut checks = Checks::of(format!("node_ports.addresses: {addresses}"));
    // twice, to detect state that is left from the first time
    for time in ["at first", "again"] {
        for address in ADDED {
            testbed.host().namespace().ip(&format!("addr add {address}/{} dev eth0", bits(address)))?;
            wait_for_address(&mut testbed, address, Some(serves.added))?;
        }
        for (family, (own, added)) in Family::BOTH.into_iter().zip(own.into_iter().zip(ADDED)) {
            checks.that(format!("the node's own address ({family}, {time})"), || {
                expect_node_ports(&testbed, own, serves.own)
            });
            checks.that(format!("the added address ({family}, {time})"), || {
                expect_node_ports(&testbed, added, serves.added)
            });
        }
        for address in ADDED {
            testbed.host().namespace().ip(&format!("addr del {address}/{} dev eth0", bits(address)))?;
            wait_for_address(&mut testbed, address, None)?;
        }
        for (family, (own, gone)) in Family::BOTH.into_iter().zip(own.into_iter().zip(ADDED)) {
            checks
                .that(format!("a removed address ({family}, {time})"), || expect_unreachable(&testbed, gone));
            checks.that(format!("the remaining address ({family}, {time})"), || {
                expect_node_ports(&testbed, own, serves.own)
            });
        }
    }
    checks.finish(&testbed.cluster)
}

const fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Waits until the datapath has the address, with or without node ports, or no longer has it.
fn wait_for_address(testbed: &mut Testbed, address: IpAddr, node_ports: Option<bool>) -> Result<()> {
    testbed.cluster.nodes_mut()[0].agent_mut().until("the address in the datapath", |agent| {
        let endpoints: Vec<EndpointView> = agent.ask(&View::Endpoints)?;
        let found = endpoints.iter().find(|endpoint| endpoint.address == address);
        Ok((found.map(|endpoint| endpoint.accepts_node_ports) == node_ports).then_some(()))
    })
}

/// The node ports answer every client, or the node refuses connections as for a closed port.
fn expect_node_ports(testbed: &Testbed, address: IpAddr, serves_node_ports: bool) -> Result<()> {
    let web = SocketAddr::new(address, NODE_WEB);
    for place in [&testbed.external, testbed.client.place(), testbed.host()] {
        if serves_node_ports {
            expect_answers(place, web, 5)?;
            place.send(SocketAddr::new(address, NODE_ECHO), 5, &[])?.check()?;
        } else {
            expect_no_answer(place, web, End::Refused)?;
        }
    }
    Ok(())
}

/// Packets are forwarded by the node's routes: there is no answer, and no refusal from the address.
fn expect_unreachable(testbed: &Testbed, address: IpAddr) -> Result<()> {
    let requests = testbed.external.get(SocketAddr::new(address, NODE_WEB), 1)?;
    let ends = failures(&requests);
    let is_lost = ends.keys().all(|end| ["unreachable", "timeout"].contains(&end.as_str()));
    ensure!(is_lost && !ends.is_empty(), "{requests:?}");
    Ok(())
}
