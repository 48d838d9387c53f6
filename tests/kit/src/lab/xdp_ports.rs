//! XDP programs on the bridge ports that are the peers of uplinks.
//!
//! A veth device receives what its peer sends with `XDP_TX` only if it has an XDP program too
//! (`drivers/net/veth.c`, `veth_xdp_flush`). The datapath's own program with empty tables passes
//! every packet.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    programs::{Xdp, XdpMode, xdp::XdpLinkId},
};
use dataplane_common::abi::names::{NODE, map, program};

use super::netns::Namespace;
use crate::prog::node_config;

/// Maps that are large by default.
const LARGE_MAPS: [&str; 11] = [
    map::ENDPOINTS,
    map::SERVICES,
    map::BACKENDS,
    map::BACKEND_GENERATIONS,
    map::FLOW_INDEX,
    map::FLOWS,
    map::FLOW_BLOCKS,
    map::FLOW_NEXT_HOPS,
    map::DATAGRAM_ORIGINS,
    map::AFFINITY,
    map::FRAGMENTED_PACKETS,
];

/// The programs. Dropping it detaches them.
#[derive(Debug)]
pub(super) struct XdpPorts {
    ebpf: Ebpf,
    links: BTreeMap<String, XdpLinkId>,
}

impl XdpPorts {
    pub(super) fn load() -> Result<Self> {
        let node = node_config();
        let mut loader = EbpfLoader::new();
        loader.override_global(NODE, &node, true).override_global("AYA_LOG_LEVEL", &0_u8, false);
        for name in LARGE_MAPS {
            loader.map_max_entries(name, 1);
        }
        let mut ebpf = loader.load(dataplane_agent::datapath::OBJECT).context("load the object")?;
        xdp(&mut ebpf)?.load().context("load the program of a bridge port")?;
        Ok(Self { ebpf, links: BTreeMap::new() })
    }

    pub(super) fn attach(&mut self, namespace: &Namespace, device: &str) -> Result<()> {
        let program = xdp(&mut self.ebpf)?;
        let link = namespace
            .enter(|| program.attach(device, XdpMode::Driver))?
            .with_context(|| format!("attach to the driver of {device}"))?;
        self.links.insert(device.to_owned(), link);
        Ok(())
    }

    /// Detaches the program of a port, if it has one.
    pub(super) fn detach(&mut self, device: &str) -> Result<()> {
        match self.links.remove(device) {
            Some(link) => xdp(&mut self.ebpf)?.detach(link).with_context(|| format!("detach from {device}")),
            None => Ok(()),
        }
    }
}

fn xdp(ebpf: &mut Ebpf) -> Result<&mut Xdp> {
    Ok(ebpf.program_mut(program::XDP_WIRE).context(program::XDP_WIRE)?.try_into()?)
}
