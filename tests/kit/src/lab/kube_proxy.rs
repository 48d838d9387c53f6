//! A cluster of plain Linux routing and kube-proxy, which tests compare with the agent. Runs no
//! agent.

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

/// Timeout for kube-proxy to write its rules on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// kube-proxy's user, which has its permissions by default.
pub fn kube_proxy_user() -> User {
    User { name: "system:kube-proxy".to_owned(), groups: Vec::new() }
}

/// A pod without the CNI plugin: a namespace connected to its node by a veth pair.
#[derive(Debug)]
pub struct PlainPod {
    pub place: Place,
    /// IPv4 and IPv6 address.
    pub addresses: [IpAddr; 2],
}

impl Cluster {
    /// Makes the nodes forward, with static routes to each other's pods. Only for clusters without
    /// running agents.
    pub fn add_static_routes(&self) -> Result<()> {
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

    /// Creates a pod with the address of this number in the node's pod CIDR. Its gateway is the
    /// node's own address, so that kube-proxy masquerades behind that.
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

    /// Runs this kube-proxy binary on a node; the API server must know [`kube_proxy_user`].
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
            // packets from pods of other nodes are masqueraded, as our datapath does
            "detectLocalMode": "NodeCIDR",
            "nodePortAddresses": ["primary"],
            "oomScoreAdj": 0,
            // these limits apply to the whole machine: leave them unchanged
            "conntrack": {
                "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": zero, "tcpCloseWaitTimeout": zero,
                "udpTimeout": zero, "udpStreamTimeout": zero,
            },
        });
        let file = logs.join("kube-proxy.yaml");
        fs::write(&file, serde_norway::to_string(&config)?)?;
        let file = file.to_str().context("a path that is not UTF-8")?;
        node.place().daemon(program, &["--config", file], &logs.join("kube-proxy.log"))
    }
}

/// Waits until kube-proxy's rules of both families on this node contain all these services.
pub fn await_rules(node: &Node, names: &[String]) -> Result<()> {
    let what = format!("rules of kube-proxy on {}", node.name());
    let waited = wait::until(&what, START_TIMEOUT, || {
        for family in ["ip", "ip6"] {
            let rules = node.place().run("nft", &["list", "table", family, "kube-proxy"])?;
            let missing = names.iter().find(|name| !rules.contains(&format!("/{name}")));
            ensure!(missing.is_none(), "{family} has no service {missing:?}");
        }
        Ok(Some(()))
    });
    waited.with_context(|| tail(&node.place().logs().join("kube-proxy.log"), 20))
}
