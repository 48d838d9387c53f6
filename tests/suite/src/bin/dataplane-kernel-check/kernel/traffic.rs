//! Traffic between pods of two nodes: real agents, the CNI plugin, a service, both families.

use anyhow::{Context as _, Result, ensure};

use super::{Finding, Told, associations};
use dataplane_testkit::{
    lab::{Cluster, ECHO_PORT, Family, Place, Pod, Routing, Service, Spec, WEB_PORT, failures, names},
    traffic::report::Request,
};

/// Requests to a service: that one of two backends gets none of them by chance happens once in a million runs.
pub(super) const REQUESTS: u32 = 20;
/// Bytes of a datagram that travels in pieces.
const IN_PIECES: [&str; 2] = ["--size", "3000"];

/// One way to run a cluster.
#[derive(Clone, Copy)]
struct Mode {
    name: &'static str,
    routing: Routing,
    /// Whether sockets are translated at `connect()`; else packets are.
    at_connect: bool,
}

/// Between them, both ways over the wire and both ways of translation.
const MODES: [Mode; 2] = [
    Mode { name: "native, translated at connect", routing: Routing::Native, at_connect: true },
    Mode { name: "VXLAN, translated per packet", routing: Routing::Vxlan, at_connect: false },
];

/// Tries both, whatever becomes of the first.
pub(crate) fn traffic(told: &mut Told) -> Result<()> {
    for mode in MODES {
        if let Err(error) = try_out(mode, told) {
            told.tell(&finding(mode, "cluster".to_owned(), Err(error)))?;
        }
    }
    Ok(())
}

fn finding(mode: Mode, what: String, result: Result<()>) -> Finding {
    Finding::Traffic { mode: mode.name, what, failed: result.err().map(|error| format!("{error:#}")) }
}

fn try_out(mode: Mode, told: &mut Told) -> Result<()> {
    let spec = Spec {
        routing: mode.routing,
        connect_tcp: mode.at_connect,
        connect_udp: mode.at_connect,
        ..Spec::new(2)
    };
    let mut cluster = Cluster::create(&spec)?;
    let (client, near, far) = (cluster.pod(0, "client")?, cluster.pod(0, "near")?, cluster.pod(1, "far")?);
    let _servers = [near.serve()?, far.serve()?];
    let service = Service::of(&[&near, &far]);
    cluster.apply(&service)?;
    let host = cluster.nodes()[0].place();

    for family in Family::BOTH {
        let mut tell = |what: &str, result| told.tell(&finding(mode, format!("{what}, {family}"), result));
        for pod in [&near, &far] {
            let name = pod.name();
            tell(&format!("ping {name}"), ping(client.place(), pod, family))?;
            tell(&format!("TCP to {name}"), requests(client.place(), pod.web(family), &[name]))?;
            for more in [&[][..], &IN_PIECES] {
                let what = format!("UDP to {name} {}", more.join(" "));
                tell(what.trim_end(), datagrams(client.place(), pod.echo(family), more))?;
            }
        }
        let both = [near.name(), far.name()];
        for (who, place) in [("pod", client.place()), ("host", host)] {
            tell(&format!("{who} TCP to service"), requests(place, service.at(family, WEB_PORT), &both))?;
            tell(&format!("{who} UDP to service"), datagrams(place, service.at(family, ECHO_PORT), &[]))?;
        }
        // a pod that may be its own backend
        tell("TCP to service, back to itself", requests(near.place(), service.at(family, WEB_PORT), &both))?;
    }
    let mut tell = |what: &str, result| told.tell(&finding(mode, format!("SCTP {what}"), result));
    associations::try_out(&mut cluster, &client, [&near, &far], &mut tell)
}

fn ping(from: &Place, to: &Pod, family: Family) -> Result<()> {
    from.ping(to.address(family), 3, 1_000)?.check()
}

fn requests(from: &Place, to: std::net::SocketAddr, servers: &[&str]) -> Result<()> {
    answered_by(&from.get_bytes(to, REQUESTS, 20_000)?, servers)
}

/// Every request is answered, and by all of `servers`.
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
