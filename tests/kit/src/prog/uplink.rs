//! A network namespace in which `bpf_fib_lookup` finds next hops: an uplink with the other node and
//! a gateway as neighbours.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, unshare};

use super::{
    frame::HOST_MAC,
    rig::Rig,
    world::{Family, World},
};

pub const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
pub const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];

/// Runs `ip` in the namespace of the calling thread.
pub fn ip(arguments: &str) -> Result<String> {
    let output = std::process::Command::new("ip").args(arguments.split(' ')).output().context("run ip")?;
    let problem = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {arguments}: {problem}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Moves the calling thread into a new namespace with an uplink, which has the MAC address of test
/// frames and is the rig's ingress device. The namespace ends with the thread.
pub fn uplink(rig: &mut Rig, families: &[Family]) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("create a network namespace")?;
    let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
    ip(&format!("link add wire0 address {} type veth peer name wire1", mac(HOST_MAC)))?;
    for device in ["lo", "wire1", "wire0"] {
        ip(&format!("link set {device} up"))?;
    }
    for (key, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/wire0/forwarding", "1"),
    ] {
        fs::write(format!("/proc/sys/{key}"), value).context(key)?;
    }
    for family in families {
        let world = World::new(*family);
        let (bits, gateway, nodad) = match family {
            Family::V4 => (24, "172.18.0.254", ""),
            Family::V6 => (64, "fd00:18::fe", " nodad"),
        };
        ip(&format!("addr add {}/{bits} dev wire0{nodad}", world.host))?;
        ip(&format!("route add {} via {}", world.wire_pod, world.wire_node))?;
        ip(&format!("route add default via {gateway}"))?;
        ip(&format!("neigh replace {} lladdr {} nud permanent dev wire0", world.wire_node, mac(NODE_MAC)))?;
        ip(&format!("neigh replace {gateway} lladdr {} nud permanent dev wire0", mac(GATEWAY_MAC)))?;
    }
    rig.ifindex = nix::net::if_::if_nametoindex("wire0")?;
    Ok(())
}
