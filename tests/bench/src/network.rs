//! Parts of all topologies: network namespaces that are deleted on drop, and pods behind veths.

use std::{fs::File, net::Ipv4Addr};

use anyhow::{Context as _, Result, anyhow};
use nix::fcntl::{Flock, FlockArg};

use super::path::Location;
use dataplane_testkit::lab::{Namespace, interrupt};

/// Prefix of the benchmark's namespaces.
const PREFIX: &str = "dpbench-";
/// Lock file of a running benchmark.
const LOCK: &str = "/run/dataplane-bench.lock";
/// The gateway of every pod, as the CNI plugin sets it; no device has the address.
pub const GATEWAY: &str = "169.254.1.1";

/// A network namespace that is deleted on drop.
#[derive(Debug)]
pub struct OwnedNamespace(Namespace);

impl OwnedNamespace {
    pub fn create(name: &str) -> Result<Self> {
        Ok(Self(Namespace::create(&format!("{PREFIX}{name}"))?))
    }

    pub fn location(&self) -> Location {
        Location { namespace: self.0.path(), cgroup: None }
    }
}

impl std::ops::Deref for OwnedNamespace {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.0
    }
}

impl Drop for OwnedNamespace {
    fn drop(&mut self) {
        if let Err(error) = Namespace::delete(self.0.name()) {
            eprintln!("{error:#}");
        }
    }
}

/// The lock that admits only one benchmark at a time.
#[derive(Debug)]
pub struct InstanceLock {
    _lock: Flock<File>,
}

impl InstanceLock {
    /// Takes the lock and removes the namespaces of a crashed benchmark.
    pub fn acquire() -> Result<Self> {
        let file = File::create(LOCK).with_context(|| format!("cannot open {LOCK}"))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
            anyhow!("another benchmark is running on this machine ({LOCK}: {error})")
        })?;
        remove_all()?;
        interrupt::on_interrupt(|| {
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

/// Lets a client open many connections: all ports are usable, and one in `TIME_WAIT` again after a
/// second.
pub fn recycle_ports(client: &Namespace) -> Result<()> {
    client.sysctls(&[("net/ipv4/ip_local_port_range", "1024 65535"), ("net/ipv4/tcp_tw_reuse", "1")])
}

/// Enables forwarding in a namespace.
pub fn enable_forwarding(node: &Namespace) -> Result<()> {
    node.sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv4/conf/all/send_redirects", "0")])
}

/// Connects a pod to its node by a veth, a host route and permanent neighbour entries, as the CNI
/// plugin does, so that only the datapath differs.
pub fn attach_pod(
    node: &Namespace,
    pod: &Namespace,
    device: &str,
    address: Ipv4Addr,
    mtu: u32,
) -> Result<()> {
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

/// Returns the MAC address of a device.
pub fn mac_of(namespace: &Namespace, device: &str) -> Result<String> {
    let text = namespace.ip(&format!("link show dev {device}"))?;
    let address = text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    Ok(address.with_context(|| format!("device {device} has no MAC address"))?.to_owned())
}
