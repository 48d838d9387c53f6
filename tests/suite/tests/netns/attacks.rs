//! What machines and containers beside the node may send, on real devices: a switch that floods
//! frames, containers and pods that use the addresses of others. `prog::spoofing` has every kind of
//! packet; here the agents' own tables decide.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use dataplane_agent::api::request::{FlowFilter, FlowList, View};
use dataplane_testkit::{
    lab::{Checks, Cluster, Family, Node, Place, Pod, Service, Spec, WEB_PORT, failures},
    traffic::HTTP,
};
use serde_json::json;

use super::devices::{CONTAINER, container_behind_bridge};

/// Addresses of a load balancer.
const LOAD_BALANCER: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 10)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0x10, 0, 0, 0, 0, 0x10)),
];
const REQUESTS: u32 = 30;
#[test]
fn nodes_behind_a_switch_that_floods_leave_each_others_frames_alone() -> Result<()> {
    flooding_switch(&Spec { connect_tcp: false, ..Spec::new(3) })
}

#[test]
fn nodes_behind_a_switch_that_floods_leave_each_others_frames_alone_with_xdp() -> Result<()> {
    flooding_switch(&Spec { connect_tcp: false, xdp: true, ..Spec::new(3) })
}

/// The load balancer's address is routed to the first node; the others receive a copy of every
/// frame, and would answer it: they have the same Services.
fn flooding_switch(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    let far = cluster.explain(cluster.pod(2, "far"))?;
    let external = cluster.outside()?;
    let _server = far.serve()?;
    let service = Service::of(&[&far]);
    let mut objects = service.objects();
    objects[0]["spec"]["type"] = json!("LoadBalancer");
    objects[0]["status"]["loadBalancer"]["ingress"] =
        json!(LOAD_BALANCER.map(|address| json!({"ip": address.to_string()})));
    cluster.change(objects.len(), |cluster| cluster.apply_objects("web", &objects))?;
    let fabric = cluster.fabric();
    for (address, via) in LOAD_BALANCER.iter().zip(cluster.nodes()[0].addresses()) {
        fabric.gateway().ip(&format!("route add {address} via {via}"))?;
    }
    for node in &cluster.nodes()[1..] {
        node.place().namespace().ip("link set eth0 promisc on")?;
    }
    // it forgets at once where a station is
    fabric.bridges().ip("link set br1 type bridge ageing_time 0")?;

    let mut checks = Checks::of(format!("a switch that floods, {}", spec.describe()));
    for family in Family::BOTH {
        checks.that(format!("connections to the load balancer ({family})"), || {
            let frontend = SocketAddr::new(family.of(LOAD_BALANCER), WEB_PORT);
            let requests = external.get(frontend, REQUESTS)?;
            ensure!(failures(&requests).is_empty(), "{:?}", failures(&requests));
            ensure!(requests.len() == REQUESTS as usize);
            Ok(())
        });
    }
    let bystander = &cluster.nodes()[1];
    checks.that("a node that only received copies left them alone", || {
        let left = bystander.count("from_wire", "stack_other_host")?;
        ensure!(left >= u64::from(REQUESTS), "{left} frames for others");
        let flows: FlowList = bystander.agent().ask(&View::Flows(FlowFilter::default()))?;
        ensure!(flows.total == 0, "{flows:?}");
        Ok(())
    });
    checks.finish(&cluster)
}

/// A request from an address that the sender adds to its own device; it must not be answered, and
/// must be dropped for `reason` at `hook`.
fn expect_refused(
    node: &Node,
    sender: &Place,
    source: IpAddr,
    server: SocketAddr,
    drop: (&str, &str),
) -> Result<()> {
    let before = node.count(drop.0, drop.1)?;
    let bits = if source.is_ipv4() { 32 } else { 128 };
    sender.namespace().ip(&format!("addr add {source}/{bits} dev eth0"))?;
    let requests = sender.get_from(server, 1, source);
    sender.namespace().ip(&format!("addr del {source}/{bits} dev eth0"))?;
    let requests = requests?;
    ensure!(!failures(&requests).is_empty(), "a packet from {source} was answered");
    let dropped = node.count(drop.0, drop.1)? - before;
    ensure!(dropped > 0, "no packet from {source} was dropped as {}", drop.1);
    Ok(())
}

#[test]
fn pods_and_containers_do_not_send_from_the_addresses_of_others() -> Result<()> {
    let spec = Spec { connect_tcp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create_stopped(&spec)?;
    let container = container_behind_bridge(&cluster)?;
    cluster.start()?;
    let made = (|| Ok([cluster.pod(0, "near")?, cluster.pod(0, "other")?, cluster.pod(1, "far")?]))();
    let pods = cluster.explain(made)?;
    let _servers = pods.iter().map(Pod::serve).collect::<Result<Vec<_>>>()?;
    let [near, other, far] = &pods;
    let node = &cluster.nodes()[0];

    let mut checks = Checks::of("addresses of others");
    for family in Family::BOTH {
        checks.that(format!("their own work: pod, container ({family})"), || {
            near.place().get_as(far.web(family), 3, Some("far"), near.address(family))?;
            container.get_as(near.web(family), 3, Some("near"), family.of(CONTAINER))
        });
        let sources = [
            ("a pod of the node", other.address(family)),
            ("the node", node.address(family)),
            ("another node", cluster.nodes()[1].address(family)),
            ("a pod of another node", far.address(family)),
            ("a machine outside", family.of(LOAD_BALANCER)),
        ];
        for (whose, source) in sources {
            checks.that(format!("a pod sends as {whose} ({family})"), || {
                // to a pod of each node, but not to the owner of the address
                let to = if source == far.address(family) { other } else { far };
                let server = to.web(family);
                expect_refused(node, near.place(), source, server, ("from_pod", "source_not_owned"))
            });
        }
        for (whose, source) in &sources[..2] {
            checks.that(format!("a container sends as {whose} ({family})"), || {
                let server = near.web(family);
                expect_refused(node, &container, *source, server, ("from_wire", "source_is_local"))
            });
        }
        checks.that(format!("the node itself, HTTP, from a pod as another ({family})"), || {
            let server = SocketAddr::new(node.address(family), HTTP);
            let drop = ("from_pod", "source_not_owned");
            expect_refused(node, near.place(), other.address(family), server, drop)
        });
    }
    checks.finish(&cluster)
}
