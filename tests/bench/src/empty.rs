//! Two nodes whose programs only redirect: what veths and the hook cost without any lookup.
//!
//! The pods' gateway has the link address of the other node's uplink, so that no program has to
//! write one.

use anyhow::{Context as _, Result};
use nix::net::if_::if_nametoindex;

use super::{
    baselines::{Cluster, Proxy, Routing},
    bpf::{
        kernel::{Kind, Link, Program},
        programs,
    },
    network::{GATEWAY, mac_of},
    path::TrafficPath,
};
use dataplane_testkit::lab::Namespace;

/// The nodes, with a program on each uplink and on the device of each pod.
#[derive(Debug)]
pub struct EmptyCluster {
    cluster: Cluster,
    _programs: Vec<Link>,
}

impl EmptyCluster {
    pub fn create() -> Result<Self> {
        let cluster = Cluster::create("empty", Routing::Native, Proxy::None)?;
        let [(first, client), (second, server)] = cluster.ends();
        let mut links = Vec::new();
        for (node, pod, other) in [(first, client, second), (second, server, first)] {
            let mac = mac_of(other, "eth0")?;
            pod.ip(&format!("neigh replace {GATEWAY} lladdr {mac} dev eth0 nud permanent"))?;
            links.extend(attach(node)?);
        }
        Ok(Self { cluster, _programs: links })
    }

    /// Returns the path between pods of the two nodes.
    pub fn two_nodes(&self) -> TrafficPath {
        self.cluster.two_nodes()
    }
}

/// Redirects from the pod to the uplink, and from the uplink to the pod.
fn attach(node: &Namespace) -> Result<[Link; 2]> {
    node.enter(|| {
        let index = |name: &str| if_nametoindex(name).with_context(|| format!("cannot find device {name}"));
        let (pod, uplink) = (index("pod1")?, index("eth0")?);
        let to_uplink = Program::load("to_uplink", Kind::Tc, &programs::redirect(uplink))?;
        let to_pod = Program::load("to_pod", Kind::Tc, &programs::redirect_to_peer(pod))?;
        Ok([to_uplink.attach(pod)?, to_pod.attach(uplink)?])
    })?
}
