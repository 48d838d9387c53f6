//! A network namespace in which `bpf_fib_lookup` finds next hops: an uplink with the other node and
//! a gateway as neighbours.

use std::fs;

use anyhow::{Context as _, Result};

pub use super::rig::devices::ip;
use super::world::{Family, World};

pub const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 0xfe];
pub const NODE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];

/// Gives the rig's uplink addresses, routes and neighbours.
pub fn uplink(families: &[Family]) -> Result<()> {
    let mac = |mac: [u8; 6]| mac.map(|byte| format!("{byte:02x}")).join(":");
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
    Ok(())
}
