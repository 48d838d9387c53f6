//! Traffic policies that change under flows: they say where new ones go, and cut none.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use dataplane_testkit::{
    lab::{Checks, Client, Family, Place, Spec},
    traffic::report::{Datagrams, HeldConnections},
};
use serde_json::json;

use super::{Bed, ECHO_PORT, End, NODE_ECHO, answered, fails};

const CONNECTIONS: u32 = 20;
const INTERVAL: Duration = Duration::from_millis(20);
/// Sockets of datagrams, as arguments of `dataplane-traffic datagrams`: one that connects, and one that does not.
const SOCKETS: [&str; 2] = ["--connected", "--size=64"];

/// What goes on all the while.
struct Flows {
    who: String,
    held: Client<HeldConnections>,
    datagrams: Vec<(&'static str, Client<Datagrams>)>,
}

impl Flows {
    /// From a place to the echo of a service, when all connections are open.
    fn start(who: String, place: &Place, echo: SocketAddr, sockets: &[&'static str]) -> Result<Self> {
        let held = place.hold(echo, CONNECTIONS, INTERVAL)?;
        let datagrams = sockets.iter().map(|kind| Ok((*kind, place.keep_sending(echo, INTERVAL, &[kind])?)));
        Ok(Self { who, held, datagrams: datagrams.collect::<Result<_>>()? })
    }

    fn finish(self, checks: &mut Checks) {
        let Self { who, held, datagrams } = self;
        checks.that(format!("connections ({who})"), || {
            let held = held.finish()?;
            let is_whole = held.broken.is_empty() && held.misdirected == 0 && held.received == held.sent;
            ensure!(is_whole && held.sent > CONNECTIONS.into(), "{held:?}");
            Ok(())
        });
        for (kind, datagrams) in datagrams {
            checks.that(format!("datagrams, {kind} ({who})"), || {
                let datagrams = datagrams.finish()?;
                datagrams.check()?;
                ensure!(datagrams.ended == 0, "{datagrams:?}");
                Ok(())
            });
        }
    }
}

/// The backend is on another node than everyone who asks, and serves all the while.
fn cut_nothing(spec: &Spec) -> Result<()> {
    let mut bed = Bed::create(spec, &[1])?;
    bed.tell(|_| {})?;
    // known limit: where an unconnected socket is translated, it has no flow: each of its datagrams is a new one
    let of_pods = if spec.connect_udp { &SOCKETS[..1] } else { &SOCKETS };
    let mut flows = Vec::new();
    for family in Family::BOTH {
        let node_port = SocketAddr::new(bed.node_port(0, family).ip(), NODE_ECHO);
        let cluster_ip = SocketAddr::new(bed.cluster_ip(family).ip(), ECHO_PORT);
        for (who, place, echo, sockets) in [
            ("outside at a node port", &bed.outside, node_port, &SOCKETS[..]),
            ("a pod at the cluster IP", bed.client.place(), cluster_ip, of_pods),
        ] {
            flows.push(Flows::start(format!("{who}, {family}"), place, echo, sockets)?);
        }
    }
    let mut checks = Checks::of(spec.describe());
    for policy in ["externalTrafficPolicy", "internalTrafficPolicy"] {
        for turn in ["Local", "Cluster"] {
            bed.tell(|service| service["spec"][policy] = json!(turn))?;
            for family in Family::BOTH {
                checks.that(format!("new connections go by {policy}: {turn} ({family})"), || {
                    new_ones(&bed, family, policy, turn)
                });
            }
        }
    }
    for flows in flows {
        flows.finish(&mut checks);
    }
    checks.finish(&bed.cluster)
}

/// A policy is of its own side only: the other has its backend.
fn new_ones(bed: &Bed, family: Family, policy: &str, turn: &str) -> Result<()> {
    let sides = [
        ("externalTrafficPolicy", &bed.outside, bed.node_port(0, family)),
        ("internalTrafficPolicy", bed.client.place(), bed.cluster_ip(family)),
    ];
    for (side, place, server) in sides {
        if side == policy && turn == "Local" {
            fails(place, server, End::Silent)?;
        } else {
            answered(place, server, 3)?;
        }
    }
    Ok(())
}

#[test]
fn policies_that_change_cut_no_flow() -> Result<()> {
    cut_nothing(&Spec { connect_tcp: false, ..Spec::new(2) })
}

#[test]
fn policies_that_change_cut_no_flow_of_connect_time() -> Result<()> {
    cut_nothing(&Spec { connect_udp: true, ..Spec::new(2) })
}
