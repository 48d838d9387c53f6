//! "`HostPort` validates that there is no conflict between pods with same hostPort but different
//! hostIP and protocol".

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use dataplane_testkit::{
    lab::{Cluster, Family, Place, Spec},
    only_in_full,
    traffic::{ECHO, HTTP, report::Transport},
};
use serde_json::{Value, json};

use super::testbed::expect_answers_over;

const PORT: u16 = 54_323;

fn mapping(host_ip: IpAddr, protocol: &str, port: u16) -> Value {
    json!({"portMappings": [{"hostPort": PORT, "containerPort": port, "protocol": protocol, "hostIP": host_ip}]})
}

#[test]
fn validates_that_there_is_no_conflict_between_pods_with_same_host_port_but_different_host_ip_and_protocol()
-> Result<()> {
    only_in_full!();
    // the node's own address is used by clients on and outside the node
    for at_connect in [true, false] {
        let spec = Spec { connect_tcp: at_connect, connect_udp: at_connect, ..Spec::new(1) };
        let cluster = Cluster::create(&spec)?;
        let node = &cluster.nodes()[0];
        let own = node.address(Family::V4);
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        let made = [("pod1", loopback, "tcp", HTTP), ("pod2", own, "tcp", HTTP), ("pod3", own, "udp", ECHO)]
            .map(|(name, address, protocol, port)| {
                cluster.pod_with(0, name, mapping(address, protocol, port))
            });
        let pods = cluster.explain(made.into_iter().collect::<Result<Vec<_>>>())?;
        let _servers = pods.iter().map(dataplane_testkit::lab::Pod::serve).collect::<Result<Vec<_>>>()?;
        let external = cluster.outside()?;
        let expect = |transport, place: &Place, address, name: &str| {
            let at = SocketAddr::new(address, PORT);
            expect_answers_over(transport, place, at, &[name.to_owned()])
                .with_context(|| format!("connect {at_connect}"))
        };
        let checked = (|| {
            expect(Transport::Tcp, node.place(), loopback, "pod1")?;
            for place in [node.place(), &external] {
                expect(Transport::Tcp, place, own, "pod2")?;
                expect(Transport::Udp, place, own, "pod3")?;
            }
            from_own_address(node.place(), own, loopback)
        })();
        cluster.explain(checked)?;
    }
    Ok(())
}

/// As `curl --interface <the node's address> 127.0.0.1:54323` does.
fn from_own_address(place: &Place, own: IpAddr, loopback: IpAddr) -> Result<()> {
    let requests = place.get_from(SocketAddr::new(loopback, PORT), 3, own)?;
    ensure!(requests.len() == 3 && requests.iter().all(|request| request.is_from("pod1")), "{requests:?}");
    Ok(())
}
