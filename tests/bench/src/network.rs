//! What every topology of the benchmark is made of: namespaces that go when their owner does, pods behind veths.

use std::{fs::File, net::Ipv4Addr};

use anyhow::{Context as _, Result, anyhow};
use nix::fcntl::{Flock, FlockArg};

use super::site::Place;
use dataplane_testkit::lab::{Namespace, interrupt};

/// Namespaces of the benchmark begin so.
const PREFIX: &str = "dpbench-";
/// Held while one runs.
const LOCK: &str = "/run/dataplane-bench.lock";
/// The gateway of every pod, as our CNI plugin has it; nobody owns the address.
const GATEWAY: &str = "169.254.1.1";

/// A namespace that goes when this does.
#[derive(Debug)]
pub struct Owned(Namespace);

impl Owned {
    pub fn create(name: &str) -> Result<Self> {
        Ok(Self(Namespace::create(&format!("{PREFIX}{name}"))?))
    }

    pub fn place(&self) -> Place {
        Place { namespace: self.0.path(), cgroup: None }
    }
}

impl std::ops::Deref for Owned {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.0
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Err(error) = Namespace::delete(self.0.name()) {
            eprintln!("{error:#}");
        }
    }
}

/// There is one benchmark at a time: two would measure each other.
#[derive(Debug)]
pub struct Turn {
    _lock: Flock<File>,
}

impl Turn {
    /// Takes the turn, and removes what a benchmark that crashed left behind.
    pub fn take() -> Result<Self> {
        let file = File::create(LOCK).with_context(|| format!("open {LOCK}"))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| anyhow!("another benchmark runs on this machine ({LOCK}: {error})"))?;
        remove_all()?;
        interrupt::also(|| {
            if let Err(error) = remove_all() {
                eprintln!("{error:#}");
            }
        })?;
        Ok(Self { _lock: lock })
    }
}

fn remove_all() -> Result<()> {
    for name in Namespace::all_named(PREFIX)? {
        Namespace::delete(&name)?;
    }
    Ok(())
}

/// Lets a client open connections without end: every port is used, and one in `TIME_WAIT` again after a second.
pub fn recycle_ports(client: &Namespace) -> Result<()> {
    client.sysctls(&[("net/ipv4/ip_local_port_range", "1024 65535"), ("net/ipv4/tcp_tw_reuse", "1")])
}

/// Makes a namespace a router.
pub fn forward(node: &Namespace) -> Result<()> {
    node.sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv4/conf/all/send_redirects", "0")])
}

/// Plugs a pod into its node: a veth, a host route, neighbours that are never asked for. The same as our CNI plugin
/// makes it, so that what differs is the datapath alone.
pub fn plug_pod(node: &Namespace, pod: &Namespace, device: &str, address: Ipv4Addr, mtu: u32) -> Result<()> {
    node.ip(&format!("link add {device} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}", pod.name()))?;
    let host_mac = mac_of(node, device)?;
    let pod_mac = mac_of(pod, "eth0")?;
    pod.ip(&format!(
        "link set eth0 up\n\
         addr add {address}/32 dev eth0\n\
         route add {GATEWAY} dev eth0 scope link\n\
         route add default via {GATEWAY}\n\
         neigh add {GATEWAY} lladdr {host_mac} dev eth0 nud permanent"
    ))?;
    node.ip(&format!(
        "link set {device} up\n\
         route add {address} dev {device} scope link\n\
         neigh add {address} lladdr {pod_mac} dev {device} nud permanent"
    ))?;
    recycle_ports(pod)
}

/// Link address of a device.
pub fn mac_of(namespace: &Namespace, device: &str) -> Result<String> {
    let text = namespace.ip(&format!("link show dev {device}"))?;
    let address = text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    Ok(address.with_context(|| format!("{device} has no link address"))?.to_owned())
}
