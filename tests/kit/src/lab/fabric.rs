//! The network between nodes: layer-2 segments, a gateway between them, and a host beyond it.
//!
//! ```text
//! node ── bridge (segment 1: 172.18.0.0/24, fd00:18::/64) ──┐
//! node ── bridge (segment 2: 172.19.0.0/24, fd00:19::/64) ──┴─ gateway ── outside
//! ```
//! The outside host is `192.0.2.1` and `2001:db8:ffff::1`. Neither it nor the gateway has a route
//! to a pod: a pod gets replies from there only if its packets were masqueraded.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Mutex,
};

use anyhow::Result;

use super::{
    family::Family,
    netns::{Namespace, veth},
    resources::Resources,
    xdp_ports::XdpPorts,
};

/// IPv4 address of the outside host.
pub const OUTSIDE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// IPv6 address of the outside host.
pub const OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1);

/// Address of the outside host.
pub const fn outside(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(OUTSIDE_V4),
        Family::V6 => IpAddr::V6(OUTSIDE_V6),
    }
}

/// A layer-2 network of nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment(u8);

impl Segment {
    /// The default segment of nodes.
    pub const FIRST: Self = Self(1);
    /// Reached from the first segment through the gateway.
    pub const SECOND: Self = Self(2);

    const fn bridge(self) -> &'static str {
        if self.0 == 1 { "br1" } else { "br2" }
    }

    pub(super) fn ipv4(self, host: u8) -> Ipv4Addr {
        Ipv4Addr::new(172, 17 + self.0, 0, host)
    }

    pub(super) fn ipv6(self, host: u8) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, if self.0 == 1 { 0x18 } else { 0x19 }, 0, 0, 0, 0, 0, host.into())
    }

    pub(super) fn gateway(self) -> [IpAddr; 2] {
        [self.ipv4(254).into(), self.ipv6(254).into()]
    }
}

/// The namespaces `fabric`, `gateway` and `outside` of a cluster.
#[derive(Debug)]
pub struct Fabric {
    bridges: Namespace,
    gateway: Namespace,
    outside: Namespace,
    /// `None`: no bridge port has an XDP program.
    ports: Option<Mutex<XdpPorts>>,
}

impl Fabric {
    /// `outside_mtu`: MTU of the link between gateway and outside host.
    pub(super) fn create(resources: &Resources, mtu: u32, outside_mtu: u32) -> Result<Self> {
        let bridges = Namespace::create(&resources.namespace("fabric"))?;
        let gateway = Namespace::create(&resources.namespace("gateway"))?;
        let outside = Namespace::create(&resources.namespace("outside"))?;
        for segment in [Segment::FIRST, Segment::SECOND] {
            let bridge = segment.bridge();
            bridges.ip(&format!(
                "link add {bridge} type bridge forward_delay 0 mcast_snooping 0\nlink set {bridge} mtu {mtu} up"
            ))?;
        }
        let fabric = Self { bridges, gateway, outside, ports: None };
        fabric.connect_gateway(mtu)?;
        fabric.connect_outside(outside_mtu)?;
        Ok(fabric)
    }

    /// The router, with the addresses of the nodes' default routes.
    pub const fn gateway(&self) -> &Namespace {
        &self.gateway
    }

    /// The namespace of the switches, `br1` and `br2`.
    pub const fn bridges(&self) -> &Namespace {
        &self.bridges
    }

    /// The namespace of the host beyond the router.
    pub const fn outside(&self) -> &Namespace {
        &self.outside
    }

    /// Creates a device `name` in `namespace` whose peer is a bridge port of the segment.
    pub(super) fn add_device(
        &self,
        namespace: &Namespace,
        name: &str,
        segment: Segment,
        port: &str,
        mtu: u32,
    ) -> Result<()> {
        veth((namespace, name), (&self.bridges, port))?;
        self.bridges.ip(&format!("link set {port} mtu {mtu} master {} up", segment.bridge()))?;
        namespace.ip(&format!("link set {name} mtu {mtu} up"))?;
        if let Some(ports) = &self.ports {
            namespace.offload(name, "tx", "off")?;
            let mut ports = ports
                .lock()
                .map_err(|_poisoned| anyhow::anyhow!("a thread panicked while it held the ports"))?;
            ports.attach(&self.bridges, port)?;
        }
        Ok(())
    }

    /// Prepares [`Self::add_device`] for native XDP: the peer port gets an XDP program, and
    /// transmit checksum offload is off, also on the outside host, so that XDP sees complete
    /// checksums.
    pub(super) fn enable_native_xdp(&mut self) -> Result<()> {
        self.ports = Some(Mutex::new(XdpPorts::load()?));
        self.outside.offload("eth0", "tx", "off")
    }

    /// Detaches our XDP program from a port, so that the caller can attach another; returns the
    /// port's namespace.
    pub fn release_port(&self, port: &str) -> Result<&Namespace> {
        if let Some(ports) = &self.ports {
            let mut ports = ports
                .lock()
                .map_err(|_poisoned| anyhow::anyhow!("a thread panicked while it held the ports"))?;
            ports.detach(port)?;
        }
        Ok(&self.bridges)
    }

    /// Sets a bridge port up or down.
    pub(super) fn set_port(&self, port: &str, is_up: bool) -> Result<()> {
        self.bridges.ip(&format!("link set {port} {}", if is_up { "up" } else { "down" })).map(drop)
    }

    fn connect_gateway(&self, mtu: u32) -> Result<()> {
        for (segment, device) in [(Segment::FIRST, "seg1"), (Segment::SECOND, "seg2")] {
            self.add_device(&self.gateway, device, segment, &format!("gw-{device}"), mtu)?;
            let [v4, v6] = segment.gateway();
            self.gateway
                .ip(&format!("addr add {v4}/24 dev {device}\naddr add {v6}/64 dev {device} nodad"))?;
        }
        self.gateway.sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv6/conf/all/forwarding", "1")])
    }

    fn connect_outside(&self, mtu: u32) -> Result<()> {
        veth((&self.outside, "eth0"), (&self.gateway, "outside"))?;
        self.gateway.ip(&format!(
            "link set outside mtu {mtu} up\n\
             addr add 192.0.2.254/24 dev outside\n\
             addr add 2001:db8:ffff::fe/64 dev outside nodad"
        ))?;
        self.outside.ip(&format!(
            "link set eth0 mtu {mtu} up\n\
             addr add {OUTSIDE_V4}/24 dev eth0\n\
             addr add {OUTSIDE_V6}/64 dev eth0 nodad\n\
             route add default via 192.0.2.254\n\
             route add default via 2001:db8:ffff::fe"
        ))?;
        Ok(())
    }
}
