//! Traffic between a pod and a machine outside of the cluster through an IPsec tunnel, which the
//! machine insists on. Not every kernel that the other tests run on has ESP.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};
use dataplane_testkit::{
    lab::{Cluster, Family, Place, Pod, outside},
    traffic::{ECHO, HTTP},
};

use super::traffic::REQUESTS;

const CIPHER: &str = "enc cbc(aes) 0x00112233445566778899aabbccddeeff";
const AUTHENTICATION: &str =
    "auth hmac(sha256) 0x00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// Reports each check with `report`.
pub(super) fn check(
    cluster: &mut Cluster,
    pod: &Pod,
    report: &mut impl FnMut(&str, Result<()>) -> Result<()>,
) -> Result<()> {
    let machine = cluster.outside()?;
    let _server = machine.serve("external")?;
    let _own = pod.serve()?;
    for family in Family::BOTH {
        connect(cluster, &machine, family).context("set up IPsec")?;
        let node = &mut cluster.nodes_mut()[0];
        node.agent_mut().until("egress by stack", |agent| {
            Ok((agent.status()?.status.egress.way == "stack").then_some(()))
        })?;
        let (web, echo) = (SocketAddr::new(outside(family), HTTP), SocketAddr::new(outside(family), ECHO));
        let source = pod.address(family);
        report(
            &format!("TCP to outside, {family}"),
            pod.place().get_as(web, REQUESTS, Some("external"), source),
        )?;
        report(&format!("UDP to outside, {family}"), pod.place().send(echo, REQUESTS, &[])?.check())?;
        report(&format!("ping outside, {family}"), pod.place().ping(outside(family), 3, 1_000)?.check())?;
        report(
            &format!("TCP from outside, {family}"),
            machine.get_as(pod.web(family), REQUESTS, Some(pod.name()), outside(family)),
        )?;
    }
    Ok(())
}

/// A tunnel between the pods of the first node and the machine outside.
fn connect(cluster: &Cluster, machine: &Place, family: Family) -> Result<()> {
    let node = &cluster.nodes()[0];
    let (here, there) = (node.address(family), outside(family));
    let pods = family.of(node.pod_cidrs());
    let tunnel = |from: IpAddr, to: IpAddr| format!("tmpl src {from} dst {to} proto esp mode tunnel");
    let state = |from: IpAddr, to: IpAddr, spi: u32| {
        format!(
            "xfrm state add src {from} dst {to} proto esp spi {spi} mode tunnel {CIPHER} {AUTHENTICATION}\n"
        )
    };
    let states = state(here, there, 0x100) + &state(there, here, 0x101);
    let leaving = format!("src {pods} dst {there}");
    let arriving = format!("src {there} dst {pods}");
    let (to_machine, to_node) = (tunnel(here, there), tunnel(there, here));
    node.place().namespace().ip(&format!(
        "{states}xfrm policy add {leaving} dir out {to_machine}\n\
         xfrm policy add {arriving} dir fwd {to_node}"
    ))?;
    machine.namespace().ip(&format!(
        "{states}xfrm policy add {arriving} dir out {to_node}\n\
         xfrm policy add {leaving} dir in {to_machine}"
    ))?;
    Ok(())
}
