//! Processes of a node reach cluster IPs over UDP, translated per packet, whatever default route
//! the node has: none, or one that leaves by a device without the node's address.

use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane_testkit::lab::{
    Checks, Cluster, ECHO_PORT, Family, Pod, Process, Routing, Service, Spec, WEB_PORT, failures, wait,
};
use serde_json::json;

const TIMEOUT: Duration = Duration::from_secs(20);
const DATAGRAMS: u32 = 10;
/// Ranges of the addresses that the tests give to Services.
const RANGES: [&str; 2] = ["10.96.0.0/16", "fd00:96::/112"];

#[test]
fn native_without_a_default_route() -> Result<()> {
    without_a_default_route(Routing::Native)
}

#[test]
fn overlay_without_a_default_route() -> Result<()> {
    without_a_default_route(Routing::Vxlan)
}

fn without_a_default_route(routing: Routing) -> Result<()> {
    let (cluster, pods, _servers) = create(routing)?;
    let node = &cluster.nodes()[0];
    node.place().namespace().ip("route del default\nroute del ::/0")?;
    check(&cluster, &pods)
}

/// A backend that no node has: the packet leaves by the kernel's route to it.
#[test]
fn backend_outside_of_the_cluster() -> Result<()> {
    let (mut cluster, pods, _servers) = create(Routing::Native)?;
    // the other node's host, by an address that is not in its Node object
    let outside = ["198.18.7.1", "2001:db8:18:7::1"];
    cluster.nodes()[1].place().namespace().ip(&format!(
        "addr add {}/32 dev eth0\n\
         addr add {}/128 dev eth0 nodad",
        outside[0], outside[1]
    ))?;
    let [v4, v6] = Family::BOTH.map(|family| cluster.nodes()[1].address(family));
    cluster.nodes()[0].place().namespace().ip(&format!(
        "route add {}/32 via {v4}\n\
         route add {}/128 via {v6}",
        outside[0], outside[1]
    ))?;
    let _server = cluster.nodes()[1].serve()?;
    let mut backend = pods[1].backend();
    backend.addresses = outside.iter().map(|address| address.parse()).collect::<Result<_, _>>()?;
    let service = Service { backends: vec![backend], ..Service::of(&[]) };
    cluster.apply(&service)?;
    let mut checks = Checks::of("host processes, per packet".to_owned());
    for family in Family::BOTH {
        // TCP, because an UDP server answers from another of the host's addresses
        checks.that(format!("TCP to the cluster IP ({family})"), || {
            let requests = cluster.nodes()[0].place().get(service.at(family, WEB_PORT), DATAGRAMS)?;
            ensure!(failures(&requests).is_empty(), "{:?}", failures(&requests));
            Ok(())
        });
    }
    checks.finish(&cluster)
}

/// As on machines with a public and a private network: the node's address is that of the private
/// one.
#[test]
fn with_a_default_route_by_another_device() -> Result<()> {
    let (cluster, pods, _servers) = create(Routing::Native)?;
    cluster.nodes()[0].place().namespace().ip(
        "link add public0 address 02:00:00:00:77:01 type veth peer name public1\n\
         link set public0 up\n\
         link set public1 up\n\
         addr add 198.18.0.1/24 dev public0\n\
         addr add 2001:db8:18::1/64 dev public0 nodad\n\
         neigh replace 198.18.0.2 lladdr 02:00:00:00:77:02 nud permanent dev public0\n\
         neigh replace 2001:db8:18::2 lladdr 02:00:00:00:77:02 nud permanent dev public0\n\
         route replace default via 198.18.0.2 dev public0\n\
         route del ::/0\n\
         route add ::/0 via 2001:db8:18::2 dev public0",
    )?;
    check(&cluster, &pods)
}

/// A service of a pod on each of two nodes, translated per packet, and the routes to its range.
fn create(routing: Routing) -> Result<(Cluster, [Pod; 2], [Process; 2])> {
    let spec = Spec { routing, connect_tcp: false, connect_udp: false, ..Spec::new(2) };
    let mut cluster = Cluster::create(&spec)?;
    let made = (|| Ok([cluster.pod(0, "here")?, cluster.pod(1, "elsewhere")?]))();
    let pods = cluster.explain(made)?;
    let servers = [pods[0].serve()?, pods[1].serve()?];
    cluster.apply(&Service::of(&[&pods[0], &pods[1]]))?;
    let range = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": RANGES},
    });
    cluster.change(1, |cluster| cluster.apply_objects("range", &[range]))?;
    for family in Family::BOTH {
        let address = Service::of(&[]).at(family, WEB_PORT).ip();
        // the agent adds them after the tables
        wait::until("the kernel's route to cluster IPs", TIMEOUT, || {
            let route = cluster.nodes()[0].place().namespace().ip(&format!("route get {address}"))?;
            Ok(["via 169.254.218.218 ", "via fe80::da7a:0:0:218 "]
                .iter()
                .any(|via| route.contains(via))
                .then_some(()))
        })?;
    }
    Ok((cluster, pods, servers))
}

fn check(cluster: &Cluster, pods: &[Pod; 2]) -> Result<()> {
    let node = &cluster.nodes()[0];
    let web = Service::of(&[]);
    let mut checks = Checks::of("host processes, per packet".to_owned());
    for family in Family::BOTH {
        for kind in ["--connected", "--fresh"] {
            checks.that(format!("UDP to the cluster IP, {kind} ({family})"), || {
                let report = node.place().send(web.at(family, ECHO_PORT), DATAGRAMS, &[kind])?;
                ensure!(report.is_complete(), "{report:?}");
                Ok(())
            });
        }
        checks.that(format!("both backends see the node's address ({family})"), || {
            node.place().get_as(web.at(family, WEB_PORT), 40, None, node.address(family))
        });
        for pod in pods {
            checks.that(format!("the pod itself ({family})"), || {
                let report = node.place().send(pod.echo(family), DATAGRAMS, &["--connected"])?;
                ensure!(report.is_complete(), "{report:?}");
                Ok(())
            });
        }
    }
    checks.finish(cluster)
}
