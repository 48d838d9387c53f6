//! What the measured programs get, and what they must make of it.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
};

use anyhow::{Result, anyhow, bail, ensure};
use dataplane_common::{
    abi::{NodeConfig, Port, ServiceFlags},
    net::Protocol,
    reason::HookId,
};
use dataplane_testkit::{
    prog::{self, Family, Frame, Parsed, Rig, World, at, ip, per_packet_udp, uplink},
    sys_bpf::TestRun,
};
use serde_json::{Value, json};

use super::wrapper::{DST_BYTE, Rotation, SRC_BYTE, TC_OK, TC_REDIRECT, XDP_PASS, XDP_TX};
use crate::{bpf::kernel::Kind, plan::row, services::NODE_PORT};

/// Node port of the Service with direct server return.
const DSR_PORT: u16 = NODE_PORT + 1;
/// Number of backends of a node port, pods of another node: enough ports for the masquerade of all
/// flows. Their slots begin with this one.
const BACKENDS: u8 = 64;
const FIRST_SLOT: u32 = 10;
const BACKEND_PORT: u16 = 8080;
/// Number of cluster IPs, and the first one. Each has its own port of its backends, so that no two
/// flows have the same reply.
const SERVICES: u8 = 64;
const SERVICE_BACKENDS: u8 = 4;
const FIRST_SERVICE_SLOT: u32 = 128;
const FIRST_SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 1, 0);
/// The first of the clients outside (RFC 2544).
const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 0);
/// The first source port of clients, and the last one.
const FIRST_PORT: u16 = 1 << 14;
const LAST_PORT: u16 = (1 << 15) - 1;
/// Ports of masqueraded connections, as by default.
const MASQUERADE_PORTS: RangeInclusive<u16> = 10_000..=29_999;
/// Size of the flow table: twice what the scenarios open, and as by default for new flows.
pub(super) const ESTABLISHED_SLOTS: u32 = 262_144;
pub(super) const NEW_SLOTS: u32 = 131_072;
const SYN: u8 = 0x02;
const SYN_ACK: u8 = 0x12;
const ACK: u8 = 0x10;
/// Bytes of payload, so that a frame has 64 bytes.
const PAYLOAD: [u8; 6] = *b"......";
/// Attempts to have a packet handled: XDP leaves one packet a second to tc.
const ATTEMPTS: usize = 20;

/// What a program does at least, which is its limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    /// Check the headers and write constant ones.
    Rewrite,
    /// Redirect, without reading the packet.
    Redirect,
    /// Return at once.
    Empty,
}

/// Packets for one hook.
#[derive(Clone, Debug)]
pub(super) struct Scenario {
    pub(super) row: &'static str,
    pub(super) params: Vec<(&'static str, Value)>,
    pub(super) hook: HookId,
    /// Sets up each flow; `None`: the packets need none, or are the first ones.
    opening: Option<Opening>,
    /// The packet of the first flow.
    pub(super) frame: Vec<u8>,
    pub(super) rotation: Rotation,
    /// Each packet is the first one of its flow.
    pub(super) is_new: bool,
    /// What our program returns and counts.
    pub(super) returned: u32,
    pub(super) outcome: &'static str,
    pub(super) expected: Expected,
    pub(super) limit: Limit,
}

/// The packet that comes out, which also has valid checksums and the same payload.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    src: (RangeInclusive<Ipv4Addr>, RangeInclusive<u16>),
    dst: (RangeInclusive<Ipv4Addr>, RangeInclusive<u16>),
}

impl Scenario {
    pub(super) const fn kind(&self) -> Kind {
        if matches!(self.hook, HookId::XdpWire) { Kind::Xdp } else { Kind::Tc }
    }

    /// Returns what the limit's program returns.
    pub(super) const fn limit_returns(&self) -> u32 {
        match (self.limit, self.kind()) {
            (Limit::Rewrite, Kind::Xdp) => XDP_TX,
            (Limit::Empty, Kind::Xdp) => XDP_PASS,
            (Limit::Redirect, _) => TC_REDIRECT,
            (_, Kind::Tc) => TC_OK,
        }
    }

    /// Returns the context of the packet.
    pub(super) fn context(&self, rig: &mut Rig) -> Result<Vec<u8>> {
        context(rig, self.hook, &self.frame)
    }

    /// Checks the packet that our program made of one of the scenario.
    pub(super) fn check(&self, frame: &[u8]) -> Result<()> {
        let [found, sent] = [frame, &self.frame].map(|frame| {
            Parsed::read(frame).map_err(|problem| anyhow!("the packet that came out: {problem}"))
        });
        let (found, sent) = (found?, sent?);
        let Expected { src, dst } = &self.expected;
        let is_in = |(addresses, ports): &(RangeInclusive<Ipv4Addr>, RangeInclusive<u16>), is: SocketAddr| {
            matches!(is.ip(), IpAddr::V4(address) if addresses.contains(&address))
                && ports.contains(&is.port())
        };
        let (found_src, found_dst) = found.tuple();
        ensure!(
            is_in(src, found_src) && is_in(dst, found_dst) && found.payload == sent.payload,
            "unexpected packet {found:?}, not {:?}",
            self.expected
        );
        Ok(())
    }
}

/// Loads the datapath with the tables of the scenarios and a flow table of this size.
pub(super) fn load(flow_slots: u32) -> Result<Rig> {
    let [first, last] = [*MASQUERADE_PORTS.start(), *MASQUERADE_PORTS.end()].map(Port::new);
    let node = NodeConfig { flow_slots, snat_first: first, snat_last: last, ..per_packet_udp() };
    let (mut rig, world) = prog::rig_with(Family::V4, &node)?;
    uplink(&[Family::V4])?;
    ip(&format!("route add 10.1.1.0/24 via {}", world.wire_node))?;
    rig.device_without_address()?;
    rig.host_with_node_ports(world.host)?;
    let backends = backends();
    for (port, flags) in [(NODE_PORT, 0), (DSR_PORT, ServiceFlags::HASH | ServiceFlags::DSR)] {
        rig.service_with(at(world.host, port), Protocol::TCP, FIRST_SLOT, &backends, |key, service| {
            *key = key.at_node();
            service.flags = flags;
        })?;
    }
    for service in 0..SERVICES {
        let address = Ipv4Addr::from_bits(FIRST_SERVICE.to_bits() + u32::from(service));
        let slot = FIRST_SERVICE_SLOT + u32::from(service) * u32::from(SERVICE_BACKENDS);
        let port = BACKEND_PORT + u16::from(service);
        let backends: Vec<SocketAddr> = (0..SERVICE_BACKENDS).map(|number| backend(number, port)).collect();
        rig.service((address, 80).into(), Protocol::TCP, slot, &backends, 0)?;
    }
    Ok(rig)
}

/// Returns the addresses of the node ports.
pub(super) fn frontends() -> [SocketAddr; 2] {
    let host = World::new(Family::V4).host;
    [NODE_PORT, DSR_PORT].map(|port| at(host, port))
}

/// Returns the backends of the node ports.
pub(super) fn backends() -> Vec<SocketAddr> {
    (0..BACKENDS).map(|number| backend(number, BACKEND_PORT)).collect()
}

/// Returns the scenarios of all rows.
pub(super) fn all() -> Vec<Scenario> {
    let world = World::new(Family::V4);
    let [pod, host, other] = [world.pod, world.host, world.wire_pod].map(v4);
    let ports = FIRST_PORT..=LAST_PORT;
    let clients = CLIENT..=Ipv4Addr::from_bits(CLIENT.to_bits() | 0xff);
    let [first_backend, last_backend] =
        [0, BACKENDS - 1].map(|number| v4(backend(number, BACKEND_PORT).ip()));
    let last_port = BACKEND_PORT + u16::from(SERVICES) - 1;
    let to_backend = (first_backend..=last_backend, BACKEND_PORT..=last_port);
    let only = |address: Ipv4Addr, port: u16| (address..=address, port..=port);
    let frame = |src: (Ipv4Addr, u16), dst: (Ipv4Addr, u16), flags| packet(src.into(), dst.into(), flags);
    let opening = |hook, frame| Some(Opening { hook, frame });
    let from_client = |port, flags| frame((CLIENT, FIRST_PORT), (host, port), flags);
    let from_pod = |dst, flags| frame((pod, FIRST_PORT), dst, flags);
    let one = Rotation { flows: 1, address_byte: SRC_BYTE };
    let masqueraded = Expected { src: (host..=host, MASQUERADE_PORTS), dst: to_backend.clone() };
    let direct = Expected { src: (clients, ports.clone()), dst: only(host, DSR_PORT) };
    let xdp = Scenario {
        row: row::PROGRAM_NODE_PORT,
        params: Vec::new(),
        hook: HookId::XdpWire,
        opening: None,
        frame: from_client(NODE_PORT, ACK),
        rotation: one,
        is_new: false,
        returned: XDP_TX,
        outcome: "to_wire",
        expected: masqueraded,
        limit: Limit::Rewrite,
    };
    let tc = Scenario {
        row: row::PROGRAM_POD,
        hook: HookId::FromPod,
        frame: from_pod((FIRST_SERVICE, 80), ACK),
        returned: TC_REDIRECT,
        expected: Expected { src: (pod..=pod, ports), dst: to_backend },
        limit: Limit::Redirect,
        ..xdp.clone()
    };
    let mut scenarios = Vec::new();
    for flows in [1, 1 << 16] {
        for (mode, port, expected) in [("snat", NODE_PORT, &xdp.expected), ("dsr", DSR_PORT, &direct)] {
            scenarios.push(Scenario {
                params: vec![("mode", json!(mode)), ("flows", json!(flows))],
                opening: opening(HookId::XdpWire, from_client(port, SYN)),
                frame: from_client(port, ACK),
                rotation: Rotation { flows, ..one },
                expected: expected.clone(),
                ..xdp.clone()
            });
        }
    }
    scenarios.push(Scenario {
        row: row::NEW_FLOW,
        params: vec![("hook", json!("xdp")), ("path", json!("node port"))],
        frame: from_client(NODE_PORT, SYN),
        rotation: Rotation { flows: 1 << 22, address_byte: SRC_BYTE },
        is_new: true,
        ..xdp.clone()
    });
    scenarios.push(Scenario {
        row: row::NEW_FLOW,
        params: vec![("hook", json!("tc")), ("path", json!("pod to cluster ip"))],
        frame: from_pod((FIRST_SERVICE, 80), SYN),
        rotation: Rotation { flows: u32::from(SERVICES) << 14, address_byte: DST_BYTE },
        is_new: true,
        ..tc.clone()
    });
    scenarios.push(Scenario {
        row: row::PROGRAM_OTHER,
        params: vec![("hook", json!("xdp")), ("path", json!("another node's pod to a pod"))],
        frame: frame((other, FIRST_PORT), (pod, BACKEND_PORT), ACK),
        returned: XDP_PASS,
        outcome: "left_to_tc",
        expected: Expected { src: only(other, FIRST_PORT), dst: only(pod, BACKEND_PORT) },
        limit: Limit::Empty,
        ..xdp
    });
    scenarios.push(Scenario {
        row: row::PROGRAM_OTHER,
        params: vec![("hook", json!("tc")), ("path", json!("pod to another node's pod"))],
        frame: from_pod((other, BACKEND_PORT), ACK),
        expected: Expected { src: only(pod, FIRST_PORT), dst: only(other, BACKEND_PORT) },
        limit: Limit::Empty,
        ..tc.clone()
    });
    let to_service = opening(HookId::FromPod, from_pod((FIRST_SERVICE, 80), SYN));
    scenarios.push(Scenario {
        params: vec![("path", json!("pod to cluster ip"))],
        opening: to_service.clone(),
        ..tc.clone()
    });
    scenarios.push(Scenario {
        params: vec![("path", json!("reply of a backend"))],
        hook: HookId::FromWire,
        opening: to_service,
        outcome: "to_pod",
        expected: Expected { src: only(FIRST_SERVICE, 80), dst: only(pod, FIRST_PORT) },
        ..tc
    });
    scenarios
}

/// A packet that opens a connection, and where it arrives.
#[derive(Clone, Debug)]
struct Opening {
    hook: HookId,
    frame: Vec<u8>,
}

impl Scenario {
    /// Opens the connections of the scenario: SYN and SYN-ACK through our programs. The packet of a
    /// reply becomes one of the backend that the connection got.
    pub(super) fn establish(&mut self, rig: &mut Rig) -> Result<()> {
        let Some(opening) = &self.opening else { return Ok(()) };
        for number in 0..self.rotation.flows {
            let syn = self.rotation.frame(&opening.frame, number.into());
            let request = handle(rig, opening.hook, &syn)?;
            let (src, dst) = Parsed::read(&request)
                .map_err(|problem| anyhow!("the first packet of a connection: {problem}"))?
                .tuple();
            if is_direct(&request, &syn) {
                continue;
            }
            let reply_hook = if opening.hook == HookId::FromPod { HookId::FromWire } else { opening.hook };
            handle(rig, reply_hook, &packet(dst, src, SYN_ACK))?;
            if self.hook != opening.hook {
                self.frame = packet(dst, src, ACK);
            }
        }
        Ok(())
    }
}

/// Whether our program left addresses and ports as they were.
fn is_direct(after: &[u8], before: &[u8]) -> bool {
    after[26..38] == before[26..38]
}

/// Runs our program of a hook once; returns the packet, which does not go to the stack.
fn handle(rig: &mut Rig, hook: HookId, frame: &[u8]) -> Result<Vec<u8>> {
    let context = context(rig, hook, frame)?;
    let program = rig.program(hook)?;
    for _ in 0..ATTEMPTS {
        let run = TestRun { repeat: 1, flags: 0, batch_size: 0, context: &context };
        let output = run.output(program, frame)?;
        if [XDP_TX, TC_REDIRECT].contains(&output.returned) {
            return Ok(output.frame);
        }
    }
    bail!("{} does not forward the first packet of a connection", hook.name())
}

/// Returns the context of a packet at a hook.
fn context(rig: &mut Rig, hook: HookId, frame: &[u8]) -> Result<Vec<u8>> {
    if hook == HookId::XdpWire {
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
        let fields = [0, frame.len() as u32, 0, rig.ifindex, 0, 0];
        return Ok(fields.map(u32::to_ne_bytes).concat());
    }
    Ok(rig.metadata(hook, frame)?.context().to_vec())
}

fn packet(src: SocketAddr, dst: SocketAddr, flags: u8) -> Vec<u8> {
    Frame { payload: PAYLOAD.to_vec(), ..Frame::tcp(src, dst, flags) }.build()
}

fn backend(number: u8, port: u16) -> SocketAddr {
    (Ipv4Addr::new(10, 1, 1, 10 + number), port).into()
}

fn v4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(address) => address,
        IpAddr::V6(_) => Ipv4Addr::UNSPECIFIED,
    }
}
