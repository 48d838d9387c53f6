//! Traffic between pods of two nodes: real agents, the CNI plugin, a service, both families.

use anyhow::{Context as _, Result, ensure};

use super::{
    Finding, Findings, associations, ipsec,
    underlay::{self, Underlay},
};
use dataplane_testkit::{
    lab::{Cluster, ECHO_PORT, Family, Place, Pod, Routing, Service, Spec, WEB_PORT, failures, names},
    traffic::report::Request,
};

/// Requests to a service. The chance that one of two backends gets none is one in a million.
pub(super) const REQUESTS: u32 = 20;
/// A datagram that is sent in fragments.
const FRAGMENTED: [&str; 2] = ["--size", "3000"];

/// A configuration of the cluster.
#[derive(Clone, Copy)]
struct Mode {
    name: &'static str,
    routing: Routing,
    underlay: Underlay,
    /// Connect-time translation; else translation per packet.
    at_connect: bool,
}

/// Together they cover both routing modes, both kinds of translation, and each underlay.
const MODES: [Mode; 4] = [
    Mode {
        name: "native, translated at connect",
        routing: Routing::Native,
        underlay: Underlay::Ethernet,
        at_connect: true,
    },
    Mode {
        name: "VXLAN, translated per packet",
        routing: Routing::Vxlan,
        underlay: Underlay::Ethernet,
        at_connect: false,
    },
    Mode {
        name: "native over WireGuard, translated per packet",
        routing: Routing::Native,
        underlay: Underlay::WireGuard,
        at_connect: false,
    },
    Mode {
        name: "native over a VLAN, translated per packet",
        routing: Routing::Native,
        underlay: Underlay::Vlan,
        at_connect: false,
    },
];

/// Runs all modes, even if one fails.
pub(crate) fn traffic(findings: &mut Findings) -> Result<()> {
    for mode in MODES {
        if let Err(error) = check_mode(mode, findings) {
            findings.report(&finding(mode, "cluster".to_owned(), Err(error)))?;
        }
    }
    Ok(())
}

fn finding(mode: Mode, what: String, result: Result<()>) -> Finding {
    Finding::Traffic { mode: mode.name, what, failed: result.err().map(|error| format!("{error:#}")) }
}

fn check_mode(mode: Mode, findings: &mut Findings) -> Result<()> {
    let spec = Spec {
        routing: mode.routing,
        connect_tcp: mode.at_connect,
        connect_udp: mode.at_connect,
        ..Spec::new(2)
    };
    let mut cluster = Cluster::create_stopped(&spec)?;
    underlay::prepare(&cluster, mode.underlay).context("connect the nodes")?;
    cluster.start()?;
    let (client, near, far) = (cluster.pod(0, "client")?, cluster.pod(0, "near")?, cluster.pod(1, "far")?);
    let _servers = [near.serve()?, far.serve()?];
    let service = Service::of(&[&near, &far]);
    cluster.apply(&service)?;
    let host = cluster.nodes()[0].place();

    for family in Family::BOTH {
        let mut report =
            |what: &str, result| findings.report(&finding(mode, format!("{what}, {family}"), result));
        for pod in [&near, &far] {
            let name = pod.name();
            report(&format!("ping {name}"), ping(client.place(), pod, family))?;
            report(&format!("TCP to {name}"), requests(client.place(), pod.web(family), &[name]))?;
            for more in [&[][..], &FRAGMENTED] {
                let what = format!("UDP to {name} {}", more.join(" "));
                report(what.trim_end(), datagrams(client.place(), pod.echo(family), more))?;
            }
        }
        let both = [near.name(), far.name()];
        for (client, place) in [("pod", client.place()), ("host", host)] {
            report(
                &format!("{client} TCP to service"),
                requests(place, service.at(family, WEB_PORT), &both),
            )?;
            report(
                &format!("{client} UDP to service"),
                datagrams(place, service.at(family, ECHO_PORT), &[]),
            )?;
        }
        // hairpin: the client is one of the backends
        report("TCP to service, with hairpin", requests(near.place(), service.at(family, WEB_PORT), &both))?;
    }
    // the associations are the same on all devices
    if mode.underlay != Underlay::Ethernet {
        return Ok(());
    }
    let mut report = |what: &str, result| findings.report(&finding(mode, format!("SCTP {what}"), result));
    associations::check(&mut cluster, &client, [&near, &far], &mut report)?;
    // nor does the way between nodes matter to it
    if mode.routing == Routing::Native {
        let mut report =
            |what: &str, result| findings.report(&finding(mode, format!("IPsec: {what}"), result));
        ipsec::check(&mut cluster, &client, &mut report)?;
    }
    Ok(())
}

fn ping(from: &Place, to: &Pod, family: Family) -> Result<()> {
    from.ping(to.address(family), 3, 1_000)?.check()
}

fn requests(from: &Place, to: std::net::SocketAddr, servers: &[&str]) -> Result<()> {
    answered_by(&from.get_bytes(to, REQUESTS, 20_000)?, servers)
}

/// Fails unless every request is answered and every one of `servers` answered some.
pub(super) fn answered_by(requests: &[Request], servers: &[&str]) -> Result<()> {
    ensure!(failures(requests).is_empty(), "{:?}", failures(requests));
    let answered = names(requests);
    let missing = servers.iter().find(|server| !answered.contains_key(**server));
    ensure!(
        missing.is_none() && answered.len() == servers.len(),
        "answered by {answered:?}, not by {servers:?}"
    );
    Ok(())
}

fn datagrams(from: &Place, to: std::net::SocketAddr, more: &[&str]) -> Result<()> {
    let datagrams = from.send(to, REQUESTS, more).context("send")?;
    ensure!(datagrams.is_complete(), "{datagrams:?}");
    Ok(())
}
