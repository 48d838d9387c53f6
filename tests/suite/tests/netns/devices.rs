//! Nodes with several devices: which of them are uplinks, and the addresses that packets have on
//! each.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use dataplane_agent::api::{
    request::View,
    views::{EndpointView, Status},
};
use dataplane_testkit::{
    lab::{
        Checks, Cluster, ECHO_PORT, Family, Node, Place, Routing, Segment, Service, Spec, WEB_PORT, failures,
        names, outside,
    },
    traffic::{ECHO, HTTP},
};
use serde_json::{Value, json};

pub(super) const NODE_WEB: u16 = 30_080;
pub(super) const NODE_ECHO: u16 = 30_007;

/// Addresses of the first node in the second segment.
const SECOND: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(172, 19, 0, 11)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x19, 0, 0, 0, 0, 0, 0x11))];
/// Addresses of the router in the first and the second segment.
const GATEWAY: [[IpAddr; 2]; 2] = [
    [IpAddr::V4(Ipv4Addr::new(172, 18, 0, 254)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, 254))],
    [IpAddr::V4(Ipv4Addr::new(172, 19, 0, 254)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x19, 0, 0, 0, 0, 0, 254))],
];
/// Addresses of a bridge for containers, and of a container.
pub(super) const BRIDGE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(172, 17, 0, 1)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x17, 0, 0, 0, 0, 0, 1))];
pub(super) const CONTAINER: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(172, 17, 0, 2)), IpAddr::V6(Ipv6Addr::new(0xfd00, 0x17, 0, 0, 0, 0, 0, 2))];

/// The service of the traffic servers in pods, with node ports.
pub(super) fn node_port_service(service: &Service) -> Vec<Value> {
    let mut objects = service.objects();
    objects[0]["spec"]["type"] = json!("NodePort");
    for (port, number) in [(0, NODE_WEB), (1, NODE_ECHO), (2, NODE_ECHO)] {
        objects[0]["spec"]["ports"][port]["nodePort"] = json!(number);
    }
    objects
}

pub(super) fn apply(cluster: &mut Cluster, service: &Service) -> Result<()> {
    let objects = node_port_service(service);
    cluster.change(objects.len(), |cluster| cluster.apply_objects("web", &objects))
}

/// TCP and UDP to the node ports at an address are answered, by all these servers.
fn expect_node_ports(client: &Place, address: IpAddr, servers: &[&str]) -> Result<()> {
    let requests = client.get(SocketAddr::new(address, NODE_WEB), 20 * servers.len() as u32)?;
    ensure!(failures(&requests).is_empty(), "{address}: {:?}", failures(&requests));
    let seen: Vec<_> = names(&requests).into_keys().collect();
    ensure!(seen == servers, "{address}: answers of {seen:?}, not {servers:?}");
    client.send(SocketAddr::new(address, NODE_ECHO), 10, &[])?.check()
}

fn status(node: &Node) -> Result<Status> {
    Ok(node.agent().status()?.status)
}

/// The reason why a device is an uplink, or is not.
fn reason(status: &Status, device: &str) -> Option<(bool, String)> {
    let uplinks = status.uplinks.iter().map(|uplink| (true, &uplink.device, &uplink.reason));
    let others = status.other_devices.iter().map(|other| (false, &other.device, &other.reason));
    let mut all = uplinks.chain(others);
    all.find(|(_, name, _)| *name == device).map(|(is_uplink, _, reason)| (is_uplink, reason.clone()))
}

fn expect_reason(node: &Node, device: &str, is_uplink: bool, expected: &str) -> Result<()> {
    let found = reason(&status(node)?, device);
    ensure!(found == Some((is_uplink, expected.to_owned())), "{device}: {found:?}");
    Ok(())
}

/// Waits until a device of the first node is an uplink, or is not, or does not exist (`None`).
fn await_uplink(cluster: &mut Cluster, device: &str, is_uplink: Option<bool>) -> Result<()> {
    cluster.nodes_mut()[0].agent_mut().until("the device in the status", |agent| {
        let found = reason(&agent.status()?.status, device).map(|(is_uplink, _)| is_uplink);
        Ok((found == is_uplink).then_some(()))
    })
}

/// Default routes of the first node by its second device.
fn default_route_by_second_device(cluster: &Cluster) -> Result<()> {
    cluster.add_device(0, "eth1", Segment::SECOND)?;
    let place = cluster.nodes()[0].place();
    place.namespace().add_addresses("eth1", SECOND)?;
    for via in GATEWAY[1] {
        place.namespace().ip(&format!("route replace default via {via} dev eth1"))?;
    }
    Ok(())
}

#[test]
fn default_route_by_another_device_with_native_routing() -> Result<()> {
    default_route_by_another_device(Routing::Native)
}

#[test]
fn default_route_by_another_device_beside_an_overlay() -> Result<()> {
    default_route_by_another_device(Routing::Vxlan)
}

/// The usual layout of private networks: the InternalIP is in the private network, the default
/// route leads out of the public one.
fn default_route_by_another_device(routing: Routing) -> Result<()> {
    let spec = Spec { routing, connect_tcp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create_stopped(&spec)?;
    default_route_by_second_device(&cluster)?;
    cluster.start()?;
    let made = (|| Ok((cluster.pod(0, "near")?, cluster.pod(1, "far")?)))();
    let (near, far) = cluster.explain(made)?;
    let (external, gateway) = (cluster.outside()?, cluster.gateway()?);
    let _servers = [near.serve()?, far.serve()?, external.serve("external")?, gateway.serve("gateway")?];
    let service = Service::of(&[&far, &near]);
    apply(&mut cluster, &service)?;
    let node = &cluster.nodes()[0];

    let mut checks = Checks::of(spec.describe());
    for device in ["eth0", "eth1"] {
        checks.that(format!("{device} is an uplink"), || {
            expect_reason(node, device, true, "has an address of the node")
        });
    }
    for family in Family::BOTH {
        let second = family.of(SECOND);
        checks.that(format!("pod to outside, by the second device ({family})"), || {
            let web = SocketAddr::new(outside(family), HTTP);
            near.place().get_as(web, 5, Some("external"), second)?;
            near.place().send(SocketAddr::new(outside(family), ECHO), 5, &[])?.check()?;
            near.place().ping(outside(family), 3, 100)?.check()
        });
        checks.that(format!("pod to a neighbour on the first device ({family})"), || {
            let web = SocketAddr::new(family.of(GATEWAY[0]), HTTP);
            near.place().get_as(web, 5, Some("gateway"), node.address(family))
        });
        checks.that(format!("pod to a neighbour on the second device ({family})"), || {
            let web = SocketAddr::new(family.of(GATEWAY[1]), HTTP);
            near.place().get_as(web, 5, Some("gateway"), second)
        });
        checks.that(format!("pod to a pod of the other node ({family})"), || {
            near.place().get_as(far.web(family), 5, Some("far"), near.address(family))
        });
        checks.that(format!("host to a service with backends on both nodes ({family})"), || {
            let requests = node.place().get(service.at(family, WEB_PORT), 40)?;
            ensure!(failures(&requests).is_empty(), "{:?}", failures(&requests));
            let seen: Vec<_> = names(&requests).into_keys().collect();
            ensure!(seen == ["far", "near"], "answers of {seen:?}");
            node.place().send(service.at(family, ECHO_PORT), 20, &[])?.check()
        });
        for address in [node.address(family), second] {
            checks.that(format!("node port at {address} for an outside client"), || {
                expect_node_ports(&external, address, &["far", "near"])
            });
            checks.that(format!("node port at {address} for a pod"), || {
                expect_node_ports(near.place(), address, &["far", "near"])
            });
        }
    }
    checks.finish(&cluster)
}

/// A container of the first node, behind the bridge `docker0`.
pub(super) fn container_behind_bridge(cluster: &Cluster) -> Result<Place> {
    let host = cluster.nodes()[0].place().namespace();
    host.ip("link add docker0 type bridge\nlink set docker0 up")?;
    host.add_addresses("docker0", BRIDGE)?;
    let container = cluster.container(0, "container", "docker0")?;
    container.namespace().add_addresses("eth0", CONTAINER)?;
    for via in BRIDGE {
        container.namespace().ip(&format!("route add default via {via}"))?;
    }
    Ok(container)
}

#[test]
fn containers_behind_a_bridge_reach_node_ports_and_are_backends() -> Result<()> {
    let spec = Spec { connect_tcp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create_stopped(&spec)?;
    let container = container_behind_bridge(&cluster)?;
    cluster.start()?;
    let made = (|| Ok((cluster.pod(0, "near")?, cluster.pod(1, "far")?)))();
    let (near, far) = cluster.explain(made)?;
    let external = cluster.outside()?;
    let _servers = [near.serve()?, far.serve()?, container.serve("container")?];
    let mut service = Service::of(&[&far, &near]);
    apply(&mut cluster, &service)?;

    let mut checks = Checks::of("a bridge with a container");
    checks.that("the bridge is an uplink, its port is not", || {
        let node = &cluster.nodes()[0];
        expect_reason(node, "docker0", true, "has an address of the node")?;
        expect_reason(node, "container", false, "port of docker0")
    });
    for family in Family::BOTH {
        for address in [cluster.nodes()[0].address(family), family.of(BRIDGE)] {
            checks.that(format!("node port at {address} for the container"), || {
                expect_node_ports(&container, address, &["far", "near"])
            });
        }
        checks.that(format!("pod to the container ({family})"), || {
            let web = SocketAddr::new(family.of(CONTAINER), HTTP);
            near.place().get_as(web, 5, Some("container"), family.of(BRIDGE))
        });
    }
    service.backends[0].addresses = CONTAINER.to_vec();
    service.backends[0].node = cluster.nodes()[0].name().to_owned();
    service.backends.truncate(1);
    // the Service object stays the same
    let objects = node_port_service(&service);
    cluster.change(objects.len() - 1, |cluster| cluster.apply_objects("web", &objects))?;
    for family in Family::BOTH {
        let node = &cluster.nodes()[0];
        checks.that(format!("the container is a backend for clients outside ({family})"), || {
            expect_node_ports(&external, node.address(family), &["container"])
        });
        checks.that(format!("the container is a backend for a pod ({family})"), || {
            let requests = near.place().get(service.at(family, WEB_PORT), 5)?;
            ensure!(failures(&requests).is_empty(), "{requests:?}");
            near.place().send(service.at(family, ECHO_PORT), 5, &[])?.check()
        });
    }
    checks.finish(&cluster)
}

#[test]
fn internal_ip_on_the_loopback_device() -> Result<()> {
    let mut cluster = Cluster::create_stopped(&Spec { connect_tcp: false, ..Spec::new(1) })?;
    let node = &cluster.nodes()[0];
    let transfer: [IpAddr; 2] = ["172.18.0.101".parse()?, "fd00:18::101".parse()?];
    let [v4, v6] = node.addresses();
    node.place().namespace().ip(&format!(
        "addr del {v4}/24 dev eth0\naddr del {v6}/64 dev eth0\naddr add {v4}/32 dev lo\naddr add {v6}/128 dev lo nodad"
    ))?;
    node.place().namespace().add_addresses("eth0", transfer)?;
    for (via, (address, transfer)) in GATEWAY[0].into_iter().zip(node.addresses().into_iter().zip(transfer)) {
        node.place().namespace().ip(&format!("route replace default via {via} dev eth0"))?;
        cluster.fabric().gateway().ip(&format!("route add {address} via {transfer}"))?;
    }
    cluster.start()?;
    let pod = cluster.explain(cluster.pod(0, "pod"))?;
    let external = cluster.outside()?;
    let _servers = [pod.serve()?, external.serve("external")?];
    apply(&mut cluster, &Service::of(&[&pod]))?;
    let node = &cluster.nodes()[0];

    let mut checks = Checks::of("InternalIP on the loopback device");
    checks.that("the device that leads to other machines is the uplink", || {
        expect_reason(node, "eth0", true, "has an address of the node")?;
        expect_reason(node, "lo", false, "loopback device")
    });
    for family in Family::BOTH {
        checks.that(format!("pod to outside ({family})"), || {
            let web = SocketAddr::new(outside(family), HTTP);
            pod.place().get_as(web, 5, Some("external"), family.of(transfer))
        });
        for address in [node.address(family), family.of(transfer)] {
            checks
                .that(format!("node port at {address}"), || expect_node_ports(&external, address, &["pod"]));
        }
    }
    checks.finish(&cluster)
}

#[test]
fn named_device_that_does_not_exist_is_a_warning() -> Result<()> {
    let config = json!({"uplinks": ["eth0", "eth7"]});
    // ready, without the device
    let mut cluster = Cluster::create(&Spec { config, ..Spec::new(1) })?;
    let warned = |node: &Node| -> Result<bool> {
        let problems = status(node)?.problems;
        Ok(problems.iter().any(|problem| problem.subject == "uplinks" && problem.message.contains("eth7")))
    };
    ensure!(warned(&cluster.nodes()[0])?, "no problem names eth7");
    cluster.add_device(0, "eth7", Segment::SECOND)?;
    await_uplink(&mut cluster, "eth7", Some(true))?;
    let node = &cluster.nodes()[0];
    expect_reason(node, "eth7", true, "named in `uplinks`")?;
    ensure!(!warned(node)?, "{:?}", status(node)?.problems);
    Ok(())
}

#[test]
fn excluded_device_is_no_uplink() -> Result<()> {
    let config = json!({"uplinks": ["auto", "!eth1"]});
    let mut cluster = Cluster::create_stopped(&Spec { config, ..Spec::new(1) })?;
    cluster.add_device(0, "eth1", Segment::SECOND)?;
    cluster.nodes()[0].place().namespace().add_addresses("eth1", SECOND)?;
    cluster.start()?;
    let node = &cluster.nodes()[0];
    expect_reason(node, "eth0", true, "has an address of the node")?;
    expect_reason(node, "eth1", false, "excluded by !eth1 in `uplinks`")
}

#[test]
fn devices_are_followed_as_they_change() -> Result<()> {
    let mut cluster = Cluster::create(&Spec { connect_tcp: false, ..Spec::new(1) })?;
    let pod = cluster.explain(cluster.pod(0, "pod"))?;
    let external = cluster.outside()?;
    let _server = pod.serve()?;
    apply(&mut cluster, &Service::of(&[&pod]))?;
    let mut checks = Checks::of("a device that appears, is renamed, loses its addresses and disappears");
    let node_ports = |checks: &mut Checks, when: &str| {
        for address in SECOND {
            checks.that(format!("node port at {address}: {when}"), || {
                expect_node_ports(&external, address, &["pod"])
            });
        }
    };

    cluster.add_device(0, "eth1", Segment::SECOND)?;
    await_uplink(&mut cluster, "eth1", Some(false))?;
    let host = cluster.nodes()[0].place().clone();
    host.namespace().add_addresses("eth1", SECOND)?;
    await_uplink(&mut cluster, "eth1", Some(true))?;
    await_addresses(&mut cluster, &SECOND)?;
    node_ports(&mut checks, "the device appeared");

    host.namespace().ip("link set eth1 down\nlink set eth1 name lan1\nlink set lan1 up")?;
    host.namespace().ip(&format!("addr replace {}/64 dev lan1 nodad", SECOND[1]))?;
    await_uplink(&mut cluster, "lan1", Some(true))?;
    await_uplink(&mut cluster, "eth1", None)?;
    await_addresses(&mut cluster, &SECOND)?;
    node_ports(&mut checks, "the device was renamed");

    // the next agent finds the programs by the new name
    let agent = cluster.nodes_mut()[0].agent_mut();
    agent.terminate()?;
    agent.start()?;
    agent.await_ready()?;
    node_ports(&mut checks, "the agent was restarted");

    host.namespace().ip("addr flush dev lan1 scope global")?;
    await_uplink(&mut cluster, "lan1", Some(false))?;
    checks.that("no program is left on the device", || {
        let shown = host.run("tc", &["filter", "show", "dev", "lan1", "ingress"])?;
        ensure!(shown.trim().is_empty(), "{shown}");
        Ok(())
    });
    host.namespace().ip("link del lan1")?;
    await_uplink(&mut cluster, "lan1", None)?;
    checks.that("the node port at the other address", || {
        expect_node_ports(&external, cluster.nodes()[0].v4().into(), &["pod"])
    });
    checks.finish(&cluster)
}

/// Waits until the datapath has these addresses of the first node.
fn await_addresses(cluster: &mut Cluster, addresses: &[IpAddr]) -> Result<()> {
    cluster.nodes_mut()[0].agent_mut().until("the addresses in the datapath", |agent| {
        let endpoints: Vec<EndpointView> = agent.ask(&View::Endpoints)?;
        let has = |address: &IpAddr| endpoints.iter().any(|endpoint| endpoint.address == *address);
        Ok(addresses.iter().all(has).then_some(()))
    })
}
