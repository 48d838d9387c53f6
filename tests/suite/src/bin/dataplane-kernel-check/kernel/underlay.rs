//! How the nodes of a cluster are connected: by their Ethernet devices, by `WireGuard` over them,
//! or by a VLAN on them.

use std::fs;

use anyhow::{Context as _, Result};
use dataplane_testkit::lab::{Cluster, Node, Place};

const WIREGUARD: &str = "wg0";
const WIREGUARD_PORT: &str = "51820";
const VLAN: &str = "eth0.100";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Underlay {
    Ethernet,
    WireGuard,
    Vlan,
}

/// Moves the InternalIPs of the nodes, whose agents do not run yet, to the devices of the underlay.
pub(super) fn prepare(cluster: &Cluster, underlay: Underlay) -> Result<()> {
    let nodes = cluster.nodes();
    match underlay {
        Underlay::Ethernet => Ok(()),
        Underlay::Vlan => nodes.iter().enumerate().try_for_each(|(index, node)| {
            let device = format!("link add link eth0 name {VLAN} type vlan id 100\nlink set {VLAN} up");
            node.place().namespace().ip(&device)?;
            move_addresses(nodes, index, VLAN)
        }),
        Underlay::WireGuard => connect_by_wireguard(nodes),
    }
}

/// The node keeps an address on its Ethernet device, which stays an uplink. The default route leads
/// to the next node: packets of host processes to services need one.
fn move_addresses(nodes: &[Node], index: usize, device: &str) -> Result<()> {
    let [v4, v6] = nodes[index].addresses();
    let [router_v4, router_v6] = nodes[(index + 1) % nodes.len()].addresses();
    nodes[index].place().namespace().ip(&format!(
        "addr del {v4}/24 dev eth0\n\
         addr del {v6}/64 dev eth0\n\
         addr add {}/24 dev eth0\n\
         addr add {v4}/24 dev {device}\n\
         addr add {v6}/64 dev {device} nodad\n\
         route replace default via {router_v4} dev {device}\n\
         route replace default via {router_v6} dev {device}",
        transfer_address(index)
    ))?;
    Ok(())
}

fn transfer_address(index: usize) -> String {
    format!("192.168.0.{}", index + 1)
}

fn connect_by_wireguard(nodes: &[Node]) -> Result<()> {
    let mut public_keys = Vec::new();
    let directory = tempfile::tempdir()?;
    let key_file = |index: usize| directory.path().join(format!("key{index}"));
    for (index, node) in nodes.iter().enumerate() {
        let place = node.place();
        place.namespace().ip(&format!("link add {WIREGUARD} type wireguard\nlink set {WIREGUARD} up"))?;
        move_addresses(nodes, index, WIREGUARD)?;
        fs::write(key_file(index), wg(place, &["genkey"])?)?;
        let file = key_file(index);
        let file = file.to_str().context("the path of the key is not UTF-8")?;
        wg(place, &["set", WIREGUARD, "listen-port", WIREGUARD_PORT, "private-key", file])?;
        public_keys.push(wg(place, &["show", WIREGUARD, "public-key"])?.trim().to_owned());
    }
    for (index, node) in nodes.iter().enumerate() {
        for (other, key) in public_keys.iter().enumerate().filter(|(other, _)| *other != index) {
            let endpoint = format!("{}:{WIREGUARD_PORT}", transfer_address(other));
            let arguments =
                ["set", WIREGUARD, "peer", key, "endpoint", &endpoint, "allowed-ips", "0.0.0.0/0,::/0"];
            wg(node.place(), &arguments)?;
        }
    }
    Ok(())
}

fn wg(place: &Place, arguments: &[&str]) -> Result<String> {
    place.run("wg", arguments).context("wg (package wireguard-tools)")
}
