//! Host ports, from every kind of client, in both routing modes, with and without connect-time
//! translation.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, bail, ensure};
use dataplane_testkit::{
    lab::{Checks, Cluster, Family, Place, Routing, Spec, failures},
    traffic::{ECHO, HTTP},
};
use serde_json::{Value, json};

const WEB: u16 = 8088;
const ECHO_PORT: u16 = 7077;
/// A host port on 127.0.0.1 only.
const LOCAL: u16 = 9099;

#[test]
fn native_with_connect_time_translation() -> Result<()> {
    host_ports(&Spec { connect_tcp: true, connect_udp: true, ..Spec::new(2) })
}

#[test]
fn native_per_packet() -> Result<()> {
    host_ports(&Spec { connect_tcp: false, connect_udp: false, ..Spec::new(2) })
}

#[test]
fn overlay_per_packet() -> Result<()> {
    host_ports(&Spec { routing: Routing::Vxlan, connect_tcp: false, connect_udp: false, ..Spec::new(2) })
}

fn mappings() -> Value {
    json!({"portMappings": [
        {"hostPort": WEB, "containerPort": HTTP, "protocol": "tcp"},
        {"hostPort": ECHO_PORT, "containerPort": ECHO, "protocol": "udp"},
        {"hostPort": LOCAL, "containerPort": HTTP, "protocol": "tcp", "hostIP": "127.0.0.1"},
    ]})
}

fn host_ports(spec: &Spec) -> Result<()> {
    let cluster = Cluster::create(spec)?;
    let made = (|| {
        let server = cluster.pod_with(0, "server", mappings())?;
        Ok((server, cluster.pod(0, "near")?, cluster.pod(1, "far")?))
    })();
    let (server, near, far) = cluster.explain(made)?;
    let _server = server.serve()?;
    let (node, other) = (&cluster.nodes()[0], &cluster.nodes()[1]);
    let external = cluster.outside()?;

    let mut checks = Checks::of(spec.describe());
    for family in Family::BOTH {
        let (web, echo) = (at(node.address(family), WEB), at(node.address(family), ECHO_PORT));
        let clients = [
            ("a pod of the same node", near.place(), near.address(family)),
            ("a pod of another node", far.place(), far.address(family)),
            ("another host", other.place(), other.address(family)),
            ("its own host", node.place(), node.address(family)),
            ("an external client", &external, dataplane_testkit::lab::outside(family)),
        ];
        for (from, place, address) in clients {
            checks.that(format!("{from} over TCP ({family})"), || {
                place.get_as(web, 10, Some("server"), address)
            });
            checks.that(format!("{from} over UDP ({family})"), || place.send(echo, 10, &[])?.check());
        }
        checks.that(format!("the pod itself ({family})"), || {
            let requests = server.place().get(web, 10)?;
            ensure!(failures(&requests).is_empty(), "{:?}", failures(&requests));
            Ok(())
        });
        let loopback: IpAddr = match family {
            Family::V4 => Ipv4Addr::LOCALHOST.into(),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        checks.that(format!("the host's loopback over TCP ({family})"), || {
            node.place().get_as(at(loopback, WEB), 10, Some("server"), node.address(family))
        });
        checks.that(format!("the host's loopback over UDP ({family})"), || {
            node.place().send(at(loopback, ECHO_PORT), 10, &[])?.check()
        });
        checks.that(format!("a pod's loopback is its own ({family})"), || {
            refused(near.place(), at(loopback, WEB))
        });
    }
    checks.that("a host port on 127.0.0.1 is at no other address", || {
        node.place().get_as(
            at(Ipv4Addr::LOCALHOST.into(), LOCAL),
            10,
            Some("server"),
            node.address(Family::V4),
        )?;
        refused(far.place(), at(node.address(Family::V4), LOCAL))
    });
    checks.that("a second pod is refused, and the error names the owner", || {
        let Err(error) = cluster.pod_with(0, "second", mappings()) else {
            bail!("a second pod got the host port")
        };
        let message = format!("{error:#}");
        ensure!(message.contains("hostPort 8088/TCP is in use by pod default/server"), "{message}");
        Ok(())
    });
    checks.that("the port is released with its pod", || {
        server.delete()?;
        let web = at(node.address(Family::V4), WEB);
        refused(far.place(), web)?;
        let successor = cluster.pod_with(0, "successor", mappings())?;
        let _server = successor.serve()?;
        far.place().get_as(web, 10, Some("successor"), far.address(Family::V4))
    });
    checks.finish(&cluster)
}

fn at(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip, port)
}

/// The request fails: the stack refuses the connection.
fn refused(from: &Place, to: SocketAddr) -> Result<()> {
    let requests = from.get(to, 1)?;
    ensure!(!failures(&requests).is_empty(), "{to} answered: {requests:?}");
    Ok(())
}
