//! Programs of other projects, loaded from files that the command line names, with tables for the
//! same packets. A peer that does not forward the packet fails the run.

use std::{
    net::SocketAddr,
    os::fd::{AsFd as _, BorrowedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map},
    programs::{Program, SchedClassifier, Xdp},
};
use dataplane_common::net::Protocol;
use dataplane_testkit::{prog::NODE_MAC, sys_bpf::Output};

use super::{
    scenarios::{self, Limit, Scenario},
    wrapper::{FRAME, XDP_PASS, XDP_TX},
};
use crate::{
    bpf::kernel::{LruHash, set_descriptor},
    plan::Variant,
};

/// Entries of Katran's consistent hashing ring of a VIP (`RING_SIZE`).
const KATRAN_RING: u32 = 65_537;
/// Bytes of the header that Katran prepends, and its protocol in the outer header.
const IPIP_HEADER: usize = 20;
const IPIP: u8 = 4;
const PROTOCOL: usize = 23;
/// `TC_ACT_SHOT`.
const TC_DROP: u32 = 2;

/// The files; a peer without one is absent.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Peers {
    /// Katran's compiled `balancer.bpf.c`: the peer of program runs at XDP
    #[arg(long, value_name = "FILE")]
    pub peer_katran: Option<PathBuf>,
    /// Calico's compiled program of a workload: the peer of program runs at tc
    #[arg(long, value_name = "FILE")]
    pub peer_calico: Option<PathBuf>,
}

impl Peers {
    pub fn has(&self, variant: Variant) -> bool {
        match variant {
            Variant::Katran => self.peer_katran.is_some(),
            Variant::Calico => self.peer_calico.is_some(),
            _ => false,
        }
    }
}

/// The loaded programs.
pub(super) struct LoadedPeers {
    katran: Option<Ebpf>,
    /// Katran's table of connections on the processor of the runs.
    _connections: Option<LruHash>,
    calico: Option<Ebpf>,
}

impl LoadedPeers {
    pub(super) fn load(peers: &Peers) -> Result<Self> {
        let katran = peers.peer_katran.as_deref().map(load_katran).transpose()?;
        let (katran, connections) = katran.unzip();
        let calico = peers.peer_calico.as_deref().map(load_calico).transpose()?;
        Ok(Self { katran, _connections: connections, calico })
    }

    /// Returns the program of a peer; `None`: it is absent.
    pub(super) fn program(&self, variant: Variant) -> Result<Option<BorrowedFd<'_>>> {
        let object = match variant {
            Variant::Katran => &self.katran,
            _ => &self.calico,
        };
        let Some(object) = object else { return Ok(None) };
        let descriptor = object.programs().find_map(|(_, program)| match (variant, program) {
            (Variant::Katran, Program::Xdp(program)) => program.fd().ok(),
            (Variant::Calico, Program::SchedClassifier(program)) => program.fd().ok(),
            _ => None,
        });
        Ok(Some(descriptor.context("the peer has no loaded program")?.as_fd()))
    }
}

/// Checks what a peer made of the last packet of a scenario.
pub(super) fn check(variant: Variant, scenario: &Scenario, output: &Output) -> Result<()> {
    let Output { returned, frame } = output;
    let forwards = match (variant, scenario.limit) {
        (Variant::Katran, Limit::Empty) => *returned == XDP_PASS && frame.len() == FRAME,
        (Variant::Katran, _) => {
            *returned == XDP_TX && frame.len() == FRAME + IPIP_HEADER && frame[PROTOCOL] == IPIP
        }
        (_, Limit::Empty) => *returned != TC_DROP,
        _ => *returned != TC_DROP && scenario.check(frame).is_ok(),
    };
    ensure!(
        forwards,
        "{variant} returned {returned} and a packet of {} bytes: it does not forward the packet",
        frame.len()
    );
    Ok(())
}

/// Loads Katran with both node ports as VIPs, and the backends of a node port.
fn load_katran(file: &Path) -> Result<(Ebpf, LruHash)> {
    let mut object = EbpfLoader::new()
        .load_file(file)
        .with_context(|| format!("cannot load {} (Katran's balancer)", file.display()))?;
    let connections = {
        let fallback = object.map("fallback_cache").context("Katran has no map fallback_cache")?;
        let Map::LruHashMap(data) = fallback else { anyhow::bail!("fallback_cache is no LRU hash") };
        let info = data.info()?;
        LruHash::create(info.key_size(), info.value_size(), scenarios::ESTABLISHED_SLOTS)?
    };
    let per_cpu = object.map("lru_mapping").context("Katran has no map lru_mapping")?;
    let Map::ArrayOfMaps(data) = per_cpu else { anyhow::bail!("lru_mapping is no array of maps") };
    set_descriptor(data.fd().as_fd(), super::CORE as u32, connections.descriptor())?;

    let mut vips: HashMap<_, [u8; 20], [u32; 2]> =
        HashMap::try_from(object.map_mut("vip_map").context("vip_map")?)?;
    let frontends = scenarios::frontends();
    for (number, frontend) in (0..).zip(frontends) {
        vips.insert(vip(frontend), [0, number], 0)?;
    }
    let mut reals: Array<_, [u8; 20]> = Array::try_from(object.map_mut("reals").context("reals")?)?;
    let backends = scenarios::backends();
    for (number, backend) in (1..).zip(&backends) {
        reals.set(number, address(*backend), 0)?;
    }
    let mut ring: Array<_, u32> = Array::try_from(object.map_mut("ch_rings").context("ch_rings")?)?;
    for slot in 0..KATRAN_RING * frontends.len() as u32 {
        ring.set(slot, slot % backends.len() as u32 + 1, 0)?;
    }
    let mut control: Array<_, [u8; 8]> = Array::try_from(object.map_mut("ctl_array").context("ctl_array")?)?;
    let [a, b, c, d, e, f] = NODE_MAC;
    control.set(0, [a, b, c, d, e, f, 0, 0], 0)?;

    let program = object.programs_mut().find_map(|(_, program)| <&mut Xdp>::try_from(program).ok());
    program.context("Katran has no XDP program")?.load().context("cannot load Katran's program")?;
    Ok((object, connections))
}

/// Loads the first tc program of Calico's object, with the tables and constants of the file.
fn load_calico(file: &Path) -> Result<Ebpf> {
    let mut object = EbpfLoader::new()
        .load_file(file)
        .with_context(|| format!("cannot load {} (Calico's program)", file.display()))?;
    let program =
        object.programs_mut().find_map(|(_, program)| <&mut SchedClassifier>::try_from(program).ok());
    program.context("Calico's object has no tc program")?.load().context("cannot load Calico's program")?;
    Ok(object)
}

/// Katran's `struct vip_definition`.
fn vip(frontend: SocketAddr) -> [u8; 20] {
    let mut vip = address(frontend);
    vip[16..18].copy_from_slice(&frontend.port().to_be_bytes());
    vip[18] = Protocol::TCP;
    vip
}

/// Katran's `struct real_definition`, of IPv4.
fn address(of: SocketAddr) -> [u8; 20] {
    let mut bytes = [0; 20];
    if let SocketAddr::V4(of) = of {
        bytes[..4].copy_from_slice(&of.ip().octets());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Katran's `struct vip_definition`: address, port, both in network order, protocol.
    #[test]
    fn vip_has_the_layout_of_katran() {
        let vip = vip("172.18.0.2:30080".parse().expect("an address"));
        assert_eq!((&vip[..4], &vip[16..]), (&[172, 18, 0, 2][..], &[0x75, 0x80, 6, 0][..]));
        assert!(vip[4..16].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn peer_without_a_file_is_absent() {
        let peers = Peers { peer_katran: Some("balancer.o".into()), peer_calico: None };
        assert!(peers.has(Variant::Katran) && !peers.has(Variant::Calico));
    }
}
