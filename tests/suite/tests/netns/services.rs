//! ClusterIP services, from pods and hosts, over TCP and UDP: with connect-time translation and per
//! packet, in both routing modes. Clients must not see a difference.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Result, bail, ensure};
use dataplane_testkit::{
    lab::{
        Checks, Cluster, Family, Place, Pod, Protocol, Routing, Service, ServicePort, Source, Spec, failures,
        names, service_addresses,
    },
    traffic::{ECHO, HTTP},
};

const WEB: u16 = 80;
const ECHO_PORT: u16 = 7;
/// Requests that reach each of three backends (one is missed once in 10⁹ runs).
const MANY: u32 = 55;

#[test]
fn native_with_connect_time_translation() -> Result<()> {
    services(&Spec { connect_tcp: true, connect_udp: true, ..Spec::new(2) })
}

#[test]
fn native_per_packet() -> Result<()> {
    services(&Spec { connect_tcp: false, connect_udp: false, ..Spec::new(2) })
}

#[test]
fn overlay_with_connect_time_translation() -> Result<()> {
    services(&Spec { routing: Routing::Vxlan, connect_tcp: true, connect_udp: true, ..Spec::new(2) })
}

#[test]
fn overlay_per_packet() -> Result<()> {
    services(&Spec { routing: Routing::Vxlan, connect_tcp: false, connect_udp: false, ..Spec::new(2) })
}

#[test]
fn overlay_per_packet_from_an_api_server() -> Result<()> {
    let spec = Spec { routing: Routing::Vxlan, connect_tcp: false, connect_udp: false, ..Spec::new(2) };
    services(&Spec { source: Source::kubernetes(), ..spec })
}

fn services(spec: &Spec) -> Result<()> {
    let mut cluster = Cluster::create(spec)?;
    let pods = cluster.explain(make_pods(&cluster));
    let (client, webs) = pods?;
    let _servers = webs.iter().map(Pod::serve).collect::<Result<Vec<_>>>()?;
    let web = service("web", 1, &webs);
    let empty = service("empty", 2, &[]);
    cluster.apply(&web)?;
    cluster.apply(&empty)?;
    let node = &cluster.nodes()[0];

    let mut checks = Checks::of(spec.describe());
    for family in Family::BOTH {
        let clients = [("pod", client.place()), ("host", node.place()), ("backend", webs[0].place())];
        for (from, place) in clients {
            tcp(&mut checks, from, place, &web, family);
            udp(&mut checks, from, place, &web, family, large_datagram(spec, from));
        }
        checks.that(format!("a backend sees the pod ({family})"), || {
            client.place().get_as(web.at(family, WEB), 20, None, client.address(family))
        });
        checks.that(format!("a backend sees the host ({family})"), || {
            node.place().get_as(web.at(family, WEB), 20, None, node.address(family))
        });
        for (from, place) in [("pod", client.place()), ("host", node.place())] {
            checks.that(format!("{from}: a service without endpoints ({family})"), || {
                expect_no_answer(place, &empty, family)
            });
        }
    }
    for (from, place) in [("pod", client.place()), ("host", node.place())] {
        checks.that(format!("{from}: an IPv6 socket to an IPv4 service"), || {
            let IpAddr::V4(v4) = web.at(Family::V4, WEB).ip() else { bail!("no IPv4 address") };
            let mapped = SocketAddr::new(v4.to_ipv6_mapped().into(), WEB);
            let requests = place.get(mapped, 10)?;
            ensure!(names(&requests).values().sum::<u64>() == 10, "{:?}", failures(&requests));
            Ok(())
        });
    }
    checks.that("the expected programs translated", || {
        let sockets = node.count("connect", "socket_translated")?;
        ensure!((sockets > 0) == spec.connect_tcp, "{sockets} sockets were translated");
        let no_backend = node.count("from_pod", "no_backend")?;
        ensure!(no_backend > 0, "no packet was dropped as no_backend");
        Ok(())
    });
    checks.finish(&cluster)
}

fn make_pods(cluster: &Cluster) -> Result<(Pod, Vec<Pod>)> {
    let webs = [cluster.pod(0, "web-1")?, cluster.pod(1, "web-2")?, cluster.pod(1, "web-3")?];
    Ok((cluster.pod(0, "client")?, webs.into()))
}

fn service(name: &str, number: u16, backends: &[Pod]) -> Service {
    let port = |name, port, protocol, target| ServicePort { name, port, protocol, target };
    Service {
        name: name.to_owned(),
        addresses: service_addresses(number).to_vec(),
        ports: vec![
            port("http", WEB, Protocol::Tcp, HTTP),
            port("echo", ECHO_PORT, Protocol::Tcp, ECHO),
            port("echo-udp", ECHO_PORT, Protocol::Udp, ECHO),
        ],
        backends: backends.iter().map(Pod::backend).collect(),
    }
}

fn tcp(checks: &mut Checks, from: &str, place: &Place, web: &Service, family: Family) {
    let what = |what: &str| format!("{from}: TCP, {what} ({family})");
    checks.that(what("every backend is used"), || {
        let requests = place.get(web.at(family, WEB), MANY)?;
        ensure!(failures(&requests).is_empty(), "{:?}", failures(&requests));
        ensure!(names(&requests).len() == web.backends.len(), "{:?}", names(&requests));
        Ok(())
    });
    checks.that(what("bulk"), || {
        let requests = place.get_bytes(web.at(family, WEB), 6, 500_000)?;
        ensure!(failures(&requests).is_empty(), "{:?}", failures(&requests));
        Ok(())
    });
    checks.that(what("another port, long-lived connections"), || {
        let held = place.hold(web.at(family, ECHO_PORT), 100, Duration::from_millis(20))?.finish()?;
        ensure!(held.broken.is_empty() && held.received == held.sent, "{held:?}");
        ensure!(held.servers.len() == web.backends.len(), "{held:?}");
        Ok(())
    });
}

fn udp(checks: &mut Checks, from: &str, place: &Place, web: &Service, family: Family, large: &str) {
    let what = |what: &str| format!("{from}: UDP, {what} ({family})");
    let echo = web.at(family, ECHO_PORT);
    checks.that(what("a socket for each datagram, every backend is used"), || {
        let datagrams = place.send(echo, MANY, &["--fresh"])?;
        datagrams.check()?;
        ensure!(datagrams.servers.len() == web.backends.len(), "{datagrams:?}");
        Ok(())
    });
    for kind in ["--connected", large] {
        checks.that(what(&format!("one socket, {kind}")), || {
            let datagrams = place.send(echo, 20, &[kind])?;
            datagrams.check()?;
            ensure!(datagrams.servers.len() == 1, "one flow, several backends: {datagrams:?}");
            Ok(())
        });
    }
}

/// The size of a large datagram: fragmented, except where the known limit applies.
///
/// Known limit: unconnected sockets of the host are translated per packet. Its kernel routes to the
/// cluster IP, not to the backend, and fragments to the MTU of the uplink. These fragments do not
/// fit the overlay.
fn large_datagram(spec: &Spec, from: &str) -> &'static str {
    let is_limited = from == "host" && spec.routing == Routing::Vxlan;
    if is_limited { "--size=1300" } else { "--size=3000" }
}

/// No request gets an answer.
fn expect_no_answer(place: &Place, empty: &Service, family: Family) -> Result<()> {
    let requests = place.get(empty.at(family, WEB), 1)?;
    ensure!(names(&requests).is_empty() && failures(&requests).len() == 1, "{requests:?}");
    let datagrams = place.send(empty.at(family, ECHO_PORT), 2, &["--timeout-ms", "100"])?;
    ensure!(datagrams.received == 0, "{datagrams:?}");
    Ok(())
}
