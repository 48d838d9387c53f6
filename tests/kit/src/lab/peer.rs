//! A cluster as Linux alone makes it, with kube-proxy for its services: what ours is held against. Knows no agent.

use std::{fs, net::IpAddr, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{
    cluster::Cluster,
    netns::{Namespace, veth},
    node::Node,
    process::{Place, Process, tail},
    wait,
};
use crate::apiserver::User;

/// What kube-proxy needs to begin with on a busy machine.
const START: Duration = Duration::from_secs(60);

/// Who kube-proxy is to the API server: the user that has its rights from the start.
pub fn kube_proxy_user() -> User {
    User { name: "system:kube-proxy".to_owned(), groups: Vec::new() }
}

/// A pod without a plugin: a namespace behind a device of its node.
#[derive(Debug)]
pub struct PlainPod {
    pub place: Place,
    /// IPv4, IPv6.
    pub addresses: [IpAddr; 2],
}

impl Cluster {
    /// Makes routers of the nodes that know each other's pods. For clusters none of whose agents runs.
    pub fn route_plainly(&self) -> Result<()> {
        for node in self.nodes() {
            let namespace = node.place().namespace();
            namespace.sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])?;
            for other in self.nodes().iter().filter(|other| other.name() != node.name()) {
                for (cidr, address) in other.pod_cidrs().iter().zip(other.addresses()) {
                    namespace.ip(&format!("route add {cidr} via {address}"))?;
                }
            }
        }
        Ok(())
    }

    /// The pod with this number in its node's range. Its gateway is the node under its own address, which so is the one it
    /// masquerades behind.
    pub fn plain_pod(&self, node: &Node, name: &str, number: u8) -> Result<PlainPod> {
        let namespace = Namespace::create(&self.namespace(&format!("pod-{name}")))?;
        let host = node.place().namespace();
        veth((&namespace, "eth0"), (host, name))?;
        let place = Place::new(namespace, &node.place().cgroup().join(name), node.place().logs())?;
        let [v4, v6] = node.pod_cidrs();
        let addresses = [v4, v6].map(|range| range.hosts().nth(number.into()).unwrap_or(range.addr()));
        host.ip(&format!("link set {name} up"))?;
        place.namespace().ip("link set eth0 up")?;
        for (address, gateway) in addresses.iter().zip(node.addresses()) {
            let (bits, nodad) = if address.is_ipv4() { (32, "") } else { (128, " nodad") };
            host.ip(&format!(
                "addr add {gateway}/{bits} dev {name}{nodad}\nroute add {address}/{bits} dev {name}"
            ))?;
            place.namespace().ip(&format!(
                "addr add {address}/{bits} dev eth0{nodad}\n\
                 route add {gateway} dev eth0\n\
                 route add default via {gateway}"
            ))?;
        }
        Ok(PlainPod { place, addresses })
    }

    /// Runs kube-proxy on a node, from this file; the API server must know [`kube_proxy_user`].
    pub fn kube_proxy(&self, program: &Path, node: &Node) -> Result<Process> {
        let logs = node.place().logs();
        let kubeconfig = logs.join("kube-proxy.kubeconfig");
        fs::write(&kubeconfig, self.control()?.server().kubeconfig(&kube_proxy_user())?)?;
        let zero = "0s";
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "hostnameOverride": node.name(),
            "clientConnection": {"kubeconfig": kubeconfig},
            // pods of other nodes are strangers, as they are where a pod is masqueraded on its way to them
            "detectLocalMode": "NodeCIDR",
            "nodePortAddresses": ["primary"],
            "oomScoreAdj": 0,
            // the machine's own limits are not a node's to set
            "conntrack": {
                "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": zero, "tcpCloseWaitTimeout": zero,
                "udpTimeout": zero, "udpStreamTimeout": zero,
            },
        });
        let file = logs.join("kube-proxy.yaml");
        fs::write(&file, serde_norway::to_string(&config)?)?;
        let file = file.to_str().context("a path that is no text")?;
        node.place().daemon(program, &["--config", file], &logs.join("kube-proxy.log"))
    }
}

/// Waits until kube-proxy's rules of both families on this node name all of these.
pub fn await_rules(node: &Node, names: &[String]) -> Result<()> {
    let what = format!("rules of kube-proxy on {}", node.name());
    let waited = wait::until(&what, START, || {
        for family in ["ip", "ip6"] {
            let rules = node.place().run("nft", &["list", "table", family, "kube-proxy"])?;
            let missing = names.iter().find(|name| !rules.contains(&format!("/{name}")));
            ensure!(missing.is_none(), "{family} has no service {missing:?}");
        }
        Ok(Some(()))
    });
    waited.with_context(|| tail(&node.place().logs().join("kube-proxy.log"), 20))
}
