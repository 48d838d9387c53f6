//! Addresses of a node that come and go, and which of them take node ports (`node_ports.addresses`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use dataplane_agent::api::{request::View, views::EndpointView};
use dataplane_testkit::lab::{Checks, Family, Spec, failures};
use serde_json::{Value, json};

use super::{Bed, End, NODE_ECHO, NODE_WEB, answered, fails};

/// What the uplink gets besides its own: neighbours of it that no node has.
const ADDED: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(172, 18, 0, 77)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 0x77))];

/// Whether the node's own address takes node ports, and one that is added.
#[derive(Clone, Copy)]
struct Taken {
    own: bool,
    added: bool,
}

#[test]
fn every_address_takes_node_ports_as_it_comes() -> Result<()> {
    come_and_go(&json!("all"), Taken { own: true, added: true })
}

#[test]
fn the_primary_address_alone_takes_node_ports() -> Result<()> {
    come_and_go(&json!("primary"), Taken { own: true, added: false })
}

#[test]
fn addresses_of_a_range_take_node_ports() -> Result<()> {
    come_and_go(&json!(["172.18.0.0/28", "fd00:18::/124"]), Taken { own: true, added: false })?;
    come_and_go(&json!(["172.18.0.64/26", "fd00:18::40/122"]), Taken { own: false, added: true })
}

fn come_and_go(addresses: &Value, taken: Taken) -> Result<()> {
    let config = json!({"node_ports": {"addresses": addresses}});
    let spec = Spec { config, ..Spec::new(1) };
    let mut bed = Bed::create(&spec, &[0])?;
    bed.tell(|_| {})?;
    let own = bed.cluster.nodes()[0].addresses();
    // still asked for when nobody has it any more
    for (to, via) in ADDED.iter().zip(own) {
        bed.cluster.fabric().gateway().ip(&format!("route add {to} via {via}"))?;
    }
    let mut checks = Checks::of(format!("node_ports.addresses: {addresses}"));
    // all of it twice: what is left of the first time would show
    for time in ["at first", "again"] {
        for address in ADDED {
            bed.host().namespace().ip(&format!("addr add {address}/{} dev eth0", bits(address)))?;
            knows(&mut bed, address, Some(taken.added))?;
        }
        for (family, (own, added)) in Family::BOTH.into_iter().zip(own.into_iter().zip(ADDED)) {
            checks.that(format!("the node's own address ({family}, {time})"), || at(&bed, own, taken.own));
            checks.that(format!("the added address ({family}, {time})"), || at(&bed, added, taken.added));
        }
        for address in ADDED {
            bed.host().namespace().ip(&format!("addr del {address}/{} dev eth0", bits(address)))?;
            knows(&mut bed, address, None)?;
        }
        for (family, (own, gone)) in Family::BOTH.into_iter().zip(own.into_iter().zip(ADDED)) {
            checks.that(format!("an address that is gone ({family}, {time})"), || is_nobodys(&bed, gone));
            checks.that(format!("and the one that stays ({family}, {time})"), || at(&bed, own, taken.own));
        }
    }
    checks.finish(&bed.cluster)
}

const fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Waits until the datapath has the address, with node ports or without, or has it no more.
fn knows(bed: &mut Bed, address: IpAddr, node_ports: Option<bool>) -> Result<()> {
    bed.cluster.nodes_mut()[0].agent_mut().until("the address in the datapath", |agent| {
        let endpoints: Vec<EndpointView> = agent.ask(&View::Endpoints)?;
        let found = endpoints.iter().find(|endpoint| endpoint.address == address);
        Ok((found.map(|endpoint| endpoint.accepts_node_ports) == node_ports).then_some(()))
    })
}

/// The ports answer whoever asks, or the node refuses as where nobody listens.
fn at(bed: &Bed, address: IpAddr, is_taken: bool) -> Result<()> {
    let web = SocketAddr::new(address, NODE_WEB);
    for place in [&bed.outside, bed.client.place(), bed.host()] {
        if is_taken {
            answered(place, web, 5)?;
            place.send(SocketAddr::new(address, NODE_ECHO), 5, &[])?.check()?;
        } else {
            fails(place, web, End::Refused)?;
        }
    }
    Ok(())
}

/// What is sent there goes on as the node's routes say: nobody answers, and nothing is refused in his name.
fn is_nobodys(bed: &Bed, address: IpAddr) -> Result<()> {
    let requests = bed.outside.get(SocketAddr::new(address, NODE_WEB), 1)?;
    let ends = failures(&requests);
    let is_lost = ends.keys().all(|end| ["unreachable", "timeout"].contains(&end.as_str()));
    ensure!(is_lost && !ends.is_empty(), "{requests:?}");
    Ok(())
}
